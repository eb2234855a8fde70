"""Record one forward pass: frozen attention patterns and norm scales, and every write to the residual stream."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ...data.batches import text_batches
from ...errors import TranscoderError
from ...lm.architectures import architecture_of, final_norm, has_parallel_residual, locate, num_layers
from ...lm.attention import attention_modules, edit_attention
from ...lm.forwards import forward_logits, has_head
from ...lm.heads import output_map, value_weight
from ...lm.hooks import Location, after_call, read_at
from ...lm.inputs import check_tokens
from ...lm.linear_maps import is_quantized
from ...lm.modes import in_eval_mode
from ...lm.norms import frozen_norm, norm_bias
from ...lm.order import POINTS
from ...lm.sites import Site, input_site, output_sites
from ...lm.stream import map_after, multiplier_after, norm_after, norm_before
from ...models.linear_parts import decoder_rows, skip_and_bias
from ...models.modeling_transcoder import TranscoderModel
from .linear_run import READS, WRITES, LinearLayer, LinearRun, Writer, WrittenFeatures, through_heads
from .linearity import check_linear


# Elements of the largest temporary, the dense features of some tokens.
_MAX_ELEMENTS = 2**25


@torch.no_grad()
def record(
    base_model: PreTrainedModel,
    dictionaries: Mapping[str, TranscoderModel],
    prompts: Sequence[torch.Tensor],
    skip_first: int = 1,
) -> list[LinearRun]:
    """Run prompts, several in one forward pass where possible, and record each for attribution.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        dictionaries (`Mapping[str, TranscoderModel]`):
            Dictionaries of any layers: for each output site at most one, or layers of one cross-layer transcoder.
        prompts (`Sequence[torch.LongTensor]`): Token ids of each prompt.
        skip_first (`int`, *optional*, defaults to 1):
            Number of tokens at the start on which no dictionary is used; all output there is error.

    Returns:
        `list[LinearRun]`

    Raises:
        [`TranscoderError`]: a dictionary does not fit the model, or cannot be part of a linear model of it.
    """
    sites = _check(dictionaries)
    check_tokens(base_model, prompts, extrapolate=False)
    blocks, parallel = _block_parts(base_model), has_parallel_residual(base_model)
    runs = {}
    for batch in text_batches(base_model, [prompt.cpu() for prompt in prompts]):
        kept, logits = _keep(base_model, sites, batch, parallel)
        for row, (number, length) in enumerate(zip(batch.numbers, batch.lengths, strict=True)):
            ids = batch.input_ids[row, :length]
            some_logits = None if logits is None else logits[row, :length]
            runs[number] = _run_of(
                base_model,
                dictionaries,
                sites,
                kept.of_prompt(row, length),
                blocks,
                parallel,
                ids,
                some_logits,
                skip_first,
            )
    return [runs[number] for number in range(len(prompts))]


def _keep(model, sites, batch, parallel):
    """Run a batch of prompts: its activations, and the logits `(batch, seq, vocab)` of a model with a language-model head."""
    kept = _Kept()
    layers = range(num_layers(model))
    with ExitStack() as stack:
        stack.enter_context(edit_attention(model, pattern=kept.keep_pattern))
        points = {Site(point, layer) for layer in layers for point in ("resid_pre", "mlp.in", "mlp.out", "mlp.branch")}
        points |= {Site(point, layer) for layer in layers for point in ("attn.in", "attn.out", "attn.branch")}
        if not parallel:
            points |= {Site("resid_mid", layer) for layer in layers}
        points |= {Site("resid_post", layer) for layer in layers}
        points |= {site for source, targets in sites.values() for site in (source, *targets)}
        for site in points:
            read_at(stack, locate(model, site), kept.keeper(site))
        read_at(stack, Location(final_norm(model), "out"), kept.keeper("final"))
        if (name := architecture_of(model).position_embeddings) is not None:
            module = model.base_model.get_submodule(name)
            after_call(stack, module, lambda module, args, output: kept.keep_positions(output))
        if has_head(model):
            logits = forward_logits(model, **batch.inputs, use_cache=False)
        else:
            logits = None
            model(**batch.inputs, use_cache=False)
    return kept, logits


class _Kept:
    """Activations of a batch, as hooks saw them."""

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

    def of_prompt(self, row, length):
        """The activations, patterns and positions of one prompt of the batch."""
        positions = self.positions
        if positions is not None:
            positions = positions.expand(self.values[Site("resid_pre", 0)].shape)[row, :length].float()
        return _KeptPrompt(
            {site: value[row, :length].float() for site, value in self.values.items()},
            {layer: pattern[row, :, :length, :length].float() for layer, pattern in self.patterns.items()},
            positions,
        )


@dataclass(frozen=True)
class _KeptPrompt:
    """Activations of one prompt, `(seq, width)`, attention patterns and position embeddings, in fp32."""

    values: dict[Site | str, torch.Tensor]
    patterns: dict[int, torch.Tensor]
    positions: torch.Tensor | None

    def at(self, point, layer):
        return self.values[Site(point, layer)]


def _check(dictionaries):
    """Input site and output sites by dictionary name, if all dictionaries can be part of a linear model."""
    sites, places = {}, {}
    for name, dictionary in dictionaries.items():
        config = dictionary.config
        source, targets = input_site(dictionary), output_sites(dictionary)
        if config.skip_connection and source.point not in READS:
            raise TranscoderError(f"The skip connection of '{name}' reads '{source}', after an MLP: it is not linear.")
        for target in targets:
            if target.module is not None or target.point not in WRITES:
                raise TranscoderError(
                    f"'{name}' writes to '{target}', which is not part of a linear model: use one that writes to one of "
                    f"the points {', '.join(WRITES)} of a layer."
                )
            if source.layer is None or (source.layer, _order(source)) > (target.layer, _order(target)):
                raise TranscoderError(
                    f"'{name}' writes to '{target}' before it reads '{source}': it cannot be spliced in."
                )
            place = _place(target)
            before, its = places.setdefault(place, (name, target))
            together = dictionary.group is not None and dictionary.group == dictionaries[before].group
            if before != name and not (together and its == target):
                kinds = {dictionaries[each].config.is_autoencoder for each in (before, name)}
                how = " (on the command line, --kind transcoder or --kind sae)" if len(kinds) == 2 else ""
                raise TranscoderError(f"'{before}' and '{name}' write to one place: keep one of them{how}.")
        sites[name] = source, targets
    return sites


def _order(site):
    return list(POINTS).index(site.point)


def _place(site):
    """A key that is equal for sites of which one write would undo the other."""
    if site.point in ("mlp.out", "mlp.branch", "attn.out", "attn.branch"):
        return site.layer, site.point.split(".")[0]
    return site.layer + (site.point == "resid_post"), "resid"


def _run_of(model, dictionaries, sites, kept, blocks, parallel, ids, logits, skip_first):
    names = list(dictionaries)
    layers = [_linear_layer(block, kept, layer, parallel) for layer, block in enumerate(blocks)]
    writers = {}
    for number, name in enumerate(names):
        source, targets = sites[name]
        true = {site: kept.values[site] for site in targets if site not in writers}
        _add_writers(writers, dictionaries[name], number, targets, kept.values[source], true, skip_first)
    for layer in range(len(layers)):
        if Site("mlp.out", layer) not in writers and Site("mlp.branch", layer) not in writers:
            writers[Site("mlp.branch", layer)] = _whole_mlp(kept.at("mlp.branch", layer), layer)
    start, norm = kept.at("resid_pre", 0), final_norm(model)
    values = {site: value for site, value in kept.values.items() if site != "final"}
    run = LinearRun(
        model=model,
        dictionaries=list(dictionaries.values()),
        names=names,
        input_sites=[source for source, _ in sites.values()],
        input_ids=ids,
        logits=logits,
        layers=layers,
        writers=writers,
        activations={site: value for site, value in values.items() if site.point in READS},
        final=kept.values["final"],
        final_norm=frozen_norm(norm, kept.at("resid_post", len(layers) - 1)[:, None]),
        final_bias=norm_bias(norm),
        token_embedding=start if kept.positions is None else start - kept.positions,
        position_embedding=kept.positions,
        parallel=parallel,
    )
    check_linear(run, values)
    return run


@dataclass(frozen=True)
class _BlockParts:
    """The parts of a block that are the same for every prompt.

    Args:
        norms (`dict[str, torch.nn.Module or None]`): Norms before `attn.in` and `mlp.in`, and after `attn.out` and `mlp.out`.
        multiplier (`float`): Factor on what attention and MLP add to the stream.
        value, output (`torch.Tensor`): Projections of all heads; see [`LinearLayer`].
        written (`torch.Tensor` of shape `(heads, hidden)`): Output of each head for the biases of what it attends to.
        added (`torch.Tensor` of shape `(hidden,)`): Bias of the output projection.
        rounds (`bool`): Whether the projections are quantized and round their inputs.
    """

    norms: dict[str, nn.Module | None]
    multiplier: float
    value: torch.Tensor
    output: torch.Tensor
    written: torch.Tensor
    added: torch.Tensor
    rounds: bool

    def bias(self, point) -> torch.Tensor | float:
        """Bias of the norm at a point."""
        return 0.0 if (norm := self.norms[point]) is None else norm_bias(norm)


def _block_parts(model) -> list[_BlockParts]:
    parts = []
    for layer, attention in enumerate(attention_modules(model)):
        norms = {point: norm_before(model, Site(point, layer)) for point in ("attn.in", "mlp.in")}
        norms |= {point: norm_after(model, Site(point, layer)) for point in ("attn.out", "mlp.out")}
        multiplier = multiplier_after(model, Site("attn.out", layer))
        heads = _head_maps(model, layer, norms["attn.in"])
        parts.append(_BlockParts(norms, multiplier, *heads, rounds=is_quantized(attention)))
    return parts


def _linear_layer(block, kept, layer, parallel):
    def frozen_before(point, at):
        norm = block.norms[point]
        return None if norm is None else frozen_norm(norm, at[:, None])

    def frozen_after(point):
        return map_after(block.norms[point], block.multiplier, kept.at(point, layer)[:, None])

    before = kept.at("resid_pre", layer)
    pattern = kept.patterns[layer]
    # Patterns sum to one, or to less in a model with attention sinks.
    constant = pattern.sum(-1).T @ block.written + block.added
    rounding = None
    if block.rounds:
        inputs = kept.at("attn.in", layer) - block.bias("attn.in")
        linear = through_heads(inputs, pattern, block.value, block.output) + constant
        rounding = kept.at("attn.out", layer) - linear
    return LinearLayer(
        attention_norm=frozen_before("attn.in", before),
        mlp_norm=frozen_before("mlp.in", before if parallel else kept.at("resid_mid", layer)),
        attention_post_norm=frozen_after("attn.out"),
        mlp_post_norm=frozen_after("mlp.out"),
        mlp_norm_bias=block.bias("mlp.in"),
        attention_norm_bias=block.bias("attn.in"),
        attention_post_bias=block.bias("attn.out") * block.multiplier,
        mlp_post_bias=block.bias("mlp.out") * block.multiplier,
        pattern=pattern,
        value=block.value,
        output=block.output,
        attention_constant=constant,
        rounding=rounding,
    )


def _head_maps(model, layer, norm):
    """Value and output projections of all heads, and their outputs for the biases, that of `norm` before them included."""
    weight, bias = value_weight(model, layer)
    output, output_bias = output_map(model, layer)
    output = output.float()
    heads, kv_heads = len(output), len(weight)
    constant = torch.zeros(weight.shape[:2], device=weight.device)
    if norm is not None and isinstance(added := norm_bias(norm), torch.Tensor):
        constant = constant + weight.float() @ added.float()
    if bias is not None:
        constant = constant + bias.float()
    written = torch.einsum("hd,hdo->ho", constant.repeat_interleave(heads // kv_heads, 0), output)
    added = output.new_zeros(output.shape[-1]) if output_bias is None else output_bias.float()
    return weight.float().flatten(0, 1), output.flatten(0, 1), written, added


def _add_writers(writers, dictionary, number, targets, read, true, skip_first):
    """Add a dictionary to the writers of its sites; `true` has the activations of sites that have no writer yet."""
    works = torch.arange(len(read), device=read.device) >= skip_first
    position, feature, activation = _active_features(dictionary, read, skip_first)
    offsets = _offsets(position, len(read))
    for site in targets:
        skip, bias = skip_and_bias(dictionary, site)
        skip = None if skip is None else skip.to(read.device)
        bias = bias.to(read.device)
        before = writers.get(site)
        missed = true[site] if before is None else before.error
        reconstruction = bias.expand_as(missed).clone()
        rows = decoder_rows(dictionary, feature.to(dictionary.device), site).to(read.device)
        reconstruction.index_add_(0, position, rows * activation[:, None])
        if skip is not None:
            reconstruction += read @ skip.T
        part = WrittenFeatures(number, position, feature, activation, offsets, skip)
        is_own = before is None or dictionary.config.output_site == str(site)
        writers[site] = Writer(
            site=site,
            dictionary=number if is_own else before.dictionary,
            error=missed - reconstruction * works[:, None],
            bias=bias if before is None else before.bias + bias,
            works=works,
            parts=(part,) if before is None else (*before.parts, part),
        )


def _active_features(dictionary, read, skip_first):
    """Position, feature and activation of all active features, sorted by position."""
    weight = dictionary.W_enc
    inputs = read.to(weight.device, weight.dtype)
    # The empty part is for prompts that are no longer than `skip_first`.
    none = torch.zeros(0, dtype=torch.long, device=weight.device)
    found = [(none, none, read.new_zeros(0, device=weight.device))]
    size = max(1, _MAX_ELEMENTS // dictionary.config.num_features)
    with in_eval_mode(dictionary):
        for start in range(min(skip_first, len(read)), len(read), size):
            features = dictionary.encode(inputs[start : start + size]).float()
            position, feature = features.nonzero(as_tuple=True)
            found.append((position + start, feature, features[position, feature]))
    return [torch.cat(parts).to(read.device) for parts in zip(*found, strict=True)]


def _whole_mlp(output, layer):
    return Writer(
        site=Site("mlp.branch", layer),
        dictionary=-1,
        error=output,
        bias=None,
        works=torch.zeros(len(output), dtype=torch.bool, device=output.device),
    )


def _offsets(position, length):
    counts = torch.bincount(position, minlength=length)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
