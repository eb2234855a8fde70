"""Change of one feature's activation when features of an earlier dictionary are ablated."""

from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from ...circuits.interventions.feature_edits import FeatureEdit
from ...circuits.interventions.intervene import intervene
from ...features.firing_contexts import some_features
from ...lm.capture import capture
from ...lm.devices import input_device
from ...lm.partial_forward import block_of, record_block_outputs, restart_at
from ...models.modeling_transcoder import TranscoderModel


@torch.no_grad()
def ablation_drops(
    base_model: PreTrainedModel,
    source: TranscoderModel,
    target: TranscoderModel,
    feature: int,
    tokens: torch.Tensor,
    *,
    skip_first: int = 1,
    batch_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Ablates every feature of a dictionary that is active in a context, each in a row of its own, at all tokens.

    The whole model responds, attention included. Blocks before the ablation run once, and those after the target do not run.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): Language model, in evaluation mode.
        source ([`TranscoderModel`]): Dictionary whose features are ablated.
        target ([`TranscoderModel`]): Dictionary of the feature that is read, later in the model.
        feature (`int`): Number of that feature, which is read at the last token.
        tokens (`torch.LongTensor` of shape `(tokens,)`): The context.
        skip_first (`int`, *optional*, defaults to 1): Tokens at the start at which the dictionary is not used.
        batch_size (`int`, *optional*, defaults to 64): Rows per forward pass.

    Returns:
        `tuple`: numbers of the active features `(active,)`, and how much lower the activation is without each, `(active,)`.
    """
    ids = tokens[None].to(input_device(base_model))
    start = block_of(base_model, source.config.output_site)
    sites = (source.config.input_site, target.config.input_site)
    with (
        record_block_outputs(base_model, {start - 1} if start else set()) as below,
        capture(base_model, sites) as found,
    ):
        base_model(input_ids=ids)
        inputs, before = (found.of_tokens(site, ids.shape) for site in sites)
    wanted = torch.tensor([feature], device=target.device)
    before = some_features(target, before[0, -1:], wanted)[0, 0]
    features = source.encode(inputs[0, skip_first:].to(source.device, source.W_enc.dtype))
    active = (features > 0).any(0).nonzero()[:, 0]
    drops = []
    for part in active.split(batch_size):
        edits = [[FeatureEdit(source.config.output_site, number, slice(skip_first, None))] for number in part.tolist()]
        with ExitStack() as stack:
            if start:
                stack.enter_context(restart_at(base_model, start, _repeated(below[start - 1], len(part))))
            stack.enter_context(intervene(base_model, source, edits))
            after = stack.enter_context(capture(base_model, sites[1]))
            base_model(input_ids=ids.expand(len(part), -1))
            values = after.of_tokens(sites[1], (len(part), ids.shape[1]))
        drops.append(before - some_features(target, values[:, -1], wanted)[:, 0])
    return active.cpu(), torch.cat(drops).cpu() if drops else torch.zeros(0)


def _repeated(output, rows):
    """The output of a block for one row, for several equal rows."""
    if isinstance(output, tuple):
        return (_repeated(output[0], rows), *output[1:])
    return output.expand(rows, *output.shape[1:])
