"""Prompts in which some features of a dictionary have the activations that they have in the counterfactual prompts."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...circuits.patching.engine import PatchEngine
from ...circuits.patching.patch_plan import ALL_POSITIONS, PatchPlan
from ...circuits.patching.readout import Readout
from ...lm.architectures import has_parallel_residual, locate
from ...lm.capture import capture
from ...lm.devices import input_device
from ...lm.forwards import forward_logits
from ...lm.hooks import write_at
from ...lm.modes import in_eval_mode
from ...lm.sites import Site, output_site
from ...models.direction_dictionary import num_signed_directions
from ...models.linear_parts import decoder_rows
from ...models.modeling_transcoder import TranscoderModel
from ...tasks.measuring import end_logits
from ...tasks.task import Task


class CounterfactualKL(Readout):
    """
    KL(patched || counterfactual) of the next-token distributions at `END`, in nats: 0 where patches make the model predict
    what it predicts after the counterfactual prompt.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        task ([`Task`]): Prompts and counterfactual prompts.
    """

    def __init__(self, model: PreTrainedModel, task: Task):
        super().__init__(model, task, "accuracy")
        self.name = "kl_to_counterfactual"
        self.target = end_logits(model, task, "corrupted").float().log_softmax(-1)

    @torch.no_grad()
    def __call__(self, hidden, prompts, base=None):
        count, rows, width = hidden.shape
        prompt = prompts.to(hidden.device).repeat_interleave(rows)
        size = self._rows_at_once()
        values = [
            kl_of_logits(self.logits(some), self.target[chosen])
            for some, chosen in zip(hidden.reshape(-1, width).split(size), prompt.split(size), strict=True)
        ]
        return torch.cat(values).view(count, rows)


def kl_of_logits(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """KL(softmax(logits) || target) `(rows,)` in nats, for logits and log-probabilities `(rows, vocab)`."""
    found = logits.float().log_softmax(-1)
    return (found.exp() * (found - target)).sum(-1)


@dataclass(frozen=True)
class Changes:
    """
    What changes between a prompt and its counterfactual, in the coordinates of a dictionary.

    A unit is a feature or, for `pairs`, a signed coordinate: the two features that are its positive and its negative part.

    Args:
        values (`torch.Tensor` of shape `(prompts, seq, units)`): Changes of units that change anywhere.
        rows (`torch.Tensor` of shape `(units, width)`): What each unit writes per unit of its activation.
        num_units (`int`): Number of units of the dictionary, those that never change included.
        num_tokens (`int`): Tokens of all prompts, without padding.
    """

    values: torch.Tensor
    rows: torch.Tensor
    num_units: int
    num_tokens: int

    def written(self, kept: torch.Tensor) -> torch.Tensor:
        """What some units write, `(sets, prompts, seq, width)`, for `kept (sets, units)` bool."""
        return torch.stack([(self.values * units) @ self.rows for units in kept.to(self.rows.dtype)])

    def edit_size(self, kept: torch.Tensor) -> float:
        """Mean Euclidean norm over tokens of what the units `kept (units,)` write."""
        return (self.written(kept[None])[0].norm(dim=-1).sum() / self.num_tokens).item()


class PatchedFeatures:
    """
    Runs prompts with counterfactual activations of some features: at every token,
    `x' = x + sum over patched features of (counterfactual - own activation) * decoder row`. What the dictionary does not
    reconstruct stays that of the prompt.

    Args:
        engine ([`PatchEngine`]): Engine with the model, the task, and [`CounterfactualKL`] as its metric.
        dictionary ([`TranscoderModel`]): The dictionary, which is on the model's device.
        pairs (`bool`, *optional*, defaults to `False`):
            Whether the two signs of a direction are patched together; for dictionaries of [`direction_dictionary`].
    """

    def __init__(self, engine: PatchEngine, dictionary: TranscoderModel, pairs: bool = False):
        self.engine = engine
        self.dictionary = dictionary
        self.site = output_site(dictionary)
        self.patched = _patched_site(engine.model, self.site)
        self.measured = 0
        inputs, self.values = self._activations("clean", (dictionary.config.input_site, self.patched))
        others, _ = self._activations("corrupted", (dictionary.config.input_site, self.patched))
        self.changes = self._changes(inputs, others, pairs)

    @torch.no_grad()
    def _activations(self, which, sites):
        """Activations of all prompts at sites, each `(prompts, seq, width)`, 0 at padding."""
        engine = self.engine
        tokens = engine.task.tokens(which, device=input_device(engine.model))
        found: list[torch.Tensor | None] = [None] * len(sites)
        with in_eval_mode(engine.model), capture(engine.model, sites) as activations:
            for places, batch in tokens.forward_batches(engine.model):
                engine.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
                for number, site in enumerate(sites):
                    value = activations.of_tokens(site, batch.input_ids.shape)
                    if found[number] is None:
                        found[number] = value.new_zeros(*tokens.input_ids.shape, value.shape[-1])
                    found[number][places, : value.shape[1]] = value * batch.attention_mask[..., None]
        return found

    @torch.no_grad()
    def _changes(self, inputs, others, pairs):
        dictionary, tokens = self.dictionary, self.engine.task.tokens(device=inputs.device)
        values = dictionary.encode(others.float()) - dictionary.encode(inputs.float())
        # Before the first token that differs, nothing does, and padding is no token.
        same = tokens.input_ids == self.engine.task.tokens("corrupted", device=inputs.device).input_ids
        differs = (same.long().cumprod(1) == 0) & tokens.attention_mask.bool()
        values = values.float() * differs[..., None]
        rows = decoder_rows(dictionary, site=self.site)
        if pairs:
            half = num_signed_directions(dictionary)
            values, rows = values[..., :half] - values[..., half:], rows[:half]
        changing = (values != 0).flatten(0, 1).any(0)
        return Changes(values[..., changing], rows[changing], len(rows), int(tokens.lengths.sum()))

    def kl(self, kept: torch.Tensor) -> torch.Tensor:
        """
        Measures sets of patched units, all of them in the same forward passes.

        Args:
            kept (`torch.BoolTensor` of shape `(sets, units)`): Patched units of each set.

        Returns:
            `torch.Tensor` of shape `(sets,)`: mean over prompts of KL(patched || counterfactual), in float64.
        """
        self.measured += len(kept)
        values = self.values + self.changes.written(kept)
        position = torch.full((values.shape[1],), ALL_POSITIONS)
        plan = PatchPlan.from_sites([self.patched] * len(kept), position, values)
        return self.engine.run(plan).values.double().mean(1)

    def attribution(self) -> torch.Tensor:
        """
        Estimates for every unit how much patching it alone changes the mean KL: its change times the gradient in the
        unpatched prompts (attribution patching).

        Returns:
            `torch.Tensor` of shape `(units,)`: negative where a patch lowers the KL.
        """
        engine, model = self.engine, self.engine.model
        tokens = engine.task.tokens(device=self.values.device)
        scores = torch.zeros(len(self.changes.rows), dtype=torch.float64)
        with in_eval_mode(model), torch.enable_grad():
            for places, batch in tokens.forward_batches(model):
                added = torch.zeros(
                    *batch.input_ids.shape, self.changes.rows.shape[1], device=self.values.device, requires_grad=True
                )
                with ExitStack() as stack:
                    write_at(stack, locate(model, self.site), lambda value, added=added: value + added.to(value.dtype))
                    logits = forward_logits(
                        model, input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                    )
                rows = torch.arange(len(places), device=logits.device)
                target = engine.readout.target[places]  # pyright: ignore[reportAttributeAccessIssue]
                kl = kl_of_logits(logits[rows, batch.positions["END"]], target)
                (gradient,) = torch.autograd.grad(kl.sum(), added)
                values = self.changes.values[places, : gradient.shape[1]]
                products = gradient.float() @ self.changes.rows.T
                scores += (products * values).sum((0, 1)).double().cpu()
        return scores / len(engine.task)


def _patched_site(model: PreTrainedModel, site: Site) -> str:
    """The site at which the engine writes for a dictionary's output: what is added to the stream is added there."""
    if site.point in ("attn.branch", "mlp.branch"):
        inside = site.point == "attn.branch" and not has_parallel_residual(model)
        return str(Site("resid_mid" if inside else "resid_post", site.layer))
    return str(site)
