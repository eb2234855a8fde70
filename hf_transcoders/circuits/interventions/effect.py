"""Measure the effects of feature edits on logits and on other features."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from ...dictionaries import find_dictionary, fitting_dictionaries
from ...errors import TranscoderError
from ...lm.capture import capture
from ...lm.forwards import forward_logits
from ...lm.inputs import forget_lengths_
from ...lm.modes import in_eval_mode
from ...lm.wrappers import measures_model
from ...models.linear_parts import encoder_rows
from ...models.modeling_transcoder import TranscoderModel
from ...models.transcoder_set import TranscoderSet
from ..prompt_tokens import prompts_of_one_length
from .feature_edits import FeatureEdit
from .intervene import edit_lists, encode_some, input_sites, intervene


@dataclass
class InterventionEffect:
    """Result of [`measure_effect`]; there is a row for each prompt or each list of edits, whichever are more.

    Args:
        logits_before (`torch.Tensor` of shape `(prompts, logits_to_keep, vocab_size)`):
            Logits without edits.
        logits_after (`torch.Tensor` of shape `(rows, logits_to_keep, vocab_size)`):
            Logits with edits.
        pre_activations_before, pre_activations_after (`torch.FloatTensor` of shape `(rows, reads)`):
            Pre-activations of the features in `read`: `rows @ x + bias` with [`encoder_rows`], before any threshold or top-k.
        activations_before, activations_after (`torch.FloatTensor` of shape `(rows, reads)`):
            Activations of the features in `read`, without edits of these features themselves.
    """

    logits_before: torch.Tensor
    logits_after: torch.Tensor
    pre_activations_before: torch.Tensor
    pre_activations_after: torch.Tensor
    activations_before: torch.Tensor
    activations_after: torch.Tensor


@measures_model
@torch.no_grad()
def measure_effect(
    base_model: PreTrainedModel,
    transcoders: TranscoderModel | TranscoderSet | Mapping[str, TranscoderModel] | Iterable[TranscoderModel],
    input_ids: torch.Tensor | Mapping,
    edits: Sequence[FeatureEdit] | Sequence[Sequence[FeatureEdit]],
    *,
    mode: Literal["direct", "frozen", "free"] = "free",
    read: Sequence[tuple[str, int, int]] = (),
    logits_to_keep: int = 1,
    batch_size: int = 64,
) -> InterventionEffect:
    """Run prompts without and with edits, and return both results.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            A causal language model, which runs in evaluation mode.
        transcoders ([`TranscoderModel`], [`TranscoderSet`], a mapping from name to dictionary, or a list):
            The dictionaries that edits and `read` name.
        input_ids (`torch.LongTensor` of shape `(seq,)` or `(prompts, seq)`, or `Mapping`):
            One prompt, on which each list of edits is tried, or one for each list, all of one length; as token ids, or as the
            tokenizer returned them.
        edits (list of [`FeatureEdit`], or list of such lists):
            The edits of all rows, or one list for each row; see [`intervene`].
        mode (`"direct"`, `"frozen"` or `"free"`, *optional*, defaults to `"free"`):
            As in [`intervene`]. The frozen modes freeze the run of these prompts. "Before" is measured in the same mode.
        read (list of `(dictionary, feature, position)`, *optional*):
            Features to read in every row: name or output site of their dictionary, number, and position in the prompt
            (negative ones from its end).
        logits_to_keep (`int`, *optional*, defaults to 1):
            Number of positions at the end to return logits of; 0 for all.
        batch_size (`int`, *optional*, defaults to 64):
            Rows per forward pass.

    Returns:
        [`InterventionEffect`]

    Raises:
        [`TranscoderError`]: as in [`intervene`]; also for what is to be read.

    Example:

    ```python
    >>> # Does the first feature feed the second by a direct path, and by how much?
    >>> edit = FeatureEdit("layers.3.mlp.transcoder", 17, position=4)
    >>> effect = measure_effect(
    ...     model, transcoders, input_ids, [edit], mode="direct", read=[("layers.8.mlp.transcoder", 1234, -1)]
    ... )
    >>> effect.pre_activations_after - effect.pre_activations_before
    ```
    """
    named = fitting_dictionaries(base_model, transcoders)
    input_ids = prompts_of_one_length(base_model, input_ids)
    lists = edit_lists(edits)
    prompts, length = input_ids.shape
    if 1 not in (prompts, len(lists)) and prompts != len(lists):
        raise TranscoderError(
            f"There are {len(lists)} lists of edits for {prompts} prompts: give one prompt, one list, or as many of both."
        )
    reader = _Reader(named, read, length)
    rows = max(prompts, len(lists))
    befores, afters = [], []
    with in_eval_mode(*named.values()):
        for start in range(0, rows, batch_size):
            part = slice(start, start + batch_size)
            given = input_ids if prompts == 1 else input_ids[part]
            if prompts > 1 or start == 0:
                frozen_at = None if mode == "free" else given
                with intervene(base_model, named, [], mode=mode, frozen_at=frozen_at) as recorded:
                    befores.append(_forward(base_model, given, reader, logits_to_keep))
            some = lists if len(lists) == 1 else lists[part]
            with intervene(base_model, named, some, mode=mode, frozen_at=recorded):
                afters.append(
                    _forward(base_model, given.expand(max(len(given), len(some)), -1), reader, logits_to_keep)
                )
    before, after = ([torch.cat(parts) for parts in zip(*runs, strict=True)] for runs in (befores, afters))
    return InterventionEffect(
        logits_before=before[0],
        logits_after=after[0],
        pre_activations_before=before[1].expand(rows, -1),
        pre_activations_after=after[1],
        activations_before=before[2].expand(rows, -1),
        activations_after=after[2],
    )


def _forward(model, input_ids, reader, logits_to_keep):
    """Logits, and pre-activations and activations of the features to read, `(batch, reads)`."""
    forget_lengths_(model)
    with ExitStack() as stack:
        activations = stack.enter_context(capture(model, reader.sites, stop=False)) if reader.sites else {}
        logits = forward_logits(model, input_ids=input_ids, logits_to_keep=logits_to_keep, use_cache=False)
    return logits, *reader(activations, len(input_ids))


class _Reader:
    """Reads features at positions, all those of one dictionary at once."""

    def __init__(self, named, read, length):
        self.count = len(read)
        places = {}
        for number, (wanted, feature, position) in enumerate(read):
            name = find_dictionary(named, wanted, feature)
            if not -length <= position < length:
                raise TranscoderError(
                    f"Cannot read feature {feature} of '{wanted}' at {position}: the prompt has the positions 0 to "
                    f"{length - 1}."
                )
            places.setdefault(name, []).append((number, feature, position % length))
        self.parts = [(named[name], *torch.tensor(some).T) for name, some in places.items()]
        self.sites = input_sites({name: named[name] for name in places})

    def __call__(self, activations, batch):
        pre_activations, features = torch.zeros(2, batch, self.count)
        for dictionary, numbers, wanted, positions in self.parts:
            wanted, column = wanted.unique(return_inverse=True)
            positions, token = positions.unique(return_inverse=True)
            inputs = activations[dictionary.config.input_site]
            inputs = inputs[:, positions.to(inputs.device)]
            rows, biases = encoder_rows(dictionary, wanted.to(dictionary.device))
            pre = inputs.to(rows.device, rows.dtype) @ rows.T + biases
            encoded = encode_some(dictionary, inputs.flatten(0, 1), wanted).float().view(pre.shape)
            pre_activations[:, numbers] = pre[:, token, column].cpu()
            features[:, numbers] = encoded[:, token, column].cpu()
        return pre_activations, features
