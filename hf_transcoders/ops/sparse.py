"""Sparse encode and decode for dictionaries with few active features per row.

A batch of sparse features is stored as rows of (column, value) pairs one after the other: `offsets (rows + 1,)` says
where each row begins, `indices (n_pairs,)` holds the feature numbers and `values (n_pairs,)` their activations.

A dense training step costs 10 B·d·n floating point operations. Here only the encoder's forward is dense (2 B·d·n);
everything else touches the active pairs alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import once_differentiable

from .dispatch import (
    kernels,
    on_tensor_cores,
    operations,
    prefers_dense,
    product_dtype,
    sparse_operations,
    table_dtype,
    uses_kernels,
)
from .pairs import SharedOrder, row_numbers
from .topk import batch_topk, topk


# Scores that are made at a time when rows can be ranked one by one. On a CPU few enough to stay in its cache.
_CPU_SCORES, _SCORES = 1 << 21, 1 << 28

Select = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def sparse_encode(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    select: Select,
    rowwise: bool = False,
    order: SharedOrder | None = None,
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
        order ([`SharedOrder`], *optional*):
            Given to [`sparse_encode`] and to [`sparse_decode`] of its result, it makes them sort the pairs by feature once.

    Returns:
        `tuple(torch.Tensor, torch.Tensor, torch.Tensor)`: `offsets`, `indices` and `values`, see the module's head.
    """
    chosen = _choose(inputs, weight, bias, select, rowwise)
    return _SparseEncode.apply(inputs, weight, bias, chosen, order or SharedOrder())


