"""The linear model of one prompt, run backwards: what everything that wrote adds to some targets."""

from dataclasses import dataclass

import torch

from ...lm.sites import Site
from ...models.linear_parts import decoder_rows
from .recording import LinearRun
from .sources import Sources


#: Where targets behind the final norm are read.
FINAL = "final"

# Positions whose features are padded to equal numbers together.
_POSITIONS_PER_CHUNK = 64
# Bytes of gradients that one batch of targets may take: few enough that a batch reaches no deeper than it must, and stays
# in a processor's cache. Measured with benchmarks/attribution.py: 512 targets at once take 1.6 times as long as 64 to 96.
_BATCH_BYTES = 3 << 23


@dataclass(frozen=True)
class Functionals:
    """Linear functionals of activations: what a row of the graph is the decomposition of.

    Args:
        layer (`torch.LongTensor` of shape `(rows,)`): Layer of the place that is read; the number of layers for `final`.
        point (`list[str]`): One of `recording.READS`, or `"final"`: behind the final norm.
        position (`torch.LongTensor` of shape `(rows,)`): Token that is read.
        vector (`torch.Tensor` of shape `(rows, width)`): What the activation is multiplied with.
        bias (`torch.Tensor` of shape `(rows,)`): What is added.
    """

    layer: torch.Tensor
    point: list[str]
    position: torch.Tensor
    vector: torch.Tensor
    bias: torch.Tensor

    def __len__(self):
        return len(self.point)

    def places(self) -> dict[tuple[int, str], torch.Tensor]:
        """Layer and point -> rows that are read there."""
        groups: dict[tuple[int, str], list[int]] = {}
        for row, place in enumerate(zip(self.layer.tolist(), self.point, strict=True)):
            groups.setdefault(place, []).append(row)
        return {place: torch.tensor(rows, device=self.layer.device) for place, rows in groups.items()}

    def __getitem__(self, rows: torch.Tensor) -> "Functionals":
        points = [self.point[row] for row in rows.tolist()]
        return Functionals(self.layer[rows], points, self.position[rows], self.vector[rows], self.bias[rows])


