"""Run the rows of a patch plan on one batch of recorded prompts."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...lm.architectures import num_layers
from ...lm.attention import num_heads
from .blocks import Blocks, Edit
from .budget import Budget
from .patch_plan import ALL_POSITIONS, COMPONENTS, HEAD_COMPONENTS, PatchPlan
from .readout import Readout
from .run_recording import Recording, Window


@dataclass(eq=False)
class Batch:
    """Some prompts with recorded base runs and the recorded activations that patches write.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        readout ([`Readout`]): The metric.
        budget ([`Budget`]): Number of rows that run at once.
        prompts (`torch.LongTensor` of shape `(prompts,)`): Indices of the prompts in the task.
        last (`torch.LongTensor` of shape `(prompts,)`): Index of the last token of each prompt, on the model's device.
        recording ([`Recording`]): The base runs.
        other ([`Recording`]): The activations that patches write.

    Attributes:
        base (`torch.Tensor` of shape `(prompts,)`): The metric of the base runs.
        source (`torch.Tensor` of shape `(prompts,)`):
            The metric of the runs that the patches come from, or `None` if `other` has no `final` residual stream.
    """

    model: PreTrainedModel
    readout: Readout
    budget: Budget
    prompts: torch.Tensor
    last: torch.Tensor
    recording: Recording
    other: Recording

    def __post_init__(self):
        self.num_layers = num_layers(self.model)
        self.base = self._metric(self.recording)
        self.source = None if self.other.final is None else self._metric(self.other)

    def _metric(self, run):
        return self.readout(run.final[:, None], self.prompts, self.recording.final)[:, 0]

    def holds(self, parts: set[str], source_parts: set[str], window: Window) -> bool:
        """Whether the recordings are sufficient for patches of these activations in a window of that size."""
        enough = parts <= self.recording.parts.keys() and source_parts <= self.other.parts.keys()
        return enough and window.size <= self.recording.window.size

    def run(self, plan: PatchPlan, bar=None) -> torch.Tensor:
        """Run a plan for these prompts.

        Returns:
            `torch.Tensor` of shape `(rows, prompts)`: the metric of each row.
        """
        values = self.base.expand(plan.num_rows, -1).clone()
        last = self.last.cpu()
        shared = self.recording.window.start.cpu()
        first = torch.where(plan.position == ALL_POSITIONS, shared, plan.position)
        sizes = (last - first).amax(1) + 1
        # Rows with equally many tokens run together, those that start in low layers first.
        size_of_row = torch.zeros(plan.num_rows, dtype=torch.long).scatter_reduce(0, plan.row, sizes, "amax")
        layer_of_row = torch.full((plan.num_rows,), self.num_layers + 1).scatter_reduce(
            0, plan.row, plan.layer, "amin"
        )
        for size in size_of_row.unique().tolist():
            if size == 0:
                # A row without patches is the base run.
                continue
            rows = (size_of_row == size).nonzero()[:, 0]
            rows = rows[layer_of_row[rows].argsort(stable=True)]
            window = Window((self.last - size + 1).clamp(min=0), size)
            blocks = Blocks(self.model, self.recording, window, self.last)
            with blocks.attached():
                for chunk in rows.split(self.budget.rows(len(self.prompts), size)):
                    final = self._walk(blocks, plan, chunk)
                    values[chunk] = self.readout(final, self.prompts, self.recording.final).T
                    if bar is not None:
                        bar.update(len(chunk) * len(self.prompts))
        return values

    def _walk(self, blocks, plan, rows):
        """Residual streams of some rows after the last block at the last token, `(prompts, rows, hidden)`."""
        num_layers = self.num_layers
        entry = torch.isin(plan.row, rows).nonzero()[:, 0]
        row = torch.full((plan.num_rows,), -1)
        row[rows] = torch.arange(len(rows))
        # Rows are numbered in the order in which they join: first those that start with the residual stream of a layer,
        # then those that start inside the layer.
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
        """Run the block in which some rows start to differ from the base run."""

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
        """Edits of the entries by layer; `rows` are the row numbers of the entries."""
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
        """Values that entries of one layer and component write, `(prompts, entries, [window,] width)`."""
        device = self.last.device
        prompts = torch.arange(len(self.prompts), device=device)[:, None]
        headed = component in HEAD_COMPONENTS
        if plan.values is not None:
            # Entries of several components share one tensor, which has the width of the widest component.
            width = self.recording.parts["key" if headed else "resid_pre"][0].shape[-1]
            width = self.recording.masks[0].shape[-1] if component == "pattern" else width
            values = plan.values[which].to(device).transpose(0, 1)[..., :width]
            if component == "pattern" and position is not None:
                # Nothing can attend to later tokens or to those outside a sliding window.
                values = values * (self.recording.masks[layer][position] == 0)
            values = values if position is not None else blocks.window.take(values)
            return blocks.joined_pattern(values) if component == "pattern" else values
        head = plan.head[which].to(device)
        part = component.removeprefix("head_")
        if part != component:
            heads, kv_heads = num_heads(self.model)
            head = head // (heads // kv_heads)
        source = self.other.parts[part][layer]
        offset = 0 if part in ("key", "value") else self.other.window.start
        if position is None:
            values = blocks.window.take(source, offset)
            values = values[:, head] if headed else values[:, None].expand(-1, len(which), -1, -1)
        else:
            at = position - (offset[:, None] if isinstance(offset, torch.Tensor) else offset)
            values = source[prompts, head, at] if headed else source[prompts, at]
        return blocks.joined_pattern(values) if component == "pattern" else values
