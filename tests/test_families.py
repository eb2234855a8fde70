"""What is promised of every family, on those beyond the twelve that the other tests run on."""

import re
from dataclasses import replace as with_changes

import pytest
import torch

from hf_transcoders import TranscoderError, TranscoderEvaluator
from hf_transcoders.circuits.graphs import attribution_graph, linearity
from hf_transcoders.circuits.graphs.adjoint import Adjoint
from hf_transcoders.circuits.graphs.autograd import AutogradRows
from hf_transcoders.circuits.patching import Patching, PatchPlan
from hf_transcoders.lm import ablate, capture, edit_attention, frozen, record_frozen, splice
from hf_transcoders.lm import architectures as architectures_module
from hf_transcoders.lm.architectures import architecture_of, has_parallel_residual
from hf_transcoders.lm.attention import num_heads
from hf_transcoders.lm.heads import output_weight, value_weight
from hf_transcoders.tasks import end_logits
from tests.circuits.graphs.setups import runs_of, some_functionals
from tests.circuits.interventions.setups import random_dictionary
from tests.circuits.patching.brute_force import activations, at, patched, prompt, tiny_task
from tests.circuits.paths.setups import recorded, transcoders
from tests.circuits.paths.test_expansion import check as check_expansion
from tests.circuits.paths.test_expansion import functionals_of
from tests.lm.utils import hook_state
from tests.tiny_models import (
    CLOSED_CONFIGS,
    HIDDEN_SIZE,
    LATENT_CONFIGS,
    NUM_LAYERS,
    OTHER_CONFIGS,
    tiny_model,
    tiny_tokens,
)


OPEN = [*OTHER_CONFIGS]
FAMILIES = [*OTHER_CONFIGS, *LATENT_CONFIGS, *CLOSED_CONFIGS]

# What is where in a block, written down apart from the library's own table: first input, or output, of a module.
_LLAMA = {
    "attn.in": "self_attn <", "attn.out": "self_attn >", "attn.branch": "self_attn >",
    "resid_mid": "post_attention_layernorm <",
    "mlp.in": "mlp <", "mlp.out": "mlp >", "mlp.branch": "mlp >",
}  # fmt: skip
_ONE_NORM = {point: place for point, place in _LLAMA.items() if point != "resid_mid"}
_NORMED_BRANCHES = {
    **_LLAMA,
    "attn.branch": "post_attention_layernorm >", "resid_mid": "mlp <", "mlp.branch": "post_feedforward_layernorm >",
}  # fmt: skip
_GPT2 = {
    "attn.in": "attn <", "attn.out": "attn >", "attn.branch": "attn >",
    "resid_mid": "ln_2 <",
    "mlp.in": "mlp <", "mlp.out": "mlp >", "mlp.branch": "mlp >",
}  # fmt: skip
_GPTJ = {point: place for point, place in _GPT2.items() if point != "resid_mid"}
_OPT = {
    **_LLAMA, "resid_mid": "final_layer_norm <", "mlp.in": "fc1 <", "mlp.out": "fc2 >", "mlp.branch": "fc2 >",
}  # fmt: skip
_FALCON = {
    point: place.replace("self_attn", "self_attention").replace("post_attention_layernorm", "post_attention_layernorm")
    for point, place in _LLAMA.items()
}
_PARALLEL_FALCON = {point: place for point, place in _FALCON.items() if point != "resid_mid"}
PLACES = {
    "apertus": {**_LLAMA, "resid_mid": "feedforward_layernorm <"},
    "biogpt": _OPT,
    "bloom": {
        "attn.in": "self_attention <", "attn.out": "self_attention.dense >", "attn.branch": "self_attention.dense >",
        "resid_mid": "post_attention_layernorm <",
        "mlp.in": "mlp <", "mlp.out": "mlp.dense_4h_to_h >", "mlp.branch": "mlp.dense_4h_to_h >",
    },
    "codegen": _GPTJ,
    "dbrx": {
        "attn.in": "norm_attn_norm.attn <", "attn.out": "norm_attn_norm.attn >", "attn.branch": "norm_attn_norm.attn >",
        "resid_mid": "norm_attn_norm.norm_2 <",
        "mlp.in": "ffn <", "mlp.out": "ffn >", "mlp.branch": "ffn >",
    },
    "cohere": _ONE_NORM,
    "cohere2": _ONE_NORM,
    "exaone4": _NORMED_BRANCHES,
    "falcon": _PARALLEL_FALCON,
    "falcon_grouped": _PARALLEL_FALCON,
    "falcon_sequential": _FALCON,
    "gemma3": {
        **_NORMED_BRANCHES, "resid_mid": "pre_feedforward_layernorm <",
    },
    "glm4": {**_LLAMA, "attn.branch": "post_self_attn_layernorm >", "mlp.branch": "post_mlp_layernorm >"},
    "gpt_bigcode": _GPT2,
    "gpt_bigcode_multi_head": _GPT2,
    "gpt_neo": _GPT2,
    "gptj": _GPTJ,
    "granitemoe": {
        **_LLAMA, "mlp.in": "block_sparse_moe <", "mlp.out": "block_sparse_moe >", "mlp.branch": "block_sparse_moe >",
    },
    "mpt": {
        **_GPT2, "resid_mid": "norm_2 <", "mlp.in": "ffn <", "mlp.out": "ffn.down_proj >", "mlp.branch": "ffn.down_proj >",
    },
    "olmo2": _NORMED_BRANCHES,
    "olmo3": _NORMED_BRANCHES,
    "stablelm_parallel": _ONE_NORM,
    "vaultgemma": {**_LLAMA, "resid_mid": "pre_feedforward_layernorm <"},
    "xglm": _OPT,
}  # fmt: skip
MULTIPLIED = {"granite": 0.4, "granitemoe": 0.4}


