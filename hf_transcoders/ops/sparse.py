"""Sparse encode and decode for dictionaries with few active features per row.

A batch of sparse features is stored as rows of (column, value) pairs one after the other: `offsets (rows + 1,)` says
where each row begins, `indices (n_pairs,)` holds the feature numbers and `values (n_pairs,)` their activations.

A dense training step costs 10 B·d·n floating point operations. Here only the encoder's forward is dense (2 B·d·n);
everything else touches the active pairs alone.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .topk import batch_topk


# Without MKL there is no sampled product on CPU; rows are then gathered in pieces of this many numbers.
_GATHER_CHUNK = 1 << 24
# Scores that are made at a time when rows can be ranked one by one. On a CPU few enough to stay in its cache.
_CPU_SCORES, _SCORES = 1 << 21, 1 << 28

# PyTorch warns once per process that CSR tensors are in beta, and every user of a TopK dictionary would see it. Only the
# pattern of one is used here, so the first is made where nobody is warned; later ones cost nothing.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1))

Select = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def sparse_encode(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, select: Select, rowwise: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Pre-activations `inputs @ weight.T + bias` of selected features only, rectified.

    Under autocast the dense product that ranks the features runs in low precision; the values of the chosen features are
    then computed again in the weights' own precision, which costs next to nothing. In the backward pass only the rows
    of chosen features with a positive value receive a gradient: a feature that was chosen at zero is off.

    Args:
        inputs (`torch.Tensor` of shape `(rows, d_in)`): Inputs of the encoder.
        weight (`torch.Tensor` of shape `(num_features, d_in)`): Encoder rows.
        bias (`torch.Tensor` of shape `(num_features,)`): Encoder bias.
        select (`Callable`): Maps pre-activations `(rows, num_features)` to `(offsets, indices)` of the chosen ones.
        rowwise (`bool`, *optional*, defaults to `False`):
            Whether `select` treats each row by itself. Pre-activations are then made a few rows at a time in one small
            buffer, and all of them together never exist.

    Returns:
        `tuple(torch.Tensor, torch.Tensor, torch.Tensor)`: `offsets`, `indices` and `values`, see the module's head.
    """
    return _SparseEncode.apply(inputs, weight, bias, _choose(inputs, weight, bias, select, rowwise))


def sparse_encode_jointly(
    encoders: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], total: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """
    Same as [`sparse_encode`] for several encoders, whose features compete for `total` places in all: BatchTopK over all of
    them.

    Args:
        encoders (`Sequence[tuple]`): `inputs`, `weight` and `bias` of each, as in [`sparse_encode`].
        total (`int`): Number of features to keep over all rows and all encoders.

    Returns:
        `list[tuple]`: `offsets`, `indices` and `values` of each encoder.
    """
    # None of the kept features of an encoder is below the `total` largest of this encoder alone.
    found = [
        _choose(inputs, weight, bias, lambda scores: batch_topk(scores, min(total, scores.numel())), False)
        for inputs, weight, bias in encoders
    ]
    values = torch.cat([scores for _, _, scores in found])
    kept = torch.ones_like(values, dtype=torch.bool)
    if values.numel() > total:
        kept = torch.zeros_like(kept).index_fill_(0, values.topk(total, sorted=False).indices, True)
    chosen = []
    for (offsets, indices, scores), mine in zip(
        found, kept.split([len(scores) for _, _, scores in found]), strict=True
    ):
        counts = torch.zeros(len(mine) + 1, dtype=torch.long, device=mine.device)
        torch.cumsum(mine, 0, out=counts[1:])
        chosen.append((counts[offsets], indices[mine], scores[mine]))
    return [_SparseEncode.apply(*encoder, picked) for encoder, picked in zip(encoders, chosen, strict=True)]


