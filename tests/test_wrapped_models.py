"""Every public function that takes a language model takes one that is wrapped, in training mode, and gives the same."""

import copy
import dataclasses
import importlib
import inspect
import math
import pkgutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import pytest
import torch

import hf_transcoders
from hf_transcoders import CrossLayerTranscoderConfig, TranscoderConfig, TranscoderModel, TranscoderSet
from hf_transcoders.circuits import AttentionEdit, FeatureEdit, PatchPlan
from hf_transcoders.circuits.graphs import attribution_graph
from hf_transcoders.data import ActivationHarvester
from hf_transcoders.data.token_blocks import TokenBlocks
from hf_transcoders.evaluation import DriftProbe, TranscoderEvaluator
from hf_transcoders.features import collect_examples
from hf_transcoders.lm import record_frozen
from hf_transcoders.lm.wrappers import NAMES, language_model
from hf_transcoders.studies.circuit_reuse import ForcedAttention, ForcedHead, forced, trace_stages
from hf_transcoders.tasks import colored_objects, indirect_object_identification
from hf_transcoders.training import TranscoderTrainer, TranscoderTrainingArguments
from hf_transcoders.training.memory_plan import plan_run
from tests.circuits.patching.brute_force import tiny_task
from tests.studies.test_circuit_reuse import TOKENIZER, model_for_tasks


peft = pytest.importorskip("peft")

READ, WRITE = "layers.1.mlp.in", "layers.1.mlp.branch"
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row.tolist()} for row in torch.randint(3, 128, (24, 16))]

# Public names with a parameter of such a name that is not a language model.
NO_LANGUAGE_MODEL = {
    "circuits.graphs.graph.AttributionGraph": "",
    "studies.published.published_study": "a name",
    "evaluation.drift.DriftReport": "numbers of the model",
    "features.explain.chat.ServiceChat": "a name",
    "tracking.callback.TranscoderTrackingCallback.on_train_begin": "the dictionary that is trained",
    "tracking.trackio.TranscoderTrackioCallback.on_log": "the dictionary that is trained",
    "tracking.trackio.TranscoderTrackioCallback.on_train_begin": "the dictionary that is trained",
    "tracking.trackio.TranscoderTrackioCallback.setup": "the dictionary that is trained",
    "training.trainer.TranscoderTrainer.compute_loss": "the dictionary that is trained",
}


def public_functions():
    """Every public function, class and method of the package that has a parameter with the name of a language model."""
    found = set()
    for info in pkgutil.walk_packages(hf_transcoders.__path__, "hf_transcoders."):
        if not info.ispkg:
            continue
        package = importlib.import_module(info.name)
        for name in getattr(package, "__all__", None) or [name for name in vars(package) if not name.startswith("_")]:
            public = getattr(package, name)
            members = [public]
            if inspect.isclass(public):
                members += [getattr(public, key) for key in vars(public) if not key.startswith("_")]
            for member in members:
                if not callable(member) or not getattr(member, "__module__", "").startswith("hf_transcoders"):
                    continue
                try:
                    parameters = inspect.signature(member).parameters
                except (TypeError, ValueError):
                    continue
                if any(parameter in NAMES for parameter in parameters):
                    found.add(f"{member.__module__.removeprefix('hf_transcoders.')}.{member.__qualname__}")
    return found


