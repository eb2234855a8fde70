"""One tile of the encoder's product, for the kernels that select features while it is in registers."""

import triton
import triton.language as tl


@triton.jit
def tile_position(rows, tiles, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Row block and tile of this program. Programs that run together share `GROUP` row blocks, and so the L2 cache."""
    program = tl.program_id(0)
    blocks = tl.cdiv(rows, ROWS)
    in_group = GROUP * tiles
    first = program // in_group * GROUP
    size = tl.minimum(blocks - first, GROUP)
    return first + program % in_group % size, program % in_group // size


@triton.jit
def product_tile(
    inputs, weight, bias, rows, features, width, block, tile,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """
    `inputs @ weight.T + bias` of one block of rows and one tile of features, `(ROWS, COLUMNS)` in fp32.

    Rows and features past the end repeat the last one. `EVEN` says that `DEPTH` divides the width, `UPCAST` is for the
    interpreter.
    """
    row = tl.minimum(block * ROWS + tl.arange(0, ROWS), rows - 1).to(tl.int64)
    column = tl.minimum(tile * COLUMNS + tl.arange(0, COLUMNS), features - 1).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    left = inputs + row[:, None] * width + depth[None, :]
    right = weight + column[None, :] * width + depth[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, width, DEPTH):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            inside = start + depth < width
            a = tl.load(left, mask=inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += DEPTH
        right += DEPTH
    return total + tl.load(bias + column).to(tl.float32)[None, :]
