"""What every public function that touches a language model says about it: numbers to compare between two models that must be one.

Merged adapters against adapters, offloaded weights against weights, quantized ones against what their codes stand for.
"""

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_transcoders import TranscoderEvaluator, capture, splice
from hf_transcoders.circuits import (
    FeatureEdit,
    FeatureWeights,
    Patching,
    PatchPlan,
    attention_between,
    attribution_graph,
    component_outputs,
    composition_scores,
    copying_scores,
    duplicate_token_scores,
    greedy_paths,
    intervene,
    logit_attribution,
    measure_effect,
    pattern_scores,
    previous_token_scores,
    validate_edges,
)
from hf_transcoders.circuits.graphs import head_loadings, qk_attribution
from hf_transcoders.evaluation import measure_drift
from hf_transcoders.features import explain_features
from hf_transcoders.lm.freeze import frozen, record_frozen
from hf_transcoders.lm.query_key import linear_query_key
from hf_transcoders.studies.blind.hypotheses import token_hypotheses
from hf_transcoders.studies.greater_than.mlp_rows import MlpRows, neurons_location
from hf_transcoders.tasks import measure
from tests.circuits.interventions.setups import random_dictionary
from tests.circuits.patching.brute_force import tiny_task
from tests.tiny_models import NUM_LAYERS, TINY_CONFIGS, tiny_tokens


PROMPT = tiny_tokens(1, 8, seed=3)[0].tolist()
TASK = tiny_task(lengths=(8, 9))
BLOCKS = [{"input_ids": row} for row in tiny_tokens(6, 12, seed=4).tolist()]
_METRICS = ("l0", "mse", "fvu", "ce_original", "ce_spliced", "ce_zero_ablated", "ce_mean_ablated")
END = NUM_LAYERS - 1


EVERYTHING = "lm patching scores graphs weights evaluation rest"
#: What reads weights, rather than running modules.
READING = "scores graphs weights"


class WordsOfIds:
    """A tokenizer whose tokens are their numbers."""

    def batch_decode(self, rows, clean_up_tokenization_spaces=False):
        return [" ".join(map(str, row)) for row in rows]

    def convert_ids_to_tokens(self, ids):
        return [str(number) for number in ids]


def untied(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    """As `tiny_model`, but with a head of its own: merging adapters into tied weights would change both."""
    config = TINY_CONFIGS[family]()
    config.tie_word_embeddings = False
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter)) if parameter.dim() == 1 else parameter.normal_(
                    std=0.3
                )
    return model.eval()


def transcoders(model):
    return {
        f"t{layer}": random_dictionary(model, f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch", seed=layer, num_features=12)
        for layer in range(NUM_LAYERS)
    }  # fmt: skip


def linear_projections(model) -> list[str]:
    """Names of the modules in the blocks of a model that multiply with a matrix."""
    kinds = ("Linear", "Conv1D")
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if type(module).__name__ in kinds and module is not head]


