from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_transcoders.errors import TranscoderError
from hf_transcoders.lm import Site, ablate, capture, replace, splice
from tests.lm.utils import hook_state
from tests.tiny_models import TINY_CONFIGS, tiny_model, tiny_tokens


class Dictionary(nn.Module):
    """A stand-in with the interface of a trained dictionary: ReLU features, or the identity."""

    def __init__(self, input_site, output_site, d_in=32, d_out=32, num_features=40, identity=False):
        super().__init__()
        self.config = SimpleNamespace(input_site=input_site, output_sites=(output_site,), d_in=d_in, d_out=d_out)
        self.identity = identity
        generator = torch.Generator().manual_seed(7)
        self.W_enc = nn.Parameter(torch.randn(num_features, d_in, generator=generator))
        self.W_dec = nn.Parameter(torch.randn(num_features, d_out, generator=generator))
        self.seen = None

    def forward(self, inputs, output_features=False):
        self.seen = inputs
        features = torch.relu(inputs @ self.W_enc.T)
        reconstruction = inputs if self.identity else features @ self.W_dec
        return SimpleNamespace(reconstruction=reconstruction, features=features if output_features else None)


def transcoder(layer, **changes):
    return Dictionary(f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch", **changes)


@pytest.fixture(params=TINY_CONFIGS)
def family(request):
    return request.param


@torch.no_grad()
def test_error_kept_means_logits_kept(family):
    model, ids = tiny_model(family), tiny_tokens()
    before, logits = hook_state(model), model(ids).logits
    dictionaries = [transcoder(layer) for layer in range(3)]
    with splice(model, dictionaries) as features:
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-4)
    for layer, dictionary in enumerate(dictionaries):
        acts = features[f"layers.{layer}.mlp.branch"]
        assert acts.shape == (2, 12, 40)
        assert torch.equal(acts, torch.relu(dictionary.seen @ dictionary.W_enc.T))
    assert hook_state(model) == before
    assert torch.equal(model(ids).logits, logits)


@torch.no_grad()
def test_dropping_the_error_writes_the_reconstruction(family):
    model, ids = tiny_model(family), tiny_tokens()
    dictionary = transcoder(1)
    with capture(model, ["layers.1.mlp.in", "layers.1.resid_pre"]) as true:
        model(ids)
    expected = dictionary(true["layers.1.mlp.in"]).reconstruction
    sites = ["layers.1.mlp.branch", "layers.1.attn.branch", "layers.1.resid_post"]
    with replace(model, {"layers.1.mlp.branch": dictionary}), capture(model, sites) as replaced:
        model(ids)
    assert torch.equal(replaced["layers.1.mlp.branch"], expected)
    # The stream goes on with the reconstruction.
    total = true["layers.1.resid_pre"] + replaced["layers.1.attn.branch"] + expected
    torch.testing.assert_close(replaced["layers.1.resid_post"], total, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "point", ["resid_pre", "attn.in", "attn.out", "attn.branch", "mlp.in", "mlp.out", "mlp.branch", "resid_post"]
)
def test_an_identity_dictionary_changes_nothing(family, point):
    model, ids = tiny_model(family), tiny_tokens()
    logits = model(ids).logits
    site = f"layers.1.{point}"
    dictionary = Dictionary(site, site, identity=True)
    with splice(model, dictionary, error="drop"):
        assert torch.equal(model(ids).logits, logits)
    with splice(model, Dictionary(site, site), error="drop"):
        assert (model(ids).logits - logits).abs().max() > 1e-2


@torch.no_grad()
def test_later_dictionaries_read_the_changed_stream(family):
    model, ids = tiny_model(family), tiny_tokens()
    first, second = transcoder(0), transcoder(1)
    # With both in place the second sees exactly what the model feeds its second MLP when only the first is in place.
    with splice(model, [first], error="drop"), capture(model, "layers.1.mlp.in") as changed:
        model(ids)
    with splice(model, [first, second], error="drop"):
        model(ids)
    assert torch.equal(second.seen, changed["layers.1.mlp.in"])
    with capture(model, "layers.1.mlp.in") as true:
        model(ids)
    assert not torch.allclose(second.seen, true["layers.1.mlp.in"])


