"""The OV circuits of a layer's heads, from residual stream to residual stream."""

import torch
from transformers import PreTrainedModel

from ...lm.heads import output_weight, value_weight
from ...lm.sites import Site
from ...lm.stream import read_directions, reading_stage, writing_stage, written_directions
from ...lm.wrappers import takes_model


class OVCircuits:
    """OV circuits of the heads of a layer: `W_OV = W_V W_O` (arXiv 2406.11944, Eq. 8).

    The gains of the norm before attention and of a post-norm, if any, are in them; the norms' scales, the patterns and
    the biases are not. With grouped queries, query head h reads the values of key-value head `h // group`.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        layer (`int`): The layer.
        head (`int`, *optional*): One head alone. All of the layer by default.

    Attributes:
        reads, writes (`int`): When they read the residual stream and write to it; see `lm.stream.reading_stage`.
    """

    @takes_model
    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, layer: int, head: int | None = None):
        into, out = Site("attn.in", layer), Site("attn.out", layer)
        values, outputs = value_weight(model, layer)[0].float(), output_weight(model, layer).float()
        values = values.repeat_interleave(len(outputs) // len(values), dim=0)
        if head is not None:
            values, outputs = values[head, None], outputs[head, None]
        # (heads, head_dim, hidden) both: read vectors of the values, and the vectors that are written for them.
        self.values = read_directions(model, into, values)
        self.outputs = written_directions(model, out, outputs)
        self.reads, self.writes = reading_stage(model, into), writing_stage(model, out)

    def __len__(self):
        return len(self.values)

    def values_of(self, directions: torch.Tensor) -> torch.Tensor:
        """Values of directions of the stream `(n, hidden)`: `(heads, n, head_dim)`."""
        return directions @ self.values.mT

    def outputs_read_by(self, readers: torch.Tensor) -> torch.Tensor:
        """Read vectors of the stream `(n, hidden)` pulled back to the values of heads: `(heads, n, head_dim)`."""
        return readers @ self.outputs.mT

    def pull(self, readers: torch.Tensor) -> torch.Tensor:
        """`W_OV^T f`: read vectors `(n, hidden)` pulled back through each head to the tokens that it attends to, `(heads, n, hidden)`."""
        return self.outputs_read_by(readers) @ self.values

    def norms(self, readers: torch.Tensor) -> torch.Tensor:
        """`||W_OV^T f||` of readers `(n, hidden)`, `(n, heads)`, without the vectors themselves."""
        outputs = self.outputs_read_by(readers)
        squares = (outputs @ (self.values @ self.values.mT) * outputs).sum(-1)
        return squares.clamp(min=0).sqrt().T
