"""Explanations beside the weights of a dictionary, in one JSON file that pages read and pushes take along."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import TranscoderError
from ...files import write_text
from ...models.modeling_transcoder import TranscoderModel
from ...models.saved_files import EXPLANATIONS_NAME
from ...models.set_index import INDEX_NAME
from ...models.transcoder_set import set_folders
from ...text.checked import checked, entry, only
from ...text.printable import printable
from ...text.strict_json import read_json, to_json
from ..collect import dictionary_digest
from .scoring import FLOOR, FeatureScores


_FORMAT = 1
# Characters of an explanation.
_LONGEST = 2000


@dataclass(frozen=True)
class SavedExplanation:
    """The explanation of a feature, as it is saved with the dictionary.

    Args:
        text (`str`): The explanation.
        explainer (`str`): Name of the explainer.
        score (`float`, *optional*): Its simulation score on top and random windows, if it has one.
        floor (`float`, *optional*): That of a table of tokens.
    """

    text: str
    explainer: str
    score: float | None = None
    floor: float | None = None


def chosen_explanations(
    results: Sequence[FeatureScores], order: Sequence[str] = ("chat model", "combination")
) -> dict[int, SavedExplanation]:
    """The explanation of each feature by the first explainer of an order that explained it."""
    found = {}
    for result in results:
        for explainer in order:
            if text := result.texts.get(explainer):
                score = lambda name, result=result: _score(result.scores.get(name, {}))  # noqa: E731
                found[result.feature] = SavedExplanation(text[:_LONGEST], explainer, score(explainer), score(FLOOR))
                break
    return found


def _score(scores):
    for name in ("simulation.top_and_random", "simulation by chat model.top_and_random"):
        value = scores.get(name)
        if value is not None and value == value:
            return value
    return None


def save_explanations(
    explanations: Mapping[int, SavedExplanation], dictionary: TranscoderModel, folder: str | os.PathLike
) -> Path:
    """
    Save explanations beside the weights of a dictionary; those of other features that are there already are kept.

    Args:
        explanations (`Mapping[int, SavedExplanation]`): Explanations by feature.
        dictionary ([`TranscoderModel`]): The dictionary.
        folder (`str` or `os.PathLike`): Folder of the dictionary.

    Returns:
        `Path`: the file.
    """
    path, digest = Path(folder) / EXPLANATIONS_NAME, dictionary_digest(dictionary)
    earlier: dict[int, SavedExplanation] = {}
    if path.exists() and read_json(path).get("dictionary") == digest:
        earlier = load_explanations(path, dictionary)
    merged = {**earlier, **explanations}
    content: dict[str, Any] = {
        "format": _FORMAT,
        "dictionary": digest,
        "explanations": {str(feature): vars(merged[feature]) for feature in sorted(merged)},
    }
    return write_text(path, to_json(content) + "\n")


def load_explanations(
    path: str | os.PathLike, dictionary: TranscoderModel | None = None
) -> dict[int, SavedExplanation]:
    """
    Read explanations.

    Args:
        path (`str` or `os.PathLike`): The file, or the folder of the dictionary that it is in.
        dictionary ([`TranscoderModel`], *optional*): The dictionary. Explanations of other weights are refused.

    Returns:
        `dict[int, SavedExplanation]`: explanations by feature.

    Raises:
        [`TranscoderError`]: there is no file, it is damaged or of another kind, or it explains other weights.
    """
    path = Path(path)
    path = path / EXPLANATIONS_NAME if path.is_dir() else path
    source, content = str(path), read_json(path)
    only(content, ("format", "dictionary", "explanations"), source)
    if entry(content, "format", int, source) != _FORMAT:
        raise TranscoderError(
            f"{printable(source)} has the format {content['format']}, and this version reads {_FORMAT}."
        )
    digest = entry(content, "dictionary", str, source)
    if dictionary is not None and digest != dictionary_digest(dictionary):
        raise TranscoderError(
            f"{printable(source)} explains the features of other weights than this dictionary has: explain it again."
        )
    found = {}
    for feature, its in entry(content, "explanations", dict, source).items():
        where = f"Explanation '{printable(feature)[:20]}' in {source}"
        if not feature.isdecimal() or len(feature) > 9 or checked(its, dict, where) is None:
            raise TranscoderError(f"{printable(where)} is not of a feature: the file is damaged or of another kind.")
        only(its, ("text", "explainer", "score", "floor"), where)
        text = entry(its, "text", str, where)
        if len(text) > _LONGEST:
            raise TranscoderError(f"{printable(where)} has {len(text):,} characters: give at most {_LONGEST:,}.")
        found[int(feature)] = SavedExplanation(
            text=text,
            explainer=entry(its, "explainer", str, where),
            score=entry(its, "score", float, where, null=True),
            floor=entry(its, "floor", float, where, null=True),
        )
    if dictionary is not None and any(feature >= dictionary.config.num_features for feature in found):
        raise TranscoderError(f"{printable(source)} explains features that this dictionary does not have.")
    return found


def saved_labels(
    folder: str | os.PathLike, dictionaries: Mapping[str, TranscoderModel], longest: int
) -> dict[str, dict[int, str]]:
    """
    Short explanations to label features with, of the dictionaries in a folder that were explained.

    Args:
        folder (`str` or `os.PathLike`): Folder of a dictionary or of a set; that of a Hub id has none.
        dictionaries (`Mapping[str, TranscoderModel]`): The dictionaries that were loaded from it.
        longest (`int`): Number of characters of a label, from which on it is cut.

    Returns:
        `dict[str, dict[int, str]]`: dictionary -> feature -> label.

    Raises:
        [`TranscoderError`]: a file is damaged, of another kind, or explains other weights.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).is_file():
        folders = set_folders(folder)
    else:
        folders = dict.fromkeys(dictionaries, folder) if len(dictionaries) == 1 else {}
    found = {}
    for name, place in folders.items():
        if name in dictionaries and (place / EXPLANATIONS_NAME).is_file():
            its = load_explanations(place, dictionaries[name])
            shorten = lambda text: text if len(text) <= longest else text[: longest - 3] + "..."  # noqa: E731
            found[name] = {feature: shorten(each.text) for feature, each in its.items() if each.text.strip()}
    return found
