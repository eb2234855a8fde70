"""Check rows of tokens, and group those that can share a forward pass."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import TranscoderError
from ..text import logging
from .linear_maps import num_embeddings


logger = logging.get_logger(__name__)


def check_tokens(
    model: PreTrainedModel,
    rows: Sequence[torch.Tensor],
    what: str = "The prompt",
    numbers: Sequence[int] | None = None,
    extrapolate: bool = True,
) -> None:
    """
    Refuse rows of tokens that a model cannot read.

    Args:
        model ([`~transformers.PreTrainedModel`]): A language model.
        rows (`Sequence[torch.LongTensor]`): Token ids of each row, `(tokens,)`.
        what (`str`, *optional*, defaults to `"The prompt"`): Name of a row in the error.
        numbers (`Sequence[int]`, *optional*): Numbers of the rows, which then follow its name.
        extrapolate (`bool`, *optional*, defaults to `True`):
            Whether rows may be longer than the model was made for, where its positions are computed. They always may where
            the frequencies of a rotary embedding grow with the length.

    Raises:
        [`TranscoderError`]: an id is not one of the model's tokens, or a row is longer than its context.
    """
    if not len(rows):
        return
    vocabulary = num_embeddings(model.get_input_embeddings())
    ids = rows[0] if len(rows) == 1 else torch.cat(list(rows))
    if len(ids) and (ids.min() < 0 or ids.max() >= vocabulary):
        row = next(row for row, its in enumerate(rows) if ((its < 0) | (its >= vocabulary)).any())
        wrong = rows[row][(rows[row] < 0) | (rows[row] >= vocabulary)][0].item()
        raise TranscoderError(
            f"{_name(what, numbers, row)} has token {wrong}, which the model does not know (its tokens are 0 to "
            f"{vocabulary - 1}): use the model's own tokenizer."
        )
    lengths = [len(its) for its in rows]
    longest = max(lengths)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None or longest <= context:
        return
    grows = any(kind == "dynamic" for _, _, kind, _ in _length_dependent(model))
    if has_position_table(model) or not (extrapolate or grows):
        name = _name(what, numbers, lengths.index(longest))
        raise TranscoderError(f"{name} has {longest} tokens and the model's context {context}: shorten it.")
    if not grows:
        logger.warning_once(  # pyright: ignore[reportAttributeAccessIssue]
            f"There is text of more than the {context} tokens that the model was made for: its positions are extrapolated."
        )


def has_position_table(model: PreTrainedModel) -> bool:
    """Whether positions come from a table of fixed length, so that longer inputs are impossible (GPT-2, OPT, GPT-J)."""
    tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    tables |= {name for name, _ in model.named_buffers() if name.endswith("embed_positions")}
    return any(part == "wpe" or "position" in part for name in tables for part in name.split("."))


def length_groups(model: PreTrainedModel, lengths: Sequence[int]) -> Iterator[list[int]]:
    """
    Rows that can share a forward pass: in each group they have the positions that they have alone.

    Padding on the right leaves every row as it is, except in models whose rotary embedding depends on the longest row of
    the batch: `longrope` has one set of frequencies for short and one for long inputs, and `dynamic` a set of its own for
    each length beyond the context. Such a model also keeps the frequencies of a longer input for later ones; before
    each group, and at the end, it is as it was loaded.

    Args:
        model ([`~transformers.PreTrainedModel`]): A language model.
        lengths (`Sequence[int]`): Tokens of each row.

    Yields:
        `list[int]`: numbers of rows, in their order. Run each group before the next is asked for.
    """
    dependent = _length_dependent(model)
    groups: dict[tuple, list[int]] = {}
    for row, length in enumerate(lengths):
        regime = tuple(max(length, end) if kind == "dynamic" else length > end for _, _, kind, end in dependent)
        groups.setdefault(regime, []).append(row)
    for rows in groups.values():
        _forget_(dependent)
        yield rows
    _forget_(dependent)


def same_positions(model: PreTrainedModel, one: int, other: int) -> bool:
    """Whether inputs of two lengths have the same position embeddings as far as both go."""
    return one == other or len(list(length_groups(model, [one, other]))) == 1


def forget_lengths_(model: PreTrainedModel) -> None:
    """Give rotary embeddings of the type `dynamic` the frequencies that they are loaded with."""
    _forget_(_length_dependent(model))


def _forget_(dependent):
    for module, prefix, kind, end in dependent:
        if kind == "dynamic" and getattr(module, f"{prefix}max_seq_len_cached", module.max_seq_len_cached) != end:
            device = getattr(module, f"{prefix}inv_freq").device
            original = getattr(module, f"{prefix}original_inv_freq").to(device)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", end)


def _length_dependent(model) -> list[tuple[nn.Module, str, str, int]]:
    """Rotary embeddings that depend on the length: the module, the prefix of its buffers, the kind and where it begins."""
    found = []
    for module in model.modules():
        types = vars(module).get("rope_type")
        if types is None:
            continue
        for layer_type, kind in types.items() if isinstance(types, dict) else [(None, types)]:
            prefix = "" if layer_type is None else f"{layer_type}_"
            if "dynamic" in kind:
                found.append((module, prefix, "dynamic", module.original_max_seq_len))
            elif kind == "longrope":
                parameters = module.config.rope_parameters
                parameters = parameters if layer_type is None else parameters[layer_type]
                found.append((module, prefix, "longrope", parameters["original_max_position_embeddings"]))
    return found


def _name(what, numbers, row):
    return what if numbers is None else f"{what} {numbers[row]}"
