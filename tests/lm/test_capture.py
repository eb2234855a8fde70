import pytest
import torch

from hf_transcoders.errors import TranscoderError
from hf_transcoders.lm import Site, capture
from hf_transcoders.lm.order import POINTS
from tests.lm.utils import hook_state
from tests.tiny_models import NUM_LAYERS, TINY_CONFIGS, tiny_model, tiny_tokens


PARALLEL = ("gpt_neox", "phi")


def _llama_places(block):
    return {
        "attn.in": (block.self_attn, "in"),
        "attn.out": (block.self_attn, "out"),
        "attn.branch": (block.self_attn, "out"),
        "resid_mid": (block.post_attention_layernorm, "in"),
        "mlp.in": (block.mlp, "in"),
        "mlp.out": (block.mlp, "out"),
        "mlp.branch": (block.mlp, "out"),
    }


def _gemma_places(block):
    return {
        **_llama_places(block),
        "attn.branch": (block.post_attention_layernorm, "out"),
        "resid_mid": (block.pre_feedforward_layernorm, "in"),
        "mlp.branch": (block.post_feedforward_layernorm, "out"),
    }


def _gpt2_places(block):
    return {
        "attn.in": (block.attn, "in"),
        "attn.out": (block.attn, "out"),
        "attn.branch": (block.attn, "out"),
        "resid_mid": (block.ln_2, "in"),
        "mlp.in": (block.mlp, "in"),
        "mlp.out": (block.mlp, "out"),
        "mlp.branch": (block.mlp, "out"),
    }


def _neox_places(block):
    return {
        "attn.in": (block.attention, "in"),
        "attn.out": (block.attention, "out"),
        "attn.branch": (block.attention, "out"),
        "resid_mid": (block.post_attention_layernorm, "in"),
        "mlp.in": (block.mlp, "in"),
        "mlp.out": (block.mlp, "out"),
        "mlp.branch": (block.mlp, "out"),
    }


def _opt_places(block):
    return {
        "attn.in": (block.self_attn, "in"),
        "attn.out": (block.self_attn, "out"),
        "attn.branch": (block.self_attn, "out"),
        "resid_mid": (block.final_layer_norm, "in"),
        "mlp.in": (block.fc1, "in"),
        "mlp.out": (block.fc2, "out"),
        "mlp.branch": (block.fc2, "out"),
    }


def _phi_places(block):
    places = {
        "attn.in": (block.self_attn, "in"),
        "attn.out": (block.self_attn, "out"),
        "attn.branch": (block.self_attn, "out"),
        "mlp.in": (block.mlp, "in"),
        "mlp.out": (block.mlp, "out"),
        "mlp.branch": (block.mlp, "out"),
    }
    return places


# Family -> (its list of blocks, what is where in one of them), written down apart from the library's own table.
BY_HAND = {
    "gpt2": (lambda model: model.transformer.h, _gpt2_places),
    "gpt_neox": (lambda model: model.gpt_neox.layers, _neox_places),
    "gpt_neox_sequential": (lambda model: model.gpt_neox.layers, _neox_places),
    "llama": (lambda model: model.model.layers, _llama_places),
    "mistral": (lambda model: model.model.layers, _llama_places),
    "qwen2": (lambda model: model.model.layers, _llama_places),
    "qwen3": (lambda model: model.model.layers, _llama_places),
    "gemma2": (lambda model: model.model.layers, _gemma_places),
    "gemma3_text": (lambda model: model.model.layers, _gemma_places),
    "opt": (lambda model: model.model.decoder.layers, _opt_places),
    "phi": (lambda model: model.model.layers, _phi_places),
    "phi3": (lambda model: model.model.layers, _llama_places),
}


def points_of(family):
    return [point for point in POINTS if point != "resid_mid" or family not in PARALLEL]


def hand_captured(model, family, ids):
    """Every point of every layer with plain PyTorch hooks, and the logits of that run."""
    values, handles = {}, []
    blocks, places = BY_HAND[family]

    def place(key, module, side):
        if side == "in":

            def hook(_, args, kwargs):
                values[key] = args[0] if args else kwargs["hidden_states"]

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:

            def hook(_, args, output):
                values[key] = output[0] if isinstance(output, tuple) else output

            handles.append(module.register_forward_hook(hook))

    for layer, block in enumerate(blocks(model)):
        for point in points_of(family):
            module, side = {**places(block), "resid_pre": (block, "in"), "resid_post": (block, "out")}[point]
            place(f"layers.{layer}.{point}", module, side)
    logits = model(ids).logits
    for handle in handles:
        handle.remove()
    # OPT's MLP sees (batch * seq, width).
    return {key: value.view(*ids.shape, -1) for key, value in values.items()}, logits


@pytest.fixture(params=TINY_CONFIGS)
def family(request):
    return request.param


