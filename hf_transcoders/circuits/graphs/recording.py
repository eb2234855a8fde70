"""One run of a model with everything held fast that attribution freezes, and all that wrote to its residual stream."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...data.batches import text_batches
from ...errors import TranscoderError
from ...lm.architectures import Location, architecture_of, has_parallel_residual, locate, num_layers
from ...lm.attention import attention_modules, edit_attention
from ...lm.forwards import forward_logits, has_head
from ...lm.heads import output_map, value_weight
from ...lm.hooks import after_call, read_at
from ...lm.inputs import check_tokens
from ...lm.linear_maps import is_quantized
from ...lm.modes import in_eval_mode
from ...lm.norms import FrozenNorm, frozen_norm, norm_bias
from ...lm.order import map_behind, multiplier_behind, norm_before, norm_behind
from ...lm.sites import POINTS, Site
from ...models.linear_parts import decoder_rows, skip_and_bias
from ...models.modeling_transcoder import TranscoderModel
from ...text import logging


logger = logging.get_logger(__name__)


#: Places at which a dictionary may write. At the first three it takes the place of an MLP's or attention's output; at
#: the others of the whole stream.
WRITES = ("mlp.out", "mlp.branch", "attn.out", "attn.branch", "resid_pre", "resid_post")
#: Places from which linear maps lead down to everything that was written before.
READS = ("resid_pre", "attn.in", "attn.out", "attn.branch", "resid_mid", "mlp.in", "resid_post")

# Elements of the largest temporary, the dense features of some tokens.
_MAX_ELEMENTS = 2**25


@dataclass(frozen=True)
class Writer:
    """A dictionary, or an MLP without one, and what it wrote in one prompt.

    Args:
        site ([`Site`]): Where it writes.
        dictionary (`int`): Number of the dictionary; -1 for an MLP as a whole.
        position, feature (`torch.LongTensor` of shape `(active,)`): Active features, sorted by position.
        activation (`torch.Tensor` of shape `(active,)`): Their activations.
        offsets (`torch.LongTensor` of shape `(seq + 1,)`): Where the features of each position begin.
        error (`torch.Tensor` of shape `(seq, width)`): What the dictionary missed; all of it for an MLP as a whole.
        bias (`torch.Tensor` of shape `(width,)`, *optional*): What the dictionary writes at every token it works on.
        skip (`torch.Tensor` of shape `(width, d_in)`, *optional*): Its skip connection.
        works (`torch.BoolTensor` of shape `(seq,)`): Where the dictionary is at work; elsewhere all is error.
    """

    site: Site
    dictionary: int
    position: torch.Tensor
    feature: torch.Tensor
    activation: torch.Tensor
    offsets: torch.Tensor
    error: torch.Tensor
    bias: torch.Tensor | None
    skip: torch.Tensor | None
    works: torch.Tensor


@dataclass(frozen=True)
class LinearLayer:
    """The linear maps of one block.

    Args:
        attention_norm, mlp_norm ([`FrozenNorm`], *optional*):
            Before attention and MLP, at `(seq, 1, hidden)`, where the family has such norms.
        attention_post_norm, mlp_post_norm ([`FrozenNorm`], *optional*):
            Behind them, where the family has such norms, or multiplies what it adds to the stream.
        attention_norm_bias, mlp_norm_bias, attention_post_bias, mlp_post_bias (`torch.Tensor` or `float`): Their biases.
        pattern (`torch.Tensor` of shape `(heads, seq, seq)`): Where each head looked.
        value (`torch.Tensor` of shape `(kv_heads * head_dim, hidden)`): Value projection.
        output (`torch.Tensor` of shape `(heads * head_dim, hidden)`): Output projection.
        attention_constant (`torch.Tensor` of shape `(seq, hidden)`): What biases make attention write.
        rounding (`torch.Tensor` of shape `(seq, hidden)`, *optional*):
            How far attention is from these maps where its projections are quantized and round what they read.
    """

    attention_norm: FrozenNorm | None
    mlp_norm: FrozenNorm | None
    attention_post_norm: FrozenNorm | None
    mlp_post_norm: FrozenNorm | None
    mlp_norm_bias: torch.Tensor | float
    attention_norm_bias: torch.Tensor | float
    attention_post_bias: torch.Tensor | float
    mlp_post_bias: torch.Tensor | float
    pattern: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    attention_constant: torch.Tensor
    rounding: torch.Tensor | None


@dataclass(frozen=True)
class LinearRun:
    """One prompt, run once: the linear map from everything that wrote to everything that read.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        dictionaries (`list[TranscoderModel]`), names (`list[str]`): What replaces MLPs.
        input_ids (`torch.LongTensor` of shape `(seq,)`): The prompt.
        logits (`torch.Tensor` of shape `(seq, vocab)`, *optional*): What the model says, if it has a head.
        layers (`list[LinearLayer]`): The maps of each block.
        writers (`dict[Site, Writer]`): What wrote, by place.
        activations (`dict[Site, torch.Tensor]`): What was read, `(seq, width)`, at every place of [`READS`].
        final (`torch.Tensor` of shape `(seq, hidden)`): What the unembedding read.
        final_norm ([`FrozenNorm`]): At `(seq, 1, hidden)`.
        final_bias (`torch.Tensor` or `float`): Bias of the final norm.
        token_embedding (`torch.Tensor` of shape `(seq, hidden)`): What tokens write.
        position_embedding (`torch.Tensor` of shape `(seq, hidden)`, *optional*): What learned positions write.
        parallel (`bool`): Whether attention and MLP both read the block's input.
    """

    model: PreTrainedModel
    dictionaries: list[TranscoderModel]
    names: list[str]
    input_ids: torch.Tensor
    logits: torch.Tensor | None
    layers: list[LinearLayer]
    writers: dict[Site, Writer]
    activations: dict[Site, torch.Tensor]
    final: torch.Tensor
    final_norm: FrozenNorm
    final_bias: torch.Tensor | float
    token_embedding: torch.Tensor
    position_embedding: torch.Tensor | None
    parallel: bool

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def norm_before(self, site: Site) -> tuple[FrozenNorm | None, torch.Tensor | float]:
        """The norm between the stream and a place that reads it, if there is one, and its bias."""
        layer = self.layers[site.layer]  # pyright: ignore[reportCallIssue]
        if site.point == "mlp.in":
            return layer.mlp_norm, layer.mlp_norm_bias
        if site.point == "attn.in":
            return layer.attention_norm, layer.attention_norm_bias
        return None, 0.0


@torch.no_grad()
def record(
    model: PreTrainedModel,
    dictionaries: Mapping[str, TranscoderModel],
    prompts: Sequence[torch.Tensor],
    skip_first: int = 1,
) -> list[LinearRun]:
    """Run some prompts, in one forward pass where they can share it, and keep what attribution needs of each.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        dictionaries (`Mapping[str, TranscoderModel]`): Dictionaries of any layers, at most one for each place.
        prompts (`Sequence[torch.LongTensor]`): Token ids of each prompt.
        skip_first (`int`, *optional*, defaults to 1):
            Tokens at the start at which no dictionary is at work; what is written there is error.

    Returns:
        `list[LinearRun]`

    Raises:
        [`TranscoderError`]: a dictionary does not fit the model, or cannot be part of a linear model of it.
    """
    sites = _check(model, dictionaries)
    check_tokens(model, prompts, extrapolate=False)
    heads = [_head_maps(model, layer) for layer in range(num_layers(model))]
    runs = {}
    for batch in text_batches(model, [prompt.cpu() for prompt in prompts]):
        kept, logits = _keep(model, sites, batch)
        for row, (number, length) in enumerate(zip(batch.numbers, batch.lengths, strict=True)):
            ids = batch.input_ids[row, :length]
            runs[number] = _run_of(
                model,
                dictionaries,
                sites,
                kept,
                heads,
                ids,
                None if logits is None else logits[row, :length],
                row,
                length,
                skip_first,
            )
    return [runs[number] for number in range(len(prompts))]


def _keep(model, sites, batch):
    """Run a batch of prompts: what hooks have seen, and the logits `(batch, seq, vocab)` of a model that has a head."""
    kept = _Kept()
    architecture = architecture_of(model)
    layers = range(num_layers(model))
    with ExitStack() as stack:
        stack.enter_context(edit_attention(model, pattern=kept.keep_pattern))
        points = {Site(point, layer) for layer in layers for point in ("resid_pre", "mlp.in", "mlp.out", "mlp.branch")}
        points |= {Site(point, layer) for layer in layers for point in ("attn.in", "attn.out", "attn.branch")}
        if not has_parallel_residual(model):
            points |= {Site("resid_mid", layer) for layer in layers}
        points |= {Site("resid_post", layer) for layer in layers}
        points |= {site for pair in sites.values() for site in pair}
        for site in points:
            read_at(stack, locate(model, site), kept.keeper(site))
        final_norm = model.base_model.get_submodule(architecture.final_norm)
        read_at(stack, Location(final_norm, "out"), kept.keeper("final"))
        if architecture.position_embeddings is not None:
            module = model.base_model.get_submodule(architecture.position_embeddings)
            after_call(stack, module, lambda module, args, output: kept.keep_positions(output))
        if has_head(model):
            logits = forward_logits(model, **batch.inputs, use_cache=False)
        else:
            logits = None
            model(**batch.inputs, use_cache=False)
    return kept, logits


class _Kept:
    """What hooks have seen of a batch."""

    def __init__(self):
        self.values = {}
        self.patterns = {}
        self.positions = None

    def keeper(self, site):
        return lambda value: self.values.__setitem__(site, value)

    def keep_pattern(self, pattern, layer):
        self.patterns[layer] = pattern

    def keep_positions(self, output):
        self.positions = output

    def at(self, point, layer, row, length):
        return self.values[Site(point, layer)][row, :length].float()


def _check(model, dictionaries):
    """Dictionary name -> input and output site, if all of them can be part of a linear model."""
    attention_modules(model)
    sites, places = {}, {}
    for name, dictionary in dictionaries.items():
        config = dictionary.config
        source, target = Site.parse(config.input_site), Site.parse(config.output_site)
        if target.module is not None or target.point not in WRITES:
            raise TranscoderError(
                f"'{name}' writes to '{target}', which is no part of a linear model: use one that writes to one of the "
                f"points {', '.join(WRITES)} of a layer."
            )
        if source.layer is None or (source.layer, _order(source)) > (target.layer, _order(target)):
            raise TranscoderError(
                f"'{name}' writes to '{target}' before it reads '{source}': it cannot be spliced in."
            )
        if config.skip_connection and source.point not in READS:
            raise TranscoderError(
                f"The skip connection of '{name}' reads '{source}', behind an MLP: it is not linear."
            )
        place = _place(model, target)
        if place in places:
            raise TranscoderError(f"'{places[place]}' and '{name}' write to one place: keep one of them.")
        places[place] = name
        sites[name] = source, target
    return sites


def _order(site):
    return POINTS.index(site.point)


def _place(model, site):
    """One name for places that are the same in a model, or of which one would undo the other."""
    if site.point in ("mlp.out", "mlp.branch", "attn.out", "attn.branch"):
        return site.layer, site.point.split(".")[0]
    return site.layer + (site.point == "resid_post"), "resid"


def _run_of(model, dictionaries, sites, kept, heads, ids, logits, row, length, skip_first):
    names = list(dictionaries)
    layers = [_linear_layer(model, kept, heads[layer], layer, row, length) for layer in range(num_layers(model))]
    writers = {}
    for number, name in enumerate(names):
        source, target = sites[name]
        read = kept.values[source][row, :length].float()
        true = kept.values[target][row, :length].float()
        writers[target] = _written(dictionaries[name], number, target, read, true, skip_first)
    for layer in range(len(layers)):
        if Site("mlp.out", layer) not in writers and Site("mlp.branch", layer) not in writers:
            writers[Site("mlp.branch", layer)] = _whole_mlp(kept.at("mlp.branch", layer, row, length), layer)
    start = kept.at("resid_pre", 0, row, length)
    positions = None
    if kept.positions is not None:
        positions = kept.positions.expand(kept.values[Site("resid_pre", 0)].shape)[row, :length].float()
    norm = model.base_model.get_submodule(architecture_of(model).final_norm)
    last = kept.at("resid_post", len(layers) - 1, row, length)
    run = LinearRun(
        model=model,
        dictionaries=list(dictionaries.values()),
        names=names,
        input_ids=ids,
        logits=logits,
        layers=layers,
        writers=writers,
        activations={
            site: value[row, :length].float()
            for site, value in kept.values.items()
            if site != "final" and site.point in READS
        },
        final=kept.values["final"][row, :length].float(),
        final_norm=frozen_norm(norm, last[:, None]),
        final_bias=norm_bias(norm),
        token_embedding=start if positions is None else start - positions,
        position_embedding=positions,
        parallel=has_parallel_residual(model),
    )
    values = {site: kept.values[site][row, :length].float() for site in kept.values if site != "final"}
    check_linear(run, values)
    return run


def _linear_layer(model, kept, heads, layer, row, length):
    before = kept.at("resid_pre", layer, row, length)
    between = before if has_parallel_residual(model) else kept.at("resid_mid", layer, row, length)

    def frozen_before(point, at):
        norm = norm_before(model, Site(point, layer))
        return (None, 0.0) if norm is None else (frozen_norm(norm, at[:, None]), norm_bias(norm))

    def frozen_behind(point):
        site = Site(point, layer)
        norm = norm_behind(model, site)
        bias = 0.0 if norm is None else norm_bias(norm) * multiplier_behind(model, site)
        return map_behind(model, site, kept.at(point, layer, row, length)[:, None]), bias

    attention_norm, attention_norm_bias = frozen_before("attn.in", before)
    mlp_norm, mlp_norm_bias = frozen_before("mlp.in", between)
    attention_post_norm, attention_post_bias = frozen_behind("attn.out")
    mlp_post_norm, mlp_post_bias = frozen_behind("mlp.out")
    value, output, constants, rounds = heads
    pattern = kept.patterns[layer][row, :, :length, :length].float()
    # Patterns sum to one, or to less in a model with attention sinks.
    constant = pattern.sum(-1).T @ constants[0] + constants[1]
    rounding = None
    if rounds:
        inputs = kept.at("attn.in", layer, row, length) - attention_norm_bias
        linear = _attended(inputs, pattern, value, output) + constant
        rounding = kept.at("attn.out", layer, row, length) - linear
    return LinearLayer(
        attention_norm=attention_norm,
        mlp_norm=mlp_norm,
        attention_post_norm=attention_post_norm,
        mlp_post_norm=mlp_post_norm,
        mlp_norm_bias=mlp_norm_bias,
        attention_norm_bias=attention_norm_bias,
        attention_post_bias=attention_post_bias,
        mlp_post_bias=mlp_post_bias,
        pattern=pattern,
        value=value,
        output=output,
        attention_constant=constant,
        rounding=rounding,
    )


def _head_maps(model, layer):
    """Value and output projection of all heads, what the bias of each makes it write for what it reads, and whether they round."""
    weight, bias = value_weight(model, layer)
    output, output_bias = output_map(model, layer)
    output = output.float()
    heads, kv_heads = len(output), len(weight)
    constant = torch.zeros(weight.shape[:2], device=weight.device)
    norm = norm_before(model, Site("attn.in", layer))
    if norm is not None and isinstance(added := norm_bias(norm), torch.Tensor):
        constant = constant + weight.float() @ added.float()
    if bias is not None:
        constant = constant + bias.float()
    written = torch.einsum("hd,hdo->ho", constant.repeat_interleave(heads // kv_heads, 0), output)
    added = output.new_zeros(output.shape[-1]) if output_bias is None else output_bias.float()
    rounds = is_quantized(attention_modules(model)[layer])
    return weight.float().flatten(0, 1), output.flatten(0, 1), (written, added), rounds


def _attended(inputs, pattern, value, output):
    """What heads write for what attention reads, `(seq, hidden)` to `(seq, hidden)`, by their maps."""
    heads = len(pattern)
    values = (inputs @ value.T).unflatten(1, (-1, len(output) // heads)).transpose(0, 1)
    z = pattern @ values.repeat_interleave(heads // len(values), dim=0)
    return z.transpose(0, 1).flatten(1) @ output


def _written(dictionary, number, site, read, true, skip_first):
    """What a dictionary wrote, and what it missed."""
    config = dictionary.config
    weight = dictionary.W_enc
    inputs = read.to(weight.device, weight.dtype)
    works = torch.arange(len(read), device=read.device) >= skip_first
    size = max(1, _MAX_ELEMENTS // config.num_features)
    found = []
    with in_eval_mode(dictionary):
        for start in range(min(skip_first, len(read)), len(read), size):
            features = dictionary.encode(inputs[start : start + size]).float()
            position, feature = features.nonzero(as_tuple=True)
            found.append((position + start, feature, features[position, feature]))
    if not found:
        found.append((works.nonzero()[:0, 0], works.nonzero()[:0, 0], true.new_zeros(0)))
    position, feature, activation = (torch.cat(parts).to(read.device) for parts in zip(*found, strict=True))
    skip, bias = skip_and_bias(dictionary)
    skip = None if skip is None else skip.to(read.device)
    bias = bias.to(read.device)
    reconstruction = bias.expand_as(true).clone()
    rows = decoder_rows(dictionary, feature.to(weight.device)).to(read.device)
    reconstruction.index_add_(0, position, rows * activation[:, None])
    if skip is not None:
        reconstruction += read @ skip.T
    return Writer(
        site=site,
        dictionary=number,
        position=position,
        feature=feature,
        activation=activation,
        offsets=_offsets(position, len(read)),
        error=true - reconstruction * works[:, None],
        bias=bias,
        skip=skip,
        works=works,
    )


def _whole_mlp(output, layer):
    none = torch.zeros(0, dtype=torch.long, device=output.device)
    return Writer(
        site=Site("mlp.branch", layer),
        dictionary=-1,
        position=none,
        feature=none,
        activation=output.new_zeros(0),
        offsets=_offsets(none, len(output)),
        error=output,
        bias=None,
        skip=None,
        works=torch.zeros(len(output), dtype=torch.bool, device=output.device),
    )


def _offsets(position, length):
    counts = torch.bincount(position, minlength=length)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def check_linear(run: LinearRun, values: dict[Site, torch.Tensor]) -> None:
    """
    Warn where the linear maps of a run do not give what the model had, and name the first such place.

    Args:
        run ([`LinearRun`]): A recorded prompt.
        values (`dict[Site, torch.Tensor]`): The activations of the model at every point of every layer, `(seq, width)`.
    """
    points, errors = [], []
    for layer, maps in enumerate(run.layers):
        at = {site.point: value for site, value in values.items() if site.layer == layer}
        for point, ours in _given_by_parts(maps, at, run.parallel).items():
            points.append(Site(point, layer))
            errors.append((ours - at[point]).norm() / at[point].norm().clamp(min=torch.finfo(torch.float32).tiny))
    tolerance = 1e-3 if run.model.dtype in (torch.float32, torch.float64) else 5e-2
    # Read off the device once.
    for site, error in zip(points, torch.stack(errors).tolist(), strict=True):
        if not error <= tolerance:
            logger.warning(
                f"'{site}' of this {run.model.config.model_type} model is off by {error:.2g} of its norm from what its "
                "parts give, so rows of graphs and paths do not sum and are not to be trusted: the block does more than "
                "norms, heads and an MLP that add to the stream, a hook edits it, or the family was registered with other "
                "modules than its own."
            )
            return


def _given_by_parts(maps, at, parallel):
    """The activations of a layer by point, as the linear maps give them from those before."""

    def through(norm, bias, value):
        return value if norm is None else norm(value[:, None])[:, 0] + bias

    heads, width = len(maps.pattern), len(maps.output) // len(maps.pattern)
    values = ((at["attn.in"] - maps.attention_norm_bias).float() @ maps.value.T).unflatten(1, (-1, width))
    values = values.repeat_interleave(heads // values.shape[1], dim=1)
    z = (maps.pattern @ values.transpose(0, 1)).transpose(0, 1).flatten(1)
    branches = {
        "attn.in": through(maps.attention_norm, maps.attention_norm_bias, at["resid_pre"]),
        "attn.out": z @ maps.output + maps.attention_constant,
        "attn.branch": through(maps.attention_post_norm, maps.attention_post_bias, at["attn.out"]),
        "mlp.in": through(maps.mlp_norm, maps.mlp_norm_bias, at["resid_pre" if parallel else "resid_mid"]),
        "mlp.branch": through(maps.mlp_post_norm, maps.mlp_post_bias, at["mlp.out"]),
    }
    middle = {} if parallel else {"resid_mid": at["resid_pre"] + at["attn.branch"]}
    return {**branches, **middle, "resid_post": at["resid_pre"] + at["attn.branch"] + at["mlp.branch"]}