def dictionary_of(model, read=READ, write=WRITE):
    config = TranscoderConfig.for_model(model, read, write, num_features=24, activation="relu")
    dictionary = TranscoderModel(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return dictionary.eval()


class Parts:
    """What calls need, made of the plain model, so that only the model that is given to the call differs."""

    def __init__(self, plain, folder):
        self.dictionary = dictionary_of(plain)
        self.later = dictionary_of(plain, "layers.2.mlp.in", "layers.2.mlp.branch")
        self.dictionaries = TranscoderSet([self.dictionary])
        self.task, self.folder = tiny_task(), folder
        self.ids = IDS[0].tolist()
        self.edit = FeatureEdit(WRITE, 3, position=2, kind="steer", value=2.0)
        self.graph = attribution_graph(plain, self.dictionaries, self.ids, progress=False)
        self.frozen = record_frozen(plain, IDS)
        self.ioi = indirect_object_identification(TOKENIZER, 2, "s2_io_flip")
        self.colors = colored_objects(TOKENIZER, 2)
        self.probe = DriftProbe(self.dictionaries, ROWS, max_tokens=64, max_loss_tokens=64, max_kl_tokens=32)
        self.probe.take_baseline(plain)
        (self.examples,) = collect_examples(plain, self.dictionaries, ROWS, TOKENIZER, progress=False).values()

    def arguments(self, **changes):
        changes = {
            "max_steps": 2, "per_device_train_batch_size": 32, "harvest_batch_size": 8, "buffer_tokens": 128,
            "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none", **changes,
        }  # fmt: skip
        return TranscoderTrainingArguments(str(self.folder / str(len(list(self.folder.iterdir())))), **changes)

    def trained(self, model):
        dictionary = dictionary_of(language_model(model))
        TranscoderTrainer(dictionary, model, self.arguments(), train_dataset=ROWS).train()
        return dictionary.state_dict()

    def swept(self, model):
        from hf_transcoders.training import run_sweep

        config = self.dictionary.config
        return run_sweep({"one": config}, model, self.arguments(), ROWS, ROWS).report.dictionaries


def _chatting():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def within(block, model, *args, **kwargs):
    """Logits, and what the block yields, of the model as it was given."""
    with torch.no_grad(), block(model, *args, **kwargs) as yielded:
        output = model(input_ids=IDS)
        found = dict(yielded) if isinstance(yielded, Mapping) else None
    return None if output is None else output.logits, found


def load(name):
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(f"hf_transcoders.{module}"), function)