@torch.no_grad()
def test_captured_values_equal_plain_hooks(family):
    model, ids = tiny_model(family), tiny_tokens()
    expected, logits = hand_captured(model, family, ids)
    before = hook_state(model)
    with capture(model, list(expected), stop=False) as activations:
        captured_logits = model(ids).logits
    assert set(activations) == {Site.parse(site) for site in expected}
    for site, value in expected.items():
        assert torch.equal(activations[site], value), site
        assert activations[site].shape == (*ids.shape, 32)
    assert torch.equal(captured_logits, logits)
    assert hook_state(model) == before
    assert torch.equal(model(ids).logits, logits)


@torch.no_grad()
def test_branches_add_up_to_the_residual_stream(family):
    model = tiny_model(family)
    sites = [f"layers.{layer}.{point}" for layer in range(NUM_LAYERS) for point in points_of(family)]
    with capture(model, sites) as activations:
        model(tiny_tokens())
    for layer in range(NUM_LAYERS):
        at = {point: activations[f"layers.{layer}.{point}"] for point in points_of(family)}
        total = at["resid_pre"] + at["attn.branch"] + at["mlp.branch"]
        torch.testing.assert_close(total, at["resid_post"], rtol=1e-5, atol=1e-5)
        if "resid_mid" in at:
            torch.testing.assert_close(at["resid_pre"] + at["attn.branch"], at["resid_mid"], rtol=1e-5, atol=1e-5)
        assert torch.equal(at["mlp.out"], at["mlp.branch"]) == (not family.startswith("gemma"))


@torch.no_grad()
def test_mlp_input_gives_mlp_output(family):
    model = tiny_model(family)
    with capture(model, ["layers.1.mlp.in", "layers.1.mlp.out"]) as activations:
        model(tiny_tokens())
    block = BY_HAND[family][0](model)[1]
    if family == "opt":
        output = block.fc2(block.activation_fn(block.fc1(activations["layers.1.mlp.in"])))
    else:
        output = block.mlp(activations["layers.1.mlp.in"])
    torch.testing.assert_close(output, activations["layers.1.mlp.out"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_stops_right_after_the_last_site(family):
    model, ids = tiny_model(family), tiny_tokens()
    blocks, places = BY_HAND[family]
    calls = []
    watched = {"block 0": blocks(model)[0], "block 1": blocks(model)[1], "block 2": blocks(model)[2]}
    watched["mlp 1"] = places(blocks(model)[1])["mlp.out"][0]
    watched["lm_head"] = model.get_output_embeddings()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name)) for name, module in watched.items()
    ]
    with capture(model, ["layers.1.attn.out", "layers.0.mlp.in"]) as activations:
        assert model(ids) is None
        assert calls == ["block 0", "block 1"]
        assert len(activations) == 2
    for handle in handles:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt_neox", "phi", "llama"])
@pytest.mark.parametrize("points", [["mlp.out", "attn.in"], ["attn.out", "mlp.in"], ["resid_post", "resid_pre"]])
def test_the_order_of_the_sites_does_not_matter(family, points):
    model, ids = tiny_model(family), tiny_tokens()
    expected, _ = hand_captured(model, family, ids)
    sites = [f"layers.{layer}.{point}" for layer in (2, 0) for point in points]
    for order in (sites, sites[::-1]):
        with capture(model, order) as activations:
            model(ids)
        assert all(torch.equal(activations[site], expected[site]) for site in sites)


@torch.no_grad()
def test_each_call_replaces_the_activations_without_new_hooks():
    model, sites = tiny_model("llama"), ["layers.1.mlp.in", "layers.0.resid_mid"]
    calls = [tiny_tokens(seed=seed, length=5 + seed) for seed in range(3)]
    expected = [hand_captured(model, "llama", ids)[0] for ids in calls]
    with capture(model, sites) as activations:
        placed = hook_state(model)
        assert len(activations) == 0
        for ids, values in zip(calls, expected, strict=True):
            assert model(ids) is None
            assert all(torch.equal(activations[site], values[site]) for site in sites)
            assert hook_state(model) == placed


def test_activations_carry_gradients():
    model, ids = tiny_model("gpt2"), tiny_tokens()
    with capture(model, "layers.0.mlp.out") as activations:
        model(ids)
    activations["layers.0.mlp.out"].sum().backward()
    assert model.transformer.h[0].attn.c_proj.weight.grad.abs().sum() > 0
    assert model.transformer.h[1].attn.c_proj.weight.grad is None


@torch.no_grad()
def test_base_model_alone(family):
    model, ids = tiny_model(family), tiny_tokens()
    expected, _ = hand_captured(model, family, ids)
    with capture(model.base_model, "layers.2.resid_post") as activations:
        assert model.base_model(ids) is None
    assert torch.equal(activations["layers.2.resid_post"], expected["layers.2.resid_post"])


@torch.no_grad()
def test_stopping_leaves_no_state_in_transformers(family):
    model, ids = tiny_model(family), tiny_tokens()
    config, before = model.config.to_dict(), hook_state(model)
    expected = model(ids)
    with capture(model, "layers.0.mlp.in"):
        model(ids)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert hook_state(model) == before
    assert model.config.to_dict() == config
    after = model(ids)
    assert torch.equal(after.logits, expected.logits)
    # An output collector left by the stopped call would fill up here, or hold these back.
    assert after.hidden_states is None
    assert len(model(ids, output_hidden_states=True).hidden_states) == NUM_LAYERS + 1


