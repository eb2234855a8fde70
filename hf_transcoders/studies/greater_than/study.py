"""The greater-than case study: features of a transcoder compared with neurons of its MLP."""

from collections.abc import Iterator

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...circuits.weights.feature_weights import FeatureWeights
from ...dictionaries import check_fits
from ...errors import TranscoderError
from ...lm.architectures import architecture_of, final_norm, locate
from ...lm.devices import input_device
from ...lm.hooks import Location
from ...lm.linear_maps import embedding_width, linear_rows
from ...lm.modes import in_eval_mode
from ...lm.norms import frozen_norm
from ...lm.sites import Site, output_site
from ...lm.stream import UNEMBEDDING, map_after, multiplier_after, norm_after
from ...lm.wrappers import measures_model
from ...models.linear_parts import decoder_rows, skip_and_bias
from ...models.modeling_transcoder import TranscoderModel
from ...tasks.answer_metrics import Estimate, accuracy, estimate
from ...version import versions
from ..published import GREATER_THAN, published_study
from .greater_than_results import GreaterThanStudy, YearFeature
from .mlp_rows import MlpRows, neurons_location
from .year_prompts import YearPrompts


# Endings whose difference of logits measures the effect of a feature; the paper uses those of two digits.
DIRECTIONS = {"two_token": ("40", "20"), "single_digit": ("4", "2")}

# Elements of the largest temporary tensor, the features of some prompts.
_MAX_ELEMENTS = 2**23


@measures_model
@torch.no_grad()
def greater_than_study(
    base_model: PreTrainedModel,
    transcoder: TranscoderModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_k: int = 99,
    num_features: int = 30,
    add_bos: bool | None = None,
    skip_first: int | None = None,
    transcoders_name: str | None = None,
    progress: bool = True,
) -> GreaterThanStudy:
    """
    Repeat the greater-than case study on any model with a transcoder for one of its MLPs.

    The score is the probability of later years minus that of earlier years after `The war lasted from 17YY to 17`. It is
    measured for the unchanged model; with the transcoder in place of the MLP; with only the k features, or k neurons, of
    the highest variance over prompts at the last position; and without each of the first features. Every change applies to
    all positions after the first `skip_first`. Only the layers from this MLP on are run, for many changes at a time.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        transcoder ([`TranscoderModel`]):
            Dictionary that writes `mlp.out` or `mlp.branch` of a layer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        max_k (`int`, *optional*, defaults to 99):
            Largest k of the curves.
        num_features (`int`, *optional*, defaults to 30):
            Number of features to measure one by one.
        add_bos (`bool`, *optional*):
            Whether prompts begin with the beginning-of-sequence token. By default, as the tokenizer does, or as the paper
            does if its figures apply.
        skip_first (`int`, *optional*):
            Number of positions at the start to leave unchanged. By default 1, since the first token of many models is an
            attention sink, on which transcoders are often not trained; 0 if the figures of the paper apply.
        transcoders_name (`str`, *optional*):
            Repo or folder of the transcoder, for recognizing the one of the paper. By default, as its configuration says.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`GreaterThanStudy`]

    Raises:
        [`TranscoderError`]: The transcoder does not fit the model or replaces no MLP, or the tokenizer does not split years.

    Source: Dunefsky, Chlenski and Nanda (2024), section 4.3 of [Transcoders Find Interpretable LLM Feature
    Circuits](https://arxiv.org/abs/2406.11944).
    """
    if max_k < 1 or num_features < 1:
        raise TranscoderError("max_k and num_features must be at least 1: give larger numbers.")
    place = _output_place(base_model, transcoder)
    name = transcoders_name or transcoder.config.name_or_path
    published = published_study(GREATER_THAN, base_model.config.name_or_path, name)
    if published is not None and published.layer != place.layer:
        published = None
    if add_bos is None and published is not None:
        add_bos = published.add_bos
    if skip_first is None:
        skip_first = 1 if published is None else published.skip_first
    prompts = YearPrompts.of(tokenizer, add_bos)
    with in_eval_mode(base_model, transcoder), tqdm(desc="versions", disable=not progress) as bar:
        measured = _Measured(base_model, transcoder, place, prompts, skip_first, bar)
        features, variances = measured.features(max(max_k, num_features))
        some = features[:num_features]
        bar.reset(total=sum(min(max_k, most) + 1 for most in measured.sizes()) + len(some) + 1)
        effects, by_ending = measured.effects(some)
        de_embeddings = _de_embeddings(base_model, transcoder, tokenizer, some)
        by_year = measured.activations(some)[:, -1].T
        found = [
            YearFeature(*each)
            for each in zip(
                some.tolist(),
                variances[:num_features].tolist(),
                by_year.tolist(),
                measured.without_each(some).tolist(),
                effects.tolist(),
                by_ending.tolist(),
                de_embeddings,
                strict=True,
            )
        ]
        return GreaterThanStudy(
            years=[prompts.years[n] for n in prompts.scored.tolist()],
            endings=list(prompts.candidates),
            original=measured.original().tolist(),
            transcoder=measured.replaced().tolist(),
            **measured.accuracies(),
            feature_curve=measured.feature_curve(features[:max_k]).tolist(),
            neuron_curve=measured.neuron_curve(max_k).tolist(),
            features=found,
            protocol={
                "model": base_model.config.name_or_path or type(base_model).__name__,
                "revision": getattr(base_model.config, "_commit_hash", None),
                "transcoder": name or None,
                "reads": transcoder.config.input_site,
                "writes": transcoder.config.output_site,
                "features": transcoder.config.num_features,
                "prompt": tokenizer.decode(prompts.input_ids[prompts.scored[0]], clean_up_tokenization_spaces=False),
                "variant": prompts.variant,
                "years": len(prompts.scored),
                "years for the variance": len(prompts.years),
                "begins with BOS": "yes" if prompts.beginning else "no",
                "unchanged positions at the start": skip_first,
                "direction": " - ".join(DIRECTIONS[prompts.variant]),
                "precision": f"{str(base_model.dtype).removeprefix('torch.')} on {input_device(base_model).type}",
                "versions": versions(),
            },
            published=published,
        )


