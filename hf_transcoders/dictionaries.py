"""The dictionaries of a circuit, in whatever form they are given."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers import PreTrainedModel

from .errors import TranscoderError
from .evaluation.evaluator import named_dictionaries as _named
from .lm.architectures import locate, site_width
from .lm.sites import Site
from .models import TranscoderModel, TranscoderSet


Dictionaries = TranscoderModel | TranscoderSet | Mapping[str, TranscoderModel] | Iterable[TranscoderModel]


def named_dictionaries(base_model: PreTrainedModel, dictionaries: Dictionaries) -> dict[str, TranscoderModel]:
    """Dictionaries by name, once it is certain that they are for this model.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): The model they are to be used on.
        dictionaries: One dictionary, a [`TranscoderSet`], a mapping from names to them, or several without names, which
            are then named after their sites.

    Returns:
        `dict[str, TranscoderModel]`

    Raises:
        [`TranscoderError`]: a dictionary is for another model, another revision of it, or does not fit it.
    """
    empty = not isinstance(dictionaries, TranscoderModel) and not (dictionaries := _again(dictionaries))
    named = {} if empty else _named(dictionaries)
    for name, dictionary in named.items():
        _check_model(base_model, name, dictionary.config)
        _check_sites(base_model, name, dictionary.config)
    return named


def find_dictionary(named: Mapping[str, TranscoderModel], wanted: str, feature: int) -> str:
    """Name of the dictionary that is called `wanted`, or writes to this site, once it is sure to have the feature.

    Raises:
        [`TranscoderError`]: there is none or more than one, or its features end before this one.
    """
    names = [wanted]
    if wanted not in named:
        names = [name for name, dictionary in named.items() if dictionary.config.output_site == str(wanted)]
    if len(names) != 1:
        reason = "no dictionary" if not names else f"more than one dictionary ({', '.join(names)})"
        raise TranscoderError(
            f"There is {reason} called '{wanted}' or writing to this site: choose from {', '.join(named)}."
        )
    size = named[names[0]].config.num_features
    if not 0 <= feature < size:
        raise TranscoderError(f"'{names[0]}' has no feature {feature}: its features are 0 to {size - 1}.")
    return names[0]


def _check_sites(model, name, config):
    """Whether the model has the places of a dictionary, of its widths, and can be written to there."""
    if config.input_site is None or config.output_site is None:
        raise TranscoderError(
            f"'{name}' does not say where it belongs: set `config.input_site` and `config.output_site`."
        )
    for site, width in ((config.input_site, config.d_in), (config.output_site, config.d_out)):
        # Finds sites that the model does not have, too.
        locate(model, site)
        expected = site_width(model, site)
        if expected is not None and expected != width:
            raise TranscoderError(
                f"'{name}' has width {width} at '{site}', but this model has {expected} there: use the model that the "
                f"dictionary was trained for ({config.base_model_name_or_path})."
            )
    if Site.parse(config.output_site).point == "resid_mid":
        raise TranscoderError(
            f"'{name}' writes to '{config.output_site}', which can be read but not written: the model has no module that "
            "passes it on."
        )


def _check_model(base_model, name, config):
    known = base_model.config
    if config.base_model_type is not None and config.base_model_type != known.model_type:
        raise TranscoderError(
            f"'{name}' is for a model of type '{config.base_model_type}', and this is one of type '{known.model_type}': "
            "load the model it was made for."
        )
    theirs, ours = config.base_model_name_or_path, known.name_or_path
    if _is_hub_id(theirs) and _is_hub_id(ours) and theirs != ours:
        raise TranscoderError(f"'{name}' is for {theirs}, and this is {ours}: load the model it was made for.")
    revision = getattr(known, "_commit_hash", None)
    if theirs == ours and None not in (config.base_model_revision, revision):
        if config.base_model_revision != revision:
            raise TranscoderError(
                f"'{name}' is for revision {config.base_model_revision} of {theirs}, and this is {revision}: load the "
                f'model with `revision="{config.base_model_revision}"`.'
            )


def _again(dictionaries):
    """What can be gone through more than once."""
    return dictionaries if isinstance(dictionaries, Mapping) else list(dictionaries)


def _is_hub_id(name):
    return bool(name) and name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
