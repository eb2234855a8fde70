"""Attribution graphs, phase by phase: run, explain the targets, explain what explains them, build the graph."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...dictionaries import Dictionaries, fitting_dictionaries
from ...errors import TranscoderError
from ...lm.sites import Site
from ...lm.wrappers import measures_model
from ...models.linear_parts import encoder_rows
from ...version import versions
from ..prompt_tokens import Prompt, encode_prompts, token_labels
from .adjoint import Adjoint
from .graph import KINDS, AttributionGraph, TargetInfo
from .influence import influence_of
from .linear_run import READS, LinearRun
from .read_vectors import FINAL, ReadVectors
from .recording import record
from .row_sums import rows_do_not_sum, warn
from .targets import resolve_targets
from .tolerance import row_tolerance


@measures_model
def attribution_graph(
    base_model: PreTrainedModel,
    transcoders: Dictionaries,
    prompt: Prompt,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    targets=None,
    max_logits: int = 10,
    logit_mass: float = 0.95,
    max_features: int = 2048,
    edges_per_node: int = 2048,
    skip_first: int = 1,
    method: Literal["adjoint", "autograd"] = "adjoint",
    progress: bool = True,
) -> AttributionGraph:
    """Which features, tokens and errors made a model say what it says about a prompt (Ameisen et al. 2025).

    Attention patterns and norm scales are held as they are, MLPs are taken apart into the features of their dictionary and
    what it misses. Everything that writes to the residual stream then adds linearly to everything that reads it, and
    what it adds is the weight of an edge. Layers without a dictionary give nodes of whole MLP outputs.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            A causal language model, which runs in evaluation mode. Use fp32 for rows that sum exactly. Where attention is quantized and
            rounds what it reads, that rounding is part of the bias nodes.
        transcoders ([`TranscoderSet`], [`TranscoderModel`], a mapping or several):
            Dictionaries of any layers: transcoders, skip transcoders, SAEs of the stream or of attention's outputs.
        prompt (`str`, `Sequence[int]` or `Mapping`):
            Text, which gets the tokenizer's special tokens unless it begins with them, as a chat template makes it; token
            ids; or what the tokenizer returned.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Needed for text; otherwise only for labels.
        targets (*optional*):
            What to explain: tokens, pairs of tokens (for the difference of their logits), vectors, or any [`Target`]. By
            default the most likely next tokens.
        max_logits (`int`, *optional*, defaults to 10), logit_mass (`float`, *optional*, defaults to 0.95):
            Without `targets`: as many of the most likely tokens as have this probability together, but not more.
        max_features (`int`, *optional*, defaults to 2048):
            How many active features become nodes, those with most influence on the targets first.
        edges_per_node (`int`, *optional*, defaults to 2048):
            Edges kept into a node, the strongest; the others are in its `rest`.
        skip_first (`int`, *optional*, defaults to 1):
            Tokens at the start at which the dictionaries are not used, as in training and evaluation: models use them as
            attention sinks. What MLPs write there are error nodes.
        method (`"adjoint"` or `"autograd"`, *optional*, defaults to `"adjoint"`):
            Hand-written transposes, or autograd over the frozen model, which is slower and needs more memory: the
            reference.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`AttributionGraph`]

    Raises:
        [`TranscoderError`]: a dictionary is for another model, the prompt is empty or too long, a target is unknown.

    Example:

    ```python
    >>> graph = attribution_graph(base, transcoders, "The capital of France is", tokenizer=tokenizer)
    >>> graph.scores()
    >>> graph.prune().to_html("france.html")
    ```
    """
    return attribution_graphs(
        base_model, transcoders, [prompt], tokenizer=tokenizer, targets=targets, max_logits=max_logits,
        logit_mass=logit_mass, max_features=max_features, edges_per_node=edges_per_node, skip_first=skip_first,
        method=method, progress=progress,
    )[0]  # fmt: skip


@measures_model
@torch.no_grad()
def attribution_graphs(
    base_model: PreTrainedModel,
    transcoders: Dictionaries,
    prompts: Sequence[Prompt],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    targets=None,
    max_logits: int = 10,
    logit_mass: float = 0.95,
    max_features: int = 2048,
    edges_per_node: int = 2048,
    skip_first: int = 1,
    method: Literal["adjoint", "autograd"] = "adjoint",
    progress: bool = True,
) -> list[AttributionGraph]:
    """Graphs of several prompts, which share forward passes. Arguments as in [`attribution_graph`].

    Returns:
        `list[AttributionGraph]`: one for each prompt.
    """
    for name, value in (
        ("max_features", max_features),
        ("edges_per_node", edges_per_node),
        ("max_logits", max_logits),
    ):
        if value < 1:
            raise TranscoderError(f"`{name}` is {value}; give at least 1.")
    if method not in ("adjoint", "autograd"):
        raise TranscoderError(f"method='{method}' is unknown; use 'adjoint' or 'autograd'.")
    dictionaries = fitting_dictionaries(base_model, transcoders)
    ids = encode_prompts(base_model, prompts, tokenizer)
    settings = {
        "max_logits": max_logits, "logit_mass": logit_mass, "max_features": max_features,
        "edges_per_node": edges_per_node, "skip_first": skip_first, "method": method,
    }  # fmt: skip
    graphs = []
    for run in record(base_model, dictionaries, ids, skip_first):
        functionals, infos = resolve_targets(run, targets, tokenizer, max_logits, logit_mass)
        rows = _Rows(run, functionals, edges_per_node, method)
        rows.explain(max_features, progress)
        graphs.append(_graph(run, rows, infos, tokenizer, settings))
    return graphs


class _Rows:
    """Rows of the graph as far as they are known: of the targets, then of more and more features.

    Sources are numbered as by [`Sources`]; rows are those of the targets and of features, in the order of expansion.
    """

    def __init__(self, run: LinearRun, targets: ReadVectors, edges_per_node: int, method: str):
        self.run = run
        self.targets = targets
        self.edges_per_node = edges_per_node
        if method == "adjoint":
            self.solver = Adjoint(run)
        else:
            from .autograd import AutogradRows

            self.solver = AutogradRows(run)
        self.size = len(self.solver.sources)
        device = run.token_embedding.device
        self.is_error = torch.zeros(self.size, dtype=torch.bool, device=device)
        # Of every feature: the site its dictionary reads, where; of other sources the layer is -1.
        self.layer = torch.full((self.size,), -1, device=device)
        self.position = torch.zeros(self.size, dtype=torch.long, device=device)
        self.segments_of_features = []
        for segment in self.solver.sources.segments:
            if segment.kind in ("error", "mlp"):
                self.is_error[segment.start : segment.end] = True
            if segment.kind == "feature":
                site = Site.parse(run.dictionaries[segment.writer.dictionary].config.input_site)
                if site.point in READS:
                    self.layer[segment.start : segment.end] = site.layer
                    self.position[segment.start : segment.end] = segment.writer.position
                    self.segments_of_features.append((segment, site))
        # Sources that rows belong to; the targets have numbers behind all sources.
        self.owner: list[torch.Tensor] = []
        self.total: list[torch.Tensor] = []
        self.magnitude: list[torch.Tensor] = []
        # How far rows are from their totals, in units of what rounding explains: the largest of all rows.
        self.excess = torch.zeros((), dtype=torch.float64, device=device)
        self.rest: list[torch.Tensor] = []
        self.rest_abs: list[torch.Tensor] = []
        self.rest_error: list[torch.Tensor] = []
        self.edge_owner: list[torch.Tensor] = []
        self.edge_source: list[torch.Tensor] = []
        self.edge_weight: list[torch.Tensor] = []

    def explain(self, max_features: int, progress: bool) -> None:
        """Rows of the targets and of the features that matter most to them."""
        from tqdm.auto import tqdm

        device = self.run.token_embedding.device
        owners = torch.arange(self.size, self.size + len(self.targets), device=device)
        for chosen in _batches(self.targets.layer, self.targets.position, self.solver.batch_size()):
            self._add(owners[chosen], self.targets[chosen])
        candidates = self.layer >= 0
        count = min(max_features, int(candidates.sum()))
        # All at once if all are wanted; otherwise the second half is chosen in the light of the first.
        step = count if count == int(candidates.sum()) else max(256, -(-count // 2))
        with tqdm(total=count, desc="attribution", unit="feature", disable=not progress) as bar:
            done = 0
            while done < count:
                wanted = min(step, count - done)
                influence = torch.where(candidates, self._influence()[: self.size], -1.0)
                features = influence.topk(wanted).indices
                candidates[features] = False
                for chosen in _batches(self.layer[features], self.position[features], self.solver.batch_size()):
                    self._add(features[chosen], self._functionals(features[chosen]))
                    bar.update(len(chosen))
                done += wanted

    def _functionals(self, features):
        """Pre-activations of features, by source number."""
        width = self.targets.vector.shape[-1]
        vector = torch.zeros(len(features), width, device=features.device)
        bias = torch.zeros(len(features), device=features.device)
        points = [""] * len(features)
        for segment, site in self.segments_of_features:
            mine = ((features >= segment.start) & (features < segment.end)).nonzero()[:, 0]
            if not len(mine):
                continue
            dictionary = self.run.dictionaries[segment.writer.dictionary]
            numbers = segment.writer.feature[features[mine] - segment.start]
            rows, biases = encoder_rows(dictionary, numbers.to(dictionary.device))
            vector[mine], bias[mine] = rows.to(vector.device), biases.to(bias.device)
            for row in mine.tolist():
                points[row] = site.point
        return ReadVectors(self.layer[features], points, self.position[features], vector, bias)

    def _add(self, owners, functionals):
        rows = self.solver.rows(functionals)
        magnitudes = rows.abs()
        total = measured(self.run, functionals)
        magnitude = magnitudes.sum(1)
        self.owner.append(owners)
        self.total.append(total)
        self.magnitude.append(magnitude)
        tolerance = row_tolerance(
            magnitude + _mass(self.run, functionals),
            functionals.layer,
            functionals.vector.shape[-1],
            self.run.model.dtype,
        )
        excess = (rows.double().sum(1) - total.double()).abs() / tolerance.clamp(min=1e-30)
        self.excess = torch.maximum(self.excess, excess.max())
        kept = min(self.edges_per_node, self.size)
        strongest = magnitudes.topk(kept, dim=1, sorted=False)
        weights = rows.gather(1, strongest.indices)
        is_edge = strongest.values > 0
        left = self.size - kept
        self.rest.append(
            (rows.double().sum(1) - weights.double().sum(1)).float() if left else rows.new_zeros(len(rows))
        )
        self.rest_abs.append((magnitudes.sum(1) - strongest.values.sum(1)).clamp(min=0) if left else self.rest[-1])
        errors = (magnitudes * self.is_error).sum(1) - (strongest.values * self.is_error[strongest.indices]).sum(1)
        self.rest_error.append(errors.clamp(min=0) if left else self.rest[-1])
        self.edge_owner.append(owners[:, None].expand_as(weights)[is_edge])
        self.edge_source.append(strongest.indices[is_edge])
        self.edge_weight.append(weights[is_edge])

    def _influence(self):
        """Influence of each source as far as rows are known, `(sources + targets,)`."""
        magnitude = self.edge_weight[0].new_ones(self.size + len(self.targets))
        magnitude[torch.cat(self.owner)] = torch.cat(self.magnitude).clamp(min=1e-10)
        owner, source = torch.cat(self.edge_owner), torch.cat(self.edge_source)
        share = torch.cat(self.edge_weight).abs() / magnitude[owner]
        weights = torch.zeros_like(magnitude)
        weights[self.size :] = 1 / len(self.targets)
        return influence_of(source, owner, share, weights)


def measured(run: LinearRun, functionals: ReadVectors) -> torch.Tensor:
    """What functionals were in the run itself, `(rows,)`: what their rows have to sum to."""
    found = functionals.bias.float().clone()
    for rows, terms in _terms(run, functionals):
        found[rows] += terms.sum(-1)
    return found


def _mass(run, functionals):
    """Sums of the absolute terms that make [`measured`] values, to which their rounding is relative."""
    found = functionals.bias.float().abs()
    for rows, terms in _terms(run, functionals):
        found[rows] += terms.abs().sum(-1)
    return found


def _terms(run, functionals):
    for (layer, point), rows in functionals.places().items():
        place = run.final if point == FINAL else run.activations[Site(point, layer)]
        yield rows, place[functionals.position[rows]] * functionals.vector[rows].float()


def _batches(layer, position, size):
    """Rows in batches of one layer, or few, and of neighbouring tokens, so that each is as shallow as it can be."""
    order = (layer * (position.max() + 1) + position).argsort(stable=True)
    layers = layer[order].tolist()
    start = 0
    for end in range(1, len(order) + 1):
        full = end - start == size
        if end == len(order) or full or (layers[end] != layers[end - 1] and 2 * (end - start) >= size):
            yield order[start:end]
            start = end


def _graph(run: LinearRun, rows: _Rows, infos: list[TargetInfo], tokenizer, settings: dict[str, Any]):
    """The graph of all rows; features without one are no nodes, and what they add goes into `rest`."""
    size, count = rows.size, rows.size + len(infos)
    kind, layer, position, index, dictionary = (torch.full((count,), -1, dtype=torch.long) for _ in range(5))
    value = torch.zeros(count)
    every = torch.arange(len(run.input_ids))
    for segment in rows.solver.sources.segments:
        where = slice(segment.start, segment.end)
        kind[where] = KINDS.index(segment.kind)
        layer[where] = segment.layer
        writer = segment.writer
        if segment.kind == "feature":
            position[where], index[where] = writer.position.cpu(), writer.feature.cpu()
            value[where], dictionary[where] = writer.activation.cpu(), writer.dictionary
        elif segment.kind != "bias":
            position[where] = every
            written = {"token": run.token_embedding, "position": run.position_embedding}.get(segment.kind)
            value[where] = (writer.error if written is None else written).norm(dim=-1).cpu()
            if segment.kind == "token":
                index[where] = run.input_ids.cpu()
            if segment.kind == "error":
                dictionary[where] = writer.dictionary
    kind[size:], index[size:] = KINDS.index("target"), torch.arange(len(infos))
    layer[size:] = rows.targets.layer.cpu()
    position[size:] = rows.targets.position.cpu()

    def per_node(parts, missing):
        full = torch.full((count,), missing)
        full[torch.cat(rows.owner).cpu()] = torch.cat(parts).cpu()
        return full

    order = torch.cat(rows.edge_owner).argsort(stable=True)
    graph = AttributionGraph(
        kind=kind, layer=layer, position=position, index=index, dictionary=dictionary, value=value,
        total=per_node(rows.total, float("nan")),
        rest=per_node(rows.rest, 0.0), rest_abs=per_node(rows.rest_abs, 0.0), rest_error=per_node(rows.rest_error, 0.0),
        source=torch.cat(rows.edge_source)[order].cpu(),
        target=torch.cat(rows.edge_owner)[order].cpu(),
        weight=torch.cat(rows.edge_weight)[order].cpu(),
        input_ids=run.input_ids.tolist(),
        tokens=token_labels(run.input_ids.tolist(), tokenizer),
        targets=infos,
        dictionaries=run.names,
        num_layers=run.num_layers,
        target_vector=rows.targets.vector.cpu(),
        target_bias=rows.targets.bias.cpu(),
        metadata=_protocol(run, settings),
    )  # fmt: skip
    # Features that end a graph, because what they read is not linear, are nodes without a row.
    without_row = graph.is_kind("feature") & ~graph.expanded
    ends = without_row & (torch.cat([rows.layer.cpu(), torch.full((len(infos),), -1)]) < 0)
    graph.metadata["active_features"] = int(graph.is_kind("feature").sum())
    graph = graph.select(~without_row | ends)
    graph.metadata["largest_row_error"] = graph.row_residuals()[graph.expanded].max().item()
    # Above 1 where rows do not sum to their totals.
    graph.metadata["largest_row_excess"] = rows.excess.item()
    graph.metadata["warning"] = rows_do_not_sum(graph)
    warn(graph.metadata["warning"])
    return graph


def _protocol(run, settings):
    config = run.model.config
    return {
        "model": config.name_or_path or None,
        "revision": getattr(config, "_commit_hash", None),
        "model_type": config.model_type,
        "dtype": str(run.model.dtype).removeprefix("torch."),
        "dictionaries": [
            {
                "name": name,
                "from": dictionary.config.name_or_path or None,
                "input_site": dictionary.config.input_site,
                "output_site": dictionary.config.output_site,
                "num_features": dictionary.config.num_features,
                "activation": dictionary.config.activation,
            }
            for name, dictionary in zip(run.names, run.dictionaries, strict=True)
        ],
        "frozen": "attention patterns and norm scales",
        "settings": settings,
        "versions": versions(),
    }