class _Measured:
    """The recorded run of the unchanged model, and scores of changed runs."""

    def __init__(self, model, transcoder, place, prompts, skip_first, bar):
        self.bar = bar
        self.model, self.transcoder, self.place, self.prompts = model, transcoder, place, prompts
        self.tokens = torch.tensor(list(prompts.candidates.values()), device=input_device(model))
        self.neurons_at = neurons_location(model, place.layer)
        read = {
            "input": locate(model, transcoder.config.input_site),
            "output": locate(model, place),
            "neurons": self.neurons_at,
            "stream": Location(final_norm(model), "in"),
        }
        # All prompts contribute to the variances; only scored ones are run again.
        _, seen = MlpRows(model, prompts.input_ids, place.layer, skip_first).record(read)
        self.at_end = {name: value[:, -1] for name, value in seen.items()}
        self.rows = MlpRows(model, prompts.input_ids[prompts.scored], place.layer, skip_first)
        self.logits, self.seen = self.rows.record(read)
        self.inputs = self.seen["input"].to(transcoder.device)

    def sizes(self) -> tuple[int, int]:
        """Numbers of features and of neurons."""
        return self.transcoder.config.num_features, self.at_end["neurons"].shape[-1]

    def features(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of the highest variance at the last position, and their variances."""
        return _most_variable(self.transcoder.encode(self.at_end["input"].to(self.transcoder.device)), count)

    def activations(self, features: torch.Tensor) -> torch.Tensor:
        """Activations of some features, `(prompts, seq, features)` in fp32."""
        size = self.inputs.shape[1] * self.transcoder.config.num_features
        parts = self.inputs.split(max(1, _MAX_ELEMENTS // size))
        return torch.cat([self.transcoder.encode(part)[..., features].float() for part in parts])

    def whole(self) -> torch.Tensor:
        """Output of the transcoder, `(prompts, seq, d_out)` in fp32."""
        size = self.inputs.shape[1] * self.transcoder.config.num_features
        parts = self.inputs.split(max(1, _MAX_ELEMENTS // size))
        return torch.cat([self.transcoder(part, output_features=False).reconstruction.float() for part in parts])

    def original(self) -> torch.Tensor:
        return self.prompts.differences(self.logits[:, self.tokens])

    def accuracies(self) -> dict[str, Estimate]:
        later = self.prompts.later[self.prompts.scored].to(self.tokens.device)
        right = self.tokens.where(later, -1)
        among = accuracy(self.logits, right, self.tokens.expand(len(right), -1))
        return {
            "accuracy": estimate(among, share=True),
            "full_accuracy": estimate(accuracy(self.logits, right), share=True),
        }

    def replaced(self) -> torch.Tensor:
        return self._scores(locate(self.model, self.place), [self.whole()[None]])[0]

    def feature_curve(self, features: torch.Tensor) -> torch.Tensor:
        versions = self._growing(self.activations(features), decoder_rows(self.transcoder, features))
        return self._scores(locate(self.model, self.place), versions).mean(-1)

    def without_each(self, features: torch.Tensor) -> torch.Tensor:
        versions = self._leaving_out(self.activations(features), decoder_rows(self.transcoder, features))
        return self._scores(locate(self.model, self.place), versions).mean(-1)

    def neuron_curve(self, count: int) -> torch.Tensor:
        order, _ = _most_variable(self.at_end["neurons"], count)
        return self._scores(self.neurons_at, self._some_neurons(order)).mean(-1)

    def _scores(self, location, versions) -> torch.Tensor:
        """`(versions, prompts)`"""
        found = []
        for values in versions:
            found.append(self.prompts.differences(self.rows.logits(location, values, self.tokens)))
            self.bar.update(len(values))
        return torch.cat(found)

    def _growing(self, activations, writes) -> Iterator[torch.Tensor]:
        """Yield outputs of the transcoder with the first 0, 1, 2 ... of some features."""
        skip, bias = skip_and_bias(self.transcoder)
        total = bias.expand(*activations.shape[:-1], -1)
        if skip is not None:
            total = total + self.inputs.float() @ skip.T
        yield total[None]
        step = self.rows.per_forward()
        for some, rows in zip(activations.split(step, dim=-1), writes.split(step), strict=True):
            versions = total + torch.einsum("psk,kd->kpsd", some, rows).cumsum(0)
            total = versions[-1]
            yield versions

    def _leaving_out(self, activations, writes) -> Iterator[torch.Tensor]:
        """Yield outputs of the transcoder without each of some features."""
        whole, step = self.whole(), self.rows.per_forward()
        for some, rows in zip(activations.split(step, dim=-1), writes.split(step), strict=True):
            yield whole - torch.einsum("psk,kd->kpsd", some, rows)

    def _some_neurons(self, order) -> Iterator[torch.Tensor]:
        """Yield neurons of the MLP with all but the first 0, 1, 2 ... of an order set to zero."""
        neurons = self.seen["neurons"]
        rank = torch.full(neurons.shape[-1:], len(order), device=order.device)
        rank[order] = torch.arange(len(order), device=order.device)
        for some in torch.arange(len(order) + 1, device=order.device).split(self.rows.per_forward()):
            yield neurons * (rank < some[:, None])[:, None, None]

    def effects(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Direct effects of features on the direction `(features,)`, and of their units on endings `(features, endings)`."""
        device = input_device(self.model)
        writes = decoder_rows(self.transcoder, features).to(device)[:, None]
        norm, multiplier = norm_after(self.model, self.place), multiplier_after(self.model, self.place)
        through = map_after(norm, multiplier, self.seen["output"][:, -1].float())
        if through is not None:
            writes = through(writes)
        writes = frozen_norm(final_norm(self.model), self.seen["stream"][:, -1].float())(writes)
        endings = linear_rows(self.model.get_output_embeddings(), self.tokens, UNEMBEDDING)
        per_unit = writes @ endings.weight.float().T
        per_unit = per_unit * architecture_of(self.model).logit_multiplier
        high, low = (list(self.prompts.candidates).index(ending) for ending in DIRECTIONS[self.prompts.variant])
        towards = per_unit[..., high] - per_unit[..., low]
        effect = (towards * self.activations(features)[:, -1].T.to(device)).mean(-1)
        by_ending = per_unit.mean(1)
        return effect, by_ending - by_ending.mean(-1, keepdim=True)


def _output_place(model, transcoder) -> Site:
    check_fits(model, {"transcoder": transcoder})
    if len(transcoder.config.output_sites) > 1:
        raise TranscoderError(
            "The study measures the transcoder of one MLP, and a layer of a cross-layer transcoder writes at several: give a "
            "transcoder of one layer."
        )
    place = output_site(transcoder)
    if place.point not in ("mlp.out", "mlp.branch"):
        raise TranscoderError(
            f"The dictionary writes '{place}', but the study replaces an MLP: choose one that writes mlp.out or mlp.branch."
        )
    return place


def _most_variable(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the highest variance over rows, and their variances."""
    top = values.float().var(0, correction=0).topk(min(count, values.shape[-1]))
    return top.indices, top.values


def _de_embeddings(model, transcoder, tokenizer, features, count=6) -> list[list[str] | None]:
    """Tokens whose embeddings activate features most."""
    if embedding_width(model.get_input_embeddings()) != transcoder.config.d_in:
        return [None] * len(features)
    weights = FeatureWeights(model, {"transcoder": transcoder})
    return weights.deembedding("transcoder", features.tolist(), k=count).texts(tokenizer)[0]
