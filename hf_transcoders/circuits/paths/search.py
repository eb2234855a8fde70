"""The strongest computational paths to a target, by greedy search."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...dictionaries import Dictionaries, fitting_dictionaries
from ...errors import TranscoderError
from ...lm.wrappers import measures_model
from ...text.printable import printable
from ..graphs.attribution import measured
from ..graphs.nodes import TargetInfo
from ..graphs.recording import record
from ..graphs.row_sums import sums_do_not_hold, warn
from ..graphs.targets import Target, resolve_targets
from ..prompt_tokens import Prompt, encode_prompt, token_labels
from .expansion import Expander
from .filters import Filters, filter_list
from .path_graph import PathGraph, merge_paths
from .steps import KINDS, Path, Step


@dataclass(frozen=True)
class GreedyPaths:
    """The result of [`greedy_paths`].

    Args:
        target (`TargetInfo`): The target of the paths.
        value (`float`): Value of the target in this run, to which the contributions of all paths of one step sum.
        levels (`list[list[Path]]`):
            Paths of one step, of two steps and so on, strongest first; lengths without paths are left out.
        sums (`dict[tuple, dict[str, float]]`):
            Contributions of all steps into which a path was expanded, kept or not, summed by kind. Keys are `Path.key` of
            the expanded paths, and `()` for the target. The sums add up to the contribution of the path.
        input_ids (`list[int]`), tokens (`list[str]`): Tokens of the prompt, as ids and as text.
        settings (`dict`): Model, dictionaries and arguments, as JSON.
        warning (`str`, *optional*): A warning where the sums differ from the values by more than rounding.
    """

    target: TargetInfo
    value: float
    levels: list[list[Path]]
    sums: dict[tuple, dict[str, float]]
    input_ids: list[int]
    tokens: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    warning: str | None = None

    @property
    def paths(self) -> list[Path]:
        """Paths of every length, short ones first."""
        return [path for level in self.levels for path in level]

    def with_levels(self, levels: list[list[Path]]) -> "GreedyPaths":
        """The result with other paths, such as those chosen by [`select_paths`]; empty levels are left out."""
        return replace(self, levels=[level for level in levels if level])

    def to_graph(self, paths: Sequence[Path] | None = None) -> PathGraph:
        """Merge paths into a graph: see [`~hf_transcoders.circuits.paths.path_graph.merge_paths`].

        Args:
            paths (`Sequence[Path]`, *optional*): Some of the paths. All by default.
        """
        return merge_paths(self.paths if paths is None else paths, self.target, self.value, self.sums)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the sums."""
        return {
            "target": asdict(self.target),
            "value": self.value,
            "input_ids": self.input_ids,
            "tokens": self.tokens,
            "levels": [[{"text": str(path), **path.to_dict()} for path in level] for level in self.levels],
            "settings": self.settings,
            "warning": self.warning,
        }

    def to_text(self) -> str:
        """Paths and their factors as text for the terminal."""
        lines = [f"WARNING: {self.warning}", ""] if self.warning else []
        lines += [
            f"{printable(self.target.label)} at token {self.target.position}: {self.value:+.4f}",
            "The contribution of a path is the product of the factors of its last step, the attention of its other heads and "
            "the weights of its other features.",
        ]
        for level in self.levels:
            lines += ["", f"{len(level[0])} step{'s' if len(level[0]) > 1 else ''}"]
            for path in level:
                factors = " <- ".join(
                    " * ".join(f"{name} {value:.4g}" for name, value in step.factors) for step in path.steps
                )
                lines += [f"  {path.contribution:+.4f}  {path}", f"           {factors}"]
        return "\n".join(lines)

    __str__ = to_text


