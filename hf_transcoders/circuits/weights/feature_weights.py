"""Views of features from weights alone: connections, de-embeddings and logits."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ...data.token_blocks import TokenBlocks
from ...dictionaries import check_fits, named_dictionaries
from ...errors import TranscoderError
from ...lm.architectures import num_layers
from ...lm.attention import num_heads
from ...lm.capture import capture
from ...lm.devices import input_device
from ...lm.inputs import forget_lengths_
from ...lm.linear_maps import map_size, num_embeddings
from ...lm.modes import in_eval_mode
from ...lm.norms import norm_scale
from ...lm.sites import Site, input_site, output_site, output_sites
from ...lm.stream import (
    direct_logits,
    norm_after,
    read_directions,
    reading_stage,
    writes_to_stream,
    writing_stage,
    written_directions,
)
from ...lm.token_embeddings import embedding_scores
from ...lm.wrappers import language_model
from ...models.linear_parts import decoder_rows, encoder_rows
from ...models.modeling_transcoder import TranscoderModel
from ...models.transcoder_set import TranscoderSet
from ..prompt_tokens import encode_prompt
from .connections import TopConnections, connection_strengths, strongest_pairs
from .mean_contributions import MeanContributions, SourceContributions, mean_scaled_activations
from .ov_circuits import OVCircuits
from .token_effects import TokenScores, extreme_tokens


# A layer (all of its heads), or a layer and a head.
Through = int | tuple[int, int]


class FeatureWeights:
    """The input-invariant view of dictionaries inside their language model (arXiv 2406.11944, §4).

    Directions of features are taken in the residual stream: an encoder row through the gain of the norm before the
    input site (and through the centering of a LayerNorm), a decoder row through the gain of the post-norm after the output
    site, if any. The scales of norms and the patterns of attention depend on the input and are left out, and
    so are biases: strengths of one feature compare with each other, and are not pre-activations. Where they are part of
    a result (`mean_contributions`, and `pull_back` on a prompt), it is said.

    `through` names heads in between: `(layer, head)`, or `layer` for all heads of it.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            The causal language model.
        transcoders ([`TranscoderSet`], `Mapping[str, TranscoderModel]` or `Iterable[TranscoderModel]`):
            Its dictionaries. A set need not cover every layer.

    Raises:
        [`TranscoderError`]: a dictionary has another width than the model, or sites that the model does not have.

    Example:

    ```python
    >>> weights = FeatureWeights(base, TranscoderSet.from_pretrained("runs/set"))
    >>> weights.deembedding("layers.0.mlp.transcoder", [17]).texts(tokenizer)
    >>> weights.top_connections("layers.0.mlp.transcoder", "layers.8.mlp.transcoder", k=5).strengths
    >>> weights.connections("layers.0.mlp.transcoder", "layers.8.mlp.transcoder", target_features=[3], through=(5, 1))
    ```
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        transcoders: TranscoderModel | TranscoderSet | Mapping[str, TranscoderModel] | Iterable[TranscoderModel],
    ):
        self.base_model = base_model = language_model(base_model)
        self.dictionaries = named_dictionaries(transcoders)
        check_fits(base_model, self.dictionaries)

    def reads(self, name: str, features: Sequence[int] | None = None) -> torch.Tensor:
        """Read vectors of features in the residual stream, `(features, hidden)` in fp32.

        Raises:
            [`TranscoderError`]: there is no such dictionary or feature, or it does not read the stream.
        """
        dictionary = self.dictionary(name)
        rows, _ = encoder_rows(dictionary, self._numbers(name, features))
        return read_directions(
            self.base_model, input_site(dictionary), rows.to(input_device(self.base_model))
        ).detach()

    def writes(self, name: str, features: Sequence[int] | None = None) -> torch.Tensor:
        """Write vectors of features in the residual stream, per unit of activation, `(features, hidden)` in fp32.

        For a layer of a cross-layer transcoder it is the sum over all sites that it writes at.

        Raises:
            [`TranscoderError`]: there is no such dictionary or feature, or it does not write to the stream.
        """
        return self._writes_up_to(name, features, None)

    def _writes_up_to(self, name, features, stage: int | None) -> torch.Tensor:
        """The sum of the decoder rows of features at the sites that are written before a stage of the model; at all sites by default."""
        dictionary, numbers = self.dictionary(name), self._numbers(name, features)
        written = []
        for site in self._sites(name):
            if stage is None or writing_stage(self.base_model, site) <= stage:
                rows = decoder_rows(dictionary, numbers, site).to(input_device(self.base_model))
                written.append(written_directions(self.base_model, site, rows).detach())
        return torch.stack(written).sum(0) if len(written) > 1 else written[0]

    def _sites(self, name) -> list[Site]:
        """The sites that a dictionary writes at, from the first up."""
        sites = output_sites(self.dictionary(name))
        if len(sites) > 1 and any(norm_after(self.base_model, site) is not None for site in sites):
            raise TranscoderError(
                f"'{name}' writes at several sites before the norms after them, whose scales differ, so its features have no single "
                "direction in the residual stream: use attribution graphs, or a dictionary that writes at mlp.branch."
            )
        return sites

    def connections(
        self,
        source: str,
        target: str,
        *,
        source_features: Sequence[int] | None = None,
        target_features: Sequence[int] | None = None,
        through: Through | None = None,
    ) -> torch.Tensor:
        """Connection strengths `W_dec_i . W_enc_j`, or `W_dec_i W_OV W_enc_j` through heads.

        Args:
            source, target (`str`): Names of the two dictionaries.
            source_features (`Sequence[int]`, *optional*), target_features (`Sequence[int]`, *optional*):
                The features i and j. At least one of the two; the other is then all of its dictionary. The strongest of
                all pairs are found by [`~FeatureWeights.top_connections`].
            through (`int` or `tuple[int, int]`, *optional*): Heads in between. The direct connection by default.

        Returns:
            `torch.Tensor` of shape `(sources, targets)`, or `(heads, sources, targets)` through a whole layer.

        Raises:
            [`TranscoderError`]: nothing can go from the source to the target, or there is no such feature or head.
        """
        if source_features is None and target_features is None:
            raise TranscoderError(
                "All connections between two dictionaries would be a matrix of features by features: give `source_features` "
                "or `target_features`, or find the strongest with `top_connections`."
            )
        heads = self._path(source, target, through)
        written = self._writes_up_to(source, source_features, self._stage(target, heads))
        strengths = connection_strengths(written, self.reads(target, target_features), heads)
        return strengths if isinstance(through, int) else strengths[0]

    def top_connections(
        self, source: str, target: str, k: int = 20, *, through: Through | None = None
    ) -> TopConnections:
        """The `k` connections of largest magnitude among all pairs of features, computed in parts.

        Args:
            source, target, through: As for [`~FeatureWeights.connections`].
            k (`int`, *optional*, defaults to 20): Number of connections.
        """
        _check_count(k)
        heads = self._path(source, target, through)
        written = self._writes_up_to(source, None, self._stage(target, heads))
        found = strongest_pairs(written, self.reads(target), heads, k)
        head, sources, targets, strengths = (tensor.tolist() for tensor in found)
        if through is None:
            layer, head = None, None
        elif isinstance(through, int):
            layer = through
        else:
            layer, head = through[0], [through[1]] * len(head)
        return TopConnections(source, target, layer, sources, targets, head, strengths)

    def deembedding(
        self, name: str, features: Sequence[int] | None = None, k: int = 10, *, through: Through | None = None
    ) -> TokenScores:
        """The tokens whose embeddings a feature reads most and least: `W_E W_enc_j`, or `W_E W_OV W_enc_j` through heads.

        Embeddings are those that enter the stream (in Gemma, scaled); positions and the embeddings' norms are left out.

        Args:
            name (`str`): The dictionary.
            features (`Sequence[int]`, *optional*): Its features; all by default.
            k (`int`, *optional*, defaults to 10): Tokens at each end.
            through (`int` or `tuple[int, int]`, *optional*): Heads in between.

        Returns:
            [`TokenScores`] of shape `(features, k)`, or `(heads, features, k)` through a whole layer.
        """
        _check_count(k)
        readers = self.pulled(name, features, through)
        score = lambda rows: embedding_scores(self.base_model, rows)  # noqa: E731
        return extreme_tokens(score, readers, num_embeddings(self.base_model.get_input_embeddings()), k)

    @torch.no_grad()
    def logits(self, name: str, features: Sequence[int] | None = None, k: int = 10) -> TokenScores:
        """The tokens whose logits a feature raises and lowers most, directly: `W_dec_i W_U`, through the final norm's gain.

        Args:
            name, features, k: As for [`~FeatureWeights.deembedding`].

        Returns:
            [`TokenScores`] of shape `(features, k)`.
        """
        _check_count(k)
        score = lambda rows: direct_logits(self.base_model, rows)  # noqa: E731
        vocabulary, _ = map_size(self.base_model.get_output_embeddings())
        return extreme_tokens(score, self.writes(name, features), vocabulary, k)

    def ov_norms(self, name: str, features: Sequence[int] | None = None) -> torch.Tensor:
        """`||W_OV^T W_enc_j||` for every head that writes before the dictionary reads.

        Args:
            name (`str`): The dictionary.
            features (`Sequence[int]`, *optional*): Its features; all by default.

        Returns:
            `torch.Tensor` of shape `(features, layers, heads)`, for as many layers as come before.

        Raises:
            [`TranscoderError`]: no attention comes before the dictionary.
        """
        readers, layers = self.reads(name, features), self.layers_before(name)
        if not layers:
            raise TranscoderError(f"No attention writes to the stream before '{name}' reads it.")
        return torch.stack([OVCircuits(self.base_model, layer).norms(readers) for layer in layers], dim=1)

    def pulled(self, name: str, features: Sequence[int] | None = None, through: Through | None = None) -> torch.Tensor:
        """Read vectors of features in the residual stream of the tokens that heads attend to: `W_OV^T W_enc_j`.

        Args:
            name, features, through: As for [`~FeatureWeights.deembedding`]; without heads it is what they read themselves.

        Returns:
            `torch.Tensor` of shape `(features, hidden)`, or `(heads, features, hidden)` through a whole layer.
        """
        readers = self.reads(name, features)
        if through is None:
            return readers
        heads = self._heads(through)
        if _layer(through) not in self.layers_before(name):
            raise TranscoderError(f"Layer {_layer(through)} attends after '{name}' reads: choose an earlier layer.")
        pulled = heads.pull(readers)
        return pulled if isinstance(through, int) else pulled[0]

    @torch.no_grad()
    def pull_back(
        self, name: str, vectors: torch.Tensor, input_ids: torch.Tensor | Mapping | None = None
    ) -> torch.Tensor:
        """Components of all features' write vectors along later vectors: `W_dec p` (arXiv 2406.11944, App. D).

        Args:
            name (`str`): The dictionary.
            vectors (`torch.Tensor` of shape `(..., hidden)`):
                Directions that are read from the residual stream later, such as [`~FeatureWeights.reads`] or
                [`~FeatureWeights.pulled`] give them.
            input_ids (`torch.LongTensor` of shape `(seq,)`, or what the tokenizer returned, *optional*):
                A prompt: the result is then weighted by the features' activations on its tokens, and by the scale that a
                post-norm of the dictionary's layer, if any, has there.

        Returns:
            `torch.Tensor` of shape `(..., num_features)`, or `(..., seq, num_features)` with a prompt.
        """
        hidden_size = self.base_model.config.get_text_config().hidden_size
        if vectors.shape[-1] != hidden_size:
            raise TranscoderError(
                f"The vectors are {vectors.shape[-1]} wide and the residual stream {hidden_size}: give directions of the "
                "stream, as `reads` does."
            )
        written = vectors.to(input_device(self.base_model), torch.float32) @ self.writes(name).T
        if input_ids is None:
            return written
        return written.unsqueeze(-2) * self._scaled_activations(name, input_ids)

    def mean_contributions(
        self,
        target: str,
        features: Sequence[int],
        dataset: Iterable[Mapping],
        *,
        sources: Sequence[str] | None = None,
        only_active: bool = False,
        max_tokens: int = 100_000,
        batch_size: int = 8,
        skip_first: int = 1,
        special_token_ids: Sequence[int] | None = None,
    ) -> MeanContributions:
        """Mean contributions of the features of earlier dictionaries to some features over text, with their strengths.

        The direct path at the same token, with every norm frozen at the scale that it has there.

        Args:
            target (`str`): The dictionary of the targets.
            features (`Sequence[int]`): The targets.
            dataset (`Iterable[Mapping]`): Rows with `input_ids` and, where they are padded, `attention_mask`.
            sources (`Sequence[str]`, *optional*): Names of the source dictionaries. By default all that write before it reads.
            only_active (`bool`, *optional*, defaults to `False`): Average over the tokens on which a target is active.
            max_tokens (`int`, *optional*, defaults to 100,000): Tokens to read.
            batch_size (`int`, *optional*, defaults to 8): Blocks per forward.
            skip_first (`int`, *optional*, defaults to 1): Tokens at the start of every block that do not count.
            special_token_ids (`Sequence[int]`, *optional*): Tokens that do not count.

        Returns:
            [`MeanContributions`]

        Raises:
            [`TranscoderError`]: no dictionary comes before the target, or one of `sources` does not.
        """
        read = self.reads(target, features)
        if sources is None:
            writing = [
                name for name, d in self.dictionaries.items() if name != target and writes_to_stream(output_site(d))
            ]
            sources = [name for name in writing if self._comes_before(name, target)]
        if not sources:
            raise TranscoderError(f"No dictionary of this set writes to the stream before '{target}' reads it.")
        for source in sources:
            self._path(source, target, None)
        blocks = TokenBlocks(
            dataset, max_tokens=max_tokens, skip_first=skip_first, special_token_ids=special_token_ids
        )
        means, tokens = mean_scaled_activations(
            self.base_model,
            self.dictionary(target),
            features,
            {name: self.dictionary(name) for name in sources},
            blocks,
            only_active=only_active,
            batch_size=batch_size,
        )
        found = {}
        for name in sources:
            strengths = connection_strengths(self._writes_up_to(name, None, self._stage(target, None)), read, None)
            strengths = strengths[0].cpu()
            found[name] = SourceContributions(strengths, (strengths * means[name]).float())
        return MeanContributions(target, list(features), only_active, tokens.tolist(), found)

    def dictionary(self, name: str) -> TranscoderModel:
        """The dictionary with a name.

        Raises:
            [`TranscoderError`]: there is none.
        """
        if name not in self.dictionaries:
            raise TranscoderError(f"There is no dictionary '{name}': choose from {', '.join(self.dictionaries)}.")
        return self.dictionaries[name]

    def layers_before(self, name: str) -> list[int]:
        """The layers whose attention writes before a dictionary reads."""
        stage = reading_stage(self.base_model, input_site(self.dictionary(name)))
        layers = range(num_layers(self.base_model))
        return [layer for layer in layers if writing_stage(self.base_model, Site("attn.out", layer)) <= stage]

    def _numbers(self, name, features):
        if features is None:
            return None
        size = self.dictionary(name).config.num_features
        if unknown := [feature for feature in features if not 0 <= feature < size]:
            raise TranscoderError(f"'{name}' has no feature {unknown[0]}: its features are 0 to {size - 1}.")
        return torch.tensor(list(features), dtype=torch.long, device=self.dictionary(name).device)

    def _heads(self, through) -> OVCircuits:
        layer, head = (through, None) if isinstance(through, int) else through
        layers, heads = num_layers(self.base_model), num_heads(self.base_model)[0]
        if not 0 <= layer < layers or (head is not None and not 0 <= head < heads):
            raise TranscoderError(
                f"There are no heads at `through={through}`: this model has {layers} layers of {heads} heads, both counted "
                "from 0; give `(layer, head)`, or the layer alone."
            )
        return OVCircuits(self.base_model, layer, head)

    def _comes_before(self, source, target) -> bool:
        written = writing_stage(self.base_model, output_site(self.dictionary(source)))
        return written <= reading_stage(self.base_model, input_site(self.dictionary(target)))

    def _path(self, source, target, through) -> OVCircuits | None:
        """The heads between two dictionaries, after a check that the source can reach the target."""
        if source == target or not self._comes_before(source, target):
            raise TranscoderError(
                f"Nothing goes from '{source}' to '{target}': the source must write to the stream before the target reads "
                "it, so take a target in a later layer."
            )
        if through is None:
            return None
        heads = self._heads(through)
        written = writing_stage(self.base_model, output_site(self.dictionary(source)))
        if written > heads.reads or _layer(through) not in self.layers_before(target):
            raise TranscoderError(
                f"The heads of layer {_layer(through)} are not between '{source}' and '{target}': choose a layer whose "
                "attention reads after the first and writes before the second."
            )
        return heads

    def _stage(self, target, heads) -> int:
        """The stage by which a source must have written: that of the heads in between, or of the target."""
        return reading_stage(self.base_model, input_site(self.dictionary(target))) if heads is None else heads.reads

    def _scaled_activations(self, name, input_ids) -> torch.Tensor:
        """Activations `(seq, num_features)` on a prompt, times the scale of a post-norm after them, if any."""
        dictionary = self.dictionary(name)
        (first, *_) = self._sites(name)
        post_norm = norm_after(self.base_model, first)
        prompt = input_ids if isinstance(input_ids, Mapping) else {"input_ids": input_ids}
        ids = encode_prompt(self.base_model, prompt, None)[None].to(input_device(self.base_model))
        forget_lengths_(self.base_model)
        sites = [input_site(dictionary)] if post_norm is None else [input_site(dictionary), first]
        with in_eval_mode(self.base_model, dictionary), capture(self.base_model, sites) as activations:
            self.base_model(input_ids=ids)
            features = dictionary.encode(activations[sites[0]][0].to(dictionary.device)).float().to(ids.device)
            if post_norm is not None:
                features = features * norm_scale(post_norm, activations[sites[1]][0].float())
        return features


def _layer(through) -> int:
    return through if isinstance(through, int) else through[0]


def _check_count(k):
    if k < 1:
        raise TranscoderError(f"k is {k}: give a number of at least 1.")
