"""Run single blocks of a model on many patched versions of some prompts at once."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from ...lm.architectures import decoder_blocks, locate
from ...lm.attention import AttentionCall, attention_modules, edit_attention, softmax_pattern
from ...lm.heads import output_projection, output_weight
from ...lm.hooks import wrap_forward
from ...lm.linear_maps import is_plain
from ...lm.sites import Site
from .patch_plan import HEAD_COMPONENTS
from .run_recording import Recording, Window, scaling_of


@dataclass(frozen=True)
class Edit:
    """Values to write into one component of one layer.

    Args:
        component (`str`): One of `COMPONENTS`.
        rows (`torch.LongTensor` of shape `(entries,)`): Row of each entry, which is the version of the prompts that it changes.
        heads (`torch.LongTensor` of shape `(entries,)`): Head of each entry, 0 for components without heads.
        offsets (`torch.LongTensor` of shape `(prompts, entries)`, *optional*): Token of the window, or `None` for all tokens.
        values (`torch.Tensor` of shape `(prompts, entries, [window,] width)`): The values.
        keep (`torch.BoolTensor` of shape `(prompts, entries)`, *optional*): Whether to write each entry. By default all entries are written.
    """

    component: str
    rows: torch.Tensor
    heads: torch.Tensor
    offsets: torch.Tensor | None
    values: torch.Tensor
    keep: torch.Tensor | None = None

    def write(self, tensor: torch.Tensor) -> None:
        """Write the values into `tensor`, in place.

        Args:
            tensor (`torch.Tensor`): `(prompts, rows, window, width)`, or `(prompts, rows, heads, window, width)` for
                components of heads.
        """
        headed = self.component in HEAD_COMPONENTS
        if self.offsets is None:
            where = (slice(None), self.rows, self.heads) if headed else (slice(None), self.rows)
        else:
            prompts = torch.arange(len(tensor), device=tensor.device)[:, None]
            where = (prompts, self.rows, self.heads, self.offsets) if headed else (prompts, self.rows, self.offsets)
        values = self.values.to(tensor.dtype)
        if self.keep is not None:
            values = torch.where(self.keep[..., None], values, tensor[where])
        tensor[where] = values

    def at(self, offset: torch.Tensor) -> "Edit":
        """The same edit on a window of one token, which is token `offset` of the present window, `(prompts,)`."""
        prompts = torch.arange(len(offset), device=offset.device)
        if self.offsets is None:
            values, keep = self.values[prompts, :, offset], None
        else:
            values, keep = self.values, self.offsets == offset[:, None]
        offsets = torch.zeros(values.shape[:2], dtype=torch.long, device=values.device)
        return replace(self, offsets=offsets, values=values, keep=keep)

    def shifted(self, first: int, count: int) -> "Edit | None":
        """The part of the edit for the `count` rows from `first` on, which are renumbered from 0."""
        chosen = (self.rows >= first) & (self.rows < first + count)
        if not chosen.any():
            return None
        if chosen.all() and first == 0:
            return self
        return replace(
            self,
            rows=self.rows[chosen] - first,
            heads=self.heads[chosen],
            offsets=None if self.offsets is None else self.offsets[:, chosen],
            values=self.values[:, chosen],
        )


class _Computed(Exception):
    """Ends the forward pass of a block as soon as its attention is computed."""


class Blocks:
    """Runs single blocks on patched versions of recorded prompts.

    Keys and values of tokens before the window come from the recording. A version is a row: hidden states are
    `(prompts, rows, window, hidden)`.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        recording ([`Recording`]): The base run of the versions, with `key` and `value`.
        window ([`Window`]): The tokens to run: the window of the recording, or its last tokens.
        last (`torch.LongTensor` of shape `(prompts,)`): Index of the last token of each prompt.

    Attributes:
        mlp_output (`torch.Tensor` of shape `(prompts, rows, window, hidden)`):
            Output of the MLP that ran last.
    """

    def __init__(self, model: PreTrainedModel, recording: Recording, window: Window, last: torch.Tensor):
        self.model = model
        self.recording = recording
        self.window = window
        self.end = last - window.start
        self.blocks = decoder_blocks(model)
        self.num_layers = len(self.blocks)
        self.output_projections = [output_projection(model, layer) for layer in range(self.num_layers)]
        # All versions of a prompt share the tokens before the window.
        self.prefix = int(window.start.max())
        self._one_start = bool((window.start == window.start[0]).all())
        self._cache = {}
        self._edits: list[Edit] = []
        self._attention_output = self._mlp_output = None
        self.mlp_output = None
        self._shape = None
        self._end_only = False
        self._catch = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach this object to the blocks of the model inside the `with` block."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(edit_attention(self.model, compute=self._attend))
            for layer, attention in enumerate(attention_modules(self.model)):
                wrap_forward(stack, attention, self._run_attention)
                first, last = (locate(self.model, Site(point, layer)).module for point in ("mlp.in", "mlp.out"))
                others = self.recording.mlp_others[layer]
                wrap_forward(stack, last, functools.partial(self._run_mlp, others=others))
                if first is not last:
                    wrap_forward(stack, first, self._run_first_of_mlp)
            yield

    def recorded(self, part: str, layer: int) -> torch.Tensor:
        """An activation of the recording at the tokens of the window, `(prompts, [heads,] window, width)`."""
        key = (part, layer)
        if key not in self._cache:
            offset = 0 if part in ("key", "value") else self.recording.window.start
            self._cache[key] = self.window.take(self.recording.parts[part][layer], offset)
        return self._cache[key]

    def run(
        self,
        layer: int,
        hidden: torch.Tensor,
        edits: list[Edit],
        attention_output: torch.Tensor | None = None,
        mlp_output: torch.Tensor | None = None,
        end_only: bool = False,
    ) -> torch.Tensor:
        """Run a block on some versions.

        Args:
            layer (`int`): The block.
            hidden (`torch.Tensor` of shape `(prompts, rows, window, hidden)`): Residual stream before the block.
            edits (`list[Edit]`): Changes inside the block.
            attention_output, mlp_output (`torch.Tensor`, *optional*): Outputs of attention and MLP, which then
                do not run, each of the shape of `hidden`.
            end_only (`bool`, *optional*, defaults to `False`): Whether to compute only the last token of each prompt.

        Returns:
            `torch.Tensor` of shape `(prompts, rows, window, hidden)`, or with a window of 1 if `end_only`.
        """
        middle = [edit for edit in edits if edit.component == "resid_mid"]
        if middle:
            return self._run_halves(layer, hidden, edits, middle, attention_output, end_only)
        if end_only and self.window.size > 1:
            if attention_output is None:
                attention_output = self._attention_at_end(layer, hidden, edits)
            else:
                attention_output = self.at_end(attention_output)
            mlp_output = None if mlp_output is None else self.at_end(mlp_output)
            hidden = self.at_end(hidden)
            edits = [edit.at(self.end) for edit in edits if edit.component == "mlp.out"]
        self._attention_output, self._mlp_output = attention_output, mlp_output
        self._edits = edits
        return self._call(layer, hidden)

    def _run_halves(self, layer, hidden, edits, middle, attention_output, end_only):
        """Run a block with edits between attention and MLP: first without the MLP, and then without attention."""
        before = [edit for edit in edits if edit.component not in ("resid_mid", "mlp.out")]
        stream = self.run(layer, hidden, before, attention_output, torch.zeros_like(hidden), end_only)
        after = [edit for edit in edits if edit.component == "mlp.out"]
        if stream.shape[2] != hidden.shape[2]:
            middle, after = ([edit.at(self.end) for edit in each] for each in (middle, after))
        for edit in middle:
            edit.write(stream)
        return self.run(layer, stream, after, torch.zeros_like(stream))

    def attention_parts(self, layer: int, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """Queries, keys and values of a block, each `(prompts, rows, heads or kv_heads, window, head_dim)`."""
        self._catch, self._attention_output, self._edits = {}, None, []
        try:
            self._call(layer, hidden)
        except _Computed:
            return self._catch
        finally:
            self._catch = None

    def head_outputs(self, layer: int, rows: int, edits: list[Edit]) -> torch.Tensor:
        """Output of attention for recorded prompts with changes of heads, `(prompts, rows, window, hidden)`."""

        def expanded(part):
            value = self.recorded(part, layer)
            return value[:, None].expand(-1, rows, *value.shape[1:]).clone()

        written = [edit for edit in edits if edit.component == "z"]
        if any(edit.component in HEAD_COMPONENTS and edit.component != "z" for edit in edits):
            query, key, value = (expanded(part) for part in ("query", "key", "value"))
            self._edits = edits
            output = self._project(layer, self._heads(layer, query, key, value))
        elif sum(len(edit.rows) for edit in written) <= rows and is_plain(self.output_projections[layer]):
            # Few heads change: their changes are added, and the other heads are not projected again. If the weight would
            # have to be computed first, running the projection is as exact and cheaper.
            output = expanded("attn.out")
            z, prompts = self.recorded("z", layer), torch.arange(len(output), device=output.device)[:, None]
            for edit in written:
                weight = output_weight(self.model, layer)[edit.heads]
                if edit.offsets is None:
                    change = torch.einsum("pewd,edo->pewo", edit.values.to(z.dtype) - z[:, edit.heads], weight)
                    output.index_add_(1, edit.rows, change)
                else:
                    change = edit.values.to(z.dtype) - z[prompts, edit.heads, edit.offsets]
                    where = (prompts, edit.rows, edit.offsets)
                    output.index_put_(where, torch.einsum("ped,edo->peo", change, weight), accumulate=True)
        else:
            z = expanded("z")
            for edit in written:
                edit.write(z)
            output = self._project(layer, z)
        for edit in edits:
            if edit.component == "attn.out":
                edit.write(output)
        return output

    def _project(self, layer, z):
        """z of all heads through the output projection, `(prompts, rows, window, hidden)`."""
        # One axis for the batch, as in a forward pass: some quantized layers need that.
        joined = z.transpose(2, 3).flatten(3).flatten(0, 1)
        return self.output_projections[layer](joined).unflatten(0, z.shape[:2])

    def at_end(self, tensor: torch.Tensor) -> torch.Tensor:
        """The last token of each prompt, `(prompts, rows, window, width)` to `(prompts, rows, 1, width)`."""
        return tensor[torch.arange(len(tensor), device=tensor.device), :, self.end][:, :, None]

    def _attention_at_end(self, layer, hidden, edits):
        self._end_only = True
        self._attention_output, self._edits, self._catch = None, edits, {}
        try:
            self._call(layer, hidden)
        except _Computed:
            output = self._project(layer, self._catch["z"])
        finally:
            self._end_only, self._catch = False, None
        for edit in edits:
            if edit.component == "attn.out":
                edit.at(self.end).write(output)
        return output

    def _call(self, layer, hidden):
        prompts, rows, window, width = hidden.shape
        self._shape = (prompts, rows, window)
        flat = hidden.reshape(prompts * rows, window, width)
        arguments = dict(self.recording.calls[layer])
        first = next(iter(arguments))
        arguments[first] = flat
        # The mask of the window is applied in `_masks`.
        arguments["attention_mask"] = None
        if window == self.window.size:
            for name in ("position_embeddings", "position_ids"):
                if arguments.get(name) is not None:
                    arguments[name] = self._positions(arguments[name], rows)
        try:
            return self.blocks[layer](**arguments).view(prompts, rows, window, width)
        finally:
            self._attention_output = self._mlp_output = None

    def _positions(self, value, rows):
        """An argument of the block with one entry for each token, for the tokens of the window."""
        if isinstance(value, tuple):
            return tuple(self._positions(each, rows) for each in value)
        index = self.window.index
        if self._one_start:
            return value[:1, index[0]]
        taken = value[0, index]
        return taken[:, None].expand(-1, rows, *taken.shape[1:]).flatten(0, 1)

    def _run_attention(self, forward, *args, **kwargs):
        if self._attention_output is not None:
            return self._attention_output.flatten(0, 1), None
        output, *rest = forward(*args, **kwargs)
        return self._written("attn.out", output), *rest

    def _run_mlp(self, forward, hidden, others):
        if self._mlp_output is not None:
            output = self._mlp_output.reshape(*hidden.shape[:-1], -1)
        else:
            output = self._written("mlp.out", forward(hidden)[0] if others else forward(hidden))
            self.mlp_output = output.view(*self._shape, -1)
        return (output, *others) if others else output

    def _run_first_of_mlp(self, forward, hidden):
        return forward(hidden) if self._mlp_output is None else hidden[..., :0]

    def _written(self, component, output):
        for edit in self._edits:
            if edit.component == component:
                edit.write(output.view(*self._shape, -1))
        return output

    def _attend(self, call: AttentionCall):
        """Attention of the block that is running, for transformers: z, `(batch, window, heads, head_dim)`."""
        prompts, rows, window = self._shape  # pyright: ignore[reportGeneralTypeIssues]
        query, key, value = (each.unflatten(0, (prompts, rows)) for each in (call.query, call.key, call.value))
        if self._catch is not None and not self._end_only:
            self._catch.update(query=query, key=key, value=value)
            raise _Computed
        z = self._heads(call.layer, query, key, value)
        if self._catch is not None:
            self._catch["z"] = z
            raise _Computed
        return z.flatten(0, 1).transpose(1, 2)

    def _heads(self, layer, query, key, value):
        """z of all heads, `(prompts, rows, heads, window, head_dim)`, with the edits of the heads."""
        edits = {part: [edit for edit in self._edits if edit.component == part] for part in HEAD_COMPONENTS}
        for part, tensor in (("query", query), ("key", key), ("value", value)):
            for edit in edits[part]:
                edit.write(tensor)
        if edits["head_key"] or edits["head_value"]:
            # Heads that share keys and values get copies of their own.
            groups = query.shape[2] // key.shape[2]
            key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
            for part, tensor in (("head_key", key), ("head_value", value)):
                for edit in edits[part]:
                    edit.write(tensor)
        patterns, outputs = edits["pattern"], edits["z"]
        if self._end_only:
            query = self.at_end(query.flatten(1, 2)).unflatten(1, query.shape[1:3])
            patterns, outputs = ([edit.at(self.end) for edit in each] for each in (patterns, outputs))
        options = self.recording.options[layer]
        if self.prefix == 0 and not patterns and options.get("softcap") is None and options.get("s_aux") is None:
            z = self._fused(layer, query, key, value)
        else:
            z = self._in_parts(layer, query, key, value, patterns)
        for edit in outputs:
            edit.write(z)
        return z

    def _fused(self, layer, query, key, value):
        prompts, rows, heads, _, _ = query.shape
        # Without tokens before it, the window starts at the first token of every prompt, so that all prompts share one mask.
        mask, _ = self._masks(layer)
        if self._end_only:
            mask = mask[:, None].expand(-1, rows, -1, -1).flatten(0, 1)[:, None]
        z = scaled_dot_product_attention(
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            attn_mask=mask if self._end_only else mask[:1],
            scale=self._scaling(layer, query),
            enable_gqa=key.shape[2] != heads,
        )
        return z.unflatten(0, (prompts, rows))

    def _in_parts(self, layer, query, key, value, patterns):
        """Attention to the tokens before the window, which all rows of a prompt share, and in the window, in one softmax."""
        prompts, rows, heads, queries, width = query.shape
        kv_heads, window, value_width = key.shape[2], key.shape[3], value.shape[-1]
        groups, prefix = heads // kv_heads, self.prefix
        # (prompts, kv_heads, rows, groups, queries, width)
        query = query.unflatten(2, (kv_heads, groups)).transpose(1, 2)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        shared_key, shared_value = (self.recording.parts[part][layer][:, :, :prefix] for part in ("key", "value"))
        if shared_key.shape[1] != kv_heads:
            each = kv_heads // shared_key.shape[1]
            shared_key, shared_value = (part.repeat_interleave(each, dim=1) for part in (shared_key, shared_value))
        if window == 1:
            own = (query * key[:, :, :, None]).sum(-1, keepdim=True)
        else:
            own = (query.flatten(3, 4) @ key.transpose(-1, -2)).unflatten(3, (groups, queries))
        shared = query.reshape(prompts, kv_heads, rows * groups * queries, width) @ shared_key.transpose(-1, -2)
        products = torch.cat([shared.view(prompts, kv_heads, rows, groups, queries, prefix), own], dim=-1)
        own_mask, shared_mask = self._masks(layer)
        mask = torch.cat([shared_mask, own_mask], dim=-1)[:, None, None, None]
        options = self.recording.options[layer]
        sinks = options.get("s_aux")
        sinks = None if sinks is None else sinks.view(kv_heads, 1, groups, 1, 1)
        pattern = softmax_pattern(products, mask, self._scaling(layer, query), options, sinks)
        for edit in patterns:
            by_head = pattern.permute(0, 2, 1, 3, 4, 5).flatten(2, 3)
            edit.write(by_head)
            pattern = by_head.unflatten(2, (kv_heads, groups)).transpose(1, 2)
        z = pattern[..., :prefix].reshape(prompts, kv_heads, rows * groups * queries, prefix) @ shared_value
        z = z.view(prompts, kv_heads, rows, groups, queries, value_width)
        if window == 1:
            z = z + pattern[..., prefix:] * value[:, :, :, None]
        else:
            z = z + (pattern[..., prefix:].flatten(3, 4) @ value).unflatten(3, (groups, queries))
        return z.transpose(1, 2).flatten(2, 3)

    def _masks(self, layer):
        """Masks from the queries to the tokens in the window and before it, each `(prompts, queries, keys)`."""
        mask = self.recording.masks[layer]
        key = ("mask", id(mask), self._end_only)
        if key not in self._cache:
            queries = self.window.index
            if self._end_only:
                queries = (self.window.start + self.end)[:, None]
            rows = mask[queries]
            own = rows.gather(2, self.window.index[:, None].expand(-1, queries.shape[1], -1))
            shared = rows[..., : self.prefix]
            outside = torch.arange(self.prefix, device=mask.device) >= self.window.start[:, None]
            shared = shared.masked_fill(outside[:, None], torch.finfo(mask.dtype).min)
            self._cache[key] = own, shared
        return self._cache[key]

    def _scaling(self, layer, query):
        return scaling_of(self.recording.options[layer], query)

    def joined_pattern(self, pattern: torch.Tensor) -> torch.Tensor:
        """Reorder pattern rows over all tokens, `(prompts, ..., seq)`, as in `_in_parts`: before the window, then in it."""
        index = self.window.index.reshape(len(pattern), *[1] * (pattern.dim() - 2), -1)
        own = pattern.gather(-1, index.expand(*pattern.shape[:-1], -1))
        before = torch.arange(self.prefix, device=pattern.device) < self.window.start[:, None]
        shared = pattern[..., : self.prefix] * before.reshape(len(pattern), *[1] * (pattern.dim() - 2), -1)
        return torch.cat([shared, own], dim=-1)
