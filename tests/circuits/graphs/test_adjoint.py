"""Rows sum to the activations of the model for every mix of dictionaries."""

import pytest
import torch

from hf_transcoders.circuits.graphs import attribution_graph
from hf_transcoders.circuits.graphs.adjoint import Adjoint
from hf_transcoders.circuits.graphs.autograd import AutogradRows
from tests.circuits.graphs.setups import mixes, runs_of, some_functionals
from tests.lm.utils import hook_state
from tests.tiny_models import HIDDEN_SIZE, TINY_CONFIGS, tiny_model, tiny_tokens


MIXES = list(mixes(tiny_model("llama")))
# Every mix on one family of each build; two that touch everything on the others.
BUILDS = ["gemma2", "gpt2", "gpt_neox", "llama", "opt"]
CASES = [(family, mix) for family in sorted(TINY_CONFIGS) for mix in (MIXES if family in BUILDS else MIXES[2:6:3])]


@pytest.mark.parametrize(("family", "mix"), CASES)
def test_rows_sum_to_the_activations_and_equal_autograd(family, mix):
    check(tiny_model(family), mix)


def test_norms_with_a_bias_behind_attention_and_mlp():
    model = tiny_model("gemma2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in model.model.layers:
            for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
                norm = torch.nn.LayerNorm(HIDDEN_SIZE)
                torch.nn.init.normal_(norm.bias)
                setattr(layer, name, norm)
    check(model, "skips")


def check(model, mix):
    long, short = runs_of(model, mixes(model)[mix])
    for run in (long, short):
        functionals, values = some_functionals(run)
        rows = Adjoint(run).rows(functionals)
        largest = rows.abs().amax(1)
        error = (rows.double().sum(1) - values).abs() / torch.maximum(largest, values.abs())
        assert error.max() < 1e-4
    reference = AutogradRows(short).rows(functionals)
    differences = (rows - reference).abs().amax(1) / largest
    assert differences.max() < 3e-5 and differences.mean() < 1e-5


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_whole_graphs_are_the_same_either_way(family):
    model = tiny_model(family)
    dictionaries, prompt = mixes(model)["skips"], tiny_tokens(1, 8)[0].tolist()
    adjoint, autograd = (
        attribution_graph(model, dictionaries, prompt, method=method, progress=False)
        for method in ("adjoint", "autograd")
    )
    assert adjoint.num_nodes == autograd.num_nodes and adjoint.num_edges > 1000
    dense = [
        torch.zeros(graph.num_nodes, graph.num_nodes).index_put_((graph.target, graph.source), graph.weight)
        for graph in (adjoint, autograd)
    ]
    torch.testing.assert_close(*dense, rtol=1e-4, atol=3e-5 * float(dense[0].abs().max()))
    torch.testing.assert_close(adjoint.influence(), autograd.influence(), rtol=1e-3, atol=1e-5)


def test_autograd_leaves_the_model_as_it_was():
    model = tiny_model("gpt2")
    weight, bias = model.transformer.h[0].attn.c_proj.weight, model.transformer.h[0].attn.c_proj.bias
    weight.requires_grad_(False), bias.requires_grad_(False)
    before = hook_state(model)
    run = runs_of(model, mixes(model)["relu"])[1]
    functionals, _ = some_functionals(run)
    with torch.no_grad():
        rows = AutogradRows(run).rows(functionals)
    assert not rows.requires_grad and not bias.requires_grad and not weight.requires_grad
    assert model.transformer.h[1].attn.c_proj.bias.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hook_state(model) == before
