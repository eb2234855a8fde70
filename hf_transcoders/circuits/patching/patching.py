"""Activation and path patching: find the heads, MLPs, positions and paths of a model that matter for a task.

A task has pairs of prompts, which differ for example in a name, and a metric of the answer, such as the difference between
the logits of the right and the wrong answer. Patching runs one prompt of a pair (the *base run*), replaces one activation,
and measures the change of the metric. The meaning of the change depends on the base run and on the replacement:

- **Noising** (`direction="noising"`) runs the clean prompt with an activation of the corrupted prompt. A large effect shows
  that the model needs the clean activation: it is *necessary*, given the rest of the run. The effect of an important head
  can be small if other heads compensate for the patch.
- **Denoising** (`direction="denoising"`) runs the corrupted prompt with an activation of the clean prompt. A large effect
  shows that the clean activation restores the answer: it is *sufficient*, given the rest of the corrupted run.
- **Ablations** replace an activation independently of the other prompt of the pair. `"zero"` removes it completely, which
  can take the model far from its usual activations. `"mean"` and `"resample"` replace it by typical values, which removes
  only the information about the prompt.
- **Path patching** ([`Patching.paths`]) changes the output of one head for chosen receivers only. It finds heads that act
  on the receivers directly, and not through other heads.

With `"counterfactual"` patches, the effect of a patch is the share of the way from the metric of the base run to that of
the other run: 0 is no change, and 1 is all the way. Effects below 0 and above 1 are possible, and the effects of several
patches need not add up. With the other ablations, an effect is the change of the metric in its own unit. Effects describe
the prompts of the task; [`PatchResult.intervals`] shows how much they vary between prompts.
"""

from collections.abc import Iterable
from typing import Literal

import torch

from ...errors import TranscoderError
from ...lm.attention import num_heads
from ...lm.sites import HEAD_POINTS, Site
from .engine import PatchEngine
from .patch_plan import PatchPlan
from .path_patching import patch_paths
from .results import PatchResult


_Positions = str | int | Iterable[str | int] | None


