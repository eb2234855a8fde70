"""Finding dictionaries and features by what users call them."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from ...errors import TranscoderError
from ...lm import Site, locate, site_width
from ...models import TranscoderModel


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


def check_sites(model: PreTrainedModel, named: Mapping[str, TranscoderModel]):
    """Raises [`TranscoderError`] where a dictionary does not fit the model, or nothing can be written at its output."""
    for name, dictionary in named.items():
        config = dictionary.config
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
                f"'{name}' writes to '{config.output_site}', which can be read but not written: the model has no module "
                "that passes it on."
            )
