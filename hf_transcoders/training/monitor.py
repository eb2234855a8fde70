"""Running metrics and dead features of a dictionary in training."""

import torch
import torch.distributed as dist

from ..evaluation.statistics import FeatureStatistics, ReconstructionStatistics
from ..models.modeling_transcoder import TranscoderModel, TranscoderOutput


class DictionaryMonitor:
    """
    Tracks metrics between two logs, and the number of tokens since each feature was last active. Only
    [`~DictionaryMonitor.refresh`] and [`~DictionaryMonitor.pop`], which are called every few steps, wait for the device.

    Args:
        model ([`TranscoderModel`]): The dictionary.
        dead_after_tokens (`int`): Number of tokens after which a silent feature counts as dead.
    """

    def __init__(self, model: TranscoderModel, dead_after_tokens: int):
        device, features = model.W_enc.device, model.config.num_features
        self.dead_after_tokens = dead_after_tokens
        self.reconstruction = ReconstructionStatistics(model.config.d_out, device)
        self.features = FeatureStatistics(features, device)
        # Sums over tokens, so that batches of any size add up.
        self.losses: dict[str, torch.Tensor] = {}
        self.tokens_since_log = 0
        self.grad_norm = torch.zeros((), device=device)
        self.steps = 0
        #: Share of tokens each feature fired on, between the last two calls of [`~DictionaryMonitor.pop`].
        self.density: torch.Tensor | None = None
        # Steps that a GradScaler has skipped, which no mean includes.
        self.overflowed_steps = torch.zeros((), dtype=torch.long, device=device)
        # State that a checkpoint keeps.
        self.tokens_since_fired = torch.zeros(features, dtype=torch.long, device=device)
        self.fired = torch.zeros(features, dtype=torch.bool, device=device)
        self.dead_features = torch.zeros(0, dtype=torch.long, device=device)
        self.tokens = 0

    @torch.no_grad()
    def update(self, targets: torch.Tensor, output: TranscoderOutput, may_overflow: bool = False) -> None:
        """
        Adds the output of one batch.

        Args:
            targets (`torch.Tensor` of shape `(tokens, d_out)`): Targets of the dictionary.
            output ([`TranscoderOutput`]): Output of the dictionary.
            may_overflow (`bool`, *optional*, defaults to `False`):
                Whether to leave out a batch whose loss is not finite, as a `GradScaler` does.
        """
        tokens = targets.shape[0]
        parts = (self.reconstruction, self.features) if may_overflow else ()
        before = [{name: total.clone() for name, total in part.sums.items()} for part in parts]
        self.reconstruction.update(targets, output.reconstruction)
        if output.feature_values is None:
            self.features.update(output.features)
            self.fired |= (output.features > 0).any(0)
        else:
            self.features.update(output.feature_values, output.feature_indices, offsets=output.feature_offsets)
            if output.feature_counts is not None:
                self.fired |= output.feature_counts > 0
            else:
                self.fired |= self._fired_in(output)
        losses = output.losses
        if may_overflow:
            finite = output.loss.isfinite()
            losses = {name: torch.where(finite, value, 0.0) for name, value in losses.items()}
            for part, sums in zip(parts, before, strict=True):
                part.sums = {name: torch.where(finite, total, sums[name]) for name, total in part.sums.items()}
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value.detach() * tokens
        self.tokens_since_log += tokens
        self.tokens += tokens

    def _fired_in(self, output: TranscoderOutput) -> torch.Tensor:
        """Features `(num_features,)` that are active on any token of a batch."""
        # In int8 a feature of 256 tokens would count as silent.
        active = (output.feature_values > 0).int().reshape(-1)
        counts = torch.zeros_like(self.fired, dtype=torch.int32)
        return counts.index_add_(0, output.feature_indices.reshape(-1), active).bool()

    def add_gradient(self, norm: torch.Tensor, may_overflow: bool = False) -> None:
        """
        Adds the gradient of one step.

        Args:
            norm (`torch.Tensor` of shape `()`): Norm of the gradient before clipping.
            may_overflow (`bool`, *optional*, defaults to `False`): Whether to leave out a norm that is not finite.
        """
        if may_overflow:
            finite = norm.isfinite()
            self.overflowed_steps += ~finite
            norm = torch.where(finite, norm, 0.0)
        self.grad_norm += norm
        self.steps += 1

    @torch.no_grad()
    def refresh(self) -> None:
        """Updates the list of dead features, over all processes."""
        tokens = self.tokens
        if dist.is_initialized() and dist.get_world_size() > 1:
            fired = self.fired.to(torch.uint8)
            dist.all_reduce(fired, op=dist.ReduceOp.MAX)
            self.fired = fired.bool()
            tokens *= dist.get_world_size()
        self.tokens_since_fired = torch.where(self.fired, 0, self.tokens_since_fired + tokens)
        self.dead_features = (self.tokens_since_fired >= self.dead_after_tokens).nonzero().squeeze(-1)
        self.fired.zero_()
        self.tokens = 0

    def pop(self) -> dict[str, float]:
        """Returns metrics since the last call, over all processes; empty without batches, or if all overflowed."""
        if self.tokens_since_log == 0:
            return {}
        self._sum_over_processes()
        tokens = self.reconstruction.tokens
        if tokens == 0:
            self._reset()
            return {}
        sums = {name: value / tokens for name, value in self.losses.items()}
        # In one order: that of a checkpoint is another, and float sums depend on it.
        sums["loss"] = sum(sums[name] for name in sorted(sums))
        sums["grad_norm"] = self.grad_norm / (self.steps - self.overflowed_steps).clamp(min=1)
        values = torch.stack([value.float() for value in sums.values()]).tolist()
        metrics = dict(zip(sums, values, strict=True))
        fidelity = self.reconstruction.compute()
        metrics |= {name: fidelity[name] for name in ("mse", "fvu", "explained_variance")}
        metrics["shrinkage"] = fidelity["relative_reconstruction_bias"]
        sparsity = self.features.compute()
        metrics |= {name: sparsity[name] for name in ("l0", "l1")}
        metrics["dead_fraction"] = self.dead_features.numel() / self.tokens_since_fired.numel()
        self.density = self.features.density()
        self._reset()
        return metrics

    def _reset(self) -> None:
        self.reconstruction.reset()
        self.features.reset()
        self.losses, self.tokens_since_log, self.steps = {}, 0, 0
        self.grad_norm.zero_()
        self.overflowed_steps.zero_()

    def _sum_over_processes(self) -> None:
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return
        for total in (*self.reconstruction.sums.values(), *self.features.sums.values(), *self.losses.values()):
            dist.all_reduce(total)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State for a checkpoint as tensors, with running sums, so that the next log is that of an uninterrupted run."""
        state = {
            "tokens_since_fired": self.tokens_since_fired,
            "fired": self.fired,
            "dead_features": self.dead_features,
            "grad_norm": self.grad_norm,
            "overflowed_steps": self.overflowed_steps,
            "counts": torch.tensor([self.tokens, self.tokens_since_log, self.steps]),
        }
        state |= {f"losses.{name}": value for name, value in self.losses.items()}
        state |= {f"reconstruction.{name}": value for name, value in self.reconstruction.sums.items()}
        state |= {f"features.{name}": value for name, value in self.features.sums.items()}
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def accepts(self, state: dict[str, torch.Tensor]) -> bool:
        """Whether a saved state has the names, shapes and kinds of numbers of this monitor's own."""
        own = self.state_dict()
        if not own.keys() <= state.keys():
            return False
        for name, value in state.items():
            if name.startswith("losses."):
                # One sum for each loss term.
                fits = value.dim() == 0 and value.is_floating_point()
            elif name == "dead_features":
                fits = value.dim() == 1 and value.dtype == torch.long
            else:
                fits = name in own and value.shape == own[name].shape and _kind(value) == _kind(own[name])
            if not fits:
                return False
        dead = state["dead_features"]
        return not dead.numel() or 0 <= int(dead.min()) <= int(dead.max()) < self.tokens_since_fired.numel()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        device = self.tokens_since_fired.device
        state = {name: value.to(device) for name, value in state.items()}
        self.tokens, self.tokens_since_log, self.steps = state.pop("counts").tolist()
        for name in ("tokens_since_fired", "fired", "dead_features", "grad_norm", "overflowed_steps"):
            setattr(self, name, state.pop(name))
        for key, value in state.items():
            part, name = key.split(".", 1)
            if part == "losses":
                self.losses[name] = value
            else:
                getattr(self, part).sums[name] = value


def _kind(value: torch.Tensor) -> type:
    """The kind of numbers in a tensor. Not its exact type: sums are float32 on devices without float64."""
    return bool if value.dtype == torch.bool else float if value.is_floating_point() else int


def share_out(states: list[dict[str, torch.Tensor]], rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """
    Computes the state of a monitor for a run that continues with another number of processes.

    Args:
        states (`list[dict[str, torch.Tensor]]`): [`~DictionaryMonitor.state_dict`] of every earlier process.
        rank, world_size (`int`): Rank of this process, and number of processes.

    Returns:
        `dict[str, torch.Tensor]`: state of this process. The first process has all sums over tokens.
    """
    state = dict(states[0])
    state["fired"] = torch.stack([s["fired"] for s in states]).any(0)
    counts = torch.stack([s["counts"] for s in states])
    state["counts"] = torch.cat([counts[:, :2].sum(0) // world_size, counts[0, 2:]])
    for name in state:
        if "." in name:
            total = torch.stack([s[name] for s in states]).sum(0)
            state[name] = total if rank == 0 else torch.zeros_like(total)
    return state