def sparse_encode_topk(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, order: SharedOrder | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Same as [`sparse_encode`] with the `k` largest pre-activations of every row.

    Where products run on tensor cores and kernels are in use, features are ranked while the product is made, see
    `ops/triton/exact_topk.py`.

    Args:
        inputs, weight, bias, order: See [`sparse_encode`].
        k (`int`): Number of features to choose for each row.

    Returns:
        `tuple(torch.Tensor, torch.Tensor, torch.Tensor)`: `offsets`, `indices` and `values`, see the module's head.
    """
    chosen = _choose_topk(inputs, weight, bias, k) if _fuses_selection(inputs, weight) else None
    if chosen is not None:
        return _SparseEncode.apply(inputs, weight, bias, chosen, order or SharedOrder())

    def select(scores):
        offsets = torch.arange(0, scores.shape[0] * k + 1, k, device=scores.device)  # pyright: ignore[reportCallIssue]
        return offsets, topk(scores, k).reshape(-1)

    return sparse_encode(inputs, weight, bias, select, rowwise=True, order=order)


def sparse_encode_above(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, threshold: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """
    Pre-activations above a threshold, where a kernel finds them while the product is made: JumpReLU and BatchTopK at
    inference. There is no gradient.

    Features are found in the precision of the product, and their values computed again in that of the weights; those that
    then are not above the threshold are zero.

    Args:
        inputs, weight, bias: See [`sparse_encode`].
        threshold (`torch.Tensor` of shape `(num_features,)` or `()`): Thresholds.

    Returns:
        `tuple(torch.Tensor, torch.Tensor, torch.Tensor)`, *optional*: `offsets`, `indices` and `values`, see the module's head;
        `None` where no kernel does this, or a gradient is needed: compute all features densely.
    """
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (inputs, weight, bias, threshold))
    if needs_gradient or not _fuses_selection(inputs, weight):
        return None
    return _choose_above(inputs, weight, bias, threshold)


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
    return [
        _SparseEncode.apply(*encoder, picked, SharedOrder()) for encoder, picked in zip(encoders, chosen, strict=True)
    ]


def sparse_decode(
    offsets: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    order: SharedOrder | None = None,
) -> torch.Tensor:
    """
    Sum of the decoder rows of each row's active features, weighted by their activations.

    Args:
        offsets (`torch.LongTensor` of shape `(rows + 1,)`): Where each row's pairs begin.
        indices (`torch.LongTensor` of shape `(n_pairs,)`): Active features.
        values (`torch.Tensor` of shape `(n_pairs,)`): Their activations.
        weight (`torch.Tensor` of shape `(num_features, d_out)`): Decoder rows.
        order ([`SharedOrder`], *optional*): That of the [`sparse_encode`] that has made exactly these pairs.

    Returns:
        `torch.Tensor` of shape `(rows, d_out)`.
    """
    return _SparseDecode.apply(offsets, indices, values, weight, order or SharedOrder())


def sparse_decode_error(
    offsets: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    terms: Sequence[torch.Tensor],
    targets: torch.Tensor,
    order: SharedOrder | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Same as [`sparse_decode`], plus other terms, and the squared error of the sum. One kernel does all of it on a GPU.

    Args:
        offsets, indices, values, weight, order: See [`sparse_decode`].
        terms (`Sequence[torch.Tensor]` of shape `(d_out,)` or `(rows, d_out)`): What is added, in this order.
        targets (`torch.FloatTensor` of shape `(rows, d_out)`): Targets in fp32.

    Returns:
        `tuple(torch.Tensor, torch.FloatTensor)`: the sum `(rows, d_out)`, and its squared error `(rows,)`.
    """
    n_pairs, shape = len(indices), weight.shape
    if not uses_kernels(weight, targets) or prefers_dense(table_dtype(weight), shape[0], len(targets), n_pairs):
        total = sparse_decode(offsets, indices, values, weight, order)
        for term in terms:
            total = total + term
        return total, (total.float() - targets).square().sum(-1)
    start = weight.new_zeros(shape[1])
    for term in terms:
        start = start + term
    return _SparseDecodeError.apply(offsets, indices, values, weight, start, targets, order or SharedOrder())


def firing_counts(
    offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, num_features: int, order: SharedOrder
) -> torch.Tensor | None:
    """
    Number of rows that each feature is active in, from the order that the gradients are summed in.

    Args:
        offsets, indices, values, order: See [`sparse_decode`].
        num_features (`int`): Number of features of the dictionary.

    Returns:
        `torch.FloatTensor` of shape `(num_features,)`, *optional*: `None` where no kernel sorts the pairs.
    """
    if not uses_kernels(values):
        return None
    active = (values.detach() > 0).float()
    return sparse_operations(active).scatter_values(offsets, indices, active, num_features, order)


def sparse_to_dense(
    offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, num_features: int
) -> torch.Tensor:
    """The same features as a dense tensor of shape `(rows, num_features)`; differentiable in `values`."""
    rows = offsets.numel() - 1
    dense = values.new_zeros(rows, num_features)
    return dense.index_put_((row_numbers(offsets, indices.numel()), indices), values)


class _SparseEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight, bias, chosen, order):
        offsets, indices, values = chosen
        if values.dtype != weight.dtype:
            values = _exact_values(offsets, indices, inputs, weight, bias)
        values = values.relu()
        ctx.save_for_backward(inputs, weight if inputs.requires_grad else None, offsets, indices, values > 0)
        # Autocast is off in the backward pass, so the dtype in which rows are read is decided here.
        ctx.features, ctx.order, ctx.reads = weight.shape[0], order, table_dtype(weight)
        ctx.mark_non_differentiable(offsets, indices)
        return offsets, indices, values

    @staticmethod
    @once_differentiable
    def backward(ctx, _offsets, _indices, grad_values):
        inputs, weight, offsets, indices, active = ctx.saved_tensors
        pairs = offsets, indices, grad_values * active
        rows = inputs.to(ctx.reads)
        ops = operations(rows, ctx.features, len(rows), len(indices))
        grad_inputs = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_inputs = ops.weighted_rows(*pairs, weight.to(ctx.reads)).to(inputs.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = ops.scatter_rows(*pairs, rows, ctx.features, ctx.order)
        if ctx.needs_input_grad[2]:
            grad_bias = ops.scatter_values(*pairs, ctx.features, ctx.order)
        return grad_inputs, grad_weight, grad_bias, None, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, offsets, indices, values, weight, order):
        table = weight.to(table_dtype(weight))
        ctx.save_for_backward(offsets, indices, values, table)
        ctx.order = order
        return operations(table, len(table), len(offsets) - 1, len(indices)).weighted_rows(
            offsets, indices, values, table
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return None, None, *_decoder_gradients(ctx, grad_output, *ctx.saved_tensors), None


class _SparseDecodeError(torch.autograd.Function):
    @staticmethod
    def forward(ctx, offsets, indices, values, weight, start, targets, order):
        table = weight.to(table_dtype(weight))
        total, residual, squared = kernels("decode_error").decode_error(
            offsets, indices, values, table, start, targets.contiguous()
        )
        ctx.save_for_backward(offsets, indices, values, table, residual)
        ctx.start, ctx.order = (start.dim(), start.dtype), order
        ctx.set_materialize_grads(False)
        return total, squared

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, grad_squared):
        *pairs_and_table, residual = ctx.saved_tensors
        grad, grad_targets = grad_total, None
        if grad_squared is not None:
            grad = 2 * grad_squared[:, None] * residual
            grad_targets = -grad if ctx.needs_input_grad[5] else None
            grad = grad if grad_total is None else grad + grad_total
        if grad is None:
            return (None,) * 7
        dims, dtype = ctx.start
        grad_start = (grad.sum(0) if dims == 1 else grad).to(dtype) if ctx.needs_input_grad[4] else None
        return None, None, *_decoder_gradients(ctx, grad, *pairs_and_table), grad_start, grad_targets, None