@torch.no_grad()
def test_replacing_an_attention_layer_by_a_dictionary_of_its_input():
    model, ids = tiny_model("llama"), tiny_tokens()
    dictionary = Dictionary("layers.0.attn.in", "layers.0.attn.out")
    with splice(model, dictionary, error="drop"), capture(model, ["layers.0.attn.in", "layers.0.attn.out"]) as at:
        model(ids)
    assert torch.equal(at["layers.0.attn.out"], dictionary(at["layers.0.attn.in"]).reconstruction)


@torch.no_grad()
@pytest.mark.parametrize("capture_first", [True, False])
@pytest.mark.parametrize("site", ["layers.1.mlp.in", "layers.1.mlp.out"])
def test_a_reader_sees_what_was_written_whoever_came_first(capture_first, site):
    model, ids = tiny_model("llama"), tiny_tokens()
    with capture(model, site) as true:
        model(ids)
    dictionary = Dictionary(site, site)
    reading, writing = capture(model, site), splice(model, dictionary, error="drop")
    if capture_first:
        with reading as activations, writing:
            model(ids)
    else:
        with writing, reading as activations:
            model(ids)
    assert torch.equal(activations[site], dictionary(true[site]).reconstruction)


@torch.no_grad()
def test_a_dictionary_reads_what_another_wrote_at_the_same_place():
    model, ids = tiny_model("llama"), tiny_tokens()
    sae = Dictionary("layers.1.mlp.in", "layers.1.mlp.in")
    for dictionaries in ([sae, transcoder(1)], [transcoder(1), sae]):
        after = next(dictionary for dictionary in dictionaries if dictionary is not sae)
        with splice(model, dictionaries, error="drop"):
            model(ids)
        assert torch.equal(after.seen, sae(sae.seen).reconstruction)


@torch.no_grad()
def test_the_inner_of_two_nested_contexts_has_the_last_word():
    model, ids = tiny_model("llama"), tiny_tokens()
    site = "layers.1.mlp.out"
    before = hook_state(model)
    with splice(model, Dictionary(site, site), error="drop"):
        outer = hook_state(model)
        with ablate(model, site), capture(model, site) as activations:
            model(ids)
        assert not activations[site].any()
        assert hook_state(model) == outer
        with capture(model, site) as activations:
            model(ids)
        assert activations[site].any()
    assert hook_state(model) == before


@torch.no_grad()
def test_only_masked_positions_are_replaced(family):
    model, ids = tiny_model(family), tiny_tokens()
    site, mask = "layers.1.mlp.branch", torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 3:5] = mask[1, 7] = True
    with capture(model, site) as true:
        model(ids)
    dictionary = transcoder(1)
    with replace(model, {site: dictionary}, mask=mask) as replacement, capture(model, site) as activations:
        model(ids)
        reconstruction = dictionary(dictionary.seen).reconstruction
        assert torch.equal(activations[site], torch.where(mask[..., None], reconstruction, true[site]))
        replacement.mask = ~mask
        model(ids)
        assert torch.equal(activations[site], torch.where(mask[..., None], true[site], reconstruction))
        replacement.mask = None
        model(ids)
        assert torch.equal(activations[site], reconstruction)
        replacement.mask = mask[:, :4]
        with pytest.raises(TranscoderError, match=r"mask has shape \(2, 4\).*called with \(2, 12\)"):
            model(ids)
    # Tokens before the first masked one cannot notice.
    with replace(model, {site: dictionary}, mask=mask):
        logits = model(ids).logits
    plain = model(ids).logits
    torch.testing.assert_close(logits[0, :3], plain[0, :3], rtol=1e-5, atol=1e-5)
    assert (logits[0, 3] - plain[0, 3]).abs().max() > 1e-2


@torch.no_grad()
def test_features_are_kept_only_when_asked_for():
    model, ids = tiny_model("llama"), tiny_tokens()
    site = "layers.1.mlp.branch"
    with replace(model, {site: transcoder(1)}) as silent:
        model(ids)
        assert len(silent) == 0
        with pytest.raises(KeyError, match="features=True"):
            silent[site]
    with replace(model, {site: transcoder(1)}, features=True) as features:
        model(ids)
        first = features[site]
        model(tiny_tokens(seed=1))
        assert list(features) == [Site.parse(site)]
        assert not torch.equal(features[Site.parse(site)], first)


