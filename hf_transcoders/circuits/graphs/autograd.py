"""Rows of an attribution graph by autograd over the model itself: slow, and the reference for the adjoint."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ...errors import TranscoderError
from ...lm.architectures import Location, architecture_of, has_parallel_residual, locate
from ...lm.attention import attention_modules
from ...lm.freeze import frozen, record_frozen
from ...lm.hooks import read_at, wrap_forward, write_at
from ...lm.linear_maps import is_offloaded, is_quantized, loaded
from ...lm.sites import POINTS, Site
from ...models.linear_parts import decoder_rows
from .adjoint import FINAL, Functionals
from .recording import READS, LinearRun
from .sources import Sources


# Elements of the gradients of one batch of targets.
_MAX_ELEMENTS = 2**25


class AutogradRows:
    """Computes rows of an attribution graph with autograd: another way to what [`Adjoint`] computes.

    The model's own modules run with frozen norms and patterns, and at every place where a dictionary writes, or an MLP
    has none, the value is a sum of leaves: decoder rows times activations, error, bias. What a leaf adds to a target is
    the target's gradient at it times its value; for the biases of norms and attention, the parameters are the leaves.

    Args:
        run ([`LinearRun`]): The recorded prompt, of a model in fp32: in half precision rows are as coarse as that is.
    """

    def __init__(self, run: LinearRun):
        self.run = run
        self.sources = Sources(run)
        self.frozen = record_frozen(run.model, run.input_ids[None])

    def rows(self, targets: Functionals) -> torch.Tensor:
        """What each source adds to each functional: see [`Adjoint.rows`]."""
        if any(is_quantized(module) for module in attention_modules(self.run.model)):
            raise TranscoderError(
                "Gradients of many targets at once cannot go through quantized projections, and would leave out how these "
                "round: use method='adjoint'."
            )
        with torch.enable_grad(), _all_loaded(self.run.model), _trainable(self._biases()) as biases:
            leaves = self._leaves()
            places = self._forward(leaves)
            groups = targets.places()
            outputs = [places[place] for place in groups]
            seeds = []
            for place, rows in groups.items():
                seed = torch.zeros(len(targets), *places[place].shape, device=places[place].device)
                seed[rows, targets.position[rows]] = targets.vector[rows].float()
                seeds.append(seed)
            values = [leaf for parts in leaves.values() for leaf in parts.values()]
            parameters = [parameter for _, parameter in biases]
            gradients = torch.autograd.grad(
                outputs, values + parameters, seeds, is_grads_batched=True, allow_unused=True
            )
        return self._read_off(targets, leaves, biases, gradients)

    def batch_size(self) -> int:
        """How many targets fit into one batch."""
        tokens, width = self.run.token_embedding.shape
        vectors = sum(len(writer.position) + tokens for writer in self.run.writers.values())
        return max(1, min(512, _MAX_ELEMENTS // (vectors * width)))

    # ------------------------------------------------------------------------------------------------ leaves

    def _biases(self) -> list[tuple[int, nn.Parameter]]:
        """(layer, bias) of everything that has one; where nothing depends on it there is no gradient."""
        final = self.run.model.base_model.get_submodule(architecture_of(self.run.model).final_norm)
        modules = [locate(self.run.model, Site("resid_pre", layer)).module for layer in range(self.run.num_layers)]
        return [
            (layer, parameter)
            for layer, module in enumerate([*modules, final])
            for name, parameter in module.named_parameters()
            if name.split(".")[-1] == "bias"
        ]

    def _leaves(self) -> dict[Site | str, dict[str, torch.Tensor]]:
        """By writer and kind: what is added up in the place of an activation."""
        leaves = {"embeddings": {"token": self.run.token_embedding}}
        if self.run.position_embedding is not None:
            leaves["embeddings"]["position"] = self.run.position_embedding
        for site, writer in self.run.writers.items():
            if writer.dictionary < 0:
                leaves[site] = {"mlp": writer.error}
                continue
            dictionary = self.run.dictionaries[writer.dictionary]
            rows = decoder_rows(dictionary, writer.feature.to(dictionary.device)).to(writer.error.device)
            leaves[site] = {"feature": rows * writer.activation[:, None], "error": writer.error, "bias": writer.bias}
        return {
            site: {kind: value.detach().clone().requires_grad_() for kind, value in parts.items()}
            for site, parts in leaves.items()
        }

    # ------------------------------------------------------------------------------------------------ the model

    def _forward(self, leaves) -> dict[tuple[int, str], torch.Tensor]:
        """Run the frozen model on the leaves; what it reads, `(tokens, width)`, by layer and point."""
        run, model = self.run, self.run.model
        places: dict[tuple[int, str], torch.Tensor] = {}
        points = [point for point in POINTS if not (point == "resid_mid" and has_parallel_residual(model))]
        by_location: dict[Location, list[Site]] = {}
        for layer in range(run.num_layers):
            for point in points:
                by_location.setdefault(locate(model, Site(point, layer)), []).append(Site(point, layer))

        def pass_through(sites):
            def function(value):
                for site in sites:
                    if site == Site("resid_pre", 0):
                        value = sum(leaves["embeddings"].values())[None].to(value)  # pyright: ignore[reportIndexIssue]
                    # A dictionary may read the very place it writes to, and then reads what was there before.
                    if site.point in READS:
                        places[site.layer, site.point] = value[0].float()
                    if site in leaves:
                        value = self._written(site, leaves[site], places)[None].to(value)
                return value

            return function

        with ExitStack() as stack:
            stack.enter_context(frozen(model, self.frozen))
            for location, sites in by_location.items():
                write_at(stack, location, pass_through(sites))
            final = model.base_model.get_submodule(architecture_of(model).final_norm)
            read_at(
                stack,
                Location(final, "out"),
                lambda value: places.__setitem__((run.num_layers, FINAL), value[0].float()),
            )
            model.get_decoder()(input_ids=run.input_ids[None], use_cache=False)
        return places

    def _written(self, site, parts, places):
        writer = self.run.writers[site]
        if writer.dictionary < 0:
            return parts["mlp"]
        works = writer.works[:, None].float()
        written = parts["error"] + works * parts["bias"]
        written = written.index_add(0, writer.position, parts["feature"])
        if writer.skip is not None:
            source = Site.parse(self.run.dictionaries[writer.dictionary].config.input_site)
            written = written + works * (places[source.layer, source.point] @ writer.skip.T)
        return written

    # ------------------------------------------------------------------------------------------------ reading off

    def _read_off(self, targets, leaves, biases, gradients):
        out = torch.zeros(len(targets), len(self.sources), device=self.run.token_embedding.device)
        remaining = iter(gradients)
        for site, parts in leaves.items():
            layer, point = (-1, "") if site == "embeddings" else (site.layer, site.point)
            for kind, leaf in parts.items():
                gradient = next(remaining)
                if gradient is None:
                    continue
                added = (gradient * leaf.detach()).sum(-1)
                segment = self.sources.segment(kind, layer, "" if kind == "bias" else point)
                if kind == "bias":
                    out[:, segment.start] += added
                else:
                    out[:, segment.start : segment.end] = added
        for (layer, parameter), gradient in zip(biases, remaining, strict=True):
            if gradient is not None:
                out[:, self.sources.segment("bias", layer).start] += (gradient * parameter.detach()).float().sum(-1)
        for place, rows in targets.places().items():
            out[rows, self.sources.segment("bias", place[0]).start] += targets.bias[rows].float()
        return out


@contextmanager
def _all_loaded(model: nn.Module) -> Iterator[None]:
    """Have all weights of an offloaded model in memory at once: a gradient needs the parameters of the forward pass."""
    with ExitStack() as stack:
        for module in model.modules():
            if is_offloaded(module):
                stack.enter_context(loaded(module))
                wrap_forward(stack, module, functools.partial(_own_forward, module))
        yield


def _own_forward(module, inner, *args, **kwargs):
    return module._old_forward(*args, **kwargs)


@contextmanager
def _trainable(biases: list[tuple[int, nn.Parameter]]) -> Iterator[list[tuple[int, nn.Parameter]]]:
    """Let gradients reach parameters that may be frozen."""
    earlier = [parameter.requires_grad for _, parameter in biases]
    try:
        for _, parameter in biases:
            parameter.requires_grad_(True)
        yield biases
    finally:
        for (_, parameter), was in zip(biases, earlier, strict=True):
            parameter.requires_grad_(was)
