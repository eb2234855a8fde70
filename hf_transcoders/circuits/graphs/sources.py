"""The order of everything that wrote to the residual stream of a run."""

from dataclasses import dataclass

from ...lm.order import POINTS
from ...lm.sites import Site
from .recording import LinearRun, Writer


@dataclass(frozen=True)
class Segment:
    """Where what one writer wrote stands among all sources of a run.

    Args:
        kind (`str`): A kind of node.
        start, end (`int`): First number, and one behind the last.
        layer (`int`): Layer that writes.
        writer ([`Writer`], *optional*): For features, errors and whole MLPs.
    """

    kind: str
    start: int
    end: int
    layer: int
    writer: Writer | None = None


class Sources:
    """Numbers for all sources of a run, so that every one has a lower number than whatever it can add to.

    Attributes:
        segments (`list[Segment]`): What stands where, from the embeddings up.
    """

    def __init__(self, run: LinearRun):
        self.segments: list[Segment] = []
        self._at: dict[tuple[str, int, str], Segment] = {}
        tokens = len(run.input_ids)
        self._add("token", tokens, -1)
        if run.position_embedding is not None:
            self._add("position", tokens, -1)
        for layer in range(run.num_layers):
            # Attention's biases are read by what the layer's MLP writes, so they come first.
            self._add("bias", 1, layer)
            for point in POINTS:
                writer = run.writers.get(Site(point, layer))
                if writer is None:
                    continue
                if writer.dictionary >= 0:
                    self._add("feature", len(writer.position), layer, writer)
                self._add("error" if writer.dictionary >= 0 else "mlp", tokens, layer, writer)
        self._add("bias", 1, run.num_layers)

    def __len__(self):
        return self.segments[-1].end

    def segment(self, kind: str, layer: int, point: str = "") -> Segment:
        """Where the sources of one kind, layer and place of writing stand."""
        return self._at[kind, layer, point]

    def _add(self, kind, size, layer, writer=None):
        start = self.segments[-1].end if self.segments else 0
        segment = Segment(kind, start, start + size, layer, writer)
        self.segments.append(segment)
        self._at[kind, layer, "" if writer is None else writer.site.point] = segment