@pytest.mark.parametrize("error", ["keep", "drop"])
def test_gradients_flow_through_the_dictionary_and_not_through_the_error(error):
    model, ids = tiny_model("llama"), tiny_tokens()
    site, dictionary = "layers.1.mlp.branch", transcoder(1)
    with splice(model, dictionary, error=error), capture(model, site) as activations:
        model(ids)
    value = activations[site]
    value.square().sum().backward()
    # d/dW_dec of sum(y ** 2) is features.T @ 2y, with y the true output when the error is kept.
    features = torch.relu(dictionary.seen @ dictionary.W_enc.T)
    expected = features.flatten(0, 1).T @ (2 * value.flatten(0, 1))
    torch.testing.assert_close(dictionary.W_dec.grad, expected, rtol=1e-4, atol=1e-3)
    # The true MLP counts only as a constant, if at all; what the dictionary has read does not.
    block = model.model.layers[1]
    assert block.mlp.down_proj.weight.grad is None
    assert block.self_attn.o_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_dtypes_of_model_and_dictionary_may_differ():
    ids = tiny_tokens()
    model = tiny_model("llama").to(torch.bfloat16)
    logits = model(ids).logits
    dictionary = transcoder(1)
    with splice(model, dictionary) as features:
        kept = model(ids).logits
    assert dictionary.seen.dtype == torch.float32
    assert features["layers.1.mlp.branch"].dtype == torch.float32
    assert kept.dtype == torch.bfloat16 and torch.equal(kept, logits)

    model, half = tiny_model("llama"), transcoder(1).to(torch.bfloat16)
    with splice(model, half, error="drop"), capture(model, "layers.1.mlp.branch") as activations:
        model(ids)
    assert half.seen.dtype == torch.bfloat16
    assert activations["layers.1.mlp.branch"].dtype == torch.float32


@torch.no_grad()
def test_zero_ablation_equals_a_zeroed_output_projection(family):
    model, ids = tiny_model(family), tiny_tokens()
    for point, names in (
        ("mlp.out", ["mlp.c_proj", "mlp.dense_4h_to_h", "mlp.down_proj", "mlp.fc2", "fc2"]),
        ("attn.out", ["attn.c_proj", "attention.dense", "self_attn.o_proj", "self_attn.out_proj", "self_attn.dense"]),
    ):
        with ablate(model, f"layers.1.{point}"):
            ablated = model(ids).logits
        zeroed = tiny_model(family)
        modules = dict(zeroed.named_modules())
        found = [path for path in modules if path.endswith(tuple(f".1.{name}" for name in names))]
        assert len(found) == 1
        for parameter in modules[found[0]].parameters():
            parameter.zero_()
        assert torch.equal(ablated, zeroed(ids).logits)
        assert (ablated - model(ids).logits).abs().max() > 1e-2


@torch.no_grad()
def test_mean_ablation():
    model, ids = tiny_model("gpt2"), tiny_tokens()
    sites = ["layers.0.mlp.out", "layers.2.attn.out"]
    with capture(model, sites) as true:
        model(ids)
    means = {site: value.mean((0, 1)) for site, value in true.items()}
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, 5] = True
    with ablate(model, sites, means) as ablation, capture(model, sites, stop=False) as activations:
        model(ids)
        assert all(torch.equal(activations[site], mean.expand(2, 12, 32)) for site, mean in means.items())
        ablation.mask = mask
        model(ids)
        assert torch.equal(activations[sites[0]][:, 5], means[Site.parse(sites[0])].expand(2, 32))
        assert torch.equal(activations[sites[0]][:, :5], true[sites[0]][:, :5])
    with ablate(model, sites[0], 1.5), capture(model, sites[0]) as activations:
        model(ids)
    assert (activations[sites[0]] == 1.5).all()


@torch.no_grad()
def test_ablating_inside_a_module():
    model, ids = tiny_model("llama"), tiny_tokens()
    heads = torch.zeros(32)
    with ablate(model, "module:model.layers.0.self_attn.o_proj:in", heads):
        ablated = model(ids).logits
    with ablate(model, "layers.0.attn.out"):
        assert torch.equal(model(ids).logits, ablated)


