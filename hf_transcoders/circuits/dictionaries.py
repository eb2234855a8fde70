"""The dictionaries of a circuit, in whatever form they are given."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers import PreTrainedModel

from ..errors import TranscoderError
from ..lm.architectures import num_layers
from ..lm.sites import Site
from ..models import TranscoderModel, TranscoderSet


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
        [`TranscoderError`]: a dictionary is for another model, or another revision of it.
    """
    if isinstance(dictionaries, TranscoderModel):
        dictionaries = [dictionaries]
    if not isinstance(dictionaries, Mapping):
        dictionaries = list(dictionaries)
        dictionaries = TranscoderSet(dictionaries) if dictionaries else {}
    named = dict(dictionaries.items())
    for name, dictionary in named.items():
        _check(base_model, name, dictionary.config)
    return named


def _check(base_model, name, config):
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
    for site in (config.input_site, config.output_site):
        layer = None if site is None else Site.parse(site).layer
        if layer is not None and layer >= num_layers(base_model):
            raise TranscoderError(
                f"'{name}' is for layer {layer}, and this model has the layers 0 to {num_layers(base_model) - 1}: it is "
                "for another model."
            )


def _is_hub_id(name):
    return bool(name) and name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
