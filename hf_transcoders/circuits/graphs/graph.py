"""The attribution graph of a prompt: nodes, direct effects between them, and the file that stores them."""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import TranscoderError
from ...features.feature_examples import FeatureExplanation
from ...files import write_text
from ...text.visible import visible
from .edge_validation import EdgeValidation
from .graph_file import OPTIONAL_TENSORS, TENSORS, read_graph, save_graph
from .influence import cumulative_shares, edge_influence, edge_shares, influence, row_magnitudes, scores
from .nodes import KINDS, Node, TargetInfo, is_kind, node_label
from .pruning import prune
from .row_sums import row_warning, warn


@dataclass
class AttributionGraph:
    r"""Nodes and their direct effects on each other, with frozen attention patterns and norm scales.

    The weight of an edge is the exact contribution of the source to the target's pre-activation (or logit). For every node that
    was expanded, `sum of its incoming weights + rest = total`: see [`~AttributionGraph.row_residuals`].

    Nodes are ordered so that every edge leads from a lower to a higher number.

    Args:
        kind (`torch.LongTensor` of shape `(nodes,)`):
            Index into [`KINDS`]: `token` and `position` embeddings, `feature`s of dictionaries, their `error`s, whole
            outputs of MLPs without a dictionary (`mlp`), `bias`es of a layer (over all positions), `target`s.
        layer (`torch.LongTensor` of shape `(nodes,)`):
            Layer that writes; -1 for embeddings, the number of layers for targets after the last block.
        position (`torch.LongTensor` of shape `(nodes,)`):
            Position in the prompt; -1 for biases, and in graphs that are summed over positions.
        index (`torch.LongTensor` of shape `(nodes,)`):
            Number of the feature, id of the token, or number of the target in `targets`; otherwise -1. For position
            embeddings in graphs that are summed over positions, the position.
        dictionary (`torch.LongTensor` of shape `(nodes,)`):
            Index into `dictionaries` for features and errors; otherwise -1.
        value (`torch.Tensor` of shape `(nodes,)`):
            Activation of a feature; norm of the output of an error, MLP, bias or embedding; 0 for targets.
        total (`torch.Tensor` of shape `(nodes,)`):
            Pre-activation of a feature, or value of a target, to which the row of the node sums; NaN for nodes without a
            row (embeddings, errors, MLPs, biases, and features that were not expanded).
        rest, rest_abs (`torch.Tensor` of shape `(nodes,)`):
            Sum, and sum of magnitudes, of all direct effects on the node that are not among the edges.
        rest_error (`torch.Tensor` of shape `(nodes,)`):
            The part of `rest_abs` that comes from errors.
        source, target (`torch.LongTensor` of shape `(edges,)`):
            Ends of each edge, sorted by `target`.
        weight (`torch.Tensor` of shape `(edges,)`):
            Direct effect of each source on its target.
        input_ids (`list[int]`), tokens (`list[str]`):
            Tokens of the prompt, as ids and as text.
        targets (`list[TargetInfo]`):
            The targets that the graph explains.
        dictionaries (`list[str]`):
            Names of the dictionaries.
        num_layers (`int`):
            Number of layers of the model.
        target_vector (`torch.Tensor` of shape `(targets, width)`), target_bias (`torch.Tensor` of shape `(targets,)`):
            The targets as functions of the activation that they read: `vector @ x + bias`. Needed to measure them again.
        metadata (`dict`):
            Record of how the graph was made, as JSON: model and revision, dictionaries and their sources, settings,
            versions, pruning.
        cumulative_influence (`torch.Tensor` of shape `(nodes,)`, *optional*):
            Of a pruned graph, the share of the influence that each node and all stronger ones had together before pruning,
            at most the share that pruning kept. `None` for other graphs.
    """

    kind: torch.Tensor
    layer: torch.Tensor
    position: torch.Tensor
    index: torch.Tensor
    dictionary: torch.Tensor
    value: torch.Tensor
    total: torch.Tensor
    rest: torch.Tensor
    rest_abs: torch.Tensor
    rest_error: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    input_ids: list[int]
    tokens: list[str]
    targets: list[TargetInfo]
    dictionaries: list[str]
    num_layers: int
    target_vector: torch.Tensor
    target_bias: torch.Tensor
    metadata: dict[str, Any] = field(default_factory=dict)
    cumulative_influence: torch.Tensor | None = None

    # ------------------------------------------------------------------------------------------------ nodes and edges

    @property
    def num_nodes(self) -> int:
        return len(self.kind)

    @property
    def num_edges(self) -> int:
        return len(self.weight)

    def is_kind(self, *kinds: str) -> torch.Tensor:
        """Whether each node is of one of these kinds, `(nodes,)` bool."""
        return is_kind(self.kind, *kinds)

    @property
    def expanded(self) -> torch.Tensor:
        """Whether each node has a row, so that its inputs are known, `(nodes,)` bool."""
        return ~self.total.isnan()

    @property
    def target_weights(self) -> torch.Tensor:
        """Weight of each target, 0 for other nodes, `(nodes,)`; sums to 1."""
        weights = torch.zeros(self.num_nodes, dtype=torch.float64)
        nodes = self.is_kind("target").nonzero()[:, 0]
        given = torch.tensor([target.weight for target in self.targets], dtype=torch.float64)[self.index[nodes]]
        weights[nodes] = given / given.sum()
        return weights

    def node(self, number: int) -> Node:
        """One node as plain values."""
        if not 0 <= number < self.num_nodes:
            raise TranscoderError(f"There is no node {number}: the graph has the nodes 0 to {self.num_nodes - 1}.")
        dictionary = int(self.dictionary[number])
        total = float(self.total[number])
        return Node(
            number=number,
            kind=KINDS[self.kind[number]],
            layer=int(self.layer[number]),
            position=int(self.position[number]),
            index=int(self.index[number]),
            dictionary=None if dictionary < 0 else self.dictionaries[dictionary],
            value=float(self.value[number]),
            total=None if total != total else total,
        )

    def label(self, number: int) -> str:
        """A short label for a node, such as `L8 feature 1203 at " gave"`."""
        node = self.node(number)
        if node.kind == "target":
            return visible(self.targets[node.index].label)
        return node_label(node.kind, node.layer, node.position, node.index, self.tokens, self.num_layers)

    def dictionary_number(self, name: str) -> int:
        """Number of a dictionary in `dictionaries`.

        Raises:
            [`TranscoderError`]: the graph has no dictionary of this name.
        """
        if name not in self.dictionaries:
            raise TranscoderError(f"The graph has no dictionary '{name}': choose from {', '.join(self.dictionaries)}.")
        return self.dictionaries.index(name)

    def find(self, dictionary: str, feature: int, position: int) -> int:
        """Number of the node of a feature.

        Raises:
            [`TranscoderError`]: the feature is not in the graph.
        """
        found = (
            self.is_kind("feature")
            & (self.dictionary == self.dictionary_number(dictionary))
            & (self.index == feature)
            & (self.position == position)
        ).nonzero()
        if not len(found):
            raise TranscoderError(
                f"Feature {feature} of {dictionary} at token {position} is not in the graph: it was not active there, or "
                "too weak (build the graph with more `max_features`, or prune less)."
            )
        return int(found[0])

    def incoming(self, number: int) -> list[tuple[int, float]]:
        """(source, weight) of the edges into a node, strongest first."""
        return self._edges(self.target == number, self.source)

    def outgoing(self, number: int) -> list[tuple[int, float]]:
        """(target, weight) of the edges out of a node, strongest first."""
        return self._edges(self.source == number, self.target)

    def _edges(self, chosen, ends):
        weights = self.weight[chosen]
        order = weights.abs().argsort(descending=True, stable=True)
        return list(zip(ends[chosen][order].tolist(), weights[order].tolist(), strict=True))

    def row_errors(self) -> torch.Tensor:
        """Distance of each row from its total, relative to the sum of the row's magnitudes.

        Returns:
            `torch.Tensor` of shape `(nodes,)`; NaN for nodes without a row.
        """
        total = self.total.double()
        return (self._row_sums() - total).abs() / torch.maximum(self.row_magnitudes, total.abs())

    def row_residuals(self) -> torch.Tensor:
        """Distance of each row from its total, relative to the larger of total and the row's largest weight.

        Returns:
            `torch.Tensor` of shape `(nodes,)`; 0 up to rounding, NaN for nodes without a row.
        """
        largest = self.total.double().abs()
        largest = largest.scatter_reduce(0, self.target, self.weight.double().abs(), "amax")
        return (self._row_sums() - self.total.double()).abs() / largest.clamp(min=1e-30)

    def _row_sums(self):
        return self.rest.double().index_add(0, self.target, self.weight.double())

    # ------------------------------------------------------------------------------------------------ influence

    @property
    def row_magnitudes(self) -> torch.Tensor:
        """Sum of the magnitudes of each row, `(nodes,)` in float64; a tiny number for nodes without a row."""
        return row_magnitudes(self.target, self.weight, self.rest_abs)

    @property
    def _flow(self):
        """The arguments that the functions of influence share."""
        return self.source, self.target, edge_shares(self.target, self.weight, self.rest_abs), self.target_weights

    def influence(self) -> torch.Tensor:
        """Influence of each node on the targets, over paths of every length (Ameisen et al. 2025, "Circuit Tracing").

        Returns:
            `torch.Tensor` of shape `(nodes,)` in float64; 0 for targets. The influence of all tokens, positions, errors,
            MLPs, biases and unexpanded features sums to one less the influence that flows into `rest`.
        """
        return influence(*self._flow)

    def strongest_features(self, count: int = 10) -> list[tuple[int, float]]:
        """(node, influence) of the features with most influence, strongest first."""
        features = self.is_kind("feature").nonzero()[:, 0]
        influences = self.influence()[features]
        order = influences.argsort(descending=True)[:count]
        return list(zip(features[order].tolist(), influences[order].tolist(), strict=True))

    def feature_numbers(self) -> dict[str, list[int]]:
        """Dictionary -> numbers of its features that are nodes, at whichever positions, in ascending order."""
        features = self.is_kind("feature")
        pairs = torch.stack([self.dictionary[features], self.index[features]], dim=1).unique(dim=0).tolist()
        found: dict[str, list[int]] = {}
        for dictionary, feature in pairs:
            found.setdefault(self.dictionaries[dictionary], []).append(feature)
        return found

    def edge_influence(self) -> torch.Tensor:
        """Influence on the targets that each edge carries, `(edges,)` in float64."""
        return edge_influence(*self._flow)

    def scores(self) -> dict[str, float]:
        """Scores of how much of the graph is explained by features rather than by errors of the dictionaries.

        Where rows do not sum to the measured values, a warning is logged: see [`~AttributionGraph.warning`].

        Returns:
            `dict[str, float]`:

            - `replacement`: influence of token and position embeddings, as a share of the influence of embeddings, errors
              and whole MLPs.
            - `completeness`: share of the inputs of nodes that does not come from errors or whole MLPs, nodes weighted by
              their influence.
            - `rest`: share of the influence that flows into effects outside the graph. The first two scores leave these
              out, as in the paper, except for errors among them, which count in `completeness`.
        """
        warn(self.warning)
        return self._scores()

    def _scores(self):
        magnitudes = self.row_magnitudes
        return scores(
            *self._flow,
            rest_share=self.rest_abs.double() / magnitudes,
            error_share=self.rest_error.double() / magnitudes,
            has_row=self.expanded,
            is_embedding=self.is_kind("token", "position"),
            is_error=self.is_kind("error", "mlp"),
        )

    @property
    def whole_scores(self) -> dict[str, float]:
        """Scores of the graph before pruning, as in [`~AttributionGraph.scores`]; no warning is logged."""
        return self.metadata.get("scores") or self._scores()

    @property
    def warning(self) -> str | None:
        """A warning where rows do not sum to the measured values as far as rounding allows; otherwise `None`."""
        # Rows of combined graphs may cancel; each of the combined graphs was checked by itself.
        if any(how in self.metadata for how in ("contrast", "union")):
            return self.metadata.get("warning")
        # A target has a row, even one whose total is not a number.
        rows = self.expanded | self.is_kind("target")
        matters = (self.influence() + self.target_weights)[rows]
        return row_warning(self.row_errors()[rows], matters, self.metadata.get("dtype") or "float32", "graph")

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> "AttributionGraph":
        """Keep the nodes, and then the edges, that together carry most of the influence (Ameisen et al. 2025).

        Tokens, positions and targets stay. Features without an edge in or out, and other nodes without an edge out, are
        dropped too. Contributions of dropped nodes and edges go into `rest`, so that rows still sum. What was dropped is
        counted in `metadata["pruning"]`, errors and features separately; `metadata["scores"]` are the scores of the whole
        graph, and `cumulative_influence` says how much of its influence comes from each node and all stronger ones.

        Args:
            nodes (`float`, *optional*, defaults to 0.8): Share of the cumulative influence that is kept with the nodes.
            edges (`float`, *optional*, defaults to 0.98):
                Share of the cumulative influence that is kept with the edges between those nodes.

        Returns:
            [`AttributionGraph`]: a new graph.

        Raises:
            [`TranscoderError`]: a share is not between 0 and 1.
        """
        fixed = self.is_kind("token", "position", "target")
        keep, keep_edges, report = prune(
            *self._flow,
            nodes=nodes,
            edges=edges,
            fixed=fixed,
            needs_input=self.is_kind("feature") & self.expanded,
            is_error=self.is_kind("error", "mlp"),
            is_feature=self.is_kind("feature"),
        )
        pruned = self.select(keep, keep_edges)._with_metadata(scores=self.whole_scores, pruning=report)
        if "pruning" in self.metadata:
            # The influence in the whole graph, which files of earlier versions lack.
            return pruned
        cumulative = cumulative_shares(self.influence())
        # The sum crosses the share with the weakest nodes that are kept.
        cumulative = torch.where(fixed, cumulative, cumulative.clamp(max=nodes))
        return dataclasses.replace(pruned, cumulative_influence=cumulative[keep])

    def with_validation(self, validation: EdgeValidation) -> "AttributionGraph":
        """The graph with the result of [`validate_edges`], which its page, its card and its files then contain.

        Args:
            validation ([`EdgeValidation`]): Predicted and measured effects of this graph, or of a part of it.

        Returns:
            [`AttributionGraph`]: a new graph.
        """
        found = validation.to_dict()
        # Node numbers are left out: they refer to the validated graph, which may be a part of this one.
        edges = [{key: edge[key] for key in edge if key not in ("source", "target")} for edge in found["edges"]]
        return self._with_metadata(certificate=found["summary"], validated_edges=edges)

    def with_note(self, note: str) -> "AttributionGraph":
        """The graph with a sentence that its page and its files contain, such as why something was left out.

        Args:
            note (`str`): The sentence.

        Returns:
            [`AttributionGraph`]: a new graph.
        """
        return self._with_metadata(notes=[*self.metadata.get("notes", ()), note])

    def _with_metadata(self, **values):
        return dataclasses.replace(self, metadata={**self.metadata, **values})

    def select(self, keep: torch.Tensor, keep_edges: torch.Tensor | None = None) -> "AttributionGraph":
        """The graph of some nodes. Contributions of other nodes, and of edges left out, go into `rest`.

        Args:
            keep (`torch.BoolTensor` of shape `(nodes,)`): Nodes to keep.
            keep_edges (`torch.BoolTensor` of shape `(edges,)`, *optional*): Edges between them to keep, all by default.

        Returns:
            [`AttributionGraph`]
        """
        stays = keep[self.source] & keep[self.target]
        if keep_edges is not None:
            stays &= keep_edges
        gone = ~stays & keep[self.target]
        to, weight = self.target[gone], self.weight[gone]
        from_error = self.is_kind("error", "mlp")[self.source[gone]]
        number = torch.cumsum(keep.long(), 0) - 1
        changed = {
            name: getattr(self, name)[keep]
            for name in ("kind", "layer", "position", "index", "dictionary", "value", "total")
        }
        if self.cumulative_influence is not None:
            changed["cumulative_influence"] = self.cumulative_influence[keep]
        return dataclasses.replace(
            self,
            **changed,
            rest=self.rest.index_add(0, to, weight)[keep],
            rest_abs=self.rest_abs.index_add(0, to, weight.abs())[keep],
            rest_error=self.rest_error.index_add(0, to, weight.abs() * from_error)[keep],
            source=number[self.source[stays]],
            target=number[self.target[stays]],
            weight=self.weight[stays],
        )

    # ------------------------------------------------------------------------------------------------ export
    # Conveniences: the files that they import take the graph for types only.

    def to_html(
        self,
        path: str | os.PathLike,
        features: Mapping[str, Sequence[FeatureExplanation]] | None = None,
        labels: str | os.PathLike | Mapping[str, Mapping[int, str]] | None = None,
    ) -> Path:
        """Write the graph as one self-contained interactive HTML page. Prune a large graph first.

        [`~hf_transcoders.circuits.graphs.write_graph_page`] writes several graphs as one page.

        Args:
            path (`str` or `os.PathLike`): The file to write.
            features (`Mapping[str, Sequence[FeatureExplanation]]`, *optional*):
                Dictionary -> explanations ([`explain_features`]) of its features.
            labels (`str`, `os.PathLike` or `Mapping[str, Mapping[int, str]]`, *optional*):
                Labels of features: a file that a page saved, with pins and groups, or dictionary -> feature -> label.

        Returns:
            `Path`: the file.

        Raises:
            [`TranscoderError`]: the graph has too many edges for a browser, or `features` or `labels` are of other
                dictionaries.
        """
        from .page_data import write_graph_page

        return write_graph_page(path, self, features, labels)

    def to_viewer_json(self, path: str | os.PathLike, slug: str | None = None, **kwargs) -> Path:
        """Write the graph as the JSON that published viewers of attribution graphs read. Prune a large graph first.

        Args:
            path (`str` or `os.PathLike`): The file to write, such as `ioi.json`.
            slug (`str`, *optional*): Name of the graph in addresses. The name of the file by default.
            kwargs: `scan`, `features` and so on, as for [`~hf_transcoders.circuits.graphs.viewer.viewer_graph`].

        Returns:
            `Path`: the file.
        """
        from .viewer import dump, viewer_graph

        return write_text(path, dump(viewer_graph(self, Path(path).stem if slug is None else slug, **kwargs)))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        features: Mapping[str, Sequence[FeatureExplanation]] | None = None,
        subfolder: str = "",
        **kwargs,
    ):
        """Publish the graph with its page and a card, in one commit.

        Args:
            repo_id (`str`): Repo to push to, such as `"me/my-graph"`, which is created if it does not exist.
            features (`Mapping[str, Sequence[FeatureExplanation]]`, *optional*):
                Dictionary -> explanations of its features, for the page.
            subfolder (`str`, *optional*, defaults to `""`): Folder in the repo for all files.
            kwargs: `commit_message`, `private`, `token`, `revision`.

        Returns:
            [`~huggingface_hub.CommitInfo`]

        Raises:
            [`TranscoderError`]: the graph cannot be pushed; the message says why, and what to do.
        """
        from ...hub.graphs import push_graph_folder
        from ...hub.public import hidden_names, public_values
        from .graph_card import graph_card
        from .page_data import MAX_EDGES

        names = hidden_names([self.metadata.get("model")])
        published = dataclasses.replace(self, metadata=public_values(self.metadata, names))
        with tempfile.TemporaryDirectory() as folder:
            published.save_pretrained(folder)
            page = published if self.num_edges <= MAX_EDGES else published.prune()
            page.to_html(Path(folder, "graph.html"), features)
            return push_graph_folder(
                folder, repo_id, lambda name: graph_card(published, name, subfolder), subfolder=subfolder, **kwargs
            )

    # ------------------------------------------------------------------------------------------------ files

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Save the graph as `graph.safetensors` and `graph.json`, both or neither.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to save to, which is created if it does not exist.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: values.pop(name) for name in (*TENSORS, *OPTIONAL_TENSORS)}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_graph(save_directory, tensors, {**values, "targets": list(map(dataclasses.asdict, self.targets))})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "AttributionGraph":
        """Load a graph from a folder or the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub id.
            kwargs: `revision`, `token`, `cache_dir`, `subfolder` and so on, as for any model.

        Returns:
            [`AttributionGraph`]

        Raises:
            [`TranscoderError`]: the folder or repo has no graph, or its files are damaged or too new.
        """
        return cls(**read_graph(pretrained_model_name_or_path, **kwargs))
