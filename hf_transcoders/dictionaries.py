"""Name dictionaries, find a dictionary by name, and check that dictionaries belong to a model."""

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedConfig

from .errors import TranscoderError
from .hub_ids import is_hub_id
from .lm.architectures import site_width
from .lm.sites import output_sites
from .models.configuration_transcoder import TranscoderConfig, weights_origin
from .models.modeling_transcoder import TranscoderModel
from .models.named_dictionaries import NamedDictionaries
from .models.transcoder_set import TranscoderSet
from .text import logging


logger = logging.get_logger(__name__)

Dictionaries = TranscoderModel | NamedDictionaries | Mapping[str, TranscoderModel] | Iterable[TranscoderModel]


def named_dictionaries(dictionaries: Dictionaries) -> dict[str, TranscoderModel]:
    """
    Returns dictionaries by name, in whatever form they are given.

    Args:
        dictionaries: One dictionary, a [`TranscoderSet`], a [`CrossLayerTranscoder`], a mapping from name to dictionary, or
            several dictionaries without names, which are named after their sites.

    Returns:
        `dict[str, TranscoderModel]`: dictionaries by name, empty if none was given.
    """
    if isinstance(dictionaries, TranscoderModel):
        dictionaries = [dictionaries]
    if not isinstance(dictionaries, Mapping):
        # An iterator can be read only once.
        dictionaries = list(dictionaries)
        dictionaries = TranscoderSet(dictionaries) if dictionaries else {}
    return dict(dictionaries.items())


def fitting_dictionaries(base_model: torch.nn.Module, dictionaries: Dictionaries) -> dict[str, TranscoderModel]:
    """
    Returns dictionaries by name, after checking that they fit a model and that their output sites can be written.

    Args:
        base_model (`torch.nn.Module`): Model that the dictionaries are used on.
        dictionaries: Same as in [`named_dictionaries`].

    Returns:
        `dict[str, TranscoderModel]`

    Raises:
        [`TranscoderError`]: a dictionary does not belong to the model, or its output site cannot be written.
    """
    named = named_dictionaries(dictionaries)
    check_fits(base_model, named)
    for name, dictionary in named.items():
        for site in output_sites(dictionary):
            if site.point == "resid_mid":
                raise TranscoderError(
                    f"'{name}' writes to '{site}', which can be read but not written: the model has no module that passes "
                    "it on."
                )
    return named


def check_fits(base_model: torch.nn.Module, named: Mapping[str, TranscoderModel]) -> None:
    """
    Refuses dictionaries that do not belong to a model.

    Args:
        base_model (`torch.nn.Module`): Model that the dictionaries are used on.
        named (`Mapping[str, TranscoderModel]`): Dictionaries by name.

    Raises:
        [`TranscoderError`]: a dictionary is for another model or another revision of it, or the model does not have the
            sites of a dictionary, or not with its widths.
    """
    for name, dictionary in named.items():
        _check_model(base_model, name, dictionary.config)
        _check_sites(base_model, name, dictionary.config)


def check_features(features: Iterable[int], num_features: int) -> None:
    """Refuses numbers of features that a dictionary does not have."""
    for feature in features:
        if not 0 <= feature < num_features:
            raise TranscoderError(
                f"Feature {feature} does not exist: this dictionary has the features 0 to {num_features - 1}."
            )


def find_dictionary(named: Mapping[str, TranscoderModel], wanted: str, feature: int) -> str:
    """
    Finds the name of the dictionary that is called `wanted`, or that writes to this site.

    Raises:
        [`TranscoderError`]: no dictionary or more than one is found, or it does not have the feature.
    """
    names = [wanted]
    if wanted not in named:
        # Of the layers of a cross-layer transcoder, the one whose own site this is.
        owners = [name for name, dictionary in named.items() if dictionary.config.output_site == str(wanted)]
        names = owners or [name for name, d in named.items() if str(wanted) in d.config.output_sites]
    if len(names) != 1:
        reason = "no dictionary" if not names else f"more than one dictionary ({', '.join(names)})"
        raise TranscoderError(
            f"There is {reason} called '{wanted}' or writing to this site: choose from {', '.join(named)}."
        )
    size = named[names[0]].config.num_features
    if not 0 <= feature < size:
        raise TranscoderError(f"'{names[0]}' has no feature {feature}: its features are 0 to {size - 1}.")
    return names[0]


def may_be_same_model(one: str | None, other: str | None) -> bool:
    """
    Whether two names may be those of the same model: `False` only if both are Hub ids of different repos. The content of a
    folder is not known from its name. `gpt2` is the old id of `openai-community/gpt2`, so an id without an owner is the
    same as the id with any owner.
    """
    if not is_hub_id(one) or not is_hub_id(other):
        return True
    one, other = one.lower(), other.lower()
    if "/" in one and "/" in other:
        return one == other
    return one.rpartition("/")[2] == other.rpartition("/")[2]


def _check_model(base_model: torch.nn.Module, name: str, config: TranscoderConfig) -> None:
    known = getattr(base_model, "config", None)
    if not isinstance(known, PreTrainedConfig):  # A plain module has no configuration to compare with.
        return
    if config.base_model_type not in (None, known.model_type):
        raise TranscoderError(
            f"'{name}' is for a model of type '{config.base_model_type}', and this is one of type '{known.model_type}': "
            "load the model it was trained for."
        )
    theirs, ours = config.base_model_name_or_path, known.name_or_path
    if not may_be_same_model(theirs, ours):
        raise TranscoderError(
            f"'{name}' is for {theirs}, and this is {ours}: load the model it was trained for, or, if this model is derived "
            "from it, say so with `model.config.name_or_path`."
        )
    trained_on = config.base_model_weights
    if trained_on is not None and trained_on != weights_origin(known):
        logger.warning_once(
            f"'{name}' was trained on the weights of {trained_on}, and this model has others of the same name: its "
            "reconstruction and its features are not those that were measured."
        )
    revision = getattr(known, "_commit_hash", None)
    if None not in (config.base_model_revision, revision) and config.base_model_revision != revision:
        raise TranscoderError(
            f"'{name}' is for revision {config.base_model_revision} of {theirs or 'its model'}, and this is {revision}: load "
            f'the model with `revision="{config.base_model_revision}"`.'
        )


def _check_sites(base_model: torch.nn.Module, name: str, config: TranscoderConfig) -> None:
    if config.input_site is None or not config.output_sites:
        raise TranscoderError(
            f"'{name}' does not say where it belongs: set `config.input_site` and `config.output_site`, or make its "
            "configuration with TranscoderConfig.for_model(base_model, input_site, output_site)."
        )
    for site, width, field in (
        (config.input_site, config.d_in, "d_in"),
        *((site, config.d_out, "d_out") for site in config.output_sites),
    ):
        expected = site_width(base_model, site)
        if expected is not None and expected != width:
            trained = config.base_model_name_or_path
            raise TranscoderError(
                f"'{name}' has width {width} at '{site}', but this model has {expected} there: use the model that the "
                f"dictionary was trained for{f' ({trained})' if trained else ''}, or set `{field}={expected}` for a new one."
            )
