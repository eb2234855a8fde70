"""Running patch plans: many changed runs per forward, and only what the patches can change."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from ...errors import TranscoderError
from ...lm.architectures import num_layers
from ...lm.attention import num_heads
from ...lm.devices import check_one_device, input_device
from ...lm.inputs import check_tokens, length_groups
from ...lm.linear_maps import adapters_at_work
from ...lm.modes import in_eval_mode
from ...lm.wrappers import language_model
from ...tasks.task import Task
from ...text.printable import printable
from .blocks import Blocks, Edit
from .patch_plan import ALL_POSITIONS, COMPONENTS, HEAD_COMPONENTS, PatchPlan
from .readout import Readout
from .run_recording import Recording, Window, record


ABLATIONS = ("counterfactual", "zero", "mean", "resample")
_ON_CPU = 1 << 30
# Larger batches of rows leave the processor's caches; with 1 GiB, rows of all positions take twice as long.
_ROWS_ON_CPU = 64 << 20


@dataclass(frozen=True)
class PatchedValues:
    """Metrics of patched runs.

    Args:
        values (`torch.Tensor` of shape `(rows, prompts)`): Of each row of the plan.
        base (`torch.Tensor` of shape `(prompts,)`): Without patches.
        source (`torch.Tensor` of shape `(prompts,)`, *optional*): Of the run that the patches come from.
    """

    values: torch.Tensor
    base: torch.Tensor
    source: torch.Tensor | None


class PatchEngine:
    """Runs [`PatchPlan`]s on a model and the prompts of a task.

    Below the first patched layer, and before the first patched token, a changed run is the base run: neither is run
    again. All rows and prompts of a batch go through a layer together, and join it at the layer of their first patch.
    Of the last layer and the logits only what the metric needs is computed. An engine that is used several times runs
    the prompts themselves only once, where the activations of all of them fit into memory.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            A causal language model, which runs in evaluation mode.
        task ([`Task`]):
            Clean and corrupted prompts.
        direction (`"noising"` or `"denoising"`, *optional*, defaults to `"noising"`):
            Whether patches from the corrupted run go into the clean one, or from the clean into the corrupted one.
        ablation (`str`, *optional*, defaults to `"counterfactual"`):
            What is written: the activation of the `"counterfactual"` run, which is the other prompt of the pair;
            `"zero"`; its `"mean"` over the counterfactual prompts of the same template and length (clean prompts if the
            task has no corrupted ones); or that of a random other prompt of the base run with the same length
            (`"resample"`).
        metric (`str` or `Callable`, *optional*):
            As [`Readout`] has it.
        batch_size (`int`, *optional*):
            Rows times prompts of one batch, estimated from the memory by default.
        max_memory (`int`, *optional*):
            Bytes that a batch may take: 1 GiB on a CPU and half of what is free on a GPU by default.
        seed (`int`, *optional*, defaults to 0):
            Of resampling.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Raises:
        [`TranscoderError`]: the model's attention cannot be edited, or the task does not fit the request.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        task: Task,
        *,
        direction: Literal["noising", "denoising"] = "noising",
        ablation: str = "counterfactual",
        metric: str | Callable | None = None,
        batch_size: int | None = None,
        max_memory: int | None = None,
        seed: int = 0,
        progress: bool = False,
    ):
        if direction not in ("noising", "denoising"):
            raise TranscoderError(f"There is no direction '{direction}': choose noising or denoising.")
        if ablation not in ABLATIONS:
            raise TranscoderError(f"There is no ablation '{ablation}': choose from {', '.join(ABLATIONS)}.")
        if batch_size is not None and batch_size < 1:
            raise TranscoderError(f"batch_size is {batch_size}, but a batch has at least one row.")
        self.model = base = language_model(base)
        check_one_device(base)
        self.device = input_device(base)
        self.task = task
        self.direction = direction
        self.ablation = ablation
        self.readout = Readout(base, task, metric)
        self.batch_size = batch_size
        self.max_memory = max_memory
        self.progress = progress
        names = ("clean", "corrupted") if direction == "noising" else ("corrupted", "clean")
        paired = ablation == "counterfactual" or direction == "denoising"
        self.tokens = task.tokens(names[0])
        self.last = self.tokens.positions["END"]
        self.num_layers = num_layers(base)
        self._means = None
        self._kept: Batch | None = None
        self._adapters = adapters_at_work(base)
        if paired or (ablation == "mean" and task.has_corrupted):
            source = task.tokens(names[1])
            if not torch.equal(source.lengths, self.tokens.lengths):
                row = int((source.lengths != self.tokens.lengths).nonzero()[0])
                raise TranscoderError(
                    f"The prompts of row {row} have {int(self.tokens.lengths[row])} and {int(source.lengths[row])} "
                    "tokens: patching needs pairs of equal length."
                )
            self.source_ids = source.input_ids
        elif ablation == "resample":
            self.source_ids = self.tokens.input_ids[self._others(seed)]
        else:
            self.source_ids = self.tokens.input_ids
        for ids in (self.tokens.input_ids, self.source_ids):
            prompts = [row[:length] for row, length in zip(ids, self.tokens.lengths.tolist(), strict=True)]
            check_tokens(base, prompts, "Prompt", range(len(prompts)))

    @classmethod
    def of(cls, base: PreTrainedModel, task: Task, engine: "PatchEngine | None", **settings) -> "PatchEngine":
        """A given engine, if it is for this model and task, or a new one with those settings that are not `None`.

        Raises:
            [`TranscoderError`]: the engine is for something else, or there are settings, which it has already.
        """
        settings = {name: value for name, value in settings.items() if value is not None}
        if engine is None:
            return cls(base, task, **settings)
        if engine.model is not language_model(base) or engine.task is not task:
            raise TranscoderError("The engine is for another model or task: make one with PatchEngine(base, task).")
        if settings:
            raise TranscoderError(
                f"An engine was given, which has its own {' and '.join(settings)}: leave {'it' if len(settings) == 1 else 'them'} "
                f"out, or make the engine with PatchEngine(base, task, {next(iter(settings))}=...)."
            )
        return engine

    def position(self, position: str | int | torch.Tensor) -> torch.Tensor:
        """Token indices in each prompt, `(prompts,)`, from the name of a position, an index, or `"all"` (-1).

        Raises:
            [`TranscoderError`]: the task has no such position.
        """
        if isinstance(position, str):
            if position == "all":
                return torch.full_like(self.last, ALL_POSITIONS)
            if position not in self.tokens.positions:
                raise TranscoderError(
                    f"The task '{self.task.name}' has no position '{position}': choose from "
                    f"{', '.join(self.task.position_names)}, or 'all'."
                )
            return self.tokens.positions[position]
        position = torch.as_tensor(position, dtype=torch.long).expand(len(self.last))
        beyond = (position < 0) | (position > self.last)
        if beyond.any():
            prompt = int(beyond.nonzero()[0])
            raise TranscoderError(
                f"Prompt {prompt} has the tokens 0 to {int(self.last[prompt])}, but token {int(position[prompt])} was "
                "asked for."
            )
        return position

    def run(self, plan: PatchPlan) -> PatchedValues:
        """Run a plan.

        Returns:
            [`PatchedValues`]

        Raises:
            [`TranscoderError`]: the plan does not fit the model or the prompts.
        """
        plan.check(self.model, self.last)
        with in_eval_mode(self.model):
            return self._run(plan)

    def _run(self, plan):
        if plan.values is None:
            parts = {COMPONENTS[code].removeprefix("head_") for code in plan.component.unique().tolist()}
        else:
            parts = set()
        values = torch.empty(plan.num_rows, len(self.last))
        base, source = torch.empty(len(self.last)), torch.empty(len(self.last))
        total = plan.num_rows * len(self.last)
        with self.bar(total) as bar:
            for batch in self.batches(plan, parts):
                values[:, batch.prompts] = batch.run(plan.select(batch.prompts), bar).cpu()
                base[batch.prompts], source[batch.prompts] = batch.base.cpu(), batch.source.cpu()
        return PatchedValues(values, base, source if self.ablation == "counterfactual" else None)

    def batches(
        self, plan: PatchPlan, source_parts: set[str], base_parts: set[str] | None = None
    ) -> Iterator["Batch"]:
        """The prompts in batches whose runs are recorded.

        Args:
            plan ([`PatchPlan`]): What will be patched, which says how many tokens are needed.
            source_parts (`set[str]`): Activations of the source run to keep.
            base_parts (`set[str]`, *optional*): Those of the base run, besides those that the plan needs.
        """
        if self._adapters != (adapters := adapters_at_work(self.model)):
            # What is kept was recorded with other ones.
            self._adapters, self._means, self._kept = adapters, None, None
        first = self._first(plan)
        parts = {"resid_pre", "attn.out", "mlp.out", "key", "value"} | (base_parts or set())
        components = {COMPONENTS[code] for code in plan.component.unique().tolist()}
        parts |= components & {"z"}
        if components & (set(HEAD_COMPONENTS) - {"z"}):
            parts |= {"query"}
        window = Window.until(self.last, first)
        kept = self._kept
        if kept is not None and kept.holds(parts, source_parts, window):
            yield kept
            return
        if kept is not None:
            # What was asked for before will be asked for again, so it is recorded with the rest if that fits.
            more = parts | kept.recording.parts.keys(), source_parts | kept.source_parts
            earlier = first.clone()
            earlier[kept.prompts] = first[kept.prompts].minimum(kept.recording.window.start.cpu())
            wider = Window.until(self.last, earlier)
            if self._prompts_per_batch(wider.size, sum(map(len, more)), plan.num_rows) >= len(self.last):
                (parts, source_parts), first, window = more, earlier, wider
            self._kept = None
        size = self._prompts_per_batch(window.size, len(parts) + len(source_parts), plan.num_rows)
        means = self._group_means(source_parts) if self.ablation == "mean" and source_parts else None
        for prompts in self._batches(size):
            window = Window.until(self.last[prompts], first[prompts])
            batch = Batch(self, prompts, window, parts, source_parts, means)
            self._kept = batch if len(prompts) == len(self.last) else None
            yield batch

    def protocol(self) -> dict:
        """How it patches, as JSON."""
        return {
            "task": self.task.name,
            "task_settings": self.task.settings,
            "prompts": len(self.last),
            "model": self.model.config.name_or_path,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "direction": self.direction,
            "ablation": self.ablation,
        }

    def bar(self, total: int):
        """A progress bar over patched prompts."""
        from tqdm import tqdm

        return tqdm(total=total, desc=f"patching {printable(self.task.name)}", unit="run", disable=not self.progress)

    def rows_per_batch(self, prompts: int, window: int) -> int:
        """How many rows of so many prompts and tokens fit into a batch."""
        if self.batch_size is not None:
            return max(1, self.batch_size // prompts)
        memory = self._memory()
        if self.device.type == "cpu":
            memory = min(memory, _ROWS_ON_CPU)
        return max(1, int(memory / (prompts * window * self._bytes_per_token(window))))

    def _batches(self, size):
        """The prompts in batches of at most `size`, those of similar length together, that can share a forward pass."""
        lengths = self.tokens.lengths
        for group in length_groups(self.model, lengths.tolist()):
            group = torch.tensor(group)
            yield from group[lengths[group].argsort(stable=True)].split(size)

    def _first(self, plan):
        """The first token that a plan can change in each prompt."""
        position = plan.position
        if not len(position):
            return self.last
        # Where all tokens are patched, those before the first difference between the prompts stay what they are.
        same = (self.tokens.input_ids == self.source_ids).long().cumprod(1).sum(1)
        shared = same.minimum(self.last) if self.ablation == "counterfactual" else torch.zeros_like(self.last)
        return torch.where(position == ALL_POSITIONS, shared, position).amin(0)

    def _prompts_per_batch(self, window, parts, rows):
        config = self.model.config.get_text_config()
        kept = self.num_layers * self._item() * config.hidden_size
        each = kept * (2 * self.tokens.input_ids.shape[1] + parts * window)
        memory = self._memory()
        if self.batch_size is not None:
            return min(self.batch_size, len(self.last))
        few = min(rows, 8)
        size = min(memory / each, memory / (few * window * self._bytes_per_token(window)))
        return max(1, min(int(size), len(self.last)))

    def _bytes_per_token(self, window):
        """Roughly what one token of one row takes at the widest place of a block, with its residual stream."""
        config = self.model.config.get_text_config()
        inner = (
            getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
        )
        heads, _ = num_heads(self.model)
        seq = self.tokens.input_ids.shape[1]
        return self._item() * (8 * config.hidden_size + 4 * inner) + 12 * heads * seq

    def _memory(self):
        if self.max_memory is not None:
            return self.max_memory
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0] // 2
        return _ON_CPU

    def _item(self):
        return torch.finfo(self.model.dtype).bits // 8

    def _others(self, seed):
        """For each prompt a random other one of the same length."""
        generator = torch.Generator().manual_seed(seed)
        others = torch.empty_like(self.last)
        for length, rows in self.task.rows_by_length().items():
            if len(rows) < 2:
                raise TranscoderError(
                    f"Row {rows[0]} is the only one of {length} tokens, so there is none to resample from: choose mean."
                )
            rows = torch.tensor(rows)[torch.randperm(len(rows), generator=generator)]
            others[rows] = rows.roll(1)
        return others

    @torch.no_grad()
    def _group_means(self, parts):
        """Means of the source run over prompts of one template and length, and the group of each prompt."""
        if self._means is not None and parts <= self._means[1].keys():
            return self._means
        keys = list(zip(self.task.dataset["template"], self.tokens.lengths.tolist(), strict=True))
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        group = torch.tensor([numbers[key] for key in keys])
        seq = self.tokens.input_ids.shape[1]
        size = self._prompts_per_batch(seq, len(parts), 1)
        sums, counts = {}, torch.bincount(group).to(self.device)
        for prompts in self._batches(size):
            longest = int(self.tokens.lengths[prompts].max())
            whole = Window(torch.zeros_like(prompts).to(self.device), longest)
            run = record(
                self.model,
                self.source_ids[prompts, :longest].to(self.device),
                self.last[prompts].to(self.device),
                whole,
                parts,
            )
            for part in parts:
                for layer, value in enumerate(run.parts[part]):
                    width = seq if part == "pattern" else value.shape[-1]
                    shape = (len(numbers), *value.shape[1:-2], seq, width)
                    total = sums.setdefault((part, layer), torch.zeros(shape, device=value.device))
                    total = total[..., :longest, : value.shape[-1]]
                    total.index_add_(0, group[prompts].to(value.device), value.float())
        means = {
            part: [
                sums[part, layer] / counts.view(-1, *[1] * (sums[part, layer].dim() - 1))
                for layer in range(sum(key[0] == part for key in sums))
            ]
            for part in parts
        }
        self._means = group, means
        return self._means