def adapted(family: str, make, seed: int = 1, **changes) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with adapters at work in it, and the same model with them merged.

    Args:
        family (`str`): The family.
        make (`Callable`): From the model to the configuration of PEFT, or several for several adapters that work together.
        seed (`int`): Seed of the adapters' weights.
        changes: Changes to the model's configuration.
    """
    from peft import get_peft_model

    model = untied(family, **changes)
    configs = make(model)
    configs = configs if isinstance(configs, list) else [configs]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, configs[0], adapter_name="adapter0")
        for number, config in enumerate(configs[1:], 1):
            wrapped.add_adapter(f"adapter{number}", config)
        if len(configs) > 1:
            wrapped.base_model.set_adapter([f"adapter{number}" for number in range(len(configs))])
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "adapter" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    merged = copy.deepcopy(wrapped).merge_and_unload()
    return wrapped.get_base_model().eval(), merged.eval()


def numbers(model, parts: str = "lm patching scores graphs weights evaluation") -> dict[str, torch.Tensor]:
    """By function, what it says about a model, as one vector each.

    Args:
        model (`PreTrainedModel`): The model.
        parts (`str`): Which groups of functions: [`EVERYTHING`] or some of it.
    """
    found = {}
    for part in parts.split():
        found.update(_PARTS[part](model))
    assert all(_leaves(values) for values in found.values()), found
    return {
        name: torch.cat([torch.as_tensor(value, dtype=torch.float64).detach().flatten() for value in _leaves(values)])
        for name, values in found.items()
    }


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float):
    """Largest difference relative to the largest number, function by function."""
    assert got.keys() == wanted.keys()
    off = {}
    for name, value in got.items():
        assert value.shape == wanted[name].shape and not value.isnan().any(), name
        error = (value - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-3)
        if not error <= tolerance:
            off[name] = float(error)
    assert not off, off


def _leaves(values):
    if isinstance(values, dict):
        return [leaf for value in values.values() for leaf in _leaves(value)]
    if isinstance(values, list | tuple):
        return [leaf for value in values for leaf in _leaves(value)]
    return [values]


def _lm(model):
    ids = torch.tensor([PROMPT])
    dictionaries = transcoders(model)
    found = {}
    with torch.no_grad():
        found["logits"] = model(input_ids=ids).logits
        with capture(model, "layers.1.mlp.in") as activations:
            model(input_ids=ids)
            found["capture"] = activations["layers.1.mlp.in"]
        with splice(model, dictionaries):
            found["splice"] = model(input_ids=ids).logits
        with frozen(model, record_frozen(model, ids), mlps=True):
            found["frozen"] = model(input_ids=ids).logits
    maps = linear_query_key(model, ids[0], END, 1, 5)
    found["query and key"] = [maps.query, maps.query_bias, maps.key, maps.key_bias]
    return found


def _patching(model):
    found = {}
    shared = Patching(model, TASK)
    for component in ("z", "query", "key", "value", "pattern"):
        found[f"heads {component}"] = shared.heads("END", component).values
    found["heads z of all tokens"] = Patching(model, TASK, ablation="zero").heads("all", "z").values
    found["residual"] = shared.residual(positions=["END"]).values
    found["mlps"] = shared.mlps(positions=["END"]).values
    found["paths to the logits"] = shared.paths(position="END").values
    found["paths"] = shared.paths([f"layers.{END}.attn.head.1.query"], "END").values
    for metric in ("kl_divergence", "logit_difference"):
        engine = Patching(model, TASK, metric=metric)
        result = engine.run(PatchPlan.grid([1], "z", 4, engine.position("END")[None]))
        found[f"plan {metric}"] = [result.base, result.values]
    return found


def _scores(model):
    outputs = component_outputs(model, TASK)
    attribution = logit_attribution(model, TASK)
    senders = [(0, 1), (1, 2)]
    return {
        "component_outputs": [outputs.heads, outputs.mlps, outputs.rest, outputs.final],
        "logit_attribution": [attribution.values, attribution.protocol["rest"]],
        "attention_between": attention_between(model, TASK, "END", ["S"]),
        "pattern_scores": pattern_scores(model, length=6, prompts=2),
        "copying_scores": copying_scores(model, range(3, 40), top=20),
        "duplicate_token_scores": duplicate_token_scores(model, range(3, 40), top=5),
        "previous_token_scores": previous_token_scores(model, length=8),
        **{f"composition {into}": composition_scores(model, senders, into) for into in ("query", "key", "value")},
    }


def dense(graph):
    edges = torch.zeros(len(graph.kind), len(graph.kind), dtype=torch.float64)
    edges[graph.target, graph.source] = graph.weight.double()
    return edges


def graph_of(model, **changes):
    return attribution_graph(model, transcoders(model), PROMPT, targets=[(5, 6), 9], progress=False, **changes)


def _graphs(model):
    graph = graph_of(model)
    dictionaries = transcoders(model)
    # In an order that does not depend on rounding.
    edges = (~graph.is_kind("bias")[graph.source]).nonzero()[:, 0]
    edges = edges[(graph.target * len(graph.kind) + graph.source)[edges].argsort()][:60:5]
    loadings = head_loadings(model, dictionaries, graph, edges)
    paths = greedy_paths(model, dictionaries, PROMPT, (5, 6), num_paths=5, num_steps=2)
    qk = qk_attribution(model, dictionaries, PROMPT, END, 1, 5, 2)
    return {
        "graph": [graph.total[graph.expanded], dense(graph), graph.value],
        "residuals of the graph": 1 + graph.row_residuals()[graph.expanded].max(),
        "scores of the graph": graph.scores(),
        "head_loadings": [loadings.loadings, loadings.direct],
        "greedy_paths": sorted(path.contribution for path in paths.paths),
        "qk_attribution": [qk.score, qk.query_marginal, qk.key_marginal],
    }


def _weights(model):
    weights = FeatureWeights(model, transcoders(model))
    top = weights.top_connections("t0", "t2", k=5, through=1)
    scores = {
        "deembedding": weights.deembedding("t1", [1, 2]),
        "deembedding through heads": weights.deembedding("t2", [1], through=(1, 2)),
        "logits of features": weights.logits("t1", [1, 2]),
    }
    means = weights.mean_contributions("t2", [1, 2], BLOCKS, max_tokens=40)
    return {
        "reads and writes": [weights.reads("t2"), weights.writes("t0")],
        "connections": weights.connections("t0", "t2", target_features=[1]),
        "connections through heads": weights.connections("t0", "t2", target_features=[1], through=1),
        "top_connections": top.strengths,
        "ov_norms": weights.ov_norms("t2", [3]),
        "pull_back": weights.pull_back("t0", weights.reads("t2", [3]), torch.tensor(PROMPT)),
        "mean_contributions": [source.contributions for source in means.sources.values()],
        **{name: [each.top_values, each.bottom_values] for name, each in scores.items()},
    }


def _evaluation(model):
    dictionaries = transcoders(model)
    report = TranscoderEvaluator(model, BLOCKS, progress=False).evaluate(dictionaries)
    explained = explain_features(model, dictionaries["t1"], BLOCKS, WordsOfIds(), features=[1, 2], progress=False)
    return {
        "evaluate": [each["metrics"][name] for each in report.dictionaries.values() for name in _METRICS],
        "promoted tokens": [value for each in explained for _, value in [*each.top_tokens, *each.bottom_tokens]],
        "measure": [estimate.mean for by_metric in measure(model, TASK).values() for estimate in by_metric.values()],
    }


def _rest(model):
    """What takes longest."""
    dictionaries = transcoders(model)
    ids = torch.tensor([PROMPT])
    graph = graph_of(model)
    agreement = validate_edges(model, dictionaries, graph, 6)
    edits = [FeatureEdit("t1", 3, -1, "steer", 2.0)]
    with torch.no_grad(), intervene(model, dictionaries, edits):
        edited = model(input_ids=ids).logits
    effect = measure_effect(model, dictionaries, ids, edits, mode="direct")
    weights = FeatureWeights(model, dictionaries)
    hypotheses = token_hypotheses(weights, "t2", [1], num_heads=2)
    drift = measure_drift(model, model, dictionaries, BLOCKS, max_kl_tokens=32)
    _, seen = MlpRows(model, ids, 1, 1).record({"neurons": neurons_location(model, 1)})
    return {
        "validation": [agreement.predicted, agreement.measured],
        "intervene": edited,
        "measure_effect": [effect.logits_before, effect.logits_after],
        "hypotheses": [hypotheses.embedding, hypotheses.current, hypotheses.preceding],
        "drift": [value for value in drift.dictionaries["t1"].values() if isinstance(value, float)],
        "neurons": seen["neurons"],
    }


_PARTS = {
    "lm": _lm,
    "patching": _patching,
    "scores": _scores,
    "graphs": _graphs,
    "weights": _weights,
    "evaluation": _evaluation,
    "rest": _rest,
}
