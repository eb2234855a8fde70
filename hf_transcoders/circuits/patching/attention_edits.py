"""Edit the attention of chosen heads, in a forward pass or during generation."""

import inspect
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from ...errors import TranscoderError
from ...lm.attention import attention_modules, edit_attention, num_heads
from ...lm.hooks import before_call
from ...lm.wrappers import opens_on_model


@dataclass(frozen=True)
class AttentionEdit:
    """A change of the attention of some heads, from one query token or from all of them.

    Args:
        heads (`Sequence[tuple[int, int]]`):
            Layer and number of each head.
        kind (`"force"`, `"block"` or `"reweigh"`):
            `"force"`: the heads attend to `keys` only, with `weights`. `"block"`: they do not attend to `keys`, and the
            rest of the row does not change. `"reweigh"`: their attention to `keys` is multiplied by `weights`.
        keys (`torch.LongTensor` of shape `(prompts, keys)`):
            The key tokens, as indices into the input, padded with -1.
        query (`torch.LongTensor` of shape `(prompts,)`, *optional*):
            The query token, as an index into the input. By default every token, including generated tokens.
        weights (`torch.Tensor` of shape `(prompts, keys)` or `float`, *optional*):
            Weights for `"force"`, by default equal weights that sum to 1, or factors for `"reweigh"`.
        onwards (`bool`, *optional*, defaults to `False`):
            Whether all tokens after `query` are edited too, including generated tokens.
        renormalize (`bool`, *optional*, defaults to `False`):
            Whether blocked or reweighed rows are scaled to sum to 1.
    """

    heads: Sequence[tuple[int, int]]
    kind: Literal["force", "block", "reweigh"]
    keys: torch.Tensor
    query: torch.Tensor | None = None
    weights: torch.Tensor | float | None = None
    onwards: bool = False
    renormalize: bool = False


@opens_on_model
@contextmanager
def edited_attention(model: PreTrainedModel, edits: AttentionEdit | Iterable[AttentionEdit]) -> Iterator[None]:
    """Apply edits of attention in every forward pass of `model` inside the `with` block, including those of `generate`.

    A batch consists of the prompts of the edits in order, each repeated if `generate` runs several beams or samples.
    Tokens that are masked for a head, such as later tokens and tokens outside its sliding window, get no attention even
    from a forced edit.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model or its base model.
        edits ([`AttentionEdit`] or an iterable of them):
            The edits. Edits of the same head are applied in this order.

    Raises:
        [`TranscoderError`]: a head does not exist, tensors do not fit each other or the batch, or the model's attention
            cannot be edited.

    Example:

    ```python
    >>> edit = AttentionEdit(heads=[(12, 3), (13, 4)], kind="force", keys=wrong_colors, query=tokens.positions["END"])
    >>> with edited_attention(model, edit):
    ...     model.generate(**inputs, max_new_tokens=1)
    ```
    """
    edits = [edits] if isinstance(edits, AttentionEdit) else list(edits)
    modules, heads = attention_modules(model), num_heads(model)[0]
    layers = len(modules)
    by_layer = {}
    for edit in edits:
        _check(edit, layers, heads)
        for layer in {layer for layer, _ in edit.heads}:
            by_layer.setdefault(layer, []).append((edit, [head for at, head in edit.heads if at == layer]))

    decoder = model.get_decoder()
    # The state of the current forward pass, one for each thread.
    current = threading.local()

    def keep_mask(module, args, kwargs):
        current.mask = kwargs["attention_mask"]

    def count(module, args, kwargs):
        call = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        new = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        cache = call.get("past_key_values")
        current.tokens = new.shape[1] + (0 if cache is None else int(cache.get_seq_length()))

    def change(pattern, layer):
        if layer not in by_layer:
            return None
        pattern = pattern.clone()
        for edit, chosen in by_layer[layer]:
            pattern[:, chosen] = _changed(edit, pattern[:, chosen], current.mask[:, 0] == 0, current.tokens)
        return pattern

    with ExitStack() as stack:
        before_call(stack, decoder, count)
        for module in modules:
            before_call(stack, module, keep_mask)
        stack.enter_context(edit_attention(model, pattern=change))
        yield


