"""Decompose read values into the contributions of writers: one step of a path, for many paths at once."""

from collections.abc import Sequence

import torch

from ...lm.order import POINTS, STEPS, reading_step
from ...lm.sites import Site
from ...models.linear_parts import decoder_rows, encoder_rows
from ..graphs.linear_run import READS, LinearRun
from ..graphs.read_vectors import FINAL
from .contributions import Collector, Contributions, Reads
from .filters import PathFilter
from .steps import BIASES, KINDS


_STREAM, _BRANCH, _OUTPUT = range(3)
# Elements of the largest temporary: features of some tokens times hidden size, or heads times tokens.
_MAX_ELEMENTS = 2**24


class Expander:
    """Decomposes values that are read in a run into the contributions of writers (Dunefsky et al. 2024, Eq. 7-8, 23-28).

    Attention patterns and norm scales are frozen, so that each norm is one linear map and the contributions of all writers
    to a token sum to the value that is read there.

    Args:
        run ([`LinearRun`]): The recorded prompt.
    """

    def __init__(self, run: LinearRun):
        self.run = run
        self.device = run.token_embedding.device
        self.continues = [site.point in READS for site in run.input_sites]
        # A dictionary that replaces the whole stream hides all earlier writes.
        floors = torch.full((STEPS * run.num_layers + 1,), -1)
        for site in run.writers:
            if POINTS[site.point].reads is not None:
                height = STEPS * site.layer + POINTS[site.point].writes
                floors[height + 1 :] = floors[height + 1 :].clamp(min=height)
        self.floors = floors.to(self.device)
        self.values = []
        for number, layer in enumerate(run.layers):
            stream = run.activations[Site("resid_pre", number)]
            inputs = stream if layer.attention_norm is None else layer.attention_norm(stream[:, None])[:, 0].float()
            values = inputs @ layer.value.T
            width = layer.output.shape[0] // len(layer.pattern)
            self.values.append(values.unflatten(1, (-1, width)))
        counts = [part.offsets.diff().max() for writer in run.writers.values() for part in writer.parts]
        heads = max(len(layer.pattern) for layer in run.layers)
        most = int(torch.stack(counts).max()) if counts else 0
        widest = max(most * run.token_embedding.shape[-1], heads * len(run.input_ids), 1)
        self._rows_per_chunk = max(1, _MAX_ELEMENTS // widest)

    # ------------------------------------------------------------------------------------------------ reading

    def read(
        self,
        layer: int,
        point: str,
        position: torch.Tensor,
        vector: torch.Tensor,
        bias: torch.Tensor,
        scale: torch.Tensor | None = None,
    ) -> Reads:
        """Reads of one place, for one read vector a row.

        Args:
            layer (`int`): Layer; the number of layers for `"final"`.
            point (`str`): One of `recording.READS`, or `"final"`: after the final norm.
            position (`torch.LongTensor` of shape `(rows,)`): Positions of the tokens.
            vector (`torch.Tensor` of shape `(rows, hidden)`): Vectors by which the activation there is multiplied.
            bias (`torch.Tensor` of shape `(rows,)`): Constants that are added.
            scale (`torch.Tensor` of shape `(rows,)`, *optional*): Factors of the values; 1 by default.

        Returns:
            [`Reads`]
        """
        vector, bias = vector.float(), bias.float()
        if point == FINAL:
            norm, norm_bias = self.run.final_norm, self.run.final_bias
        else:
            norm, norm_bias = self.run.norm_before(Site(point, layer))
        if isinstance(norm_bias, torch.Tensor):
            bias = bias + vector @ norm_bias.float()
        if norm is not None:
            vector = norm[position, 0].transpose(vector)
        scale = torch.ones_like(bias) if scale is None else scale
        return self._before_norm(layer, point, position, vector, bias, scale)

    def _before_norm(self, layer, point, position, vector, bias, scale):
        """Reads of a place, with vectors that already apply before its norm."""
        space = {"attn.branch": _BRANCH, "attn.out": _OUTPUT}.get(point, _STREAM)
        if space == _STREAM:
            height = STEPS * layer + (0 if point == FINAL else reading_step(point, self.run.parallel))
            floor = int(self.floors[height])
        else:
            height, floor = STEPS * layer + 2, STEPS * layer + 1
        columns = (torch.full_like(position, value) for value in (space, floor, height))
        return Reads(vector, scale, bias, torch.full_like(position, layer), position, *columns)

    # ------------------------------------------------------------------------------------------------ one step

    @torch.no_grad()
    def expand(
        self, reads: Reads, keep: int | None = None, filters: Sequence[PathFilter] = ()
    ) -> tuple[Contributions, torch.Tensor]:
        """Contribution of every writer to every reader.

        Args:
            reads ([`Reads`]): The readers.
            keep (`int`, *optional*): Number of the strongest contributions to keep, over all readers. All by default.
            filters (`Sequence[PathFilter]`, *optional*): Conditions on writers, of which one must hold.

        Returns:
            `tuple`: [`Contributions`], which include the `keep` strongest and the `keep` strongest that continue, and the
            sums of all contributions, kept or not, by kind, `(rows, kinds)`.
        """
        found, sums = [], []
        for start in range(0, len(reads), self._rows_per_chunk):
            collector = Collector(reads[start : start + self._rows_per_chunk], keep, filters)
            self._expand(collector)
            part = Contributions.cat(collector.parts)
            part.row.add_(start)
            found.append(part)
            sums.append(collector.sums)
        return Contributions.cat(found), torch.cat(sums)

    def _expand(self, collector):
        reads = collector.reads
        rows = torch.arange(len(reads), device=self.device)
        collector.add("bias", rows, reads.layer, 1.0, reads.constant, reads.position, BIASES.index("own"))
        for layer in range(min(int(reads.layer.max()), self.run.num_layers - 1), -1, -1):
            for height, step in enumerate((self._before, self._attention, self._mlp, self._after)):
                height = STEPS * layer + height
                rows = ((reads.floor <= height) & (height < reads.height)).nonzero()[:, 0]
                if len(rows):
                    step(collector, layer, rows)
        rows = (reads.floor < 0).nonzero()[:, 0]
        position = reads.position[rows]
        for kind, written in (("token", self.run.token_embedding), ("position", self.run.position_embedding)):
            if written is not None:
                index = self.run.input_ids[position] if kind == "token" else -1
                products = (reads.vector[rows] * written[position]).sum(-1)
                collector.add(kind, rows, -1, 1.0, products, position, index)

    def _before(self, collector, layer, rows):
        self._written(collector, Site("resid_pre", layer), rows)

    def _after(self, collector, layer, rows):
        self._written(collector, Site("resid_post", layer), rows)

    def _mlp(self, collector, layer, rows):
        bias = self.run.layers[layer].mlp_post_bias
        if Site("mlp.branch", layer) not in self.run.writers:
            self._norm_bias(collector, layer, rows, bias, "norm")
        self._written(collector, Site("mlp.branch", layer), rows)
        self._written(collector, Site("mlp.out", layer), rows)

    def _attention(self, collector, layer, rows):
        """Contributions of attention: its heads, or a dictionary of its output."""
        run, reads = self.run, collector.reads
        space = reads.space[rows]
        if Site("attn.branch", layer) in run.writers:
            self._written(collector, Site("attn.branch", layer), rows[space == _STREAM])
            rows, space = rows[space > _STREAM], space[space > _STREAM]
        self._norm_bias(collector, layer, rows[space < _OUTPUT], run.layers[layer].attention_post_bias, "attention")
        if Site("attn.out", layer) in run.writers:
            self._written(collector, Site("attn.out", layer), rows[space < _OUTPUT])
            rows = rows[space == _OUTPUT]
        if len(rows):
            self._heads(collector, layer, rows)

    def _norm_bias(self, collector, layer, rows, bias, name):
        if isinstance(bias, torch.Tensor):
            reads = collector.reads
            products = reads.vector[rows] @ bias.float()
            collector.add("bias", rows, layer, 1.0, products, reads.position[rows], BIASES.index(name))

    def _heads(self, collector, layer, rows):
        """`A[h, t, s] * (W_O[h] f) . v_h(s)` for every head and source token (Eq. 8)."""
        maps, values = self.run.layers[layer], self.values[layer]
        position = collector.reads.position[rows]
        vector = self._at(Site("attn.out", layer), collector.reads[rows])
        tokens, kv_heads, width = values.shape
        read = (vector @ maps.output.T).view(len(rows), kv_heads, -1, width)
        carried = torch.einsum("nkgd,tkd->nkgt", read, values).flatten(1, 2)
        pattern = maps.pattern[:, position].transpose(0, 1)
        shape = pattern.shape
        head = torch.arange(shape[1], device=self.device)[:, None].expand(shape)
        source = torch.arange(tokens, device=self.device).expand(shape)
        row = rows[:, None, None].expand(shape)
        collector.add(
            "head", row.flatten(), layer, pattern.flatten(), carried.flatten(), source.flatten(), head.flatten(),
            continues=True,
        )  # fmt: skip
        constant = (vector * maps.attention_constant[position]).sum(-1)
        if maps.rounding is not None:
            constant = constant + (vector * maps.rounding[position]).sum(-1)
        collector.add("bias", rows, layer, 1.0, constant, position, BIASES.index("attention"))

    def _written(self, collector, site, rows):
        """Contributions of a dictionary (features, error, bias, skip connection), or of an MLP without one."""
        writer = self.run.writers.get(site)
        if writer is None or not len(rows):
            return
        position, layer, number = collector.reads.position[rows], site.layer, writer.dictionary
        vector = self._at(site, collector.reads[rows])
        error = writer.error[position]
        norm = error.norm(dim=-1)
        products = (error * vector).sum(-1) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        collector.add("error" if number >= 0 else "mlp", rows, layer, norm, products, position, dictionary=number)
        if number < 0:
            return
        for part in writer.parts:
            self._features(collector, part, site, rows, position, vector)
        works = writer.works[position].float()
        collector.add(
            "bias", rows, layer, 1.0, works * (vector @ writer.bias), position, BIASES.index("decoder"), number
        )
        for part in writer.parts:
            if part.skip is not None:
                source = self.run.input_sites[part.dictionary]
                products = works * ((vector @ part.skip) * self.run.activations[source][position]).sum(-1)
                collector.add("skip", rows, layer, 1.0, products, position, dictionary=part.dictionary, continues=True)

    def _features(self, collector, part, site, rows, position, vector):
        dictionary = self.run.dictionaries[part.dictionary]
        counts = part.offsets[position + 1] - part.offsets[position]
        # One pair for each row and feature active at its token.
        pair = torch.arange(len(rows), device=self.device).repeat_interleave(counts)
        first = (part.offsets[position] - (counts.cumsum(0) - counts))[pair]
        active = first + torch.arange(len(pair), device=self.device)
        feature = part.feature[active]
        decoder = decoder_rows(dictionary, feature.to(dictionary.device), site).to(self.device)
        collector.add(
            "feature", rows[pair], site.layer, part.activation[active], (decoder * vector[pair]).sum(-1),
            position[pair], feature, part.dictionary, self.continues[part.dictionary],
        )  # fmt: skip

    def _at(self, site, reads):
        """Read vectors at a site, before its post-norm if it has one."""
        layer = self.run.layers[site.layer]
        if site.point == "mlp.out" and layer.mlp_post_norm is not None:
            return layer.mlp_post_norm[reads.position, 0].transpose(reads.vector)
        if site.point == "attn.out" and layer.attention_post_norm is not None:
            through = layer.attention_post_norm[reads.position, 0].transpose(reads.vector)
            return torch.where((reads.space == _OUTPUT)[:, None], reads.vector, through)
        return reads.vector

    # ------------------------------------------------------------------------------------------------ the next step

    @torch.no_grad()
    def follow(self, steps: Contributions, reads: Reads) -> Reads:
        """The reads of the writers of some steps (Eq. 25-28).

        A feature reads with its encoder row, scaled by the product of its decoder row and the reader; a head reads with
        `W_V W_O f` at the token it attends to, scaled by its attention. The value that is read, times its scale, is the
        contribution of the step.

        Args:
            steps ([`Contributions`]): Steps that continue.
            reads ([`Reads`]): The reads that `row` of the steps refers to.

        Returns:
            [`Reads`]: one row for each step.
        """
        parents = reads[steps.row]
        scale = parents.scale * torch.where(steps.kind == KINDS.index("feature"), steps.weight, steps.activation)
        parts, order = [], []
        for kind, group, follow in (
            ("feature", steps.dictionary, self._follow_features),
            ("skip", steps.layer * len(self.run.dictionaries) + steps.dictionary, self._follow_skip),
            ("head", steps.layer, self._follow_heads),
        ):
            chosen = steps.kind == KINDS.index(kind)
            for number in group[chosen].unique().tolist():
                rows = (chosen & (group == number)).nonzero()[:, 0]
                parts.append(follow(number, steps[rows], parents[rows], scale[rows]))
                order.append(rows)
        return Reads.cat(parts)[torch.cat(order).argsort()]

    def _follow_features(self, number, steps, parents, scale):
        dictionary = self.run.dictionaries[number]
        site = self.run.input_sites[number]
        vector, bias = encoder_rows(dictionary, steps.index.to(dictionary.device))
        return self.read(site.layer, site.point, steps.position, vector.to(self.device), bias.to(self.device), scale)

    def _follow_skip(self, number, steps, parents, scale):
        layer, dictionary = divmod(number, len(self.run.dictionaries))
        written, skip = next(
            (site, part.skip)
            for site, writer in self.run.writers.items()
            for part in writer.parts
            if (site.layer, part.dictionary) == (layer, dictionary) and part.skip is not None
        )
        site = self.run.input_sites[dictionary]
        vector = self._at(written, parents) @ skip
        return self.read(site.layer, site.point, steps.position, vector, torch.zeros_like(scale), scale)

    def _follow_heads(self, layer, steps, parents, scale):
        maps = self.run.layers[layer]
        heads, kv_heads, width = len(maps.pattern), *self.values[layer].shape[1:]
        vector = self._at(Site("attn.out", layer), parents)
        rows = torch.arange(len(steps), device=self.device)
        read = (vector @ maps.output.T).view(len(steps), heads, width)[rows, steps.index]
        values = read.new_zeros(len(steps), kv_heads, width)
        values[rows, steps.index // (heads // kv_heads)] = read
        # The bias of the norm before attention is part of the bias of attention.
        vector = values.flatten(1) @ maps.value
        if maps.attention_norm is not None:
            vector = maps.attention_norm[steps.position, 0].transpose(vector)
        return self._before_norm(layer, "attn.in", steps.position, vector, torch.zeros_like(scale), scale)
