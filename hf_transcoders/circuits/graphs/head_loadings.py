"""Head loadings: which attention heads carry the edges of an attribution graph."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ...dictionaries import Dictionaries
from ...errors import TranscoderError
from ...lm.sites import Site
from ...lm.wrappers import measures_model
from ...models.linear_parts import decoder_rows
from ...text.printable import printable
from .adjoint import Adjoint, Visitor, Walk
from .graph import KINDS, AttributionGraph
from .linear_run import LinearRun
from .read_vectors import FINAL, ReadVectors, node_read_vectors
from .rerun import rerun
from .row_sums import warn


# Elements of the largest temporary: what the sources of one batch of edges add to the values of all heads.
_MAX_ELEMENTS = 2**25
# Relative difference between an edge and the sum of its parts above which the run is certainly another one.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class HeadLoadings:
    """Edges of a graph split over attention heads: `loadings.sum((1, 2)) + direct = weight`.

    Args:
        edges (`torch.LongTensor` of shape `(edges,)`): Numbers of the edges in the graph.
        source, target (`torch.LongTensor` of shape `(edges,)`): Source and target node of each edge.
        weight (`torch.Tensor` of shape `(edges,)`): Weights of the edges in the graph.
        loadings (`torch.Tensor` of shape `(edges, layers, heads)`): Part of each edge that a head reads at the source.
        direct (`torch.Tensor` of shape `(edges,)`): Part of each edge that goes through no head.
        labels (`dict[int, str]`): Labels of the source and target nodes.
        warning (`str`, *optional*): Warning of the graph, if its rows do not sum to the measured values.
    """

    edges: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    loadings: torch.Tensor
    direct: torch.Tensor
    labels: dict[int, str] = field(repr=False)
    warning: str | None = None

    def top(self, count: int = 10) -> list[tuple[int, int, int, float]]:
        """The loadings of largest magnitude, as (place in `edges`, layer, head, loading)."""
        layers, heads = self.loadings.shape[1:]
        flat = self.loadings.flatten()
        order = flat.abs().topk(min(count, len(flat))).indices
        return [
            (at // (layers * heads), at // heads % layers, at % heads, value)
            for at, value in zip(order.tolist(), flat[order].tolist(), strict=True)
        ]

    def to_dict(self, heads: int = 5) -> list[dict[str, Any]]:
        """Plain values for JSON: one entry for each edge, with its strongest heads and the sum of the others.

        Args:
            heads (`int`, *optional*, defaults to 5): Number of heads to list for each edge.
        """
        per_layer = self.loadings.shape[2]
        flat = self.loadings.flatten(1)
        order = flat.abs().topk(min(heads, flat.shape[1]), dim=1).indices
        found = []
        for number, edge in enumerate(self.edges.tolist()):
            source, target = int(self.source[number]), int(self.target[number])
            strongest = flat[number, order[number]]
            listed = [
                {"layer": at // per_layer, "head": at % per_layer, "loading": value}
                for at, value in zip(order[number].tolist(), strongest.tolist(), strict=True)
            ]
            found.append(
                {
                    "edge": edge,
                    "source": source,
                    "target": target,
                    "source_label": self.labels[source],
                    "target_label": self.labels[target],
                    "weight": float(self.weight[number]),
                    "direct": float(self.direct[number]),
                    "heads": listed,
                    "other_heads": float(flat[number].sum() - strongest.sum()),
                }
            )
        return found

    def to_text(self, count: int = 10) -> str:
        """The largest loadings as a table for the terminal.

        Args:
            count (`int`, *optional*, defaults to 10): Number of loadings.
        """
        lines = [f"WARNING: {self.warning}", ""] if self.warning else []
        lines.append(f"{'loading':>10}  {'of weight':>10}  {'head':<7}  edge")
        for edge, layer, head, value in self.top(count):
            ends = f"{self.labels[int(self.source[edge])]} -> {self.labels[int(self.target[edge])]}"
            lines.append(
                f"{value:>10.4g}  {float(self.weight[edge]):>10.4g}  {f'L{layer}H{head}':<7}  {printable(ends)}"
            )
        return "\n".join(lines)

    __str__ = to_text


@measures_model
@torch.no_grad()
def head_loadings(
    base_model: PreTrainedModel,
    transcoders: Dictionaries,
    graph: AttributionGraph,
    edges: torch.Tensor | list[int] | None = None,
    *,
    max_edges: int | None = None,
) -> HeadLoadings:
    """Split edges of an attribution graph over the attention heads that carry them (Kamath et al. 2025).

    A path from source to target may go through several heads. It counts for the head nearest the source, which moves it
    away from the source's token; paths through no head are the direct part. So every path counts once, and the parts sum
    to the weight of the edge. With grouped queries, each query head has its own part.

    The prompt of the graph is run again, so the graph need not store the run.

    Args:
        base_model ([`~transformers.PreTrainedModel`]), transcoders ([`TranscoderSet`], ...):
            The model and the dictionaries of the graph.
        graph ([`AttributionGraph`]):
            The graph, pruned or not.
        edges (`torch.LongTensor` of shape `(k,)` or `list[int]`, *optional*):
            Numbers of edges in the graph, except edges from biases, which have no token. Defaults to the edges that carry
            the most influence.
        max_edges (`int`, *optional*):
            Number of edges if `edges` is left out. Defaults to 32.

    Returns:
        [`HeadLoadings`]

    Raises:
        [`TranscoderError`]: an edge does not exist or comes from a bias, or the graph was made with another model or other
            dictionaries.

    Example:

    ```python
    >>> graph = attribution_graph(base, transcoders, "The capital of France is", tokenizer=tokenizer)
    >>> print(head_loadings(base, transcoders, graph).to_text())
    ```
    """
    if edges is not None and max_edges is not None:
        raise TranscoderError("`edges` names the edges and `max_edges` limits their number: give one of the two.")
    max_edges = 32 if max_edges is None else max_edges
    if max_edges < 1:
        raise TranscoderError(f"`max_edges` is {max_edges}; give at least 1.")
    edges = _chosen(graph, edges, max_edges)
    run = rerun(base_model, transcoders, graph)
    source, target = graph.source[edges], graph.target[edges]
    targets, row = _read(run, graph, target)
    heads = len(run.layers[0].pattern)
    loadings = torch.zeros(len(edges), run.num_layers, heads)
    direct = torch.zeros(len(edges))
    for part in _batches(run, targets, row, Adjoint(run).batch_size()):
        own, local = row[part].unique(return_inverse=True)
        sources = _written(run, graph, source[part.cpu()])
        lift = _Lift(run, targets[own], local, sources)
        splitting = _Splitting(local, sources.position, lift.values, heads)
        Walk(run, targets[own], splitting).down()
        loadings[part.cpu()], direct[part.cpu()] = splitting.loadings.cpu(), lift.direct.cpu()
    result = HeadLoadings(
        edges=edges,
        source=source,
        target=target,
        weight=graph.weight[edges],
        loadings=loadings,
        direct=direct,
        labels={number: graph.label(number) for number in torch.cat([source, target]).unique().tolist()},
        warning=graph.warning,
    )
    _check_sums(result)
    warn(result.warning)
    return result


def _chosen(graph, edges, most):
    from_bias = graph.is_kind("bias")[graph.source]
    if edges is None:
        carried = torch.where(from_bias, -1.0, graph.edge_influence())
        return carried.topk(min(most, int((~from_bias).sum()))).indices
    edges = torch.as_tensor(edges, dtype=torch.long)
    if edges.dim() != 1 or (len(edges) and not (0 <= int(edges.min()) and int(edges.max()) < graph.num_edges)):
        raise TranscoderError(f"`edges` must be numbers of edges of the graph, 0 to {graph.num_edges - 1}.")
    if from_bias[edges].any():
        number = int(edges[from_bias[edges]][0])
        raise TranscoderError(
            f"Edge {number} comes from biases, which are added at every token and so have no token for a head to attend to: "
            "leave out edges from biases."
        )
    return edges


def _read(run, graph, target):
    """Read vectors of the targets of edges, and the row of each edge's target among them."""
    nodes, row = target.unique(return_inverse=True)
    device = run.token_embedding.device
    return node_read_vectors(graph, run.dictionaries, nodes, device), row.to(device)


