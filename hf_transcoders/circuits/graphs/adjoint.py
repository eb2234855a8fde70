"""Backward passes through the linear model of one prompt, by hand-written transposes."""

import torch

from ...lm.sites import Site
from ...models.linear_parts import decoder_rows
from .linear_run import LinearRun, Writer
from .read_vectors import FINAL, ReadVectors
from .sources import Sources


# Positions whose features are padded to equal numbers together.
_POSITIONS_PER_CHUNK = 64
# Bytes of the gradients of one batch of targets. A small batch need not go down from a layer above most of its targets,
# and stays in a processor's cache. Measured with benchmarks/attribution.py: 512 targets at once take 1.6 times as long as
# 64 to 96.
_BATCH_BYTES = 3 << 23


class Adjoint:
    """Computes rows of an attribution graph by hand-written transposes, without autograd.

    With frozen attention patterns and norm scales, and with dictionaries and their errors in place of MLPs, the residual
    stream is linear in everything that writes to it: embeddings, active features, errors and biases. One walk down the
    layers carries the gradients of many targets, at the tokens up to the last of them only, and each writer's contribution
    to each target is the product of what it writes and the gradient there.

    Args:
        run ([`LinearRun`]): The recorded prompt.
    """

    def __init__(self, run: LinearRun):
        self.run = run
        self.sources = Sources(run)

    @torch.no_grad()
    def rows(self, targets: ReadVectors) -> torch.Tensor:
        """Contributions of all sources to some targets.

        Args:
            targets ([`ReadVectors`]): The targets. Batches of one layer and of neighboring tokens are fastest.

        Returns:
            `torch.Tensor` of shape `(rows, sources)` in fp32: The rows sum to the values of the targets.
        """
        rows = _Rows(self.run, self.sources, len(targets))
        Walk(self.run, targets, rows).down()
        return rows.out.T

    def batch_size(self) -> int:
        """Number of targets that fit into one batch."""
        width = self.run.token_embedding.shape[-1]
        inner = max(layer.output.shape[0] for layer in self.run.layers)
        return max(16, min(512, _BATCH_BYTES // (4 * len(self.run.input_ids) * 3 * max(width, inner))))


class Visitor:
    """Receives the gradients of a [`Walk`] where it passes; a subclass defines the methods that it needs.

    Gradients are `(tokens, targets, width)`, for the tokens up to the last that is read.
    """

    def on_writer(self, writer: Writer, gradient: torch.Tensor) -> None:
        """The gradients where a dictionary, or an MLP without one, writes."""

    def on_bias(self, layer: int, gradient: torch.Tensor, written: torch.Tensor) -> None:
        """The gradients where a bias is added: `(width,)`, or `(tokens, width)` where it differs between tokens."""

    def on_constant(self, layer: int, values: torch.Tensor, rows: torch.Tensor) -> None:
        """Constants of some targets themselves, `(rows,)`."""

    def on_heads(self, layer: int, gradient: torch.Tensor) -> None:
        """The gradients of the values that heads attend to, `(heads, tokens, targets, head_dim)`."""

    def on_embeddings(self, gradient: torch.Tensor) -> None:
        """The gradients of the stream that enters the first block."""


class Walk:
    """A backward pass of one batch of targets, from the top layer that is read down to the embeddings.

    Args:
        run ([`LinearRun`]): The recorded prompt.
        targets ([`ReadVectors`]): The targets.
        visitor ([`Visitor`]): Receives the gradients.
    """

    def __init__(self, run: LinearRun, targets: ReadVectors, visitor: Visitor):
        self.run = run
        self.targets = targets
        self.visitor = visitor
        # Later tokens cannot contribute to any target.
        self.tokens = int(targets.position.max()) + 1
        width = run.token_embedding.shape[-1]
        self.stream = torch.zeros(self.tokens, len(targets), width, device=run.token_embedding.device)
        self.groups = targets.places()
        # Gradients, by layer and point, that skip connections further up pass to what they read.
        self.skipped: dict[tuple[int, str], torch.Tensor] = {}
        self.top = int(targets.layer.max())
        # Gradients are zero until the first target has been met.
        self.live = False

    def down(self) -> None:
        """Walk through all layers."""
        run = self.run
        if self.top == run.num_layers:
            self.stream = self._place(run.num_layers, FINAL, self.stream, run.final_norm, run.final_bias)
        for layer in range(min(self.top, run.num_layers - 1), -1, -1):
            self._block(layer, run.layers[layer])
        self.visitor.on_embeddings(self.stream)

    def _block(self, layer, maps):
        self.stream = self._place(layer, "resid_post", self.stream)
        if self.live:
            self._mlp(layer, maps)
        if not self.run.parallel:
            self.stream = self._place(layer, "mlp.in", self.stream, maps.mlp_norm, maps.mlp_norm_bias)
            self.stream = self._place(layer, "resid_mid", self.stream)
        self._attention(layer, maps)
        if self.run.parallel:
            self.stream = self._place(layer, "mlp.in", self.stream, maps.mlp_norm, maps.mlp_norm_bias)
        self.stream = self._place(layer, "resid_pre", self.stream)

    def _place(self, layer, point, gradient, norm=None, norm_bias=0.0):
        """Backward step at a site: credit the writer, then add the gradients of the targets that read here."""
        if self.live and not point.startswith("mlp"):
            writer = None if layer == self.run.num_layers else self.run.writers.get(Site(point, layer))
            if writer is not None:
                self._writer(writer, gradient)
                gradient = torch.zeros_like(gradient)
        skipped = self.skipped.pop((layer, point), None)
        if skipped is not None:
            self._bias(layer, skipped, norm_bias)
            gradient = gradient + (skipped if norm is None else norm[: self.tokens].transpose(skipped))
        rows = self.groups.get((layer, point))
        if rows is not None:
            position, vector = self.targets.position[rows], self.targets.vector[rows].float()
            constant = self.targets.bias[rows].float()
            if isinstance(norm_bias, torch.Tensor):
                constant = constant + vector @ norm_bias.float()
            self.visitor.on_constant(layer, constant, rows)
            gradient = gradient.clone()
            gradient[position, rows] += vector if norm is None else norm[position, 0].transpose(vector)
            self.live = True
        return gradient

    def _mlp(self, layer, maps):
        writer = self.run.writers.get(Site("mlp.branch", layer))
        gradient = self.stream
        if writer is None:
            gradient = self._before_post_norm(layer, gradient, maps.mlp_post_norm, maps.mlp_post_bias)
            writer = self.run.writers[Site("mlp.out", layer)]
        self._writer(writer, gradient)

    def _attention(self, layer, maps):
        gradient = self._place(layer, "attn.branch", self.stream)
        if self.live:
            gradient = self._before_post_norm(layer, gradient, maps.attention_post_norm, maps.attention_post_bias)
        gradient = self._place(layer, "attn.out", gradient)
        inputs = torch.zeros_like(gradient)
        if self.live:
            self._bias(layer, gradient, maps.attention_constant)
            if maps.rounding is not None:
                self._bias(layer, gradient, maps.rounding)
            inputs = self._through_heads(layer, maps, gradient)
        # Through heads, the norm's bias is part of the attention constant; here it counts for direct readers.
        inputs = self._place(layer, "attn.in", inputs, norm_bias=maps.attention_norm_bias)
        if self.live:
            norm = maps.attention_norm
            self.stream = self.stream + (inputs if norm is None else norm[: self.tokens].transpose(inputs))

    def _before_post_norm(self, layer, gradient, norm, bias):
        if norm is None:
            return gradient
        self._bias(layer, gradient, bias)
        return norm[: self.tokens].transpose(gradient)

    def _through_heads(self, layer, maps, gradient):
        """From gradients of attention's output to gradients of its input, all heads at once."""
        tokens, targets, _ = gradient.shape
        pattern = maps.pattern[:, :tokens, :tokens]
        heads = len(pattern)
        read = (gradient @ maps.output.T).view(tokens, targets, heads, -1)
        read = read.permute(2, 0, 1, 3).reshape(heads, tokens, -1)
        values = (pattern.transpose(1, 2) @ read).view(heads, tokens, targets, -1)
        self.visitor.on_heads(layer, values)
        kv_heads = maps.value.shape[0] // values.shape[-1]
        values = values.unflatten(0, (kv_heads, -1)).sum(1)
        return values.permute(1, 2, 0, 3).reshape(tokens, targets, -1) @ maps.value

    def _writer(self, writer, gradient):
        self.visitor.on_writer(writer, gradient)
        if writer.dictionary < 0:
            return
        works = writer.works[: self.tokens, None].float()
        self._bias(writer.site.layer, gradient, works * writer.bias)
        for part in writer.parts:
            if part.skip is None:
                continue
            read = self.run.input_sites[part.dictionary]
            place = (read.layer, read.point)
            skipped = (gradient * works[:, None]) @ part.skip
            self.skipped[place] = self.skipped[place] + skipped if place in self.skipped else skipped

    def _bias(self, layer, gradient, written):
        """A bias on the way, unless it is the number zero: the norm or projection has none."""
        if isinstance(written, torch.Tensor):
            self.visitor.on_bias(layer, gradient, written[: self.tokens] if written.dim() > 1 else written)


class _Rows(Visitor):
    """Contributions of all sources to the targets of a walk.

    Attributes:
        out (`torch.Tensor` of shape `(sources, targets)`): The contributions.
    """

    def __init__(self, run, sources, targets):
        self.run = run
        self.sources = sources
        self.out = torch.zeros(len(sources), targets, device=run.token_embedding.device)

    def on_writer(self, writer, gradient):
        for part in writer.parts:
            self._features(part, writer.site, gradient)
        self._vectors("mlp" if writer.dictionary < 0 else "error", writer.site, writer.error, gradient)

    def on_embeddings(self, gradient):
        self._vectors("token", None, self.run.token_embedding, gradient)
        if self.run.position_embedding is not None:
            self._vectors("position", None, self.run.position_embedding, gradient)

    def on_bias(self, layer, gradient, written):
        if written.dim() == 1:
            values = gradient.sum(0) @ written.float()
        else:
            values = torch.linalg.vecdot(gradient, written[:, None].float()).sum(0)
        self.out[self.sources.segment("bias", layer).start] += values

    def on_constant(self, layer, values, rows):
        self.out[self.sources.segment("bias", layer).start, rows] += values

    def _vectors(self, kind, of, vectors, gradient):
        """Contributions of one source for each token."""
        start, tokens = self.sources.segment(kind, of).start, len(gradient)
        # A batched product with one column takes six times as long on CPU.
        self.out[start : start + tokens] = torch.linalg.vecdot(gradient, vectors[:tokens, None])

    def _features(self, part, site, gradient):
        """Contributions of features through one of the sites that they write at."""
        dictionary, tokens = self.run.dictionaries[part.dictionary], len(gradient)
        start = self.sources.segment("feature", part.dictionary).start
        for first in range(0, tokens, _POSITIONS_PER_CHUNK):
            last = min(first + _POSITIONS_PER_CHUNK, tokens)
            begin, end = int(part.offsets[first]), int(part.offsets[last])
            if begin == end:
                continue
            features = part.feature[begin:end].to(dictionary.device)
            rows = decoder_rows(dictionary, features, site).to(gradient.device)
            rows = rows * part.activation[begin:end, None]
            # Pad each token to as many rows as the token with most, so that one batched product serves all.
            position = part.position[begin:end]
            counts = part.offsets[first + 1 : last + 1] - part.offsets[first:last]
            most = int(counts.max())
            slot = (position - first) * most + torch.arange(begin, end, device=position.device)
            slot = slot - part.offsets[position]
            padded = rows.new_zeros((last - first) * most, rows.shape[-1]).index_copy_(0, slot, rows)
            products = padded.view(last - first, most, -1) @ gradient[first:last].transpose(1, 2)
            self.out[start + begin : start + end] += products.flatten(0, 1).index_select(0, slot)
