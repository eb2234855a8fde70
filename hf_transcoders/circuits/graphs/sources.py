"""Numbers for all sources of a run: embeddings, features, errors, MLPs and biases."""

from dataclasses import dataclass

from ...lm.order import POINTS
from ...lm.sites import Site
from .linear_run import LinearRun, Writer, WrittenFeatures


@dataclass(frozen=True)
class Segment:
    """The numbers of the sources of one kind that belong together.

    Args:
        kind (`str`): Kind of the nodes.
        start, end (`int`): First number, and one after the last.
        layer (`int`): Layer that the sources first write in; -1 for embeddings.
        writer ([`Writer`], *optional*): Writer of errors and of whole MLPs.
        features ([`WrittenFeatures`], *optional*):
            Features of a dictionary, at the first of the sites that it writes at.
    """

    kind: str
    start: int
    end: int
    layer: int
    writer: Writer | None = None
    features: WrittenFeatures | None = None


class Sources:
    """Numbers for all sources of a run, such that every source has a lower number than everything it can add to.

    Attributes:
        segments (`list[Segment]`): The segments of all numbers, from the embeddings up.
    """

    def __init__(self, run: LinearRun):
        self.segments: list[Segment] = []
        self._at: dict[tuple[str, int | Site | None], Segment] = {}
        tokens = len(run.input_ids)
        self._add("token", None, tokens, -1)
        if run.position_embedding is not None:
            self._add("position", None, tokens, -1)
        for layer in range(run.num_layers):
            # The layer's MLP reads what the biases of attention write, so biases come first.
            self._add("bias", layer, 1, layer)
            for point in POINTS:
                writer = run.writers.get(Site(point, layer))
                if writer is None:
                    continue
                if writer.dictionary < 0:
                    self._add("mlp", writer.site, tokens, layer, writer)
                    continue
                for part in writer.parts:
                    if ("feature", part.dictionary) not in self._at:
                        self._add("feature", part.dictionary, len(part.position), layer, features=part)
                self._add("error", writer.site, tokens, layer, writer)
        self._add("bias", run.num_layers, 1, run.num_layers)

    def __len__(self):
        return self.segments[-1].end

    def segment(self, kind: str, of: int | Site | None = None) -> Segment:
        """The segment of a kind of source.

        Args:
            kind (`str`): Kind of the nodes.
            of (`int` or [`Site`], *optional*): Number of the dictionary for features, site for errors and MLPs, layer for
                biases; nothing for embeddings.
        """
        return self._at[kind, of]

    def _add(self, kind, of, size, layer, writer=None, features=None):
        start = self.segments[-1].end if self.segments else 0
        segment = Segment(kind, start, start + size, layer, writer, features)
        self.segments.append(segment)
        self._at[kind, of] = segment
