"""The points of a transformer block, and the order in which they read from and write to the residual stream."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One point of a transformer block.

    A block has four steps that write to the residual stream: a dictionary of the incoming stream (0), attention (1), the
    MLP (2), and a dictionary of the outgoing stream (3).

    Args:
        reads (`int`, *optional*): Steps of the block that come before the stream is read here; `None` where the value is
            not the stream, or the stream after a norm.
        writes (`int`, *optional*): Step at which the value is added to the stream, or becomes the stream.
        linear (`bool`, *optional*, defaults to `True`): Whether the value is linear in earlier writes to the stream, once
            attention patterns and norm scales are frozen.
        writable (`bool`, *optional*, defaults to `True`): Whether a module of the model passes the value on, so that
            another can take its place.
    """

    reads: int | None = None
    writes: int | None = None
    linear: bool = True
    writable: bool = True


#: Every point of a block, in the order in which a sequential block reaches them.
POINTS = {
    "resid_pre": Point(reads=0, writes=0),
    "attn.in": Point(reads=1),
    "attn.out": Point(writes=1),
    "attn.branch": Point(writes=1),
    "resid_mid": Point(reads=2, writes=1, writable=False),
    "mlp.in": Point(reads=2),
    "mlp.out": Point(writes=2, linear=False),
    "mlp.branch": Point(writes=2, linear=False),
    "resid_post": Point(reads=3, writes=3),
}

#: Steps of a block: one more than the last of its points writes at.
STEPS = 4


def reading_step(point: str, parallel: bool = False) -> int | None:
    """Steps of the block that come before a point reads the stream.

    Args:
        point (`str`): One of [`POINTS`].
        parallel (`bool`, *optional*, defaults to `False`): Whether attention and MLP both read the block's input.
    """
    return POINTS["attn.in"].reads if parallel and point == "mlp.in" else POINTS[point].reads