@dataclass(frozen=True)
class _Written:
    """The vectors that the sources of some edges write.

    Args:
        position (`torch.LongTensor` of shape `(edges,)`): Token of each source.
        by_site (`dict`): By site, `None` for embeddings, the edges whose sources write there, `(k,)`, and what they
            write, `(k, width)`.
    """

    position: torch.Tensor
    by_site: dict[Site | None, tuple[torch.Tensor, torch.Tensor]]

    def at(self, site: Site | None, like: torch.Tensor) -> torch.Tensor:
        """The writes of all sources at a site, `(edges, width)`: zeros for those that write elsewhere."""
        written = torch.zeros_like(like)
        if site in self.by_site:
            edges, vectors = self.by_site[site]
            written[edges] = vectors
        return written


def _written(run, graph, source):
    device = run.token_embedding.device
    position, kind = graph.position[source], graph.kind[source]
    by_site = {}

    def add(site, edges, vectors):
        edges = edges.to(device)
        if site in by_site:
            edges, vectors = torch.cat([by_site[site][0], edges]), torch.cat([by_site[site][1], vectors])
        by_site[site] = edges, vectors

    for name, embedding in (("token", run.token_embedding), ("position", run.position_embedding)):
        edges = (kind == KINDS.index(name)).nonzero()[:, 0]
        if len(edges):
            add(None, edges, embedding[position[edges]])
    for site, writer in run.writers.items():
        is_dictionary = writer.dictionary >= 0
        missed = (kind == KINDS.index("error" if is_dictionary else "mlp")) & (graph.layer[source] == site.layer)
        missed = (missed & (graph.dictionary[source] == writer.dictionary)).nonzero()[:, 0]
        if len(missed):
            add(site, missed, writer.error[position[missed]])
        for part in writer.parts:
            features = (kind == KINDS.index("feature")) & (graph.dictionary[source] == part.dictionary)
            features = features.nonzero()[:, 0]
            if len(features):
                dictionary, nodes = run.dictionaries[part.dictionary], source[features]
                rows = decoder_rows(dictionary, graph.index[nodes].to(dictionary.device), site).to(device)
                add(site, features, rows * graph.value[nodes, None].to(device))
    return _Written(position.to(device), by_site)


