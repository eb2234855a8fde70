"""Path patching: the effect of heads and MLPs through their direct paths to some receivers."""

from collections.abc import Iterable, Sequence

import torch

from ...errors import TranscoderError
from ...lm.architectures import has_parallel_residual
from ...lm.attention import num_heads
from ...lm.sites import Site
from .blocks import Blocks, Edit
from .engine import PatchEngine
from .patch_plan import ALL_POSITIONS, COMPONENTS, PatchPlan
from .results import PatchResult
from .run_recording import Window


def patch_paths(
    engine: PatchEngine,
    receivers: str | Site | Iterable[str | Site],
    position: str | int | torch.Tensor,
    sender_mlps: bool,
    freeze_mlps: bool,
    per_query_head: bool,
) -> PatchResult:
    """Patch the direct paths from each head to some receivers; [`Patching.paths`] documents the arguments."""
    sites = _receivers(receivers)
    if per_query_head and not any(site.point in ("key", "value") for site in sites or []):
        raise TranscoderError("per_query_head is for key and value receivers, and there are none: leave it out.")
    position = engine.position(position)
    to_logits = sites is None
    if to_logits and not ((position == engine.last) | (position == ALL_POSITIONS)).all():
        raise TranscoderError(
            "The logits are read at END, and other tokens have no direct path to them: choose position='END' or 'all'."
        )
    columns = [str(site).replace("mlp.in", "mlp.out") for site in sites or []]
    template = PatchPlan.from_sites([columns] if columns else [["layers.0.mlp.out"]], position, None, per_query_head)
    template.check(engine.model, engine.last)

    layers, heads = engine.num_layers, num_heads(engine.model)[0]
    most = layers if to_logits else max(_reach(engine.model, site) for site in sites)
    kinds = heads + sender_mlps
    senders = torch.cartesian_prod(torch.arange(min(most + 1, layers)), torch.arange(kinds))
    values = torch.empty(layers * kinds, len(engine.last))

    def run(batch, bar):
        values[:, batch.prompts] = batch.base.cpu()
        paths = _Paths(batch, position[batch.prompts], sites, freeze_mlps, per_query_head)
        for chunk in senders.split(engine.budget.rows(len(batch.prompts), paths.window.size)):
            rows = chunk[:, 0] * kinds + chunk[:, 1]
            values[rows[:, None], batch.prompts] = paths.run(chunk).cpu()
            bar.update(len(chunk) * len(batch.prompts))

    source_parts = {"z", "mlp.out"} if sender_mlps else {"z"}
    base, source = engine.run_batches(template, source_parts, {"z", "query"}, len(senders), run)
    protocol = {
        "method": "path patching",
        "receivers": ["logits"] if to_logits else [str(site) for site in sites],
        "mlps": "frozen" if freeze_mlps else "recomputed",
        **({"per_query_head": True} if per_query_head else {}),
        **engine.protocol(),
    }
    names = [str(head) for head in range(heads)] + ["mlp"] * sender_mlps
    axes = {"layer": [str(layer) for layer in range(layers)], "head": names}
    return PatchResult(values.view(layers, kinds, -1), base, source, axes, engine.readout.name, protocol)


