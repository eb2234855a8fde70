"""Keep the folder of a run to one run: refuse a folder that holds another one, or clear it."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..errors import TranscoderError
from ..files import is_inside
from ..hub.cards.card import README, is_generated
from ..models.saved_files import CONFIG_NAME, DICTIONARY_TYPES
from ..models.saved_folder import outdated_files, saved_dictionaries
from ..models.set_index import INDEX_NAME
from ..text import logging
from ..text.printable import printable
from ..text.strict_json import read_json
from ..tracking.local import FOLDER
from ..tracking.run import EVALUATION_FILE
from .checkpoint_files import TRAINER_STATE, checkpoint_folders


logger = logging.get_logger(__name__)

#: The settings of a sweep, in its folder.
PLAN_FILE = "sweep.json"

# Further files that a run or a sweep writes into its folder.
_RESULTS = (
    EVALUATION_FILE, TRAINER_STATE, "training_args.json", PLAN_FILE, "report.html", "pareto.html", "pareto.csv", "pareto.png",
)  # fmt: skip
# Names of dictionaries in a message.
_MOST = 4


def check_run_folder(output_dir: str | os.PathLike, resume: str | bool | None = None, overwrite: bool = False) -> None:
    """
    Refuses a folder in which a run would write over another one.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the new run.
        resume (`str` or `bool`, *optional*):
            Checkpoint that the run continues, or `True` for the last one in the folder.
        overwrite (`bool`, *optional*, defaults to `False`): Whether an earlier run may be deleted.

    Raises:
        [`TranscoderError`]: the folder holds an earlier run, a sweep, other dictionaries or another model.
    """
    folder = Path(output_dir)
    if resume and overwrite and (resume is True or is_inside(resume, folder)):
        raise TranscoderError(
            "Resuming continues the run in the folder and `overwrite` deletes it: give one of them (on the command line, "
            "--resume or --overwrite)."
        )
    _refuse_other_models(folder)
    if overwrite:
        return
    checkpoints = checkpoint_folders(folder)
    if resume is True and checkpoints:
        return
    if resume and resume is not True and is_inside(resume, folder):
        return
    if held := held_in(folder):
        ways = ["give another folder (`output_dir`, --output-dir)", "delete it first with `overwrite` (--overwrite)"]
        if checkpoints or (folder / PLAN_FILE).is_file():
            ways.append("continue it with `resume_from_checkpoint` (--resume)")
        raise TranscoderError(
            f"{printable(folder)} holds {held}, and a folder is for one run: {', '.join(ways[:-1])} or {ways[-1]}."
        )


def held_in(folder: str | os.PathLike) -> str | None:
    """The content of a folder that a new run would overwrite, as a part of a sentence; `None` if there is nothing."""
    folder = Path(folder)
    checkpoints = checkpoint_folders(folder)
    if (folder / PLAN_FILE).is_file():
        return "a sweep"
    found = saved_dictionaries(folder)
    if found:
        return _listed(found) + (f" and {checkpoints[-1].name}" if checkpoints else "")
    if checkpoints:
        return f"{checkpoints[-1].name} of a run of {_listed(saved_dictionaries(checkpoints[-1]))}"
    return None


def clear_run_folder(output_dir: str | os.PathLike) -> None:
    """
    Deletes an earlier run from its folder: dictionaries, checkpoints, records and results, and nothing else.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the earlier run.
    """
    folder = Path(output_dir)
    if not (held := held_in(folder)):
        return
    logger.warning(f"{folder} held {held}, which the new run overwrites.")
    groups = [path for path in folder.glob("group-*") if path.is_dir() and (folder / PLAN_FILE).is_file()]
    for place in (*groups, folder):
        for path in checkpoint_folders(place):
            shutil.rmtree(path)
        for name in (*outdated_files(place, ()), *_results(place)):
            (place / name).unlink(missing_ok=True)
        shutil.rmtree(place / FOLDER, ignore_errors=True)
        _remove_empty(place, keep=folder)


def _results(folder: Path) -> list[str]:
    readme = folder / README
    card = readme.is_file() and is_generated(readme.read_text(encoding="utf-8", errors="replace"))
    return [*_RESULTS, INDEX_NAME, *([README] if card else [])]


def _remove_empty(folder: Path, keep: Path) -> None:
    """Removes the empty folders inside a folder, and the folder itself unless it is `keep`."""
    for path, _, _ in os.walk(folder, topdown=False):
        if Path(path) != keep and not os.listdir(path):
            os.rmdir(path)


def _refuse_other_models(folder: Path) -> None:
    """Refuses the folder of a language model, whose files those of a dictionary would replace."""
    try:
        kind = read_json(folder / CONFIG_NAME).get("model_type")
    except TranscoderError:
        return
    if isinstance(kind, str) and kind not in DICTIONARY_TYPES:
        raise TranscoderError(
            f"{printable(folder)} holds a model of type '{printable(kind)[:40]}', whose files those of a dictionary would "
            "replace: give another folder."
        )


def _listed(names: Iterable[str]) -> str:
    names = [printable(name) for name in names] or ["unknown dictionaries"]
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more
