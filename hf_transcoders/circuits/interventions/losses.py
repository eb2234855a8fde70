"""Losses of a language model on a dataset while features are edited."""

from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedModel

from ...dictionaries import find_dictionary, fitting_dictionaries
from ...errors import TranscoderError
from ...evaluation.evaluator import TranscoderEvaluator
from ...lm.partial_forward import block_of
from ...lm.wrappers import measures_model
from ...models.modeling_transcoder import TranscoderModel
from ...models.transcoder_set import TranscoderSet
from .feature_edits import FeatureEdit
from .intervene import edit_lists, intervene


@measures_model
def intervention_losses(
    base_model: PreTrainedModel,
    dataset: Iterable[Mapping],
    transcoders: TranscoderModel | TranscoderSet | Mapping[str, TranscoderModel] | Iterable[TranscoderModel],
    edits: Sequence[FeatureEdit],
    **kwargs,
) -> dict[str, float]:
    """Next-token losses of a model on a dataset while features are edited, with nothing frozen.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            A causal language model.
        dataset (`Iterable[Mapping]`):
            Rows with `input_ids`, such as [`pack_tokens`] makes, or padded ones with `attention_mask`.
        transcoders ([`TranscoderModel`], [`TranscoderSet`], a mapping from name to dictionary, or a list):
            The dictionaries that the edits name.
        edits (list of [`FeatureEdit`]):
            The edits of every row. They act at their own positions, also where these do not count in the losses: give
            `slice(1, None)` to leave out the first token of each row.
        kwargs:
            For [`TranscoderEvaluator`]: `batch_size`, `max_tokens`, `skip_first`, `special_token_ids`, `progress`.

    Returns:
        `dict[str, float]`: `ce_original` and `ce_edited`, the cross-entropies in nats per token; `kl`, the mean of
        KL(original || edited) in nats; `top1_agreement`; and `tokens`, how many were counted.

    Raises:
        [`TranscoderError`]: as in [`intervene`].

    Example:

    ```python
    >>> edits = [FeatureEdit("layers.8.mlp.transcoder", 1234, position="all")]
    >>> intervention_losses(model, held_out_blocks, transcoders, edits)["kl"]
    ```
    """
    named = fitting_dictionaries(base_model, transcoders)
    lists = edit_lists(edits)
    if len(lists) > 1:
        raise TranscoderError(
            f"There are {len(lists)} lists of edits, but a dataset takes one, for all of its rows: call this once for each."
        )
    (edits,) = lists
    edited = {name: named[name] for name in (find_dictionary(named, edit.dictionary, edit.feature) for edit in edits)}
    sites = [site for d in edited.values() for site in (d.config.input_site, *d.config.output_sites)]
    evaluator = TranscoderEvaluator(base_model, dataset, **{"max_tokens": 20_000, **kwargs})
    losses = evaluator.measure_changes(
        {"edited": lambda mask: intervene(base_model, named, edits)},
        first_block=min((block_of(base_model, site) for site in sites), default=0),
    )
    original, changed = losses["original"], losses["edited"].compute()
    return {
        "ce_original": original.compute()["ce"],
        "ce_edited": changed["ce"],
        "kl": changed["kl"],
        "top1_agreement": changed["top1_agreement"],
        "tokens": original.tokens,
    }
