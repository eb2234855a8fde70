"""What is known of a dictionary while it trains: running metrics and which features have gone silent."""

import torch
import torch.distributed as dist

from ..evaluation.statistics import FeatureStatistics, ReconstructionStatistics
from ..models import TranscoderModel, TranscoderOutput


class DictionaryMonitor:
    """
    Running metrics between two logs, and the tokens since each feature last fired. Nothing here waits for the device
    except [`~DictionaryMonitor.refresh`] and [`~DictionaryMonitor.pop`], which are called every few steps.

    Args:
        model ([`TranscoderModel`]): The dictionary.
        dead_after_tokens (`int`): Tokens without firing after which a feature counts as dead.
    """

    def __init__(self, model: TranscoderModel, dead_after_tokens: int):
        device, features = model.W_enc.device, model.config.num_features
        self.dead_after_tokens = dead_after_tokens
        self.reconstruction = ReconstructionStatistics(model.config.d_out, device)
        self.features = FeatureStatistics(features, device)
        self.losses: dict[str, torch.Tensor] = {}
        self.batches = 0
        self.grad_norm = torch.zeros((), device=device)
        self.steps = 0
        #: Share of tokens each feature fired on, between the last two calls of [`~DictionaryMonitor.pop`].
        self.density: torch.Tensor | None = None
        # State that a checkpoint keeps.
        self.tokens_since_fired = torch.zeros(features, dtype=torch.long, device=device)
        self.fired = torch.zeros(features, dtype=torch.bool, device=device)
        self.dead_features = torch.zeros(0, dtype=torch.long, device=device)
        self.tokens = 0

    @torch.no_grad()
    def update(self, targets: torch.Tensor, output: TranscoderOutput) -> None:
        """Adds the output of one batch."""
        tokens = targets.shape[0]
        self.reconstruction.update(targets, output.reconstruction)
        if output.feature_values is None:
            self.features.update(output.features)
            self.fired |= (output.features > 0).any(0)
        else:
            self.features.update(output.feature_values, output.feature_indices, offsets=output.feature_offsets)
            active = (output.feature_values > 0).to(torch.int8).reshape(-1)
            self.fired |= (
                torch.zeros_like(self.fired, dtype=torch.int8)
                .index_add_(0, output.feature_indices.reshape(-1), active)
                .bool()
            )
        for name, value in output.losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value.detach()
        self.batches += 1
        self.tokens += tokens

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings the list of dead features up to date, over all processes."""
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
        """Metrics since the last call, over all processes."""
        if self.batches == 0:
            return {}
        self._sum_over_processes()
        sums = {name: value / self.batches for name, value in self.losses.items()}
        sums["loss"] = sum(sums.values())
        sums["grad_norm"] = self.grad_norm / max(self.steps, 1)
        values = torch.stack([value.float() for value in sums.values()]).tolist()
        metrics = dict(zip(sums, values, strict=True))
        fidelity = self.reconstruction.compute()
        metrics |= {name: fidelity[name] for name in ("mse", "fvu", "explained_variance")}
        metrics["shrinkage"] = fidelity["relative_reconstruction_bias"]
        sparsity = self.features.compute()
        metrics |= {name: sparsity[name] for name in ("l0", "l1")}
        metrics["dead_fraction"] = self.dead_features.numel() / self.tokens_since_fired.numel()
        self.density = self.features.density()
        self.reconstruction.reset()
        self.features.reset()
        self.losses, self.batches, self.steps = {}, 0, 0
        self.grad_norm.zero_()
        return metrics

    def _sum_over_processes(self) -> None:
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return
        for total in (*self.reconstruction.sums.values(), *self.features.sums.values()):
            dist.all_reduce(total)
        # Every process has the same number of batches, so that means of means are means.
        for value in self.losses.values():
            dist.all_reduce(value)
            value /= dist.get_world_size()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps, as tensors: running sums too, so that the next log is that of an unbroken run."""
        state = {
            "tokens_since_fired": self.tokens_since_fired,
            "fired": self.fired,
            "dead_features": self.dead_features,
            "grad_norm": self.grad_norm,
            "counts": torch.tensor([self.tokens, self.batches, self.steps]),
        }
        state |= {f"losses.{name}": value for name, value in self.losses.items()}
        state |= {f"reconstruction.{name}": value for name, value in self.reconstruction.sums.items()}
        state |= {f"features.{name}": value for name, value in self.features.sums.items()}
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        device = self.tokens_since_fired.device
        state = {name: value.to(device) for name, value in state.items()}
        self.tokens, self.batches, self.steps = state.pop("counts").tolist()
        for name in ("tokens_since_fired", "fired", "dead_features", "grad_norm"):
            setattr(self, name, state.pop(name))
        for key, value in state.items():
            part, name = key.split(".", 1)
            if part == "losses":
                self.losses[name] = value
            else:
                getattr(self, part).sums[name] = value