class Adjoint:
    """Computes rows of an attribution graph by hand-written transposes, without autograd.

    Attention patterns and norm scales are held as they were, dictionaries and their errors stand for MLPs, so that the
    stream is linear in everything that wrote to it: embeddings, active features, errors, biases. One walk down the layers
    carries the gradients of many targets, at the tokens up to the last of them only, and reads off at each writer what it
    adds to each target.

    Args:
        run ([`LinearRun`]): The recorded prompt.
    """

    def __init__(self, run: LinearRun):
        self.run = run
        self.sources = Sources(run)

    @torch.no_grad()
    def rows(self, targets: Functionals) -> torch.Tensor:
        """What each source adds to each functional.

        Args:
            targets ([`Functionals`]): The functionals. Those of one layer and of neighbouring tokens are best together.

        Returns:
            `torch.Tensor` of shape `(rows, sources)` in fp32; rows sum to the functionals.
        """
        out = torch.zeros(len(self.sources), len(targets), device=self.run.token_embedding.device)
        Walk(self.run, self.sources, targets, out).down()
        return out.T

    def batch_size(self) -> int:
        """How many targets fit into one batch."""
        width = self.run.token_embedding.shape[-1]
        inner = max(layer.output.shape[0] for layer in self.run.layers)
        return max(16, min(512, _BATCH_BYTES // (4 * len(self.run.input_ids) * 3 * max(width, inner))))


class Walk:
    """One batch of targets on its way down the layers. Gradients are `(tokens, targets, hidden)`."""

    def __init__(self, run, sources, targets, out):
        self.run = run
        self.sources = sources
        self.targets = targets
        self.out = out
        # Nothing behind the last token that is read can matter.
        self.tokens = int(targets.position.max()) + 1
        self.stream = torch.zeros(
            self.tokens, len(targets), self.run.token_embedding.shape[-1], device=out.device, dtype=torch.float32
        )
        self.groups = targets.places()
        # What skip connections further up read at a place, gradients by layer and point.
        self.skipped: dict[tuple[int, str], torch.Tensor] = {}
        self.top = int(targets.layer.max())
        # Before the first target has been met there is nothing to carry.
        self.live = False

    def down(self):
        run = self.run
        if self.top == run.num_layers:
            self.stream = self._place(run.num_layers, FINAL, self.stream, run.final_norm, run.final_bias)
        for layer in range(min(self.top, run.num_layers - 1), -1, -1):
            self._block(layer, run.layers[layer])
        self._emit_vectors("token", run.token_embedding)
        if run.position_embedding is not None:
            self._emit_vectors("position", run.position_embedding)

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

    # ------------------------------------------------------------------------------------------------ steps

    def _place(self, layer, point, gradient, norm=None, norm_bias=0.0):
        """Past a place: what is written there takes all that is above, then comes what is read there."""
        if self.live and not point.startswith("mlp"):
            writer = None if layer == self.run.num_layers else self.run.writers.get(Site(point, layer))
            if writer is not None:
                self._emit(writer, gradient)
                gradient = torch.zeros_like(gradient)
        skipped = self.skipped.pop((layer, point), None)
        if skipped is not None:
            if isinstance(norm_bias, torch.Tensor):
                self._emit_bias(layer, skipped.sum(0) @ norm_bias.float())
            gradient = gradient + (skipped if norm is None else norm[: self.tokens].transpose(skipped))
        rows = self.groups.get((layer, point))
        if rows is not None:
            position, vector = self.targets.position[rows], self.targets.vector[rows].float()
            constant = self.targets.bias[rows].float()
            if isinstance(norm_bias, torch.Tensor):
                constant = constant + vector @ norm_bias.float()
            self._emit_bias(layer, constant, rows)
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
        self._emit(writer, gradient)

    def _attention(self, layer, maps):
        gradient = self._place(layer, "attn.branch", self.stream)
        if self.live:
            gradient = self._before_post_norm(layer, gradient, maps.attention_post_norm, maps.attention_post_bias)
        gradient = self._place(layer, "attn.out", gradient)
        inputs = torch.zeros_like(gradient)
        if self.live:
            constant = maps.attention_constant[: self.tokens, :, None]
            self._emit_bias(layer, (gradient @ constant)[..., 0].sum(0))
            if maps.rounding is not None:
                self._emit_bias(layer, torch.einsum("ptd,pd->t", gradient, maps.rounding[: self.tokens]))
            inputs = self._through_heads(layer, maps, gradient)
        # The norm's bias goes through the heads as part of their constant; here it counts for what is read directly.
        inputs = self._place(layer, "attn.in", inputs, norm_bias=maps.attention_norm_bias)
        if self.live:
            norm = maps.attention_norm
            self.stream = self.stream + (inputs if norm is None else norm[: self.tokens].transpose(inputs))

    def _before_post_norm(self, layer, gradient, norm, bias):
        if norm is None:
            return gradient
        if isinstance(bias, torch.Tensor):
            self._emit_bias(layer, gradient.sum(0) @ bias.float())
        return norm[: self.tokens].transpose(gradient)

    def _through_heads(self, layer, maps, gradient):
        """From gradients of attention's output to gradients of its input, all heads at once."""
        values = self._at_values(layer, maps, gradient)
        heads, tokens, targets, width = values.shape
        kv_heads = maps.value.shape[0] // width
        values = values.view(kv_heads, heads // kv_heads, tokens, targets, width).sum(1)
        return values.permute(1, 2, 0, 3).reshape(tokens, targets, -1) @ maps.value

    def _at_values(self, layer, maps, gradient):
        """Gradients of the values that each head reads, `(heads, tokens, targets, head_dim)`."""
        tokens, targets, _ = gradient.shape
        pattern = maps.pattern[:, :tokens, :tokens]
        heads = len(pattern)
        read = (gradient @ maps.output.T).view(tokens, targets, heads, -1)
        read = read.permute(2, 0, 1, 3).reshape(heads, tokens, -1)
        return (pattern.transpose(1, 2) @ read).view(heads, tokens, targets, -1)

    # ------------------------------------------------------------------------------------------------ reading off

    def _emit(self, writer, gradient):
        """What a writer adds to each target, given the gradients where it writes."""
        layer, point = writer.site.layer, writer.site.point
        if writer.dictionary < 0:
            self._emit_vectors("mlp", writer.error, gradient, layer, point)
            return
        self._emit_features(writer, gradient)
        self._emit_vectors("error", writer.error, gradient, layer, point)
        works = writer.works[: self.tokens].float()
        self._emit_bias(layer, torch.einsum("ptd,p->td", gradient, works) @ writer.bias)
        if writer.skip is not None:
            read = Site.parse(self.run.dictionaries[writer.dictionary].config.input_site)
            place = (read.layer, read.point)
            skipped = (gradient * works[:, None, None]) @ writer.skip
            self.skipped[place] = self.skipped[place] + skipped if place in self.skipped else skipped

    def _emit_features(self, writer, gradient):
        dictionary = self.run.dictionaries[writer.dictionary]
        start = self.sources.segment("feature", writer.site.layer, writer.site.point).start
        for first in range(0, self.tokens, _POSITIONS_PER_CHUNK):
            last = min(first + _POSITIONS_PER_CHUNK, self.tokens)
            begin, end = int(writer.offsets[first]), int(writer.offsets[last])
            if begin == end:
                continue
            features = writer.feature[begin:end]
            rows = decoder_rows(dictionary, features.to(dictionary.device)).to(gradient.device)
            rows = rows * writer.activation[begin:end, None]
            # As many rows for each token as the one with most has, so that one product serves all.
            position = writer.position[begin:end]
            counts = writer.offsets[first + 1 : last + 1] - writer.offsets[first:last]
            most = int(counts.max())
            slot = (position - first) * most + torch.arange(begin, end, device=position.device)
            slot = slot - writer.offsets[position]
            padded = rows.new_zeros((last - first) * most, rows.shape[-1]).index_copy_(0, slot, rows)
            products = padded.view(last - first, most, -1) @ gradient[first:last].transpose(1, 2)
            self.out[start + begin : start + end] = products.flatten(0, 1).index_select(0, slot)

    def _emit_vectors(self, kind, vectors, gradient=None, layer=-1, point=""):
        """One source for each token."""
        gradient = self.stream if gradient is None else gradient
        start = self.sources.segment(kind, layer, point).start
        self.out[start : start + self.tokens] = (gradient @ vectors[: self.tokens, :, None])[..., 0]

    def _emit_bias(self, layer, values, rows=None):
        number = self.sources.segment("bias", layer).start
        if rows is None:
            self.out[number] += values
        else:
            self.out[number, rows] += values