def sparse_decode(
    offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """
    Sum of the decoder rows of each row's active features, weighted by their activations.

    Args:
        offsets (`torch.LongTensor` of shape `(rows + 1,)`): Where each row's pairs begin.
        indices (`torch.LongTensor` of shape `(n_pairs,)`): Active features.
        values (`torch.Tensor` of shape `(n_pairs,)`): Their activations.
        weight (`torch.Tensor` of shape `(num_features, d_out)`): Decoder rows.

    Returns:
        `torch.Tensor` of shape `(rows, d_out)`.
    """
    return _SparseDecode.apply(offsets, indices, values, weight)


def sparse_to_dense(
    offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, num_features: int
) -> torch.Tensor:
    """The same features as a dense tensor of shape `(rows, num_features)`; differentiable in `values`."""
    rows = offsets.numel() - 1
    dense = values.new_zeros(rows, num_features)
    return dense.index_put_((_row_numbers(offsets, indices.numel()), indices), values)


class _SparseEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight, bias, chosen):
        offsets, indices, values = chosen
        if values.dtype != weight.dtype:
            values = _paired_dots(offsets, indices, inputs.to(weight.dtype), weight) + bias[indices]
        values = values.relu()
        ctx.save_for_backward(inputs, weight if inputs.requires_grad else None, offsets, indices, values > 0)
        ctx.shape = weight.shape
        ctx.mark_non_differentiable(offsets, indices)
        return offsets, indices, values

    @staticmethod
    @once_differentiable
    def backward(ctx, _offsets, _indices, grad_values):
        inputs, weight, offsets, indices, active = ctx.saved_tensors
        grad_values = grad_values * active
        grad_inputs = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_inputs = _weighted_rows(offsets, indices, grad_values, weight).to(inputs.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _scatter_rows(offsets, indices, grad_values, inputs.to(grad_values.dtype), ctx.shape[0])
        if ctx.needs_input_grad[2]:
            grad_bias = grad_values.new_zeros(ctx.shape[0]).index_add_(0, indices, grad_values)
        return grad_inputs, grad_weight, grad_bias, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, offsets, indices, values, weight):
        ctx.save_for_backward(offsets, indices, values, weight)
        return _weighted_rows(offsets, indices, values, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        offsets, indices, values, weight = ctx.saved_tensors
        grad_values = grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_values = _paired_dots(offsets, indices, grad_output, weight)
        if ctx.needs_input_grad[3]:
            grad_weight = _scatter_rows(offsets, indices, values, grad_output, weight.shape[0])
        return None, None, grad_values, grad_weight


@torch.no_grad()
def _choose(inputs, weight, bias, select, rowwise):
    """`offsets`, `indices` and scores of the features that `select` chooses."""
    device = inputs.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    inputs, weight, bias = inputs.to(dtype), weight.to(dtype), bias.to(dtype)
    rows, features = inputs.shape[0], weight.shape[0]
    step = max(1, (_CPU_SCORES if device == "cpu" else _SCORES) // features) if rowwise else max(rows, 1)
    # One buffer for all pieces: a fresh one each time would cost a page fault for every few of its numbers.
    buffer = inputs.new_empty(min(step, rows), features)
    offsets, indices, values = [inputs.new_zeros(1, dtype=torch.long)], [], []
    with torch.autocast(device, enabled=False):
        for piece in inputs.split(step):
            scores = torch.addmm(bias, piece, weight.T, out=buffer[: piece.shape[0]])
            begins, chosen = select(scores)
            indices.append(chosen)
            values.append(scores[_row_numbers(begins, chosen.numel()), chosen])
            offsets.append(begins[1:] + offsets[-1][-1])
    return torch.cat(offsets), torch.cat(indices), torch.cat(values)


def _row_numbers(offsets: torch.Tensor, n_pairs: int) -> torch.Tensor:
    """The row that each pair belongs to, shape `(n_pairs,)`."""
    rows = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=n_pairs)


def _weighted_rows(offsets, indices, values, table):
    """`out[b] = sum of values * table[indices]` over row b's pairs, shape `(rows, width)`."""
    if indices.numel() == 0:
        return table.new_zeros(offsets.numel() - 1, table.shape[1])
    return F.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=values.to(table.dtype), include_last_offset=True
    )


def _paired_dots(offsets, indices, rows, table):
    """`rows[b] . table[i]` for every pair (b, i), shape `(n_pairs,)`."""
    rows, table = rows.contiguous(), table.to(rows.dtype)
    if rows.dtype in (torch.float32, torch.float64) and (rows.is_cuda or torch.backends.mkl.is_available()):
        pattern = _csr(offsets, indices, rows.new_zeros(indices.numel()), (rows.shape[0], table.shape[0]))
        return torch.sparse.sampled_addmm(pattern, rows, table.T, beta=0.0).values()
    row_numbers = _row_numbers(offsets, indices.numel())
    step = max(1, _GATHER_CHUNK // rows.shape[1])
    pieces = zip(row_numbers.split(step), indices.split(step), strict=True)
    dots = [(rows[r] * table[i]).sum(-1) for r, i in pieces]
    return torch.cat(dots) if dots else rows.new_zeros(0)


def _scatter_rows(offsets, indices, values, rows, num_features):
    """`out[i] = sum of values * rows[b]` over the pairs (b, i), shape `(num_features, width)`."""
    # Sorting the pairs by feature makes each output row one sum: no atomics, and the same bits every time.
    # Narrow keys sort several times faster.
    narrow = torch.int16 if num_features <= torch.iinfo(torch.int16).max else torch.int32
    order = indices.to(narrow).argsort(stable=True)
    starts = torch.zeros(num_features + 1, dtype=torch.long, device=indices.device)
    torch.cumsum(torch.bincount(indices, minlength=num_features), 0, out=starts[1:])
    row_numbers = _row_numbers(offsets, indices.numel())[order]
    return _weighted_rows(starts, row_numbers, values[order], rows)


def _csr(offsets, indices, values, shape):
    return torch.sparse_csr_tensor(offsets, indices, values, shape, check_invariants=False)