class Batch:
    """Some prompts whose base and source runs are recorded.

    Attributes:
        prompts (`torch.LongTensor` of shape `(prompts,)`): Which prompts of the task.
        base, source (`torch.Tensor` of shape `(prompts,)`): Metrics of both runs.
        recording, other ([`Recording`]): Both runs.
        last (`torch.LongTensor` of shape `(prompts,)`): Index of the last token of each, on the model's device.
    """

    @torch.no_grad()
    def __init__(self, engine: PatchEngine, prompts, window: Window, parts, source_parts, means):
        self.engine = engine
        self.prompts = prompts
        self.source_parts = source_parts
        device = engine.device
        longest = int(engine.tokens.lengths[prompts].max())
        self.last = engine.last[prompts].to(device)
        window = Window(window.start.to(device), window.size)
        ids = engine.tokens.input_ids[prompts, :longest].to(device)
        self.recording = record(engine.model, ids, self.last, window, parts)
        self.base = engine.readout(self.recording.final[:, None], prompts, self.recording.final)[:, 0]
        self.other, self.source = self.recording, self.base
        if means is not None:
            group, means = means
            group = group[prompts].to(device)
            self.other = Recording(window, parts={})
            for part in source_parts:
                whole = [mean[group][..., :longest, :].to(engine.model.dtype) for mean in means[part]]
                if part == "pattern":
                    whole = [mean[..., :longest] for mean in whole]
                kept = whole if part in ("key", "value") else [window.take(mean) for mean in whole]
                self.other.parts[part] = kept
        elif engine.ablation in ("counterfactual", "resample"):
            source_ids = engine.source_ids[prompts, :longest].to(device)
            self.other = record(engine.model, source_ids, self.last, window, source_parts)
            self.source = engine.readout(self.other.final[:, None], prompts, self.recording.final)[:, 0]

    def holds(self, parts: set[str], source_parts: set[str], window: Window) -> bool:
        """Whether what is recorded is enough for patches of these activations in a window of that size."""
        enough = parts <= self.recording.parts.keys() and source_parts <= self.source_parts
        return enough and window.size <= self.recording.window.size

    def run(self, plan: PatchPlan, bar=None) -> torch.Tensor:
        """Metrics of the rows of a plan that is for these prompts, `(rows, prompts)`."""
        values = self.base.expand(plan.num_rows, -1).clone()
        last = self.last.cpu()
        shared = self.recording.window.start.cpu()
        first = torch.where(plan.position == ALL_POSITIONS, shared, plan.position)
        sizes = (last - first).amax(1) + 1
        # Rows that need equally many tokens go together, those that begin in low layers first.
        size_of_row = torch.zeros(plan.num_rows, dtype=torch.long).scatter_reduce(0, plan.row, sizes, "amax")
        layer_of_row = torch.full((plan.num_rows,), self.engine.num_layers + 1).scatter_reduce(
            0, plan.row, plan.layer, "amin"
        )
        for size in size_of_row.unique().tolist():
            if size == 0:
                # A row without patches is the base run.
                continue
            rows = (size_of_row == size).nonzero()[:, 0]
            rows = rows[layer_of_row[rows].argsort(stable=True)]
            window = Window((self.last - size + 1).clamp(min=0), size)
            blocks = Blocks(self.engine.model, self.recording, window, self.last)
            with blocks.attached():
                for chunk in rows.split(self.engine.rows_per_batch(len(self.prompts), size)):
                    final = self._walk(blocks, plan, chunk)
                    values[chunk] = self.engine.readout(final, self.prompts, self.recording.final).T
                    if bar is not None:
                        bar.update(len(chunk) * len(self.prompts))
        return values

    def _walk(self, blocks, plan, rows):
        """Residual streams behind the last block at the last token, `(prompts, rows, hidden)`, of some rows."""
        num_layers = self.engine.num_layers
        entry = torch.isin(plan.row, rows).nonzero()[:, 0]
        row = torch.full((plan.num_rows,), -1)
        row[rows] = torch.arange(len(rows))
        # Rows are numbered in the order in which they join: first those that begin with the residual stream of a layer,
        # then those that begin inside it.
        residual = COMPONENTS.index("resid_pre")
        joins = torch.full((len(rows),), 2 * num_layers + 2)
        joins = joins.scatter_reduce(
            0, row[plan.row[entry]], 2 * plan.layer[entry] + (plan.component[entry] != residual).long(), "amin"
        )
        order = joins.argsort(stable=True)
        joins = joins[order]
        number = order.argsort()
        edits = self._edits(blocks, plan, entry, number[row[plan.row[entry]]])

        hidden = None
        for layer in range(int(joins[0]) // 2, num_layers + 1):
            streams, inside = ((joins == 2 * layer + kind).sum().item() for kind in (0, 1))
            here = edits.get(layer, [])
            if streams:
                stream = blocks.recorded("resid_pre", layer)[:, None]
                begun = stream.expand(-1, streams, -1, -1)
                if layer == num_layers and hidden is not None and hidden.shape[2] != stream.shape[2]:
                    begun = blocks.at_end(begun)
                hidden = begun.clone() if hidden is None else torch.cat([hidden, begun], dim=1)
            if hidden is not None:
                for edit in here:
                    if edit.component == "resid_pre":
                        short = hidden.shape[2] != blocks.window.size
                        (edit.at(blocks.end) if short else edit).write(hidden)
            if layer == num_layers:
                break
            end_only = layer == num_layers - 1
            running = 0 if hidden is None else hidden.shape[1]
            outputs = []
            if running:
                continuing = [edit.shifted(0, running) for edit in here if edit.component != "resid_pre"]
                outputs.append(
                    blocks.run(layer, hidden, [edit for edit in continuing if edit is not None], end_only=end_only)
                )
            if inside:
                shifted = [edit.shifted(running, inside) for edit in here if edit.component != "resid_pre"]
                outputs.append(self._join(blocks, layer, inside, [e for e in shifted if e is not None], end_only))
            if outputs:
                hidden = torch.cat(outputs, dim=1)
        if hidden.shape[2] > 1:
            hidden = blocks.at_end(hidden)
        return hidden[:, number, 0]

    def _join(self, blocks, layer, rows, edits, end_only):
        """The block in which some rows begin to differ from the base run."""

        def recorded(part):
            return blocks.recorded(part, layer)[:, None].expand(-1, rows, -1, -1)

        mlp_output = None
        if all(edit.component == "mlp.out" for edit in edits):
            attention_output, mlp_output = recorded("attn.out"), recorded("mlp.out").clone()
            for edit in edits:
                edit.write(mlp_output)
        elif all(edit.component in ("attn.out", "resid_mid", "mlp.out") for edit in edits):
            attention_output = recorded("attn.out").clone()
            for edit in edits:
                if edit.component == "attn.out":
                    edit.write(attention_output)
        else:
            attention_output = blocks.head_outputs(layer, rows, edits)
        return blocks.run(layer, recorded("resid_pre"), edits, attention_output, mlp_output, end_only)

    def _edits(self, blocks, plan, entries, rows):
        """Layer -> edits of the entries, whose rows are numbered `rows`."""
        device = self.last.device
        start = blocks.window.start
        found = {}
        everywhere = plan.position[:, 0] == ALL_POSITIONS
        groups = torch.stack([plan.layer[entries], plan.component[entries], everywhere[entries].long()], dim=1)
        for layer, code, whole in groups.unique(dim=0).tolist():
            chosen = (groups == torch.tensor([layer, code, whole])).all(1)
            which = entries[chosen]
            position = None if whole else plan.position[which].T.to(device)
            values = self._values(blocks, plan, which, layer, COMPONENTS[code], position)
            edit = Edit(
                COMPONENTS[code],
                rows[chosen].to(device),
                plan.head[which].to(device),
                None if whole else position - start[:, None],
                values,
            )
            found.setdefault(layer, []).append(edit)
        return found

    def _values(self, blocks, plan, which, layer, component, position):
        """What entries of one layer and component write, `(prompts, entries, [window,] width)`."""
        device = self.last.device
        prompts = torch.arange(len(self.prompts), device=device)[:, None]
        headed = component in HEAD_COMPONENTS
        if plan.values is not None:
            # Entries of several components share one tensor, which is as wide as the widest of them.
            width = self.recording.parts["key" if headed else "resid_pre"][0].shape[-1]
            width = self.recording.masks[0].shape[-1] if component == "pattern" else width
            values = plan.values[which].to(device).transpose(0, 1)[..., :width]
            values = values if position is not None else blocks.window.take(values)
            return blocks.joined_pattern(values) if component == "pattern" else values
        head = plan.head[which].to(device)
        part = component.removeprefix("head_")
        if part != component:
            heads, kv_heads = num_heads(self.engine.model)
            head = head // (heads // kv_heads)
        if self.engine.ablation == "zero":
            like = self._like(blocks, part, layer)
            source, offset = like.new_zeros(1).expand(like.shape), blocks.window.start
        else:
            source = self.other.parts[part][layer]
            offset = 0 if part in ("key", "value") else self.other.window.start
        if position is None:
            values = blocks.window.take(source, offset)
            values = values[:, head] if headed else values[:, None].expand(-1, len(which), -1, -1)
        else:
            at = position - (offset[:, None] if isinstance(offset, torch.Tensor) else offset)
            values = source[prompts, head, at] if headed else source[prompts, at]
        return blocks.joined_pattern(values) if component == "pattern" else values

    def _like(self, blocks, component, layer):
        """A tensor of the shape that a component has within the window."""
        if component == "pattern":
            queries = blocks.recorded("query", layer)
            return queries.new_empty(1).expand(*queries.shape[:3], self.recording.masks[layer].shape[-1])
        return blocks.recorded("resid_pre" if component == "resid_mid" else component, layer)
