"""The attribution graph of a prompt: which features, tokens and errors made the model say what it says."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from ...errors import TranscoderError
from ...files import atomic_directory, read_settled, write_text
from ...text.printable import printable
from ...text.strict_json import to_json


if TYPE_CHECKING:
    from ...features.feature_examples import FeatureExplanation
    from .validation import Certificate

#: What a node can be. Codes in files are indices into this tuple: add at the end only.
KINDS = ("token", "position", "feature", "error", "mlp", "bias", "target")

TENSORS_NAME, INFO_NAME = "graph.safetensors", "graph.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class TargetInfo:
    """What one target of a graph is.

    Args:
        label (`str`): Such as `" Mary"` or `" Mary - John"`.
        position (`int`): The token behind which it is read.
        weight (`float`): Its share where influence is counted; a logit's probability by default.
        probability (`float`, *optional*): Of the token, where the target is the logit of one.
        token_id (`int`, *optional*): That token.
        layer (`int`, *optional*), point (`str`, *optional*): Where it is read; `"final"` behind the final norm.
    """

    label: str
    position: int
    weight: float
    probability: float | None = None
    token_id: int | None = None
    layer: int | None = None
    point: str | None = None


@dataclass(frozen=True)
class Node:
    """One node, as plain values: what [`AttributionGraph.node`] answers with."""

    number: int
    kind: str
    layer: int
    position: int
    index: int
    dictionary: str | None
    value: float
    total: float | None


@dataclass
class AttributionGraph:
    r"""Nodes and their direct effects on each other, with attention patterns and norm scales held as they were.

    The weight of an edge is exactly what the source adds to the target's pre-activation (or logit). For every node that
    was expanded, `sum of its incoming weights + rest = total`: see [`~AttributionGraph.row_residuals`].

    Nodes are ordered so that every edge leads from a lower to a higher number.

    Args:
        kind (`torch.LongTensor` of shape `(nodes,)`):
            Index into [`KINDS`]: `token` and `position` embeddings, `feature`s of dictionaries, what they miss (`error`),
            whole outputs of MLPs without a dictionary (`mlp`), `bias`es of a layer (over all positions), `target`s.
        layer (`torch.LongTensor` of shape `(nodes,)`):
            Layer that writes; -1 for embeddings, the number of layers for targets behind the last block.
        position (`torch.LongTensor` of shape `(nodes,)`):
            Token of the prompt; -1 for biases, and in graphs that are summed over positions.
        index (`torch.LongTensor` of shape `(nodes,)`):
            Number of the feature; id of the token; number of the target in `targets`; otherwise -1 (that of the position
            for embeddings of positions in graphs that are summed over positions).
        dictionary (`torch.LongTensor` of shape `(nodes,)`):
            Index into `dictionaries` for features and errors; otherwise -1.
        value (`torch.Tensor` of shape `(nodes,)`):
            Activation of a feature; norm of what an error, MLP, bias or embedding writes; 0 for targets.
        total (`torch.Tensor` of shape `(nodes,)`):
            Pre-activation of a feature, or value of a target, that the row of the node sums to; NaN for those without
            a row (embeddings, errors, MLPs, biases, and features that were not expanded).
        rest, rest_abs (`torch.Tensor` of shape `(nodes,)`):
            Sum, and sum of magnitudes, of all direct effects on the node that are not among the edges.
        rest_error (`torch.Tensor` of shape `(nodes,)`):
            The part of `rest_abs` that comes from errors.
        source, target (`torch.LongTensor` of shape `(edges,)`):
            Nodes that each edge leads from and to; sorted by `target`.
        weight (`torch.Tensor` of shape `(edges,)`):
            Direct effects.
        input_ids (`list[int]`), tokens (`list[str]`):
            The prompt.
        targets (`list[TargetInfo]`):
            What is explained.
        dictionaries (`list[str]`):
            Names of the dictionaries.
        num_layers (`int`):
            Layers of the base model.
        target_vector (`torch.Tensor` of shape `(targets, width)`), target_bias (`torch.Tensor` of shape `(targets,)`):
            The targets as functions of what is read there: `vector @ x + bias`. With them a target can be measured again.
        metadata (`dict`):
            Protocol as JSON: model and revision, dictionaries and where they come from, settings, versions, pruning.
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

    # ------------------------------------------------------------------------------------------------ what is in it

    @property
    def num_nodes(self) -> int:
        return len(self.kind)

    @property
    def num_edges(self) -> int:
        return len(self.weight)

    def is_kind(self, *kinds: str) -> torch.Tensor:
        """`(nodes,)` bool: which nodes are of one of these kinds."""
        codes = torch.tensor([KINDS.index(kind) for kind in kinds])
        return torch.isin(self.kind, codes)

    @property
    def expanded(self) -> torch.Tensor:
        """`(nodes,)` bool: which nodes have a row, so that what they consist of is known."""
        return ~self.total.isnan()

    @property
    def target_weights(self) -> torch.Tensor:
        """`(nodes,)`: weight of each target, 0 elsewhere; sums to 1."""
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
        """A short text for a node, such as `L8 feature 1203 at " gave"`."""
        node = self.node(number)
        if node.kind == "target":
            return _one_line(self.targets[node.index].label)
        return node_label(node.kind, node.layer, node.position, node.index, self.tokens, self.num_layers)

    def find(self, dictionary: str, feature: int, position: int) -> int:
        """Number of the node of a feature.

        Raises:
            [`TranscoderError`]: the feature is not in the graph.
        """
        if dictionary not in self.dictionaries:
            raise TranscoderError(
                f"The graph has no dictionary '{dictionary}': choose from {', '.join(self.dictionaries)}."
            )
        found = (
            self.is_kind("feature")
            & (self.dictionary == self.dictionaries.index(dictionary))
            & (self.index == feature)
            & (self.position == position)
        ).nonzero()
        if not len(found):
            raise TranscoderError(
                f"Feature {feature} of {dictionary} at token {position} is not in the graph: it was not active there, or "
                "was left out as too weak (build the graph with more `max_features`, prune less)."
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

    def row_residuals(self) -> torch.Tensor:
        """How far each row is from its total, relative to the larger of total and the row's largest weight.

        Returns:
            `torch.Tensor` of shape `(nodes,)`: 0 up to rounding; NaN for nodes without a row.
        """
        sums = self.rest.double().index_add(0, self.target, self.weight.double())
        largest = self.total.double().abs()
        largest = largest.scatter_reduce(0, self.target, self.weight.double().abs(), "amax")
        return (sums - self.total.double()).abs() / largest.clamp(min=1e-30)

    # ------------------------------------------------------------------------------------------------ what to do with it

    def influence(self) -> torch.Tensor:
        """How much of the targets each node accounts for: see [`~hf_transcoders.circuits.graphs.influence.influence`]."""
        from .influence import influence

        return influence(self)

    def scores(self) -> dict[str, float]:
        """Replacement and completeness score: see [`~hf_transcoders.circuits.graphs.influence.scores`].

        Where rows of the graph do not sum to what was measured, a warning says so: see [`~AttributionGraph.warning`].
        """
        from .influence import scores
        from .row_sums import warn

        warn(self.warning)
        return scores(self)

    @property
    def warning(self) -> str | None:
        """A sentence that says so, where rows do not sum to what was measured as far as rounding lets them."""
        from .row_sums import rows_do_not_sum

        return rows_do_not_sum(self)

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> "AttributionGraph":
        """The part of the graph that matters most: see [`~hf_transcoders.circuits.graphs.pruning.prune`]."""
        from .pruning import prune

        return prune(self, nodes, edges)

    def select(self, keep: torch.Tensor, keep_edges: torch.Tensor | None = None) -> "AttributionGraph":
        """The graph of some nodes. What the others, and edges left out, contribute goes into `rest`.

        Args:
            keep (`torch.BoolTensor` of shape `(nodes,)`): Nodes.
            keep_edges (`torch.BoolTensor` of shape `(edges,)`, *optional*): Edges between them, all by default.

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

    # ------------------------------------------------------------------------------------------------ seeing it

    def to_html(
        self,
        path: str | os.PathLike,
        features: Mapping[str, Sequence["FeatureExplanation"]] | None = None,
        certificate: "Certificate | None" = None,
    ) -> Path:
        """Writes the graph as one HTML page to walk through, which works offline. Prune a large graph first.

        Args:
            path (`str` or `os.PathLike`): The file to write.
            features (`Mapping[str, Sequence[FeatureExplanation]]`, *optional*):
                Dictionary -> explanations ([`explain_features`]), to be shown with the features.
            certificate ([`~hf_transcoders.circuits.graphs.certificate.Certificate`], *optional*):
                To show its single edges; its summary is shown in any case.

        Returns:
            `Path`: the file.

        Raises:
            [`TranscoderError`]: the graph has too many edges for a browser.
        """
        from ...reports.graph.graph_page import write_graph
        from .page_data import page_data

        return write_graph(path, page_data(self, features, certificate))

    def to_viewer_json(self, path: str | os.PathLike, **kwargs) -> Path:
        """Writes the graph as the JSON of published viewers: see [`~hf_transcoders.circuits.graphs.export.to_viewer_json`].

        Args:
            path (`str` or `os.PathLike`): The file to write, such as `ioi.json`; its name is the slug, if none is given.
            kwargs: `slug`, `scan`, `features` ... as there.

        Returns:
            `Path`: the file.
        """
        from .viewer import to_viewer_json

        content = to_viewer_json(self, kwargs.pop("slug", Path(path).stem), **kwargs)
        return write_text(path, json.dumps(content, ensure_ascii=False, allow_nan=False))

    # ------------------------------------------------------------------------------------------------ files

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Saves the graph as `graph.safetensors` and `graph.json`; nothing half-written is ever found there.

        Args:
            save_directory (`str` or `os.PathLike`): A folder, made if it does not exist.
        """
        with atomic_directory(save_directory, replacing="graph.*") as partial:
            save_file(
                {name: getattr(self, name).contiguous() for name in _TENSORS},
                partial / TENSORS_NAME,
                metadata={"format": "pt"},
            )
            info = {
                "format_version": FORMAT_VERSION,
                "input_ids": self.input_ids,
                "tokens": self.tokens,
                "targets": [dataclasses.asdict(target) for target in self.targets],
                "dictionaries": self.dictionaries,
                "num_layers": self.num_layers,
                "metadata": self.metadata,
            }
            write_text(partial / INFO_NAME, to_json(info, ensure_ascii=False) + "\n")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        features: Mapping[str, Sequence["FeatureExplanation"]] | None = None,
        subfolder: str = "",
        **kwargs,
    ):
        """Publishes the graph with its page and a card, in one commit.

        Args:
            repo_id (`str`): Such as `"me/my-graph"`; made if it does not exist.
            features (`Mapping[str, Sequence[FeatureExplanation]]`, *optional*): For the page, as in [`~AttributionGraph.to_html`].
            subfolder (`str`, *optional*, defaults to `""`): Where in the repo everything goes.
            kwargs: `commit_message`, `private`, `token`, `revision`.

        Returns:
            [`~huggingface_hub.CommitInfo`]

        Raises:
            [`TranscoderError`]: what kept it from happening, and what to do.
        """
        # As with models: publishing is a method of what is published.
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "AttributionGraph":
        """Loads a graph from a folder or the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder, or Hub id.
            kwargs: `revision`, `token`, `cache_dir`, `subfolder` ... as for any model.

        Returns:
            [`AttributionGraph`]

        Raises:
            [`TranscoderError`]: there is no graph there, or its files are damaged or too new.
        """
        from transformers.utils import cached_file

        from .graph_file import read_graph

        def read(opening=lambda path: path):
            try:
                paths = [
                    cached_file(pretrained_model_name_or_path, name, **kwargs) for name in (INFO_NAME, TENSORS_NAME)
                ]
            except (OSError, ValueError) as error:
                raise TranscoderError(
                    f"{printable(pretrained_model_name_or_path)} is not an attribution graph (no {INFO_NAME} and {TENSORS_NAME} "
                    "there): give a folder or repo that `save_pretrained` of a graph has made."
                ) from error
            return read_graph(*(opening(path) for path in paths))

        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        # Both files are of one save, even where another process saves there meanwhile.
        return read_settled(folder, read) if folder.is_dir() else read()


def node_label(kind: str, layer: int, position: int, index: int, tokens: list[str], num_layers: int) -> str:
    """A short text for a node that is no target: see [`AttributionGraph`] for the arguments."""
    if kind == "bias":
        return "bias behind the last block" if layer == num_layers else f"L{layer} biases"
    # Graphs of several prompts have nodes that are wherever they are.
    somewhere = position >= 0 and tokens
    at = f'at "{_one_line(tokens[position])}" ({position})' if somewhere else "anywhere"
    if kind in ("token", "position"):
        return f"{kind} {at if somewhere else max(index, position)}"
    return f"L{layer} {f'feature {index}' if kind == 'feature' else kind} {at}"


def _one_line(text):
    return text.replace("\r", "\\r").replace("\n", "\\n")


_NODE_TENSORS = (
    "kind", "layer", "position", "index", "dictionary", "value", "total", "rest", "rest_abs", "rest_error",
)  # fmt: skip
_TENSORS = (*_NODE_TENSORS, "source", "target", "weight", "target_vector", "target_bias")