def _changed(edit, pattern, seen, tokens):
    """Apply an edit to the attention of some heads.

    Args:
        edit ([`AttentionEdit`]): The edit.
        pattern (`torch.Tensor` of shape `(batch, heads, queries, keys)`): The attention before the edit.
        seen (`torch.BoolTensor` of shape `(batch or 1, queries, keys)`): Whether a key is visible to a query.
        tokens (`int`): Number of tokens so far, including those in the cache.
    """
    batch, _, queries, length = pattern.shape
    device = pattern.device
    prompts = len(edit.keys)
    if batch % prompts:
        raise TranscoderError(f"The edit is for {prompts} prompts, but the model was called with a batch of {batch}.")

    def repeated(tensor):
        return tensor.to(device).repeat_interleave(batch // prompts, dim=0)

    # With a cache, the queries are the last tokens. With a sliding window, the cache lacks the first tokens.
    at = torch.arange(tokens - queries, tokens, device=device)
    forgotten = max(tokens - length, 0)
    rows = torch.ones(batch, queries, dtype=torch.bool, device=device)
    if edit.query is not None:
        query = repeated(edit.query)[:, None]
        rows = at >= query if edit.onwards else at == query
    # (batch, queries, keys of the edit): the columns of the keys, and whether they are visible to the query.
    keys = repeated(edit.keys)
    place = keys - forgotten
    index = place.clamp(0, length - 1)[:, None].expand(-1, queries, -1)
    inside = (keys >= 0) & (place >= 0) & (place < length)
    visible = inside[:, None] & seen.expand(batch, -1, -1).gather(2, index)
    listed = torch.zeros(batch, queries, length, device=device)
    if edit.kind == "force":
        if edit.weights is None:
            weights = 1 / (keys >= 0).sum(1, keepdim=True).clamp(min=1).expand(keys.shape)
        else:
            weights = repeated(torch.as_tensor(edit.weights, dtype=torch.float32).expand(edit.keys.shape))
        new = listed.scatter_add(2, index, weights[:, None] * visible)[:, None].to(pattern.dtype)
    else:
        factor = 0.0 if edit.kind == "block" else edit.weights
        factor = repeated(torch.as_tensor(factor, dtype=torch.float32).expand(edit.keys.shape))
        change = listed.scatter_add(2, index, (factor[:, None] - 1) * visible)
        new = pattern * (1 + change)[:, None].to(pattern.dtype)
        if edit.renormalize:
            total = new.sum(-1, keepdim=True)
            new = torch.where(total > 0, new / total.clamp(min=torch.finfo(new.dtype).tiny), new)
    return torch.where(rows[:, None, :, None], new, pattern)


def _check(edit, layers, heads):
    if edit.kind not in ("force", "block", "reweigh"):
        raise TranscoderError(f"There is no edit '{edit.kind}': choose force, block or reweigh.")
    check_heads(edit.heads, layers, heads)
    if edit.keys.dim() != 2 or (edit.query is not None and edit.query.shape != edit.keys.shape[:1]):
        raise TranscoderError(
            f"An edit has keys of shape (prompts, keys) and a query of shape (prompts,), not {tuple(edit.keys.shape)} and "
            f"{None if edit.query is None else tuple(edit.query.shape)}."
        )
    if edit.kind == "reweigh" and edit.weights is None:
        raise TranscoderError("The edit 'reweigh' takes weights: give one factor, or one for each prompt and key.")
    if edit.kind == "block" and edit.weights is not None:
        raise TranscoderError("The edit 'block' takes no weights: leave them out, or use 'reweigh'.")
    if edit.kind == "force" and edit.renormalize:
        raise TranscoderError(
            "The edit 'force' is not renormalized: leave out renormalize, or give weights that sum to 1."
        )
    if edit.onwards and edit.query is None:
        raise TranscoderError("Without a query every token is edited: give a query, or leave out onwards.")


def check_heads(chosen: Iterable[tuple[int, int]], layers: int, heads: int) -> None:
    """Refuse a layer or head that a model with `layers` layers of `heads` heads does not have.

    Raises:
        [`TranscoderError`]: one of the heads does not exist.
    """
    for layer, head in chosen:
        if not (0 <= layer < layers and 0 <= head < heads):
            raise TranscoderError(
                f"Head {head} of layer {layer} does not exist: this model has the layers 0 to {layers - 1} and the heads "
                f"0 to {heads - 1}."
            )
