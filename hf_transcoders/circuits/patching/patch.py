"""Activation patching: what each head, MLP or point of the residual stream does for a task."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from transformers import PreTrainedModel

from ...errors import TranscoderError
from ...lm.architectures import num_layers
from ...lm.attention import num_heads
from ...lm.sites import HEAD_POINTS
from ...lm.wrappers import measures_model
from ...tasks.task import Task
from .engine import PatchEngine
from .patch_plan import PatchPlan
from .results import PatchResult


@measures_model
def patch_heads(
    base: PreTrainedModel,
    task: Task,
    position: str | int | torch.Tensor = "END",
    component: Literal["z", "query", "key", "value", "pattern"] = "z",
    *,
    per_query_head: bool = False,
    layers: Iterable[int] | None = None,
    direction: Literal["noising", "denoising"] | None = None,
    ablation: str | None = None,
    metric: str | Callable | None = None,
    engine: PatchEngine | None = None,
    **settings,
) -> PatchResult:
    """Patch one head at a time.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            A causal language model, which runs in evaluation mode.
        task ([`Task`]):
            Clean and corrupted prompts.
        position (`str`, `int` or `torch.LongTensor` of shape `(prompts,)`, *optional*, defaults to `"END"`):
            The token to patch at: the name of a position of the task, an index, or `"all"` tokens at once.
        component (`str`, *optional*, defaults to `"z"`):
            `"z"`, what the head read, before the output projection; `"query"`, `"key"` (both after the rotary
            embedding) or `"value"`; or `"pattern"`, where the head looks from that token. With grouped queries `"key"`
            and `"value"` are those of key-value heads, each of which changes all heads that share it.
        per_query_head (`bool`, *optional*, defaults to `False`):
            Whether a `"key"` or `"value"` changes for one head only, and the others that share it keep theirs.
        layers (`Iterable[int]`, *optional*):
            The layers, all by default.
        direction, ablation, metric:
            As [`PatchEngine`] has them, with its defaults.
        engine ([`PatchEngine`], *optional*):
            One for the same model and task whose recorded runs are used again. It has its own `direction`, `ablation`,
            `metric` and `settings`, so these are given to one of the two.
        settings:
            `batch_size`, `max_memory`, `seed` and `progress` of [`PatchEngine`].

    Returns:
        [`PatchResult`] with the axes `layer` and `head`.

    Raises:
        [`TranscoderError`]: the task has no such position or no corrupted prompts, or the model's attention cannot be
            edited.

    Example:

    ```python
    >>> result = patch_heads(model, task, position="END")
    >>> result.top(3)
    [{'layer': '9', 'head': '9', 'effect': 0.41}, ...]
    ```
    """
    if component not in HEAD_POINTS:
        raise TranscoderError(f"A head has no component '{component}': choose from {', '.join(HEAD_POINTS)}.")
    if per_query_head and component not in ("key", "value"):
        raise TranscoderError(f"Every head has its own {component}: per_query_head is for key and value.")
    engine = PatchEngine.of(base, task, engine, direction=direction, ablation=ablation, metric=metric, **settings)
    layers = _layers(base, layers)
    grouped = component in ("key", "value") and not per_query_head
    heads = num_heads(base)[grouped]
    code = f"head_{component}" if per_query_head else component
    plan = PatchPlan.grid(layers, code, heads, engine.position(position)[None])
    axes = {"layer": _names(layers), "head": _names(range(heads))}
    return _result(engine, plan, axes, component, _name(position), per_query_head)


@measures_model
def patch_residual(
    base: PreTrainedModel,
    task: Task,
    positions: Iterable[str | int] | None = None,
    point: Literal["resid_pre", "resid_mid"] = "resid_pre",
    *,
    layers: Iterable[int] | None = None,
    direction: Literal["noising", "denoising"] | None = None,
    ablation: str | None = None,
    metric: str | Callable | None = None,
    engine: PatchEngine | None = None,
    **settings,
) -> PatchResult:
    """Patch the residual stream at one block, at one token at a time.

    Args:
        base, task:
            As in [`patch_heads`].
        positions (`Iterable[str | int]`, *optional*):
            The tokens, as names of positions of the task or indices; every token by default, which takes prompts of one
            length.
        point (`str`, *optional*, defaults to `"resid_pre"`):
            `"resid_pre"`, what enters the block, or `"resid_mid"`, the stream between its attention and its MLP. What
            leaves a block enters the next.
        layers (`Iterable[int]`, *optional*):
            The layers, all by default; with `"resid_pre"` the number of layers stands for the stream that leaves the
            last block.
        direction, ablation, metric, engine, settings:
            As in [`patch_heads`].

    Returns:
        [`PatchResult`] with the axes `layer` and `position`.

    Raises:
        [`TranscoderError`]: the task has no such position or no corrupted prompts, or attention and MLP of the model run
            in parallel, so that there is nothing between them.
    """
    if point not in ("resid_pre", "resid_mid"):
        raise TranscoderError(f"The residual stream is patched at resid_pre or resid_mid, not at '{point}'.")
    engine = PatchEngine.of(base, task, engine, direction=direction, ablation=ablation, metric=metric, **settings)
    return _sweep(engine, point, _layers(base, layers), positions)


@measures_model
def patch_mlps(
    base: PreTrainedModel,
    task: Task,
    positions: Iterable[str | int] | None = ("END",),
    *,
    layers: Iterable[int] | None = None,
    direction: Literal["noising", "denoising"] | None = None,
    ablation: str | None = None,
    metric: str | Callable | None = None,
    engine: PatchEngine | None = None,
    **settings,
) -> PatchResult:
    """Patch the output of one MLP at a time, as [`patch_residual`] does with the residual stream.

    Args:
        positions (`Iterable[str | int]`, *optional*, defaults to `("END",)`):
            As in [`patch_residual`]; `None` for every token, `["all"]` for all tokens at once.
        base, task, layers, direction, ablation, metric, engine, settings:
            As in [`patch_residual`].

    Returns:
        [`PatchResult`] with the axes `layer` and `position`.
    """
    engine = PatchEngine.of(base, task, engine, direction=direction, ablation=ablation, metric=metric, **settings)
    return _sweep(engine, "mlp.out", _layers(base, layers), positions)


@measures_model
def patch_attention(
    base: PreTrainedModel,
    task: Task,
    positions: Iterable[str | int] | None = ("END",),
    *,
    layers: Iterable[int] | None = None,
    direction: Literal["noising", "denoising"] | None = None,
    ablation: str | None = None,
    metric: str | Callable | None = None,
    engine: PatchEngine | None = None,
    **settings,
) -> PatchResult:
    """Patch the output of one attention layer at a time, as [`patch_mlps`] does with MLPs."""
    engine = PatchEngine.of(base, task, engine, direction=direction, ablation=ablation, metric=metric, **settings)
    return _sweep(engine, "attn.out", _layers(base, layers), positions)


def _sweep(engine, component, layers, positions):
    if positions is None:
        if (engine.last != engine.last[0]).any():
            raise TranscoderError(
                "The prompts differ in length, so their tokens have no common numbers: name positions, such as "
                f"{', '.join(engine.task.position_names)}."
            )
        positions = range(int(engine.last[0]) + 1)
    positions = [positions] if isinstance(positions, (str, int)) else list(positions)
    plan = PatchPlan.grid(layers, component, 1, torch.stack([engine.position(each) for each in positions]))
    axes = {"layer": _names(layers), "position": _names(positions)}
    return _result(engine, plan, axes, component, None)


def _result(engine, plan, axes, component, position, per_query_head=False):
    patched = engine.run(plan)
    shape = [len(cells) for cells in axes.values()]
    protocol = {"method": "activation patching", "component": component, **engine.protocol()}
    if position is not None:
        protocol["position"] = position
    if per_query_head:
        protocol["per_query_head"] = True
    return PatchResult(
        patched.values.view(*shape, -1), patched.base, patched.source, axes, engine.readout.name, protocol
    )


def _layers(base, layers):
    return list(range(num_layers(base)) if layers is None else layers)


def _names(numbers):
    return [str(number) for number in numbers]


def _name(position):
    return "given" if isinstance(position, torch.Tensor) else position
