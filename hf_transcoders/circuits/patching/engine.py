"""Run patch plans: many patched runs in one forward pass, from the first layer and token that a patch can change."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from ...errors import TranscoderError
from ...lm.architectures import num_layers
from ...lm.devices import check_one_device, input_device
from ...lm.linear_maps import adapters_at_work
from ...lm.modes import in_eval_mode
from ...lm.wrappers import language_model
from ...tasks.task import Task
from ...text.printable import printable
from .ablations import ABLATIONS, AblationSetup
from .batch import Batch
from .budget import Budget
from .patch_plan import ALL_POSITIONS, COMPONENTS, HEAD_COMPONENTS, PatchPlan
from .prompt_runs import PromptRuns
from .readout import Readout
from .run_recording import Window


Direction = Literal["noising", "denoising"]


@dataclass(frozen=True)
class PatchedValues:
    """Metrics of patched runs.

    Args:
        values (`torch.Tensor` of shape `(rows, prompts)`): The metric of each row of the plan.
        base (`torch.Tensor` of shape `(prompts,)`): The metric of the base runs, without patches.
        source (`torch.Tensor` of shape `(prompts,)`, *optional*):
            The metric of the runs that the patches come from, for `"counterfactual"` patches.
    """

    values: torch.Tensor
    base: torch.Tensor
    source: torch.Tensor | None


class PatchEngine:
    """Runs [`PatchPlan`]s on a model and the prompts of a task. [`Patching`] documents the arguments.

    Below the first patched layer, and before the first patched token, a patched run equals the base run, so neither is
    run again. All rows and prompts of a batch go through a layer together and join it at the layer of their first patch.
    Of the last layer and the logits, only the values that the metric needs are computed. The runs of the prompts
    themselves are recorded once and reused by later plans if the activations of all prompts fit into memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        *,
        direction: Direction = "noising",
        ablation: str = "counterfactual",
        metric: str | Callable | Readout | None = None,
        batch_size: int | None = None,
        max_memory: int | None = None,
        seed: int | None = None,
        progress: bool = False,
    ):
        if direction not in get_args(Direction):
            raise TranscoderError(
                f"There is no direction '{direction}': choose from {', '.join(get_args(Direction))}."
            )
        if ablation not in ABLATIONS:
            raise TranscoderError(f"There is no ablation '{ablation}': choose from {', '.join(ABLATIONS)}.")
        prepare, is_random = ABLATIONS[ablation]
        if seed is not None and not is_random:
            raise TranscoderError(f"The ablation '{ablation}' is not random: leave out seed={seed}.")
        self.model = model = language_model(model)
        check_one_device(model)
        self.num_layers = num_layers(model)
        self.task = task
        self.direction = direction
        self.ablation = ablation
        self.progress = progress
        self.readout = metric if isinstance(metric, Readout) else Readout(model, task, metric)
        own, other = ("clean", "corrupted") if direction == "noising" else ("corrupted", "clean")
        self.runs = PromptRuns(model, task.tokens(own))
        self.last = self.runs.last
        self.budget = Budget(model, self.runs.tokens.input_ids.shape[1], batch_size, max_memory)
        self._setup = AblationSetup(task, self.runs, other, self.budget, seed or 0)
        self._prepare = prepare
        self._source = prepare(self._setup)
        self._recorded: Batch | None = None
        self._adapters = adapters_at_work(model)

    def position(self, position: str | int | torch.Tensor) -> torch.Tensor:
        """Find the token that a position stands for in each prompt.

        Args:
            position (`str`, `int` or `torch.LongTensor` of shape `(prompts,)`):
                Name of a position of the task, a token index, or `"all"`.

        Returns:
            `torch.LongTensor` of shape `(prompts,)`: token indices, -1 for all tokens.

        Raises:
            [`TranscoderError`]: the task has no such position, or a prompt no such token.
        """
        positions = self.runs.tokens.positions
        if isinstance(position, str):
            if position == "all":
                return torch.full_like(self.last, ALL_POSITIONS)
            if position not in positions:
                raise TranscoderError(
                    f"The task '{self.task.name}' has no position '{position}': choose from "
                    f"{', '.join(self.task.position_names)}, or 'all'."
                )
            return positions[position]
        position = torch.as_tensor(position, dtype=torch.long).expand(len(self.last))
        beyond = (position < 0) | (position > self.last)
        if beyond.any():
            prompt = int(beyond.nonzero()[0])
            raise TranscoderError(
                f"Prompt {prompt} has the tokens 0 to {int(self.last[prompt])}, but the position is token "
                f"{int(position[prompt])}."
            )
        return position

    def run(self, plan: PatchPlan) -> PatchedValues:
        """Run a plan of patches.

        Args:
            plan ([`PatchPlan`]): The patches, for all prompts of the task.

        Returns:
            [`PatchedValues`]

        Raises:
            [`TranscoderError`]: the plan does not fit the model or the prompts.
        """
        plan.check(self.model, self.last)
        parts = set()
        if plan.values is None:
            parts = {COMPONENTS[code].removeprefix("head_") for code in plan.component.unique().tolist()}
        values = torch.empty(plan.num_rows, len(self.last))

        def run(batch, bar):
            values[:, batch.prompts] = batch.run(plan.select(batch.prompts), bar).cpu()

        base, source = self.run_batches(plan, parts, set(), plan.num_rows, run)
        return PatchedValues(values, base, source)

    def run_batches(
        self, plan: PatchPlan, source_parts: set[str], base_parts: set[str], rows: int, run: Callable
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Record the prompts in batches, and do something with each.

        Args:
            plan ([`PatchPlan`]): The patches, which decide how many tokens and which activations of the base runs are needed.
            source_parts (`set[str]`): Names of the activations that patches write.
            base_parts (`set[str]`): Names of further activations of the base runs.
            rows (`int`): Number of patched runs of each prompt, for the progress bar.
            run (`Callable`): Called with each [`Batch`] and the progress bar.

        Returns:
            `tuple(torch.Tensor, torch.Tensor)`: the metric of the base runs and of the runs that patches come from, if any,
            both of shape `(prompts,)`.
        """
        from tqdm import tqdm

        base, source = torch.empty(len(self.last)), torch.empty(len(self.last))
        name, total = printable(self.task.name), rows * len(self.last)
        with (
            in_eval_mode(self.model),
            tqdm(total=total, desc=f"patching {name}", unit="run", disable=not self.progress) as bar,
        ):
            for batch in self._batches(plan, source_parts, base_parts):
                run(batch, bar)
                base[batch.prompts] = batch.base.cpu()
                if batch.source is not None:
                    source[batch.prompts] = batch.source.cpu()
        return base, None if batch.source is None else source

    def protocol(self) -> dict:
        """The settings as JSON."""
        return {
            "task": self.task.name,
            "task_settings": self.task.settings,
            "prompts": len(self.last),
            "model": self.model.config.name_or_path,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "direction": self.direction,
            "ablation": self.ablation,
        }

    @torch.no_grad()
    def _batches(self, plan, source_parts, base_parts) -> Iterator[Batch]:
        """Batches of prompts whose runs are recorded."""
        if self._adapters != (adapters := adapters_at_work(self.model)):
            # Everything recorded so far is of other weights.
            self._adapters, self._source, self._recorded = adapters, self._prepare(self._setup), None
        first = self._first(plan)
        parts = {"resid_pre", "attn.out", "mlp.out", "key", "value"} | base_parts
        components = {COMPONENTS[code] for code in plan.component.unique().tolist()}
        parts |= components & {"z"}
        if components & (set(HEAD_COMPONENTS) - {"z"}):
            parts |= {"query"}
        window = Window.until(self.last, first)
        recorded = self._recorded
        if recorded is not None and recorded.holds(parts, source_parts, window):
            yield recorded
            return
        if recorded is not None:
            # Earlier plans may come again, so their activations are recorded too if all fit into memory.
            more = parts | recorded.recording.parts.keys(), source_parts | recorded.other.parts.keys()
            earlier = first.clone()
            earlier[recorded.prompts] = first[recorded.prompts].minimum(recorded.recording.window.start.cpu())
            wider = Window.until(self.last, earlier)
            if self.budget.prompts(wider.size, sum(map(len, more)), plan.num_rows) >= len(self.last):
                (parts, source_parts), first, window = more, earlier, wider
            self._recorded = None
        size = self.budget.prompts(window.size, len(parts) + len(source_parts), plan.num_rows)
        device = input_device(self.model)
        for prompts in self.runs.batches(size):
            last = self.last[prompts].to(device)
            recording = self.runs.record(prompts, Window.until(last, first[prompts].to(device)), parts)
            other = self._source.record(prompts, recording, source_parts)
            batch = Batch(self.model, self.readout, self.budget, prompts, last, recording, other)
            self._recorded = batch if len(prompts) == len(self.last) else None
            yield batch

    def _first(self, plan):
        """The first token that a plan can change in each prompt."""
        position = plan.position
        if not len(position):
            return self.last
        return torch.where(position == ALL_POSITIONS, self._source.first, position).amin(0)
