"""Rows of an attribution graph by autograd over the model itself: the slow reference for the adjoint."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ...errors import TranscoderError
from ...lm.architectures import decoder_blocks, final_norm, locate
from ...lm.attention import attention_modules
from ...lm.freeze import frozen, record_frozen
from ...lm.hooks import Location, read_at, wrap_forward, write_at
from ...lm.linear_maps import is_offloaded, is_quantized, loaded
from ...lm.order import POINTS
from ...lm.sites import Site
from ...models.linear_parts import decoder_rows
from .linear_run import READS, LinearRun
from .read_vectors import FINAL, ReadVectors
from .sources import Sources


# Elements of the gradients of one batch of targets.
_MAX_ELEMENTS = 2**25


class AutogradRows:
    """Computes with autograd the same rows of an attribution graph as [`Adjoint`].

    The model's own modules run with frozen norm scales and attention patterns. At every output site of a dictionary, and
    at every MLP without one, the value is a sum of leaves: decoder rows times activations, error and bias. A leaf's
    contribution to a target is its value times the target's gradient there; for the biases of norms and attention, the
    parameters are the leaves.

    Args:
        run ([`LinearRun`]): The recorded prompt of a model in fp32. In half precision, rows are only that precise.
    """

    def __init__(self, run: LinearRun):
        self.run = run
        self.sources = Sources(run)
        self.frozen = record_frozen(run.model, run.input_ids[None])

    def rows(self, targets: ReadVectors) -> torch.Tensor:
        """Contributions of all sources to some targets: see [`Adjoint.rows`]."""
        if any(is_quantized(module) for module in attention_modules(self.run.model)):
            raise TranscoderError(
                "Batched gradients cannot pass through quantized projections and would leave out their rounding: use "
                "method='adjoint'."
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
        """Number of targets that fit into one batch."""
        tokens, width = self.run.token_embedding.shape
        features = sum(len(part.position) for writer in self.run.writers.values() for part in writer.parts)
        vectors = features + tokens * len(self.run.writers)
        return max(1, min(512, _MAX_ELEMENTS // (vectors * width)))

    # ------------------------------------------------------------------------------------------------ leaves

    def _biases(self) -> list[tuple[int, nn.Parameter]]:
        """All biases of norms, attention and MLPs, as (layer, bias); those that nothing depends on get no gradient."""
        model = self.run.model
        return [
            (layer, parameter)
            for layer, module in enumerate([*decoder_blocks(model), final_norm(model)])
            for name, parameter in module.named_parameters()
            if name.split(".")[-1] == "bias"
        ]

    def _leaves(self) -> dict[Site | str, dict[str | int, torch.Tensor]]:
        """Leaves by writer and kind, whose sum takes the place of an activation; those of features by dictionary."""
        leaves = {"embeddings": {"token": self.run.token_embedding}}
        if self.run.position_embedding is not None:
            leaves["embeddings"]["position"] = self.run.position_embedding
        for site, writer in self.run.writers.items():
            if writer.dictionary < 0:
                leaves[site] = {"mlp": writer.error}
                continue
            leaves[site] = {"error": writer.error, "bias": writer.bias}
            for part in writer.parts:
                dictionary = self.run.dictionaries[part.dictionary]
                rows = decoder_rows(dictionary, part.feature.to(dictionary.device), site).to(writer.error.device)
                leaves[site][part.dictionary] = rows * part.activation[:, None]
        return {
            site: {kind: value.detach().clone().requires_grad_() for kind, value in parts.items()}
            for site, parts in leaves.items()
        }

    # ------------------------------------------------------------------------------------------------ the model

    def _forward(self, leaves) -> dict[tuple[int, str], torch.Tensor]:
        """Run the frozen model on the leaves, and return its activations `(tokens, width)` by layer and point."""
        run, model = self.run, self.run.model
        places: dict[tuple[int, str], torch.Tensor] = {}
        points = [point for point in POINTS if not (point == "resid_mid" and run.parallel)]
        by_location: dict[Location, list[Site]] = {}
        for layer in range(run.num_layers):
            for point in points:
                by_location.setdefault(locate(model, Site(point, layer)), []).append(Site(point, layer))

        def pass_through(sites):
            def function(value):
                for site in sites:
                    if site == Site("resid_pre", 0):
                        value = sum(leaves["embeddings"].values())[None].to(value)  # pyright: ignore[reportIndexIssue]
                    # A dictionary that reads and writes at one site reads the value before its own write.
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
            read_at(
                stack,
                Location(final_norm(model), "out"),
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
        for part in writer.parts:
            written = written.index_add(0, part.position, parts[part.dictionary])
            if part.skip is not None:
                source = self.run.input_sites[part.dictionary]
                written = written + works * (places[source.layer, source.point] @ part.skip.T)
        return written

    # ------------------------------------------------------------------------------------------------ reading off

    def _read_off(self, targets, leaves, biases, gradients):
        out = torch.zeros(len(targets), len(self.sources), device=self.run.token_embedding.device)
        remaining = iter(gradients)
        for site, parts in leaves.items():
            for kind, leaf in parts.items():
                gradient = next(remaining)
                if gradient is None:
                    continue
                if site == "embeddings":
                    segment = self.sources.segment(kind)
                elif isinstance(kind, int):
                    segment = self.sources.segment("feature", kind)
                else:
                    segment = self.sources.segment(kind, site.layer if kind == "bias" else site)
                # A bias is one source, and its leaf one vector.
                added = (gradient * leaf.detach()).sum(-1)
                out[:, segment.start : segment.end] += added[:, None] if kind == "bias" else added
        for (layer, parameter), gradient in zip(biases, remaining, strict=True):
            if gradient is not None:
                out[:, self.sources.segment("bias", layer).start] += (gradient * parameter.detach()).float().sum(-1)
        for place, rows in targets.places().items():
            out[rows, self.sources.segment("bias", place[0]).start] += targets.bias[rows].float()
        return out


@contextmanager
def _all_loaded(model: nn.Module) -> Iterator[None]:
    """Keep all weights of an offloaded model in memory: a gradient needs the parameters of the forward pass."""
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
    """Let gradients reach parameters that do not require them."""
    earlier = [parameter.requires_grad for _, parameter in biases]
    try:
        for _, parameter in biases:
            parameter.requires_grad_(True)
        yield biases
    finally:
        for (_, parameter), was in zip(biases, earlier, strict=True):
            parameter.requires_grad_(was)
