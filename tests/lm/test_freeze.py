"""A frozen model gives the same outputs on the recorded prompt, and is linear where it claims to be."""

import pytest
import torch

from hf_transcoders import Site, TranscoderError, capture
from hf_transcoders.lm import frozen, locate, record_frozen
from tests.lm.utils import hook_state
from tests.tiny_models import TINY_CONFIGS, tiny_model, tiny_tokens


FAMILIES = sorted(TINY_CONFIGS)


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("mlps", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_recorded_prompt_gives_the_plain_logits(family, mlps):
    model, tokens = tiny_model(family), tiny_tokens()
    plain, before = model(tokens).logits, hook_state(model)
    run = record_frozen(model, tokens)
    with frozen(model, run, mlps=mlps):
        assert relative(model(tokens).logits, plain) < 1e-5
    assert hook_state(model) == before
    assert torch.equal(model(tokens).logits, plain)
    # One recorded prompt serves every row that repeats it.
    with frozen(model, record_frozen(model, tokens[:1]), mlps=mlps):
        assert relative(model(tokens[[0, 0, 0]]).logits, plain[[0, 0, 0]]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_mlps_make_the_model_affine(family):
    model, tokens = tiny_model(family), tiny_tokens()
    embeddings = model.get_input_embeddings()(tokens)
    change = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    run = record_frozen(model, tokens)

    def outputs(scale):
        return model.get_decoder()(inputs_embeds=embeddings + scale * change).last_hidden_state

    with frozen(model, run, mlps=True):
        still, once, thrice = outputs(0), outputs(1), outputs(3)
    assert relative(thrice - still, 3 * (once - still)) < 1e-5
    assert relative(once, still) > 0.01
    with frozen(model, run):
        curved = [outputs(scale) for scale in (0, 1, 3)]
    assert relative(curved[2] - curved[0], 3 * (curved[1] - curved[0])) > 0.01
    assert relative(outputs(1) - still, once - still) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_frozen_maps(family):
    """The gradient of an affine function predicts its differences."""
    model, tokens = tiny_model(family), tiny_tokens(batch=1)
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    change = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    run = record_frozen(model, tokens)
    site = "layers.2.mlp.in"
    with frozen(model, run, mlps=True), capture(model, site, stop=False) as activations:
        model(inputs_embeds=embeddings)
        first = activations[site][0, -1]
        target = first @ torch.ones(len(first))
        (gradient,) = torch.autograd.grad(target, embeddings)
        with torch.no_grad():
            model(inputs_embeds=embeddings + change)
            measured = activations[site][0, -1].sum() - target
    torch.testing.assert_close((gradient * change).sum(), measured, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_norm_equals_its_definition_at_the_recorded_scale():
    model, tokens = tiny_model("llama"), tiny_tokens(batch=1)
    norm = locate(model, "layers.1.resid_pre").module.input_layernorm
    run = record_frozen(model, tokens, sites=["layers.1.resid_pre"])
    at = run.activations[Site("resid_pre", 1)]
    other = torch.randn_like(at)
    scale = (at.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    expected = other * scale * norm.weight
    torch.testing.assert_close(run.norms[norm](other), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_after_the_prompt_are_free(family):
    """Generation with a cache, and forwards of the longer sequences, both give what the plain model gives."""
    model, tokens = tiny_model(family), tiny_tokens()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(tokens, **options)
    logits = model(plain).logits
    with frozen(model, record_frozen(model, tokens), mlps=True):
        assert torch.equal(model.generate(tokens, **options), plain)
        assert relative(model(plain).logits, logits) < 1e-5


@torch.no_grad()
def test_bf16():
    model, tokens = tiny_model("llama").to(torch.bfloat16), tiny_tokens()
    plain = model(tokens).logits
    with frozen(model, record_frozen(model, tokens), mlps=True):
        assert relative(model(tokens).logits.float(), plain.float()) < 0.02


@torch.no_grad()
def test_other_prompts_are_refused_and_nothing_stays_behind():
    model, tokens = tiny_model("llama"), tiny_tokens()
    before = hook_state(model)
    run = record_frozen(model, tokens)
    with pytest.raises(TranscoderError, match="another prompt"), frozen(model, run):
        model(tiny_tokens(seed=1))
    for wrong in (tokens[:, :-1], tokens[:1], tokens[[0, 1, 0]]):
        with pytest.raises(TranscoderError, match="2 prompts with 12 tokens"), frozen(model, run):
            model(wrong)
    assert hook_state(model) == before