def seen_by_plain_hooks(model, family, ids):
    """Every point of every layer with plain PyTorch hooks, and the logits of that run."""
    values, handles = {}, []
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    blocks = next(module for module in lists if len(module) == NUM_LAYERS)

    def keep(site, module, side):
        def hook(module, args, kwargs, output=None):
            value = (args[0] if args else kwargs["hidden_states"]) if side == "<" else output
            value = value[0] if isinstance(value, tuple) else value
            values[site] = value.clone() * (MULTIPLIED.get(family, 1.0) if site.endswith("branch") else 1.0)

        register = module.register_forward_pre_hook if side == "<" else module.register_forward_hook
        handles.append(register(hook, with_kwargs=True))

    for layer, block in enumerate(blocks):
        for point, place in {**PLACES.get(family, _LLAMA), "resid_pre": " <", "resid_post": " >"}.items():
            name, side = place.split(" ")
            keep(f"layers.{layer}.{point}", block.get_submodule(name), side)
    logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return values, logits


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_points_are_what_plain_hooks_see_and_add_up(family):
    model, ids = tiny_model(family), tiny_tokens()
    assert len(model.base_model.get_submodule(architecture_of(model).blocks)) == NUM_LAYERS
    expected, logits = seen_by_plain_hooks(model, family, ids)
    assert has_parallel_residual(model) == ("layers.0.resid_mid" not in expected)
    before = hook_state(model)
    with capture(model, list(expected), stop=False) as captured:
        assert torch.equal(model(ids).logits, logits)
    for site, value in expected.items():
        assert captured[site].shape == (2, 12, HIDDEN_SIZE) and torch.equal(captured[site], value), site
    for layer in range(NUM_LAYERS):
        stream = captured[f"layers.{layer}.resid_pre"] + captured[f"layers.{layer}.attn.branch"]
        if not has_parallel_residual(model):
            torch.testing.assert_close(stream, captured[f"layers.{layer}.resid_mid"], rtol=1e-5, atol=1e-5)
        stream = stream + captured[f"layers.{layer}.mlp.branch"]
        torch.testing.assert_close(stream, captured[f"layers.{layer}.resid_post"], rtol=1e-5, atol=1e-5)
    assert hook_state(model) == before


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_dictionaries_are_spliced_in_and_points_ablated(family):
    model, ids = tiny_model(family), tiny_tokens()
    logits = model(ids).logits
    dictionaries = [
        random_dictionary(model, f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.{point}", seed=layer)
        for layer, point in enumerate(("branch", "out", "branch"))
    ]
    with splice(model, dictionaries):
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-4)
    with splice(model, dictionaries, error="drop"):
        assert (model(ids).logits - logits).abs().max() > 1e-2
    for point in ("mlp.out", "attn.branch"):
        sites = [f"layers.1.{point}", "layers.1.resid_pre", "layers.1.resid_post", "layers.1.attn.branch"]
        with ablate(model, f"layers.1.{point}"), capture(model, sites) as captured:
            model(ids)
        assert (captured[sites[0]] == 0).all()
        if point == "mlp.out" and architecture_of(model).mlp_post_norm is None:
            stream = captured["layers.1.resid_pre"] + captured["layers.1.attn.branch"]
            torch.testing.assert_close(captured["layers.1.resid_post"], stream, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_whole_forwards(family):
    model, ids = tiny_model(family), tiny_tokens(4, 8)
    dictionary = random_dictionary(model, "layers.1.mlp.in", "layers.1.mlp.branch")
    evaluator = TranscoderEvaluator(model, [{"input_ids": row} for row in ids], progress=False, skip_first=0)
    metrics = evaluator.evaluate({"t": dictionary}).dictionaries["t"]["metrics"]

    def cross_entropy():
        return torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    assert metrics["ce_original"] == pytest.approx(cross_entropy(), rel=1e-5)
    with splice(model, dictionary, error="drop"):
        assert metrics["ce_spliced"] == pytest.approx(cross_entropy(), rel=1e-5)
    with ablate(model, "layers.1.mlp.branch"):
        assert metrics["ce_zero_ablated"] == pytest.approx(cross_entropy(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", [*OPEN, *LATENT_CONFIGS])
def test_idle_edits_and_frozen_runs_change_nothing(family):
    model, ids = tiny_model(family), tiny_tokens()
    model.set_attn_implementation("eager")
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    plain = model(input_ids=ids, attention_mask=mask).logits
    with edit_attention(model, pattern=lambda pattern, layer: pattern, z=lambda z, layer: z):
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, plain)
    if family not in LATENT_CONFIGS:
        plain, run = model(ids).logits, record_frozen(model, ids)
        with frozen(model, run, mlps=True):
            assert (model(ids).logits - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("family", [*OPEN, *LATENT_CONFIGS])
def test_patches_equal_whole_forwards(family):
    model, task = tiny_model(family), tiny_task(lengths=(9, 10))
    engine = Patching(model, task)
    shared = num_heads(model)[1] - 1
    rows = [
        [],
        ["layers.0.attn.head.1.z"],
        ["layers.1.attn.head.0.query"],
        [f"layers.0.attn.head.{shared}.key"],
        [f"layers.1.attn.head.{shared}.value"],
        ["layers.0.attn.head.2.pattern", "layers.2.attn.head.3.z"],
        ["layers.0.attn.out", "layers.1.mlp.out"],
        ["layers.1.mlp.out", "layers.2.attn.head.1.query", "layers.2.resid_post"],
        ["layers.1.resid_pre"] if has_parallel_residual(model) else ["layers.1.resid_mid", "layers.2.mlp.out"],
    ]
    for name in ("S", "all"):
        found = engine.run(PatchPlan.from_sites(rows, engine.position(name)))
        expected = torch.empty(len(rows), len(task))
        for row in range(len(task)):
            position = None if name == "all" else task.dataset[row]["positions"][name]
            source = activations(model, prompt(task, row, "corrupted"))
            for number, sites in enumerate(rows):
                patches = []
                for text in sites:
                    _, layer, point = text.split(".", 2)
                    layer, head, component = int(layer), None, point
                    if "head" in point:
                        head, component = point.removeprefix("attn.head.").split(".")
                        head = int(head)
                    value = at(source[component, layer], component, head, position)
                    if component == "resid_post":
                        component, layer = "resid_pre", layer + 1
                    patches.append((component, layer, head, position, value))
                expected[number, row] = patched(model, task, row, patches)
        torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        assert ((found.values[1:] - found.values[0]).abs().amax(1) > 1e-4).all()


def _mixed(model):
    """Dictionaries of an MLP before a post-norm, of attention's output, and of the stream, with a skip connection."""
    return [
        random_dictionary(model, "layers.0.mlp.in", "layers.0.mlp.out", seed=1, skip_connection=True),
        random_dictionary(model, "layers.1.attn.in", "layers.1.attn.out", seed=2),
        random_dictionary(model, "layers.1.mlp.in", "layers.1.mlp.branch", seed=3),
        random_dictionary(model, "layers.2.resid_pre", "layers.2.mlp.branch", seed=4, activation="topk", k=5),
    ]


@pytest.mark.parametrize("family", OPEN)
def test_rows_of_graphs_sum_and_equal_autograd(family):
    model = tiny_model(family)
    long, run = runs_of(model, _mixed(model))
    for each in (long, run):
        functionals, values = some_functionals(each)
        rows = Adjoint(each).rows(functionals)
        # A small sum of large products has their rounding.
        stream = max(value.norm(dim=-1).max() for value in each.activations.values())
        size = rows.abs().amax(1) + 0.1 * functionals.vector.norm(dim=-1) * stream
        assert ((rows.double().sum(1) - values).abs() / size).max() < 1e-5
    assert ((rows - AutogradRows(run).rows(functionals)).abs().amax(1) / size).max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", OPEN)
def test_weights_of_heads_compute_what_attention_gets_to_see(family):
    model, seen = tiny_model(family), {}
    keep = lambda part: lambda tensor, layer: seen.__setitem__((part, layer), tensor.clone())  # noqa: E731
    with capture(model, ["layers.1.attn.in", "layers.1.attn.out"], stop=False) as captured:
        with edit_attention(model, value=keep("value"), z=keep("z")):
            model(tiny_tokens())
    weight, bias = value_weight(model, 1)
    values = torch.einsum("bsi,hdi->bhsd", captured["layers.1.attn.in"], weight)
    values = values if bias is None else values + bias[:, None]
    torch.testing.assert_close(values, seen["value", 1], rtol=1e-4, atol=1e-4)
    written = torch.einsum("bhsd,hdo->bso", seen["z", 1], output_weight(model, 1))
    constant = captured["layers.1.attn.out"] - written
    torch.testing.assert_close(constant, constant[:1, :1].expand_as(constant), rtol=1e-4, atol=1e-4)


# Of every build one: a norm on the branch alone, a multiplier, sinks, one norm for both.
@pytest.mark.parametrize("family", ["olmo2", "granite", "gpt_oss", "cohere", "nemotron"])
def test_steps_of_paths_sum(family):
    run = recorded(family, transcoders(0, 2))
    assert check_expansion(run, functionals_of(run, (3, "final"), (2, "mlp.in"))) >= {"head", "feature"}


@torch.no_grad()
@pytest.mark.parametrize("family", ["cohere", "granite", "gpt_oss", "olmo2"])
def test_targets_of_a_graph_are_logits(family):
    model, ids = tiny_model(family), tiny_tokens(1)[0]
    dictionaries = {"t": random_dictionary(model, "layers.1.mlp.in", "layers.1.mlp.branch")}
    graph = attribution_graph(model, dictionaries, ids.tolist(), targets=[5, (7, 9)], progress=False)
    logits = model(ids[None]).logits[0, -1]
    targets = graph.is_kind("target").nonzero()[:, 0]
    sums = graph.rest.double().index_add(0, graph.target, graph.weight.double())[targets]
    expected = torch.stack([logits[5] - logits.mean(), logits[7] - logits[9]]).double()
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [*CLOSED_CONFIGS])
def test_heads_out_of_reach_are_refused(family):
    model, task = tiny_model(family), tiny_task()
    for call in (
        lambda: attribution_graph(model, [], [5, 6, 7], progress=False),
        lambda: Patching(model, task).run(
            PatchPlan.from_sites(["layers.0.attn.head.0.z"], Patching(model, task).last)
        ),
        lambda: value_weight(model, 0),
    ):
        with pytest.raises(TranscoderError, match="does not go through transformers' AttentionInterface"):
            call()


@pytest.mark.parametrize("family", [*LATENT_CONFIGS])
def test_latent_attention_has_no_weights_of_heads(family):
    model = tiny_model(family)
    for call in (
        lambda: attribution_graph(model, [], [5, 6, 7], progress=False),
        lambda: value_weight(model, 0),
        lambda: record_frozen(model, tiny_tokens()),
    ):
        with pytest.raises(TranscoderError, match="is not known to be one projection of what"):
            call()


@pytest.mark.parametrize(
    ("wrong", "point"),
    [
        ({"residual_multiplier": 0.5}, "attn.branch|resid_mid"),
        ({"mlp_norm": "input_layernorm"}, "mlp.in|resid_mid"),
        ({"attention_norm": "post_attention_layernorm"}, "attn.in"),
        ({"value": "k_proj"}, "attn.out"),
        ({"parallel_residual": True}, "mlp.in"),
    ],
)
def test_a_graph_of_a_family_registered_wrongly_says_so(monkeypatch, wrong, point):
    model = tiny_model("llama")
    table = {**architectures_module._ARCHITECTURES, "llama": with_changes(architecture_of(model), **wrong)}
    monkeypatch.setattr(architectures_module, "_ARCHITECTURES", table)
    said = []
    monkeypatch.setattr(linearity.logger, "warning", said.append)
    attribution_graph(model, [], [5, 6, 7], progress=False)
    assert re.match(rf"'layers\.0\.({point})' of this llama model differs by", said[0])


@pytest.mark.parametrize(("wrong", "parent"), [({"mlp": "ffn"}, "LlamaDecoderLayer"), ({"blocks": "h"}, "LlamaModel")])
def test_a_module_that_is_not_there_is_named(monkeypatch, wrong, parent):
    model = tiny_model("llama")
    table = {**architectures_module._ARCHITECTURES, "llama": with_changes(architecture_of(model), **wrong)}
    monkeypatch.setattr(architectures_module, "_ARCHITECTURES", table)
    with pytest.raises(TranscoderError, match=f"names '{next(iter(wrong.values()))}', which {parent} does not have"):
        capture(model, "layers.0.mlp.in").__enter__()


def test_a_graph_of_clamped_values_says_so(monkeypatch):
    model = tiny_model("olmo")
    model.config.clip_qkv = 0.5
    said = []
    monkeypatch.setattr(linearity.logger, "warning", said.append)
    attribution_graph(model, [], [5, 6, 7], progress=False)
    assert said[0].startswith("'layers.0.attn.out' of this olmo model differs by")


def test_attention_that_is_no_softmax_of_products_is_not_run_apart(monkeypatch):
    model, task = tiny_model("llama"), tiny_task()
    module = __import__("sys").modules[type(model).__module__]
    eager = module.eager_attention_forward

    def doubled(*args, **kwargs):
        z, pattern = eager(*args, **kwargs)
        return 2 * z, pattern

    monkeypatch.setattr(module, "eager_attention_forward", doubled)
    engine = Patching(model, task)
    with pytest.raises(TranscoderError, match="is not a softmax over products of queries and keys alone"):
        engine.run(PatchPlan.from_sites(["layers.0.attn.head.0.z"], engine.position("S")))


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "llama", "bloom"])
def test_outputs_without_names_and_router_logits(family):
    model, ids = tiny_model(family), tiny_tokens(4, 8)
    rows = [{"input_ids": row} for row in ids]
    dictionary = random_dictionary(model, "layers.1.mlp.in", "layers.1.mlp.branch")
    expected = TranscoderEvaluator(model, rows, progress=False).evaluate([dictionary])
    task = tiny_task()
    logits = end_logits(model, task)
    model.config.return_dict = False
    if "moe" in family or family == "mixtral":
        model.config.output_router_logits = True
    assert (
        TranscoderEvaluator(model, rows, progress=False).evaluate([dictionary]).dictionaries == expected.dictionaries
    )
    assert torch.equal(end_logits(model, task), logits)
    assert model.config.return_dict is False
    if family != "bloom":
        engine = Patching(model, task)
        engine.run(PatchPlan.from_sites(["layers.0.attn.head.0.z"], engine.position("S")))
        attribution_graph(model, [dictionary], ids[0].tolist(), progress=False)