@torch.no_grad()
def test_generation_with_a_cache_goes_through_the_dictionary():
    model, ids = tiny_model("llama"), tiny_tokens(batch=1, length=5)
    with splice(model, transcoder(1), error="drop") as features:
        generated = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert features["layers.1.mlp.branch"].shape == (1, 1, 40)
        for position in range(5, 9):
            assert model(generated[:, :position]).logits[0, -1].argmax() == generated[0, position]


@torch.no_grad()
def test_splice_takes_one_many_or_a_mapping():
    model, ids = tiny_model("llama"), tiny_tokens()
    with splice(model, [transcoder(0), transcoder(2)], error="drop"):
        expected = model(ids).logits
    for dictionaries in (
        nn.ModuleList([transcoder(0), transcoder(2)]),
        {"any": transcoder(0), "name": transcoder(2)},
        (transcoder(layer) for layer in (0, 2)),
    ):
        with splice(model, dictionaries, error="drop") as features:
            assert torch.equal(model(ids).logits, expected)
        assert [str(site) for site in features] == ["layers.0.mlp.branch", "layers.2.mlp.branch"]


def test_exceptions_remove_everything():
    model, ids = tiny_model("gemma3_text"), tiny_tokens()
    before = hook_state(model)
    with pytest.raises(RuntimeError, match="mine"):
        with splice(model, transcoder(0)), ablate(model, "layers.1.attn.branch"), capture(model, "layers.2.mlp.in"):
            model(ids)
            raise RuntimeError("mine")
    assert hook_state(model) == before


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (lambda m: replace(m, {"layers.1.mlp.out": transcoder(1, d_in=16)}), "reads 16 values at 'layers.1.mlp.in', but this model has 32"),
        (lambda m: replace(m, {"layers.1.mlp.out": transcoder(1, d_out=64)}), "writes 64 values at 'layers.1.mlp.out', but this model has 32"),
        (lambda m: replace(m, {"layers.1.mlp.out": transcoder(1)}, error="forget"), "error='forget' is unknown; use 'drop' or 'keep'"),
        (lambda m: replace(m, {"layers.7.mlp.out": transcoder(1)}), "'layers.7.mlp.out' does not exist: this model has the layers 0 to 2"),
        (lambda m: replace(m, {"layers.1.mlp.outt": transcoder(1)}), "Did you mean 'layers.1.mlp.out'"),
        (lambda m: replace(m, {"layers.1.mlp.out": transcoder(1), "layers.1.mlp.branch": transcoder(1)}), "are one place in this model"),
        (lambda m: splice(m, [transcoder(1), transcoder(1)]), "Two dictionaries write to 'layers.1.mlp.branch'"),
        (lambda m: splice(m, Dictionary("layers.1.resid_mid", "layers.1.resid_mid")), "can be read but not written"),
        (lambda m: ablate(m, "layers.1.resid_mid"), "write to 'layers.1.attn.branch' instead"),
        (lambda m: ablate(m, []), "No site was given"),
        (lambda m: ablate(m, "layers.1.mlp.out", torch.zeros(16)), "writes 16 values at 'layers.1.mlp.out', but this model has 32"),
        (lambda m: ablate(m, ["layers.1.mlp.out", "layers.2.mlp.out"], {"layers.1.mlp.out": 0.0}), "no entry for layers.2.mlp.out"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_hook_is_placed(context, message):
    model = tiny_model("llama")
    before = hook_state(model)
    with pytest.raises(TranscoderError) as error:
        with context(model):
            pass
    assert message in str(error.value)
    assert hook_state(model) == before


@torch.no_grad()
def test_an_input_that_comes_after_the_output_is_refused():
    model, ids = tiny_model("llama"), tiny_tokens()
    before = hook_state(model)
    for _ in range(2):
        with pytest.raises(TranscoderError, match="cannot read 'layers.2.mlp.in': the model reaches that later"):
            with splice(model, Dictionary("layers.2.mlp.in", "layers.1.mlp.out")):
                model(ids)
    assert hook_state(model) == before