class _Paths:
    """Path patching on one batch of prompts."""

    def __init__(self, batch, position, sites: Sequence[Site] | None, freeze_mlps, per_query_head):
        self.batch = batch
        self.sites = sites
        self.freeze_mlps = freeze_mlps
        self.per_query_head = per_query_head
        self.heads, self.kv_heads = num_heads(batch.model)
        self.position = position
        self.everywhere = bool((position == ALL_POSITIONS).all())
        window = batch.recording.window
        self.window = window if self.everywhere else Window(position.to(batch.last.device), 1)

    @torch.no_grad()
    def run(self, senders: torch.Tensor) -> torch.Tensor:
        """Metrics of some senders, `(senders, prompts)`; `senders` has the layer and head of each, `(senders, 2)`."""
        batch = self.batch
        # Within a layer, heads join before the MLP, so that both are contiguous.
        order = (2 * senders[:, 0] + (senders[:, 1] == self.heads)).argsort(stable=True)
        blocks = Blocks(self.batch.model, batch.recording, self.window, batch.last)
        with blocks.attached():
            final, received = self._direct(blocks, senders[order])
        if self.sites is None:
            values = batch.readout(blocks.at_end(final)[:, :, 0], batch.prompts, batch.recording.final).T
        else:
            values = batch.run(self._plan(len(senders), received))
        return values[order.argsort()]

    def _direct(self, blocks, senders):
        """Follow the direct paths: the final residual streams, and the input of each receiver for each sender."""
        received = {}
        wanted = {} if self.sites is None else {site: [] for site in self.sites}
        top = blocks.num_layers if self.sites is None else max(site.layer for site in self.sites) + 1
        hidden = None
        for layer in range(int(senders[0, 0]), top):
            here = [site for site in wanted if site.layer == layer]
            count = 0 if hidden is None else hidden.shape[1]
            if count and any(site.head is not None for site in here):
                parts = blocks.attention_parts(layer, hidden)
                for site in here:
                    if site.head is not None:
                        shared = self.per_query_head and site.point in ("key", "value")
                        head = site.head // (self.heads // self.kv_heads) if shared else site.head
                        received[site] = parts[site.point][:, :, head].clone()
            mlp_read = any(site.head is None for site in here)
            if self.sites is not None and layer == top - 1 and not mlp_read:
                break
            heads = senders[(senders[:, 0] == layer) & (senders[:, 1] < self.heads)]
            mlps = int(((senders[:, 0] == layer) & (senders[:, 1] == self.heads)).sum())
            outputs, read = [], []

            def clean(part, rows, layer=layer):
                return blocks.recorded(part, layer)[:, None].expand(-1, rows, -1, -1)

            if count:
                if mlp_read or not self.freeze_mlps:
                    ran = blocks.run(layer, hidden, [], clean("attn.out", count))
                    read.append(blocks.mlp_output)
                if self.freeze_mlps:
                    ran = (
                        hidden
                        + (blocks.recorded("resid_pre", layer + 1) - blocks.recorded("resid_pre", layer))[:, None]
                    )
                outputs.append(ran)
            if len(heads):
                attention = blocks.head_outputs(layer, len(heads), [self._edit("z", layer, heads[:, 1])])
                stream = clean("resid_pre", len(heads))
                if mlp_read or not self.freeze_mlps:
                    ran = blocks.run(layer, stream, [], attention)
                    read.append(blocks.mlp_output)
                if self.freeze_mlps:
                    ran = blocks.run(layer, stream, [], attention, clean("mlp.out", len(heads)))
                outputs.append(ran)
            if mlps:
                mlp = clean("mlp.out", mlps).clone()
                self._edit("mlp.out", layer, torch.zeros(mlps, dtype=torch.long)).write(mlp)
                outputs.append(blocks.run(layer, clean("resid_pre", mlps), [], clean("attn.out", mlps), mlp))
            for site in here:
                if site.head is None and read:
                    received[site] = torch.cat(read, dim=1)
            hidden = torch.cat(outputs, dim=1) if outputs else hidden
        return hidden, received

    def _edit(self, part, layer, heads):
        """The edit of the senders of one layer; row i is sender i."""
        other, device = self.batch.other, self.batch.last.device
        heads = heads.to(device)
        taken = self.window.take(other.parts[part][layer], other.window.start)
        values = taken[:, heads] if part == "z" else taken[:, None].expand(-1, len(heads), -1, -1)
        return Edit(part, torch.arange(len(heads), device=device), heads, None, values)

    def _plan(self, senders, received):
        """The plan that patches the received inputs; the first rows of each receiver are the senders below it."""
        rows, sites, values = [], [], []
        width = max((value.shape[-1] for value in received.values()), default=1)
        for site, value in received.items():
            count = value.shape[1]
            rows.append(torch.arange(count))
            sites += [site] * count
            # (senders, prompts, window, width)
            value = torch.nn.functional.pad(value.transpose(0, 1), (0, width - value.shape[-1]))
            values.append(self._over_all_tokens(value) if self.everywhere else value[:, :, 0])
        codes = [COMPONENTS.index(self._component(site)) for site in sites]
        return PatchPlan(
            senders,
            torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long),
            torch.tensor([site.layer for site in sites], dtype=torch.long),
            torch.tensor(codes, dtype=torch.long),
            torch.tensor([site.head or 0 for site in sites], dtype=torch.long),
            self.position.expand(len(sites), -1),
            torch.cat(values) if values else None,
        )

    def _component(self, site):
        if site.head is None:
            return "mlp.out"
        return f"head_{site.point}" if self.per_query_head and site.point in ("key", "value") else site.point

    def _over_all_tokens(self, value):
        seq = self.batch.recording.masks[0].shape[-1]
        whole = value.new_zeros(*value.shape[:2], seq, value.shape[-1])
        index = self.window.index[None, :, :, None].expand_as(value)
        return whole.scatter(2, index, value)


def _receivers(receivers):
    """The sites of the receivers, or `None` for the logits."""
    if isinstance(receivers, (str, Site)):
        receivers = [receivers]
    receivers = list(dict.fromkeys(receivers))
    if receivers == ["logits"]:
        return None
    if not receivers or "logits" in receivers:
        raise TranscoderError(
            "The receivers are either 'logits', or heads and MLPs such as 'layers.8.attn.head.3.query' and 'layers.8.mlp.in'."
        )
    sites = [Site.parse(receiver) for receiver in receivers]
    for site in sites:
        if site.point not in ("query", "key", "value") and (site.point != "mlp.in"):
            raise TranscoderError(
                f"'{site}' cannot be a receiver: choose the query, key or value of a head, or mlp.in."
            )
    return sites


def _reach(model, site):
    """The highest layer from which a head has a direct path to a receiver."""
    return site.layer if site.head is None and not has_parallel_residual(model) else site.layer - 1