def _batches(run, targets, row, size):
    """Edges in batches of at most `size` targets, of neighboring layers and tokens together."""
    order = (targets.layer * len(run.input_ids) + targets.position).argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    batch = rank[row] // size
    edges = max(1, _MAX_ELEMENTS // (run.num_layers * run.layers[0].output.shape[0]))
    for number in range(int(batch.max()) + 1 if len(batch) else 0):
        yield from (batch == number).nonzero()[:, 0].split(edges)


class _Lift:
    """A forward pass of the vectors that sources write, through everything except heads: at their own tokens only.

    Attributes:
        values (`list[torch.Tensor]`): By layer, what each source adds to the values of heads, `(edges, kv_heads * head_dim)`.
        direct (`torch.Tensor` of shape `(edges,)`): What reaches the target of each edge this way.
    """

    def __init__(self, run: LinearRun, targets: ReadVectors, row: torch.Tensor, sources: _Written):
        self.run = run
        self.targets = targets
        self.row = row
        self.sources = sources
        self.values: list[torch.Tensor] = []
        self.direct = torch.zeros(len(row), device=row.device)
        self.groups = targets.places()
        # What skip connections read, by site.
        self.read: dict[Site, torch.Tensor] = {}
        self.read_by_skips = {
            run.input_sites[part.dictionary]
            for writer in run.writers.values()
            for part in writer.parts
            if part.skip is not None
        }
        stream = sources.at(None, run.token_embedding.new_zeros(len(row), run.token_embedding.shape[-1]))
        for layer, maps in enumerate(run.layers):
            stream = self._block(layer, maps, stream)
        self._reach(run.num_layers, FINAL, self._normed(run.final_norm, stream))

    def _block(self, layer, maps, stream):
        stream = self._pass(layer, "resid_pre", stream)
        inputs = self._pass(layer, "attn.in", self._normed(maps.attention_norm, stream))
        self.values.append(inputs @ maps.value.T)
        branch = self._pass(layer, "attn.out", torch.zeros_like(stream))
        branch = self._pass(layer, "attn.branch", self._normed(maps.attention_post_norm, branch))
        between = stream if self.run.parallel else self._pass(layer, "resid_mid", stream + branch)
        self._pass(layer, "mlp.in", self._normed(maps.mlp_norm, between))
        output = self._pass(layer, "mlp.out", torch.zeros_like(stream))
        output = self._pass(layer, "mlp.branch", self._normed(maps.mlp_post_norm, output))
        return self._pass(layer, "resid_post", between + output + (branch if self.run.parallel else 0.0))

    def _normed(self, norm, vectors):
        return vectors if norm is None else norm[self.sources.position, 0](vectors)

    def _reach(self, layer, point, vectors):
        """Add the contributions to the targets that read at a site."""
        rows = self.groups.get((layer, point))
        if rows is not None:
            here = torch.isin(self.row, rows) & (self.targets.position[self.row] == self.sources.position)
            self.direct += here * (vectors * self.targets.vector[self.row]).sum(-1)

    def _pass(self, layer, point, vectors):
        """Forward step at a site: reach its targets, then replace the value by the writes of the sources."""
        self._reach(layer, point, vectors)
        site = Site(point, layer)
        if site in self.read_by_skips:
            self.read[site] = vectors
        writer = self.run.writers.get(site)
        if writer is None:
            return vectors
        written = self.sources.at(site, vectors)
        for part in writer.parts:
            if part.skip is not None:
                works = writer.works[self.sources.position, None].float()
                written = written + works * (self.read[self.run.input_sites[part.dictionary]] @ part.skip.T)
        return written


class _Splitting(Visitor):
    """Splits edges over heads: a source's contribution to the values of a head, times the gradient of the target there.

    Args:
        row, position (`torch.LongTensor` of shape `(edges,)`): Target, and token of the source, of each edge.
        values (`list[torch.Tensor]`): By layer, what sources add to the values of heads; see [`_Lift`].
        heads (`int`): Heads of a layer.
    """

    def __init__(self, row, position, values, heads):
        self.row = row
        self.position = position
        self.values = values
        self.loadings = torch.zeros(len(row), len(values), heads, device=row.device)

    def on_heads(self, layer, gradient):
        heads, _, _, width = gradient.shape
        values = self.values[layer].unflatten(-1, (-1, width))
        values = values.repeat_interleave(heads // values.shape[1], dim=1)
        self.loadings[:, layer] = (gradient[:, self.position, self.row].transpose(0, 1) * values).sum(-1)


def _check_sums(result):
    parts = torch.cat([result.loadings.flatten(1), result.direct[:, None]], dim=1)
    largest = torch.maximum(parts.abs().sum(1), result.weight.abs())
    if not ((parts.sum(1) - result.weight).abs() <= _TOLERANCE * largest).all():
        raise TranscoderError(
            "The parts of the edges do not sum to their weights, so the graph was made with another model or other "
            "dictionaries: give the model and the dictionaries of the graph."
        )