class Patching(PatchEngine):
    """Patches a model on the prompts of a task.

    The runs of the prompts are recorded once and shared by all calls. Each method patches one kind of activation, one at a
    time; [`Patching.run`] patches any combination of them.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, which runs in evaluation mode.
        task ([`Task`]):
            Clean and corrupted prompts.
        direction (`"noising"` or `"denoising"`, *optional*, defaults to `"noising"`):
            Whether patches from the corrupted run go into the clean run, or from the clean run into the corrupted run.
        ablation (`str`, *optional*, defaults to `"counterfactual"`):
            The values to write: the activation in the `"counterfactual"` run, which is the other prompt of the pair;
            `"zero"`; its `"mean"` over the counterfactual prompts of the same template and length (over the prompts
            themselves if the task has no corrupted ones); or the activation in the base run of a random other prompt of
            the same length (`"resample"`).
        metric (`str` or `Callable`, *optional*):
            The metric of [`Readout`]; by default the metric of the task.
        batch_size (`int`, *optional*):
            Number of rows times prompts in one batch. By default it follows from the memory.
        max_memory (`int`, *optional*):
            Number of bytes that a batch may take, if no `batch_size` is given. The default is 1 GiB on a CPU and half of
            the free memory on a GPU.
        seed (`int`, *optional*, defaults to 0):
            Seed for `"resample"`.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Raises:
        [`TranscoderError`]: the settings exclude each other, the task does not have the prompts that they need, or the
            model's attention cannot be edited.

    Example:

    ```python
    >>> patching = Patching(model, task)
    >>> patching.heads("END").top(1)
    [{'layer': '9', 'head': '9', 'effect': 0.41}]
    >>> patching.paths(["layers.20.attn.head.0.query"]).shape
    (30, 9)
    ```
    """

    def heads(
        self,
        position: str | int | torch.Tensor = "END",
        component: Literal["z", "query", "key", "value", "pattern"] = "z",
        *,
        per_query_head: bool = False,
        layers: Iterable[int] | None = None,
    ) -> PatchResult:
        """Patch one head at a time.

        Args:
            position (`str`, `int` or `torch.LongTensor` of shape `(prompts,)`, *optional*, defaults to `"END"`):
                The token to patch: the name of a position of the task, a token index, or `"all"` tokens at once.
            component (`str`, *optional*, defaults to `"z"`):
                `"z"`, the output of the head before the output projection; `"query"`, `"key"` (both after the rotary
                embedding) or `"value"`; or `"pattern"`, the attention from that token. With grouped queries, `"key"` and
                `"value"` are those of key-value heads, and each changes all heads that share it.
            per_query_head (`bool`, *optional*, defaults to `False`):
                Whether a `"key"` or `"value"` changes for one query head only, and not for the others that share it.
            layers (`Iterable[int]`, *optional*):
                The layers to patch. By default all of them.

        Returns:
            [`PatchResult`] with the axes `layer` and `head`.

        Raises:
            [`TranscoderError`]: the task has no such position, or the model no such layer or component.
        """
        if component not in HEAD_POINTS:
            raise TranscoderError(f"A head has no component '{component}': choose from {', '.join(HEAD_POINTS)}.")
        shared = component in ("key", "value")
        if per_query_head and not shared:
            raise TranscoderError(f"Every head has its own {component}: per_query_head is for key and value.")
        layers = self._layers(layers)
        heads = num_heads(self.model)[shared and not per_query_head]
        code = f"head_{component}" if per_query_head else component
        plan = PatchPlan.grid(layers, code, heads, self.position(position)[None])
        more = {"position": "given" if isinstance(position, torch.Tensor) else position}
        if per_query_head:
            more["per_query_head"] = True
        return self._result(plan, {"layer": _names(layers), "head": _names(range(heads))}, component, more)

    def residual(
        self,
        positions: _Positions = None,
        point: Literal["resid_pre", "resid_mid"] = "resid_pre",
        *,
        layers: Iterable[int] | None = None,
    ) -> PatchResult:
        """Patch the residual stream at one layer and one token at a time.

        Args:
            positions (`str`, `int` or an iterable of them, *optional*):
                The tokens to patch, as names of positions of the task or token indices; `"all"` patches all tokens at once.
                By default each token is patched, which needs prompts of equal length.
            point (`str`, *optional*, defaults to `"resid_pre"`):
                `"resid_pre"`, the input of the block, or `"resid_mid"`, the stream between its attention and its MLP. The
                output of a block is the input of the next one.
            layers (`Iterable[int]`, *optional*):
                The layers to patch. By default all of them. With `"resid_pre"`, the number of layers stands for the output
                of the last block.

        Returns:
            [`PatchResult`] with the axes `layer` and `position`.

        Raises:
            [`TranscoderError`]: the task has no such position, the prompts differ in length and no positions are given, or
                attention and MLP of the model run in parallel, so that there is no `"resid_mid"`.
        """
        if point not in ("resid_pre", "resid_mid"):
            raise TranscoderError(f"The residual stream is patched at resid_pre or resid_mid, not at '{point}'.")
        return self._at_positions(point, positions, layers)

    def mlps(self, positions: _Positions = ("END",), *, layers: Iterable[int] | None = None) -> PatchResult:
        """Patch the output of one MLP at a time.

        Args:
            positions (`str`, `int` or an iterable of them, *optional*, defaults to `("END",)`):
                The tokens to patch, as for [`Patching.residual`]; `None` for each token.
            layers (`Iterable[int]`, *optional*):
                The layers to patch. By default all of them.

        Returns:
            [`PatchResult`] with the axes `layer` and `position`.
        """
        return self._at_positions("mlp.out", positions, layers)

    def attention(self, positions: _Positions = ("END",), *, layers: Iterable[int] | None = None) -> PatchResult:
        """Patch the output of one attention layer at a time.

        Args:
            positions (`str`, `int` or an iterable of them, *optional*, defaults to `("END",)`):
                The tokens to patch, as for [`Patching.residual`]; `None` for each token.
            layers (`Iterable[int]`, *optional*):
                The layers to patch. By default all of them.

        Returns:
            [`PatchResult`] with the axes `layer` and `position`.
        """
        return self._at_positions("attn.out", positions, layers)

    def paths(
        self,
        receivers: str | Site | Iterable[str | Site] = "logits",
        position: str | int | torch.Tensor = "END",
        *,
        sender_mlps: bool = False,
        freeze_mlps: bool = False,
        per_query_head: bool = False,
    ) -> PatchResult:
        """Patch the direct paths from each head to some receivers.

        For each sender, the output of the sender at `position` is patched, all other heads keep their output of the base
        run, and MLPs are recomputed or frozen. The resulting inputs of the receivers are then patched into the base run,
        for all receivers at once, and everything after them is recomputed.

        Args:
            receivers (`str`, [`Site`] or an iterable of them, *optional*, defaults to `"logits"`):
                `"logits"`, or any of `layers.8.attn.head.3.query` (or `key`, `value`) and `layers.8.mlp.in`. With grouped
                queries, the number of a `key` or `value` is the number of the key-value head, whose receivers are all
                heads that share it.
            position (`str`, `int` or `torch.LongTensor` of shape `(prompts,)`, *optional*, defaults to `"END"`):
                The token of senders and receivers, as for [`Patching.heads`]. The logits are read at `END`.
            sender_mlps (`bool`, *optional*, defaults to `False`):
                Whether MLPs are senders too.
            freeze_mlps (`bool`, *optional*, defaults to `False`):
                Whether the MLPs between sender and receivers keep their output of the base run.
            per_query_head (`bool`, *optional*, defaults to `False`):
                Whether the `key` and `value` receivers are those of one query head, with the number of that head, and not
                of the others that share them.

        Returns:
            [`PatchResult`] with the axes `layer` and `head`, where MLPs are a last head named `mlp`. Senders without a path
            to any receiver have the metric of the base run.

        Raises:
            [`TranscoderError`]: a receiver does not exist or cannot be one, or the task has no such position.
        """
        return patch_paths(self, receivers, position, sender_mlps, freeze_mlps, per_query_head)

    def _at_positions(self, component, positions, layers):
        if positions is None:
            if (self.last != self.last[0]).any():
                raise TranscoderError(
                    "The prompts differ in length, so their tokens have no common numbers: name positions, such as "
                    f"{', '.join(self.task.position_names)}."
                )
            positions = range(int(self.last[0]) + 1)
        positions = [positions] if isinstance(positions, str | int) else list(positions)
        layers = self._layers(layers)
        plan = PatchPlan.grid(layers, component, 1, torch.stack([self.position(each) for each in positions]))
        return self._result(plan, {"layer": _names(layers), "position": _names(positions)}, component, {})

    def _layers(self, layers):
        return list(range(self.num_layers) if layers is None else layers)

    def _result(self, plan, axes, component, more):
        patched = self.run(plan)
        values = patched.values.view(*map(len, axes.values()), -1)
        protocol = {"method": "activation patching", "component": component, **self.protocol(), **more}
        return PatchResult(values, patched.base, patched.source, axes, self.readout.name, protocol)


def _names(numbers):
    return [str(number) for number in numbers]