@measures_model
@torch.no_grad()
def greedy_paths(
    base_model: PreTrainedModel,
    transcoders: Dictionaries,
    prompt: Prompt,
    target: Target | str | int | tuple | torch.Tensor | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_paths: int = 15,
    num_steps: int = 3,
    filter: Filters | None = None,
    skip_first: int = 1,
) -> GreedyPaths:
    """The strongest computational paths to a target, through features, heads and embeddings (Dunefsky et al. 2024, Alg. 1).

    The activation that a target reads is decomposed into the contributions of features, of heads with each token they
    attend to, of embeddings, errors and biases; the strongest contributions are decomposed in turn. Attention patterns and
    norm scales are frozen, and each norm is one linear map, so that the contributions to a path sum to the contribution of
    the path. Paths of both signs are followed.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            A causal language model, which runs in evaluation mode. Use fp32 for sums that are exact.
        transcoders ([`TranscoderSet`], [`TranscoderModel`], a mapping or several):
            Dictionaries of any layers: transcoders, skip transcoders, SAEs of the stream or of attention's outputs. MLPs
            without one end a path.
        prompt (`str`, `Sequence[int]` or `Mapping`):
            Text, to which the tokenizer's special tokens are added unless it begins with them, as a chat template makes
            it; token ids; or the output of the tokenizer.
        target (*optional*):
            Target of the paths: a token, a pair of tokens (for the difference of their logits), a vector, or any [`Target`].
            By default the most likely next token.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Required for text; otherwise used for labels only.
        num_paths (`int`, *optional*, defaults to 15):
            Number of paths of each length: of the strongest paths, which are reported, and of the strongest paths that end
            in a feature, head or skip connection, which are continued.
        num_steps (`int`, *optional*, defaults to 3):
            Number of steps of the longest paths.
        filter ([`PathFilter`] or a sequence, *optional*):
            Conditions on steps, of which each step must meet one. All steps by default.
        skip_first (`int`, *optional*, defaults to 1):
            Number of tokens at the start at which the dictionaries are not used: the MLP outputs there are errors.

    Returns:
        [`GreedyPaths`]

    Raises:
        [`TranscoderError`]: a dictionary is for another model, the prompt is empty or too long, the target is unknown.

    Example:

    ```python
    >>> found = greedy_paths(base, transcoders, prompt, (" Mary", " John"), tokenizer=tokenizer)
    >>> print(found)
    >>> select_paths(found.paths, contains=PathFilter(kind="head"), ends_with=PathFilter(kind="token"))
    >>> print(found.to_graph())
    ```
    """
    for name, value in (("num_paths", num_paths), ("num_steps", num_steps)):
        if value < 1:
            raise TranscoderError(f"`{name}` is {value}; give at least 1.")
    filters = filter_list(filter)
    dictionaries = fitting_dictionaries(base_model, transcoders)
    run = record(base_model, dictionaries, [encode_prompt(base_model, prompt, tokenizer)], skip_first)[0]
    functionals, (info,) = resolve_targets(run, None if target is None else [target], tokenizer, max_logits=1)
    value = float(measured(run, functionals))
    ids = run.input_ids.tolist()
    tokens = token_labels(ids, tokenizer)

    expander = Expander(run)
    place = int(functionals.layer[0]), functionals.point[0]
    reads = expander.read(*place, functionals.position, functionals.vector, functionals.bias)
    beam: list[tuple[Step, ...]] = [()]
    levels: list[list[Path]] = []
    sums, expanded = {}, []
    for _ in range(num_steps):
        found, added = expander.expand(reads, num_paths, filters)
        for steps, row in zip(beam, added.tolist(), strict=True):
            sums[tuple(step.key for step in steps)] = dict(zip(KINDS, row, strict=True))
        expanded += beam
        reported, continued = found.strongest(num_paths), found.strongest(num_paths, found.continues)
        extended = _extended(found[reported], beam, run.names, reads.position, tokens)
        if extended:
            levels.append([Path(info.label, steps) for steps in extended])
        beam = _extended(found[continued], beam, run.names, reads.position, tokens)
        if not beam:
            break
        reads = expander.follow(found[continued], reads)
    settings = {
        "model": base_model.config.name_or_path or None,
        "model_type": base_model.config.model_type,
        "dictionaries": {name: dictionary.config.name_or_path or None for name, dictionary in dictionaries.items()},
        "num_paths": num_paths,
        "num_steps": num_steps,
        "filter": [asdict(one) for one in filters],
        "skip_first": skip_first,
    }
    warning = _check_sums(run, value, sums, expanded)
    warn(warning)
    return GreedyPaths(info, value, levels, sums, ids, tokens, settings, warning)


def _check_sums(run, value, sums, expanded):
    """A warning where the contributions to an expanded path do not sum to the contribution of the path."""
    parts = torch.tensor([list(by_kind.values()) for by_kind in sums.values()], dtype=torch.float64)
    expected = [Path("", steps).contribution if steps else value for steps in expanded]
    return sums_do_not_hold(
        run.model.dtype, parts.sum(1), parts.abs().sum(1), torch.tensor(expected), "search for paths"
    )


def _extended(found, beam, names, positions, tokens):
    """The steps of the paths, each extended by one entry."""
    to = positions[found.row].tolist()
    columns = (
        found.row, found.kind, found.layer, found.position, found.index, found.dictionary, found.activation,
        found.weight, found.contribution,
    )  # fmt: skip
    return [
        (
            *beam[row],
            Step(
                kind=KINDS[kind], layer=layer, position=position, to=at, index=index,
                dictionary=None if dictionary < 0 else names[dictionary], activation=activation, weight=weight,
                contribution=contribution, token=tokens[position],
            ),
        )
        for at, row, kind, layer, position, index, dictionary, activation, weight, contribution in zip(
            to, *(column.tolist() for column in columns), strict=True
        )
    ]  # fmt: skip