_QUIET = {"progress": False}
# Name -> a call, given the function, a model and the parts.
CALLS = {
    "circuits.graphs.attribution.attribution_graph": lambda f, m, p: f(m, p.dictionaries, p.ids, **_QUIET),
    "circuits.graphs.validation.validate_edges": lambda f, m, p: f(m, p.dictionaries, p.graph, 4),
    "circuits.graphs.head_loadings.head_loadings": lambda f, m, p: f(m, p.dictionaries, p.graph, max_edges=4),
    "circuits.graphs.qk.qk_attribution": lambda f, m, p: f(m, p.dictionaries, p.ids, 1, 0),
    "circuits.interventions.effect.measure_effect": lambda f, m, p: f(m, p.dictionaries, IDS[0], [p.edit]),
    "circuits.interventions.intervene.intervene": lambda f, m, p: within(f, m, p.dictionaries, [p.edit]),
    "circuits.interventions.losses.intervention_losses": lambda f, m, p: f(
        m, ROWS, p.dictionaries, [p.edit], max_tokens=64, **_QUIET
    ),
    "circuits.patching.attention_edits.edited_attention": lambda f, m, p: within(
        f, m, AttentionEdit([(1, 2)], "force", torch.tensor([[0], [1]]))
    ),
    "circuits.patching.patching.Patching": lambda f, m, p: [
        f(m, p.task).run(_PLAN(p)),
        f(m, p.task).heads(),
        f(m, p.task).residual("S"),
        f(m, p.task).mlps(),
        f(m, p.task).attention(),
        f(m, p.task).paths(),
    ],
    "circuits.patching.patch_plan.PatchPlan.check": lambda f, m, p: _PLAN(p).check(
        m, p.task.tokens().positions["END"]
    ),
    "circuits.patching.head_scores.attention_between": lambda f, m, p: f(m, p.task, "END", ["S"]),
    "circuits.patching.head_scores.component_outputs": lambda f, m, p: f(m, p.task),
    "circuits.patching.head_scores.logit_attribution": lambda f, m, p: f(m, p.task),
    "circuits.patching.head_scores.pattern_scores": lambda f, m, p: f(m, 6, 2),
    "circuits.patching.weight_scores.composition_scores": lambda f, m, p: f(m, [(0, 1)]),
    "circuits.patching.weight_scores.copying_scores": lambda f, m, p: f(m, [3, 4, 5]),
    "circuits.patching.weight_scores.duplicate_token_scores": lambda f, m, p: f(m, [3, 4, 5]),
    "circuits.patching.weight_scores.previous_token_scores": lambda f, m, p: f(m),
    "circuits.paths.search.greedy_paths": lambda f, m, p: f(m, p.dictionaries, p.ids, num_paths=3),
    "studies.circuit_reuse.end_runs.predict_at_end": lambda f, m, p: f(m, p.colors, {"none": []}),
    "circuits.patching.faithfulness.circuit_faithfulness": lambda f, m, p: f(m, p.colors, {"one": [(1, 2)]}),
    "studies.circuit_reuse.movers.mover_change": lambda f, m, p: f(
        m, p.colors, forced(p.colors, [(1, 1)]), [(2, 1)], torch.arange(12.0).view(3, 4)
    ),
    "studies.circuit_reuse.repair.repair_outcomes": lambda f, m, p: f(
        m, p.colors, [(1, 1)], [], head_draws=1, token_draws=1
    ),
    "studies.circuit_reuse.study.reuse_circuit": lambda f, m, p: f(
        m, TOKENIZER, prompts=2, repair_prompts=2, faithfulness_prompts=0, search_prompts=2
    ),
    "studies.circuit_reuse.repair_search.search_repair": lambda f, m, p: f(m, p.colors),
    "studies.circuit_reuse.found_repair.find_repair": lambda f, m, p: f(
        m, p.colors, colored_objects(TOKENIZER, 2, seed=1), head_draws=1, token_draws=1
    ),
    "studies.circuit_reuse.judged_repairs.forced_predictions": lambda f, m, p: f(
        m, p.colors, ForcedAttention(p.colors, {"object": ("object_1",)}), {"one": [ForcedHead((1, 1), "object")]}
    ),
    "studies.circuit_reuse.head_evidence.head_evidence": lambda f, m, p: f(
        m, [(1, 1)], {"colors": (p.colors, "END", ["first token"])}
    ),
    "studies.circuit_reuse.downstream.downstream_change": lambda f, m, p: f(
        m, p.colors, forced(p.colors, [(1, 1)]), ["answer_colour"]
    ),
    "studies.circuit_reuse.traced_tasks.trace_tasks": lambda f, m, p: f(m, TOKENIZER, 2, depth=2),
    "studies.circuit_reuse.roles.find_roles": lambda f, m, p: f(
        m, p.ioi, trace_stages(m, p.ioi), p.colors, trace_stages(m, p.colors)
    ),
    "studies.circuit_reuse.stages.trace_stages": lambda f, m, p: f(m, p.ioi),
    "circuits.patching.attention_views.attention_views": lambda f, m, p: f(m, TOKENIZER, p.colors, {(2, 1): "mover"}),
    "studies.blind.study.blind_study": lambda f, m, p: f(
        m, p.dictionaries, next(iter(p.dictionaries)), ROWS, TOKENIZER, num_features=2, null_features=3, **_QUIET
    ),
    "studies.feature_effects.study.feature_effects_study": lambda f, m, p: f(
        m, p.dictionary, ROWS, TOKENIZER, [1, 2], num_contexts=3, max_tokens=64
    ),
    "studies.feature_patching.study.feature_patching_study": lambda f, m, p: f(
        m, p.task, {"one": p.dictionary}, thresholds=(0.1,), random_orders=0, progress=False
    ),
    "studies.feature_tree.study.feature_tree_study": lambda f, m, p: f(
        m,
        {"one": p.dictionary, "two": p.later},
        ROWS,
        TOKENIZER,
        "two",
        1,
        depth=1,
        num_contexts=2,
        max_tokens=64,
        progress=False,
    ),
    "studies.autointerp.study.autointerp_study": lambda f, m, p: [
        each.l0 for each in f(m, {"a": p.dictionary}, ROWS, TOKENIZER, num_features=2, **_QUIET).dictionaries
    ],
    "studies.greater_than.study.greater_than_study": lambda f, m, p: f(
        m, p.dictionary, TOKENIZER, max_k=2, num_features=1, **_QUIET
    ),
    "circuits.weights.feature_weights.FeatureWeights": lambda f, m, p: f(m, p.dictionaries).reads(
        next(iter(p.dictionaries))
    ),
    "circuits.weights.ov_circuits.OVCircuits": lambda f, m, p: vars(f(m, 1)),
    "data.harvest.ActivationHarvester": lambda f, m, p: ActivationHarvester(m, ROWS, [READ]).chunk(0),
    "evaluation.drift.DriftProbe.check": lambda f, m, p: p.probe.check(m),
    "evaluation.drift.DriftProbe.measure": lambda f, m, p: p.probe.measure(m),
    "evaluation.drift.DriftProbe.take_baseline": lambda f, m, p: p.probe.take_baseline(m),
    "evaluation.evaluator.TranscoderEvaluator": lambda f, m, p: TranscoderEvaluator(
        m, ROWS, max_tokens=64, **_QUIET
    ).evaluate(p.dictionaries),
    "features.collect.collect_examples": lambda f, m, p: f(
        m, p.dictionaries, ROWS, TOKENIZER, max_tokens=64, **_QUIET
    ),
    "features.explain.chat.LocalChat": lambda f, m, p: f(m, _chatting(), max_tokens=2).answer(
        [{"role": "user", "content": "Mary"}]
    ),
    "features.explain.random_control.random_control": lambda f, m, p: [
        parameter.detach() for parameter in f(m, p.dictionary, p.examples)[0].parameters()
    ],
    "features.explain.scoring.rule_explainers": lambda f, m, p: [
        getattr(each, "tokens", None) for each in f(m, p.dictionary, TOKENIZER, [1, 2])
    ],
    "features.explain.surprisal.SurprisalScorer": lambda f, m, p: f(m, TOKENIZER)._losses("Mary", [[3, 4, 5]]),
    "features.feature_examples.explain_features": lambda f, m, p: f(
        m, p.dictionary, ROWS, TOKENIZER, features=[1, 2], max_tokens=64, **_QUIET
    ),
    "features.top_activations.find_top_activations": lambda f, m, p: f(
        m, p.dictionaries, TokenBlocks(ROWS, max_tokens=64)
    ),
    "lm.architectures.architecture_of": lambda f, m, p: f(m),
    "lm.architectures.locate": lambda f, m, p: f(m, WRITE),
    "lm.architectures.num_layers": lambda f, m, p: f(m),
    "lm.architectures.site_width": lambda f, m, p: f(m, WRITE),
    "lm.attention.edit_attention": lambda f, m, p: within(f, m, z=lambda z, layer: 2 * z),
    "lm.capture.capture": lambda f, m, p: within(f, m, [READ, WRITE]),
    "lm.freeze.frozen": lambda f, m, p: within(f, m, p.frozen, mlps=True),
    "lm.freeze.record_frozen": lambda f, m, p: f(m, IDS, [READ]),
    "lm.replace.ablate": lambda f, m, p: within(f, m, WRITE),
    "lm.replace.replace": lambda f, m, p: within(f, m, {WRITE: p.dictionary}, features=True),
    "lm.replace.splice": lambda f, m, p: within(f, m, p.dictionary, error="drop"),
    "models.configuration_transcoder.TranscoderConfig.for_model": lambda f, m, p: TranscoderConfig.for_model(
        m, READ, WRITE, num_features=24, k=4
    ).to_dict(),
    "models.cross_layer.configuration_cross_layer.CrossLayerTranscoderConfig.for_model": lambda f, m, p: (
        CrossLayerTranscoderConfig.for_model(m, num_features=24, k=4).to_dict()
    ),
    "tasks.task.TokenBatch.forward_batches": lambda f, m, p: [
        places for places, _ in p.task.tokens("clean").forward_batches(m)
    ],
    "tasks.measuring.end_logits": lambda f, m, p: f(m, p.task),
    "tasks.measuring.measure": lambda f, m, p: f(m, p.task),
    "tasks.performance.task_performance": lambda f, m, p: f(m, p.task),
    "tracking.probe.TranscoderProbeCallback.on_evaluate": None,
    "tracking.probe.TranscoderProbeCallback.on_step_end": None,
    "tracking.probe.TranscoderProbeCallback.on_train_begin": None,
    "training.baseline_dictionaries.fit_baselines": lambda f, m, p: [
        baselines[name].state_dict()
        for baselines in f(m, ROWS, [WRITE], ["pca", "random", "identity"], batch_size=4, progress=False).values()
        for name in baselines
    ],
    "training.grid.expand_grid": lambda f, m, p: [
        config.to_dict() for config in f(m, [(READ, WRITE)], num_features=24, k=4).configs.values()
    ],
    "training.sweep.run_sweep": lambda f, m, p: p.swept(m),
    "training.trainer.TranscoderTrainer": lambda f, m, p: p.trained(m),
}


