"""Attribution graphs: record the run, attribute the targets, then the features that matter most, and build the graph."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...dictionaries import Dictionaries, fitting_dictionaries
from ...errors import TranscoderError
from ...lm.forwards import has_head
from ...lm.sites import Site
from ...lm.wrappers import measures_model
from ...models.linear_parts import encoder_rows
from ...version import versions
from ..prompt_tokens import Prompt, encode_prompts, is_one_prompt, token_labels
from .adjoint import Adjoint
from .graph import AttributionGraph
from .influence import influence
from .linear_run import READS, LinearRun
from .nodes import KINDS, TargetInfo
from .read_vectors import FINAL, ReadVectors
from .recording import record
from .row_sums import warn
from .targets import resolve_targets
from .tolerance import row_tolerance


@measures_model
@torch.no_grad()
def attribution_graph(
    base_model: PreTrainedModel,
    transcoders: Dictionaries,
    prompt: Prompt | Sequence[Prompt],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    targets=None,
    max_logits: int | None = None,
    logit_mass: float | None = None,
    max_features: int = 2048,
    edges_per_node: int = 2048,
    skip_first: int = 1,
    method: Literal["adjoint", "autograd"] = "adjoint",
    progress: bool = True,
) -> AttributionGraph | list[AttributionGraph]:
    """Attribute the predictions of a model to features, tokens and errors (Ameisen et al. 2025).

    Attention patterns and norm scales are frozen, and MLPs are replaced by the features of their dictionary and its error.
    Everything that writes to the residual stream then contributes linearly to everything that reads it: the weight of an
    edge is the contribution of its source to its target. Layers without a dictionary give nodes of whole MLP outputs.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            A causal language model, which runs in evaluation mode. Use fp32 for rows that sum exactly. Where quantized
            attention rounds its inputs, the rounding is part of the bias nodes.
        transcoders ([`TranscoderSet`], [`TranscoderModel`], a mapping or several):
            Dictionaries of any layers: transcoders, skip transcoders, SAEs of the stream or of attention's outputs.
        prompt (`str`, `Sequence[int]`, `Mapping`, or several prompts):
            Text, to which the tokenizer's special tokens are added unless it begins with them, as a chat template makes
            it; token ids; or the output of the tokenizer. Several prompts (a list of prompts, a tensor of shape
            `(prompts, seq)`, or the output of the tokenizer for several texts) share forward passes.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Required for text; otherwise used for labels only.
        targets (*optional*):
            Targets of the graph, the same for all prompts: tokens, pairs of tokens (for the difference of their logits),
            vectors, or any [`Target`]. The most likely next tokens by default.
        max_logits (`int`, *optional*, defaults to 10):
            Largest number of tokens that are chosen as targets. Not together with `targets`.
        logit_mass (`float`, *optional*, defaults to 0.95):
            Probability at which the most likely tokens together are enough. Not together with `targets`.
        max_features (`int`, *optional*, defaults to 2048):
            Largest number of active features that become nodes, those with most influence on the targets first.
        edges_per_node (`int`, *optional*, defaults to 2048):
            Largest number of edges into a node, strongest first; the other effects are in its `rest`.
        skip_first (`int`, *optional*, defaults to 1):
            Number of tokens at the start at which the dictionaries are not used, as in training and evaluation, because
            models use these tokens as attention sinks. The MLP outputs there are error nodes.
        method (`"adjoint"` or `"autograd"`, *optional*, defaults to `"adjoint"`):
            Hand-written transposes, or autograd over the frozen model: the reference, which is slower and needs more
            memory.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`AttributionGraph`], or a `list` with one graph per prompt where several prompts were given.

    Raises:
        [`TranscoderError`]: a dictionary is for another model, a prompt is empty or too long, or a target is unknown.

    Example:

    ```python
    >>> graph = attribution_graph(base, transcoders, "The capital of France is", tokenizer=tokenizer)
    >>> graph.scores()
    >>> graph.prune().to_html("france.html")
    ```
    """
    least_one = {"max_features": max_features, "edges_per_node": edges_per_node, "max_logits": max_logits}
    for name, value in least_one.items():
        if value is not None and value < 1:
            raise TranscoderError(f"`{name}` is {value}; give at least 1.")
    if method not in ("adjoint", "autograd"):
        raise TranscoderError(f"method='{method}' is unknown; use 'adjoint' or 'autograd'.")
    limits = _limits(base_model, targets, max_logits, logit_mass)
    several = not is_one_prompt(prompt)
    dictionaries = fitting_dictionaries(base_model, transcoders)
    ids = encode_prompts(base_model, prompt if several else [prompt], tokenizer)
    settings = {
        **limits, "max_features": max_features, "edges_per_node": edges_per_node, "skip_first": skip_first,
        "method": method,
    }  # fmt: skip
    graphs = []
    for run in record(base_model, dictionaries, ids, skip_first):
        functionals, infos = resolve_targets(run, targets, tokenizer, **limits)
        rows = _Rows(run, functionals, edges_per_node, method)
        rows.explain(max_features, progress)
        graphs.append(_graph(run, rows, infos, tokenizer, settings))
    return graphs if several else graphs[0]


def _limits(model, targets, max_logits, logit_mass):
    """The limits by which targets are chosen, where they are not named."""
    if targets is not None:
        if max_logits is not None or logit_mass is not None:
            raise TranscoderError(
                "`max_logits` and `logit_mass` choose targets: leave them out where `targets` are given."
            )
        return {}
    if logit_mass is not None and not has_head(model):
        raise TranscoderError(f"{type(model).__name__} has no language-model head: leave `logit_mass` out.")
    if logit_mass is not None and not 0 <= logit_mass <= 1:
        raise TranscoderError(f"`logit_mass` is {logit_mass}; give a probability between 0 and 1.")
    limits = {"max_logits": 10 if max_logits is None else max_logits}
    return {**limits, "logit_mass": 0.95 if logit_mass is None else logit_mass} if has_head(model) else limits


class _Rows:
    """Rows of the targets, and then of more and more features.

    Sources are numbered as in [`Sources`]; rows are in the order in which targets and features were expanded.
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
        # Layer and position at which the dictionary of each feature reads; the layer is -1 for other sources.
        self.layer = torch.full((self.size,), -1, device=device)
        self.position = torch.zeros(self.size, dtype=torch.long, device=device)
        self.segments_of_features = []
        for segment in self.solver.sources.segments:
            if segment.kind in ("error", "mlp"):
                self.is_error[segment.start : segment.end] = True
            if segment.kind == "feature":
                site = run.input_sites[segment.features.dictionary]
                if site.point in READS:
                    self.layer[segment.start : segment.end] = site.layer
                    self.position[segment.start : segment.end] = segment.features.position
                    self.segments_of_features.append((segment, site))
        # Columns of rows and of their edges, in batches. The owner of a row is its source; targets come after all sources.
        self.parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        # Largest distance of a row from its total, as a multiple of its tolerance.
        self.excess = torch.zeros((), dtype=torch.float64, device=device)

    def explain(self, max_features: int, progress: bool) -> None:
        """Add the rows of the targets and of the features with most influence on them."""
        from tqdm.auto import tqdm

        device = self.run.token_embedding.device
        owners = torch.arange(self.size, self.size + len(self.targets), device=device)
        for chosen in _batches(self.targets.layer, self.targets.position, self.solver.batch_size()):
            self._add(owners[chosen], self.targets[chosen])
        candidates = self.layer >= 0
        count = min(max_features, int(candidates.sum()))
        # All at once if all are wanted; otherwise the second half is chosen by influence through the first half.
        step = count if count == int(candidates.sum()) else max(256, -(-count // 2))
        with tqdm(total=count, desc="attribution", unit="feature", disable=not progress) as bar:
            done = 0
            while done < count:
                wanted = min(step, count - done)
                influences = torch.where(candidates, self._influence()[: self.size], -1.0)
                features = influences.topk(wanted).indices
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
            dictionary = self.run.dictionaries[segment.features.dictionary]
            numbers = segment.features.feature[features[mine] - segment.start]
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
        rest = rest_abs = rest_error = rows.new_zeros(len(rows))
        if kept < self.size:
            rest = (rows.double().sum(1) - weights.double().sum(1)).float()
            rest_abs = (magnitude - strongest.values.sum(1)).clamp(min=0)
            errors = strongest.values * self.is_error[strongest.indices]
            rest_error = ((magnitudes * self.is_error).sum(1) - errors.sum(1)).clamp(min=0)
        columns = {
            "owner": owners, "total": total, "magnitude": magnitude,
            "rest": rest, "rest_abs": rest_abs, "rest_error": rest_error,
            "edge_owner": owners[:, None].expand_as(weights)[is_edge],
            "edge_source": strongest.indices[is_edge], "edge_weight": weights[is_edge],
        }  # fmt: skip
        for name, column in columns.items():
            self.parts[name].append(column)

    def column(self, name: str) -> torch.Tensor:
        """A column of all rows, or of all edges."""
        return torch.cat(self.parts[name])

    def _influence(self):
        """Influence of each source through the rows so far, `(sources + targets,)`."""
        weight, owner = self.column("edge_weight"), self.column("edge_owner")
        magnitude = weight.new_ones(self.size + len(self.targets))
        magnitude[self.column("owner")] = self.column("magnitude").clamp(min=1e-10)
        share = weight.abs() / magnitude[owner]
        weights = torch.zeros_like(magnitude)
        weights[self.size :] = 1 / len(self.targets)
        return influence(self.column("edge_source"), owner, share, weights)


def measured(run: LinearRun, functionals: ReadVectors) -> torch.Tensor:
    """Values of read vectors in the run, `(rows,)`, to which their rows must sum."""
    found = functionals.bias.float().clone()
    for rows, terms in _terms(run, functionals):
        found[rows] += terms.sum(-1)
    return found


def _mass(run, functionals):
    """Magnitudes of the terms of [`measured`] values, summed, to which their rounding is relative."""
    found = functionals.bias.float().abs()
    for rows, terms in _terms(run, functionals):
        found[rows] += terms.abs().sum(-1)
    return found


def _terms(run, functionals):
    for (layer, point), rows in functionals.places().items():
        place = run.final if point == FINAL else run.activations[Site(point, layer)]
        yield rows, place[functionals.position[rows]] * functionals.vector[rows].float()


def _batches(layer, position, size):
    """Batches of rows of one layer or few, and of neighboring tokens, so that each batch covers few layers."""
    order = (layer * (position.max() + 1) + position).argsort(stable=True)
    layers = layer[order].tolist()
    start = 0
    for end in range(1, len(order) + 1):
        full = end - start == size
        if end == len(order) or full or (layers[end] != layers[end - 1] and 2 * (end - start) >= size):
            yield order[start:end]
            start = end


def _graph(run: LinearRun, rows: _Rows, infos: list[TargetInfo], tokenizer, settings: dict[str, Any]):
    """The graph of all rows. Contributions of features without a row go into `rest`."""
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
            features = segment.features
            position[where], index[where] = features.position.cpu(), features.feature.cpu()
            value[where], dictionary[where] = features.activation.cpu(), features.dictionary
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

    def per_node(name, missing=0.0):
        return torch.full((count,), missing).index_copy(0, rows.column("owner").cpu(), rows.column(name).cpu())

    target = rows.column("edge_owner").cpu()
    order = target.argsort(stable=True)
    graph = AttributionGraph(
        kind=kind, layer=layer, position=position, index=index, dictionary=dictionary, value=value,
        total=per_node("total", float("nan")),
        rest=per_node("rest"), rest_abs=per_node("rest_abs"), rest_error=per_node("rest_error"),
        source=rows.column("edge_source").cpu()[order],
        target=target[order],
        weight=rows.column("edge_weight").cpu()[order],
        input_ids=run.input_ids.tolist(),
        tokens=token_labels(run.input_ids.tolist(), tokenizer),
        targets=infos,
        dictionaries=run.names,
        num_layers=run.num_layers,
        target_vector=rows.targets.vector.cpu(),
        target_bias=rows.targets.bias.cpu(),
        metadata=_protocol(run, settings),
    )  # fmt: skip
    # Features whose inputs are not linear end the graph: nodes without a row.
    without_row = graph.is_kind("feature") & ~graph.expanded
    ends = without_row & (torch.cat([rows.layer.cpu(), torch.full((len(infos),), -1)]) < 0)
    graph.metadata["active_features"] = int(graph.is_kind("feature").sum())
    graph = graph.select(~without_row | ends)
    graph.metadata["largest_row_error"] = graph.row_residuals()[graph.expanded].max().item()
    # Above 1 where a row does not sum to its total.
    graph.metadata["largest_row_excess"] = rows.excess.item()
    graph.metadata["warning"] = graph.warning
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
                "output_sites": list(dictionary.config.output_sites),
                "num_features": dictionary.config.num_features,
                "activation": dictionary.config.activation,
            }
            for name, dictionary in zip(run.names, run.dictionaries, strict=True)
        ],
        "frozen": "attention patterns and norm scales",
        "settings": settings,
        "versions": versions(),
    }