def _decoder_gradients(ctx, grad_output, offsets, indices, values, table):
    """Gradients of the values and of the decoder rows."""
    # Rows are gathered in the dtype of the table: under autocast on a GPU in low precision, as in any linear layer.
    grad_output = grad_output.to(table.dtype)
    ops = operations(table, len(table), len(grad_output), len(indices))
    grad_values = grad_weight = None
    if ctx.needs_input_grad[2]:
        grad_values = ops.paired_dots(offsets, indices, grad_output, table)
    if ctx.needs_input_grad[3]:
        grad_weight = ops.scatter_rows(offsets, indices, values, grad_output, len(table), ctx.order)
    return grad_values, grad_weight


def _exact_values(offsets, indices, inputs, weight, bias):
    """Pre-activations of chosen features in the dtype of the weights."""
    dots = sparse_operations(weight).paired_dots(offsets, indices, inputs.to(weight.dtype), weight)
    return dots.to(weight.dtype) + bias[indices]


def _fuses_selection(inputs, weight):
    """Whether features are selected while the product is made. In fp32 without tensor cores the library's product is faster."""
    return len(inputs) > 0 and uses_kernels(inputs, weight) and on_tensor_cores(product_dtype(weight))


@torch.no_grad()
def _choose_topk(inputs, weight, bias, k):
    """`offsets`, `indices` and scores of the `k` largest scores of each row, by the kernel; `None` if `k` is too large for it."""
    exact_topk = kernels("exact_topk")
    kept, dtype = exact_topk.kept_of_a_tile(k, len(weight)), product_dtype(weight)
    if kept is None:
        return None
    with torch.autocast(inputs.device.type, enabled=False):
        columns, scores = exact_topk.topk_scores(
            inputs.to(dtype).contiguous(), weight.to(dtype).contiguous(), bias.contiguous(), k, kept, "tf32"
        )
    offsets = torch.arange(0, len(inputs) * k + 1, k, device=inputs.device)  # pyright: ignore[reportCallIssue]
    return offsets, columns.reshape(-1), scores.to(dtype).reshape(-1)


@torch.no_grad()
def _choose_above(inputs, weight, bias, threshold):
    """`offsets`, `indices` and values of the scores above their threshold, by the kernel."""
    dtype = product_dtype(weight)
    threshold = threshold.float().expand(len(weight)).contiguous()
    with torch.autocast(inputs.device.type, enabled=False):
        offsets, indices = kernels("above_threshold").above_threshold(
            inputs.to(dtype).contiguous(), weight.to(dtype).contiguous(), bias.contiguous(), threshold, "tf32"
        )
        values = _exact_values(offsets, indices, inputs, weight, bias)
    return offsets, indices, values.masked_fill(values <= threshold[indices], 0.0)


@torch.no_grad()
def _choose(inputs, weight, bias, select, rowwise):
    """`offsets`, `indices` and scores of the features that `select` chooses."""
    device, dtype = inputs.device.type, product_dtype(weight)
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
            values.append(scores[row_numbers(begins, chosen.numel()), chosen])
            offsets.append(begins[1:] + offsets[-1][-1])
    return torch.cat(offsets), torch.cat(indices), torch.cat(values)