def _PLAN(parts):
    return PatchPlan.from_sites(["layers.0.attn.head.2.z", "layers.1.mlp.out"], parts.task.tokens().positions["END"])


def assert_same(found, expected, where="result"):
    """Equal in every number; objects are compared by their fields."""
    assert type(found) is type(expected), where
    if isinstance(found, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True, msg=where)
    elif isinstance(found, torch.nn.Module):
        assert found is expected, where
    elif dataclasses.is_dataclass(found):
        for field in dataclasses.fields(found):
            assert_same(getattr(found, field.name), getattr(expected, field.name), f"{where}.{field.name}")
    elif isinstance(found, Mapping):
        assert list(map(str, found)) == list(map(str, expected)), where
        for one, other in zip(found.values(), expected.values(), strict=True):
            assert_same(one, other, where)
    elif isinstance(found, float):
        assert math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-6) or (
            found != found and expected != expected
        ), where
    elif isinstance(found, Iterable) and not isinstance(found, (str, bytes, AbstractContextManager)):
        one, other = list(found), list(expected)
        assert len(one) == len(other), where
        for pair in zip(one, other, strict=True):
            assert_same(*pair, where)
    elif isinstance(found, (str, int, bool, type(None))):
        assert found == expected or "versions" in where or "path" in where, where


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model with an adapter in its layers, in training mode with dropout; what wraps it; and the parts of calls."""
    plain = model_for_tasks("llama")
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], lora_dropout=0.5, init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(plain, config)
    plain = wrapped.get_base_model()
    parts = Parts(plain, tmp_path_factory.mktemp("wrapped"))
    return plain, wrapped, parts


def test_every_public_function_with_a_model_is_here():
    found = public_functions()
    assert found - NO_LANGUAGE_MODEL.keys() == CALLS.keys()
    assert len(found) > 60


def run(name, model, parts):
    torch.manual_seed(0)
    call = CALLS[name]
    try:
        function = load(name)
    except (ImportError, AttributeError):
        function = None
    return call(function, model, parts)


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call is not None])
def test_a_peft_model(models, name):
    plain, wrapped, parts = models
    expected = run(name, plain.eval(), parts)
    # Blocks leave the mode of the model to whoever calls it.
    is_block = name.split(".")[-1] in (
        "capture",
        "frozen",
        "ablate",
        "replace",
        "splice",
        "edit_attention",
        "edited_attention",
    )
    wrapped.train(not is_block)
    before = [module.training for module in wrapped.modules()]
    assert_same(run(name, wrapped, parts), expected)
    assert [module.training for module in wrapped.modules()] == before


def test_a_plan_of_a_run(models):
    plain, wrapped, parts = models
    configs = {"one": parts.dictionary.config}
    assert_same(plan_run(wrapped, configs, parts.arguments()), plan_run(plain, configs, parts.arguments()))