@torch.no_grad()
def test_stopping_while_transformers_collects_hidden_states():
    model, ids = tiny_model("llama"), tiny_tokens()
    with capture(model, "layers.1.mlp.in"):
        assert model(ids, output_hidden_states=True) is None
    assert model(ids).hidden_states is None
    assert len(model(ids, output_hidden_states=True).hidden_states) == NUM_LAYERS + 1


@torch.no_grad()
def test_no_cache_is_built_unless_asked_for(family):
    model, ids = tiny_model(family), tiny_tokens()
    assert model(ids).past_key_values is not None
    with capture(model, "layers.0.mlp.in", stop=False) as activations:
        assert model(ids).past_key_values is None
        cache = model(ids, use_cache=True).past_key_values
        assert cache.get_seq_length() == ids.shape[1]
        model(ids[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == ids.shape[1] + 1
        assert activations["layers.0.mlp.in"].shape == (2, 1, 32)


@torch.no_grad()
def test_a_forward_patched_on_the_instance_stays():
    model, ids = tiny_model("llama"), tiny_tokens()
    original, calls = model.forward, []

    def patched(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = patched
    with capture(model, "layers.0.mlp.in") as activations:
        assert model(ids) is None
    assert model.forward is patched
    assert calls == [1]
    del model.forward
    assert torch.equal(activations["layers.0.mlp.in"], hand_captured(model, "llama", ids)[0]["layers.0.mlp.in"])


@torch.no_grad()
def test_nested_captures_each_get_their_sites():
    model, ids = tiny_model("llama"), tiny_tokens()
    expected, logits = hand_captured(model, "llama", ids)
    before = hook_state(model)
    for outer_site, inner_site in (("layers.0.mlp.in", "layers.2.mlp.in"), ("layers.2.mlp.in", "layers.0.mlp.in")):
        with capture(model, outer_site) as outer:
            placed = hook_state(model)
            with capture(model, inner_site) as inner:
                assert model(ids) is None
            assert torch.equal(outer[outer_site], expected[outer_site])
            assert torch.equal(inner[inner_site], expected[inner_site])
            assert hook_state(model) == placed
            assert model(ids) is None
        assert hook_state(model) == before

    with capture(model, "layers.0.mlp.in", stop=False), capture(model, "layers.0.mlp.in"):
        assert torch.equal(model(ids).logits, logits)


@torch.no_grad()
def test_capturing_causal_lm_and_its_base_model_together():
    model, ids = tiny_model("llama"), tiny_tokens()
    with capture(model, "layers.0.mlp.in") as outer, capture(model.model, "layers.1.mlp.in") as inner:
        assert model(ids) is None
    assert len(outer) == len(inner) == 1


def test_exception_in_the_block_removes_everything():
    model, ids = tiny_model("gemma2"), tiny_tokens()
    before = hook_state(model)
    with pytest.raises(RuntimeError, match="mine"), capture(model, ["layers.0.mlp.in", "layers.2.resid_post"]):
        model(ids)
        raise RuntimeError("mine")
    assert hook_state(model) == before


@torch.no_grad()
def test_exception_in_a_forward_leaves_the_capture_usable():
    model, ids = tiny_model("gpt2"), tiny_tokens()
    with capture(model, "layers.1.mlp.in") as activations:
        with pytest.raises(IndexError):
            model(torch.full_like(ids, 10_000))
        with pytest.raises(KeyError, match="was not reached by the last forward"):
            activations["layers.1.mlp.in"]
        assert model(ids) is None
        assert len(activations) == 1


@torch.no_grad()
def test_the_base_model_called_by_itself_inside_a_capture_of_the_causal_lm():
    model, ids = tiny_model("llama"), tiny_tokens()
    with capture(model, "layers.0.mlp.in") as activations:
        assert model.model(ids).last_hidden_state.shape == (2, 12, 32)
        assert "layers.0.mlp.in" in activations


def test_bad_input_places_no_hook():
    model = tiny_model("llama")
    before = hook_state(model)
    with pytest.raises(TranscoderError, match="layers 0 to 2"), capture(model, ["layers.0.mlp.in", "layers.9.mlp.in"]):
        pass
    with pytest.raises(TranscoderError, match="Did you mean 'layers.0.mlp.in'"), capture(model, "layers.0.mpl.in"):
        pass
    assert hook_state(model) == before
    with capture(model, "layers.0.mlp.in") as activations:
        assert "layers.1.mlp.in" not in activations
        with pytest.raises(TranscoderError, match="is not a site"):
            activations["layers.0"]


def test_a_module_without_a_tensor_is_refused():
    model = tiny_model("llama")
    with pytest.raises(TranscoderError, match="NoneType as its input"), capture(model, "module:model:in"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
