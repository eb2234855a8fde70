"""Interventions in every mode and every family; afterwards the model is unchanged."""

from contextlib import ExitStack

import pytest
import torch

from hf_transcoders import TranscoderError, capture
from hf_transcoders.circuits import FeatureEdit, intervene, intervention_losses, measure_effect
from hf_transcoders.lm import edit_attention, frozen, locate, record_frozen
from hf_transcoders.lm.heads import output_weight, value_weight
from hf_transcoders.lm.hooks import write_at
from hf_transcoders.models.linear_parts import decoder_rows, encoder_rows
from tests.circuits.interventions.setups import FEATURES, random_dictionary, transcoder_set
from tests.lm.utils import hook_state
from tests.tiny_models import TINY_CONFIGS, tiny_model, tiny_tokens


FAMILIES = sorted(TINY_CONFIGS)
KINDS = {
    "relu": {},
    "topk": {"activation": "topk", "k": 6, "normalization": "standardize", "pre_bias": True},
    "batchtopk": {"activation": "batchtopk", "k": 6},
    "jumprelu": {"activation": "jumprelu", "normalization": "scale"},
    "gated": {"activation": "gated"},
    "skip": {"activation": "topk", "k": 6, "skip_connection": True, "normalization": "standardize"},
}
LOW, HIGH = "layers.0.mlp.transcoder", "layers.2.mlp.transcoder"


def active_features(model, transcoders, name, tokens, position):
    """Features of a dictionary that are active at a position of the first prompt, and all its activations there."""
    dictionary = transcoders[name]
    with capture(model, dictionary.config.input_site) as activations, torch.no_grad():
        model(tokens[:1])
        features = dictionary.encode(activations[dictionary.config.input_site][0, position])
    return features.nonzero().flatten().tolist(), features


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_no_edits_leave_the_logits_bit_equal(family):
    model, tokens = tiny_model(family), tiny_tokens()
    transcoders = transcoder_set(model, skip_connection=True)
    plain, before = model(tokens).logits, hook_state(model)
    with intervene(model, transcoders, []) as run:
        assert run is None
        assert torch.equal(model(tokens).logits, plain)
    # An edit of other positions leaves these bit-equal too.
    with intervene(model, transcoders, [FeatureEdit(LOW, 0, 5, "steer", 3.0)]):
        logits = model(tokens).logits
    assert torch.equal(logits[:, :5], plain[:, :5]) and not torch.equal(logits, plain)
    for mode in ("direct", "frozen"):
        with intervene(model, transcoders, [], mode=mode, frozen_at=tokens):
            torch.testing.assert_close(model(tokens).logits, plain, rtol=1e-4, atol=1e-4)
    assert hook_state(model) == before
    assert torch.equal(model(tokens).logits, plain)


def brute_force_coefficient(model, transcoders, tokens, source, target):
    """What a unit of one feature adds to the pre-activation of another through linear paths, by autograd."""
    (low, feature, position), (high, read, at) = source, target
    amount = torch.zeros((), requires_grad=True)
    row = decoder_rows(transcoders[low])[feature]
    site = transcoders[high].config.input_site

    def add(value):
        change = torch.zeros_like(value)
        change[:, position] = row
        return value + amount * change

    with ExitStack() as stack:
        stack.enter_context(frozen(model, record_frozen(model, tokens), mlps=True))
        write_at(stack, locate(model, transcoders[low].config.output_site), add)
        activations = stack.enter_context(capture(model, site, stop=False))
        model(tokens)
        rows, biases = encoder_rows(transcoders[high])
        pre_activation = activations[site][0, at] @ rows[read] + biases[read]
    return torch.autograd.grad(pre_activation, amount)[0]


@pytest.mark.parametrize("output", ["mlp.out", "mlp.branch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_direct_effects_are_activation_times_coefficient(family, output):
    model, tokens = tiny_model(family), tiny_tokens(batch=1)
    transcoders = transcoder_set(model, output)
    active, features = active_features(model, transcoders, LOW, tokens, 7)
    feature = max(active, key=lambda i: features[i])
    read = [(HIGH, 3, 7), (HIGH, 5, -1)]
    effect = measure_effect(model, transcoders, tokens, [FeatureEdit(LOW, feature, 7)], mode="direct", read=read)
    changes = (effect.pre_activations_after - effect.pre_activations_before)[0]
    for change, (name, number, position) in zip(changes, read, strict=True):
        expected = -features[feature] * brute_force_coefficient(
            model, transcoders, tokens, (LOW, feature, 7), (name, number, position % 12)
        )
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=2e-5 * features[feature].item())
    assert changes.abs().min() > 1e-3


@torch.no_grad()
def test_direct_effect_by_hand():
    """Llama, from layer 1 to layer 2: the residual stream and each head's value path, written out."""
    model, tokens = tiny_model("llama"), tiny_tokens(batch=1)
    transcoders, (source, target) = transcoder_set(model), (4, 9)
    sites = [f"layers.2.{point}" for point in ("resid_pre", "resid_mid", "mlp.in")]
    patterns = {}
    with edit_attention(model, pattern=lambda pattern, layer: patterns.__setitem__(layer, pattern)):
        with capture(model, sites) as activations:
            model(tokens)
        at = {site: activations[site][0] for site in sites}
    block = locate(model, "layers.2.resid_pre").module

    def norm(module, x, change):
        return change * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt() * module.weight

    change = torch.zeros_like(at["layers.2.resid_pre"])
    change[source] = 2.5 * decoder_rows(transcoders["layers.1.mlp.transcoder"])[6]
    read = norm(block.input_layernorm, at["layers.2.resid_pre"], change)
    values = torch.einsum("kdh,sh->ksd", value_weight(model, 2)[0], read).repeat_interleave(2, dim=0)
    heads = torch.einsum("hqs,hsd,hdo->qo", patterns[2][0], values, output_weight(model, 2))
    seen = norm(block.post_attention_layernorm, at["layers.2.resid_mid"], change + heads)
    rows, _ = encoder_rows(transcoders[HIGH])

    edit = FeatureEdit("layers.1.mlp.transcoder", 6, source, "steer", 2.5)
    read = [(HIGH, feature, target) for feature in range(FEATURES)]
    effect = measure_effect(model, transcoders, tokens, [edit], mode="direct", read=read)
    changes = (effect.pre_activations_after - effect.pre_activations_before)[0]
    torch.testing.assert_close(changes, rows @ seen[target], rtol=1e-3, atol=1e-4)
    assert changes.abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_direct_effects_are_linear(kind):
    """Twice the value, twice the change; and changes add up, whatever the dictionary and however far apart they are."""
    model, tokens = tiny_model("gemma2"), tiny_tokens(batch=1)
    transcoders = transcoder_set(model, **KINDS[kind])
    first, second = (FeatureEdit(LOW, 2, 4, "steer", 1.0), FeatureEdit("layers.1.mlp.transcoder", 7, 5, "set", 2.0))
    rows = [[], [first], [FeatureEdit(LOW, 2, 4, "steer", -3.0)], [second], [first, second]]
    read = [(HIGH, feature, position) for feature in (0, 1, 2) for position in (6, -1)]
    effect = measure_effect(model, transcoders, tokens, rows, mode="direct", read=read)
    still, once, thrice, other, both = effect.pre_activations_after
    torch.testing.assert_close(still, effect.pre_activations_before[0])
    torch.testing.assert_close(thrice - still, -3 * (once - still), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(both - still, (once - still) + (other - still), rtol=1e-3, atol=1e-4)
    assert (once - still).abs().max() > 1e-3 and (other - still).abs().max() > 1e-3
    curved = measure_effect(model, transcoders, tokens, rows, mode="frozen", read=read).pre_activations_after
    assert ((curved[2] - curved[0]) + 3 * (curved[1] - curved[0])).abs().max() > 1e-3


@torch.no_grad()
def test_skip_connections_carry_direct_effects():
    """Through the skip of the layer between, on top of the residual stream; normalisation included."""
    model, tokens = tiny_model("llama"), tiny_tokens(batch=1)
    transcoders = transcoder_set(model, **KINDS["skip"])
    edit, position = FeatureEdit(LOW, 2, 4, "steer", 2.0), 4
    sites = ["layers.1.mlp.in", "layers.1.mlp.out", "layers.2.resid_pre"]
    seen = []
    run = record_frozen(model, tokens, [d.config.input_site for d in transcoders.values()])
    for edits in ([], [edit]):
        with intervene(model, transcoders, edits, mode="direct", frozen_at=run):
            with capture(model, sites) as activations:
                model(tokens)
            seen.append({site: activations[site][0, position] for site in sites})
    change = {site: seen[1][site] - seen[0][site] for site in sites}
    middle = transcoders["layers.1.mlp.transcoder"]
    expected = (middle.W_skip @ (change["layers.1.mlp.in"] / middle.input_scale)) * middle.output_scale
    torch.testing.assert_close(change["layers.1.mlp.out"], expected, rtol=1e-4, atol=1e-4)
    assert expected.norm() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("mode", ["direct", "frozen", "free"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_as_one_at_a_time(family, mode):
    model, tokens = tiny_model(family), tiny_tokens(batch=1)
    transcoders = transcoder_set(model, activation="topk", k=6)
    rows = [
        [FeatureEdit(LOW, 1, 3)],
        [FeatureEdit(LOW, 1, "all", "set", 1.5), FeatureEdit(HIGH, 4, [-1, 2], "scale", -2.0)],
        [],
        [FeatureEdit("layers.1.mlp.branch", 5, slice(2, 9, 3), "patch", [1.0, 2.0, 3.0])],
    ]
    read = [(HIGH, 0, -1), ("layers.1.mlp.transcoder", 5, 5)]
    together = measure_effect(model, transcoders, tokens, rows, mode=mode, read=read, logits_to_keep=0)
    chunked = measure_effect(model, transcoders, tokens, rows, mode=mode, read=read, batch_size=3)
    torch.testing.assert_close(together.logits_after[:, -1:], chunked.logits_after, rtol=1e-4, atol=1e-4)
    for number, row in enumerate(rows):
        alone = measure_effect(model, transcoders, tokens[0], row, mode=mode, read=read, logits_to_keep=0)
        for name in ("logits_after", "pre_activations_after", "activations_after"):
            torch.testing.assert_close(getattr(together, name)[number], getattr(alone, name)[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.activations_before[number], alone.activations_before[0])
    assert (together.logits_after[1] - together.logits_after[2]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("mode", ["direct", "free"])
def test_each_prompt_with_its_own_edits(mode):
    model, tokens = tiny_model("qwen2"), tiny_tokens(batch=3)
    transcoders = transcoder_set(model)
    rows = [[FeatureEdit(LOW, i, -2, "set", 2.0)] for i in range(3)]
    together = measure_effect(model, transcoders, tokens, rows, mode=mode, read=[(HIGH, 0, -1)], batch_size=2)
    for i in range(3):
        alone = measure_effect(model, transcoders, tokens[i], rows[i], mode=mode, read=[(HIGH, 0, -1)])
        torch.testing.assert_close(together.logits_before[i], alone.logits_before[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.logits_after[i], alone.logits_after[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            together.pre_activations_after[i], alone.pre_activations_after[0], rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_output_changes_as_the_dictionary_says(kind):
    """The site changes by the difference of two decodings; the rest of the output, the error included, stays."""
    model, tokens = tiny_model("llama"), tiny_tokens()
    dictionary = random_dictionary(model, "layers.1.mlp.in", "layers.1.mlp.out", **KINDS[kind])
    with capture(model, ["layers.1.mlp.in", "layers.1.mlp.out"]) as activations:
        model(tokens)
        inputs, output = activations["layers.1.mlp.in"], activations["layers.1.mlp.out"]
    old = dictionary.encode(inputs)
    new = old.clone()
    new[:, 3, 2] = 0
    new[:, 4:, 5] = 1.25
    new[:, -1, 7] *= -3
    new[:, [1, 2], 9] += 0.5
    new[:, 1:3, 11] = torch.tensor([2.0, 3.0])
    site = "layers.1.mlp.out"
    edits = [
        FeatureEdit(site, 2, 3),
        FeatureEdit(site, 5, slice(4, None), "set", 1.25),
        FeatureEdit(site, 7, -1, "scale", -3),
        FeatureEdit(site, 9, [1, 2], "steer", 0.5),
        FeatureEdit(site, 11, slice(1, 3), "patch", torch.tensor([2.0, 3.0])),
    ]
    with intervene(model, dictionary, edits), capture(model, site) as activations:
        model(tokens)
        changed = activations[site]
    expected = output + dictionary.decode(new, inputs) - dictionary.decode(old, inputs)
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(changed[:, 0], output[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("site", ["layers.1.resid_post", "layers.1.mlp.in", "layers.1.attn.out"])
@pytest.mark.parametrize("tied", [False, True])
def test_autoencoders(site, tied):
    """Setting all features of an SAE to those of its own encoding of other activations moves the site by as much."""
    model, tokens = tiny_model("gemma3_text"), tiny_tokens(batch=1)
    dictionary = random_dictionary(model, site, tied=tied, decoder_bias=not tied, seed=3)
    with capture(model, site) as activations:
        model(tokens)
        value = activations[site]
        model(tiny_tokens(batch=1, seed=1))
        target = dictionary.encode(activations[site])
    edits = [FeatureEdit(site, i, "all", "patch", target[0, :, i]) for i in range(FEATURES)]
    with intervene(model, dictionary, edits), capture(model, site, stop=False) as activations:
        logits = model(tokens).logits
        changed = activations[site]
    expected = value + dictionary.decode(target) - dictionary.decode(dictionary.encode(value))
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, model(tokens).logits)


@torch.no_grad()
def test_free_edits_see_the_edits_below_and_direct_ones_do_not():
    model, tokens = tiny_model("llama"), tiny_tokens(batch=1)
    transcoders = transcoder_set(model)
    push = [FeatureEdit(LOW, i, 6, "steer", 5.0) for i in range(4)]
    double = [FeatureEdit(HIGH, i, 6, "scale", 2.0) for i in range(FEATURES)]
    site = "layers.2.mlp.in"
    for mode, frozen_at in (("free", None), ("frozen", tokens), ("direct", tokens)):
        written, features = {}, {}
        for name, edits in {"none": [], "push": push, "both": push + double}.items():
            with intervene(model, transcoders, edits, mode=mode, frozen_at=frozen_at):
                with capture(model, [site, "layers.2.mlp.branch"], stop=False) as activations:
                    model(tokens)
                    written[name] = activations["layers.2.mlp.branch"][0, 6]
                    features[name] = transcoders[HIGH].encode(activations[site][0, 6])
        old = features["none" if mode == "direct" else "push"]
        expected = old @ decoder_rows(transcoders[HIGH])
        torch.testing.assert_close(written["both"] - written["push"], expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(features["none"], features["push"])


def step_by_step(model, tokens, new_tokens):
    for _ in range(new_tokens):
        logits = model(tokens, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens, logits


GENERATE = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_whole_forwards(family):
    model, tokens = tiny_model(family), tiny_tokens(length=9)
    transcoders = transcoder_set(model, activation="topk", k=6)
    edits = [
        FeatureEdit(LOW, 1, 3, "set", 4.0),
        FeatureEdit(LOW, 2, slice(9, None), "steer", 5.0),
        FeatureEdit("layers.1.mlp.transcoder", 3, "all", "scale", -2.0),
        FeatureEdit(HIGH, 4, slice(7, None, 2), "set", 6.0),
        FeatureEdit(HIGH, 5, slice(2, 11), "set", 3.0),
    ]
    plain, plain_logits = step_by_step(model, tokens, 4)
    for mode, frozen_at in (("free", None), ("frozen", tokens), ("direct", tokens)):
        with intervene(model, transcoders, edits, mode=mode, frozen_at=frozen_at):
            expected, logits = step_by_step(model, tokens, 4)
            output = model.generate(tokens, **GENERATE, return_dict_in_generate=True, output_logits=True)
            uncached = model.generate(tokens, **GENERATE, use_cache=False)
        assert torch.equal(output.sequences, expected) and torch.equal(uncached, expected)
        torch.testing.assert_close(output.logits[-1], logits, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(logits, plain_logits, atol=0.05)
    assert torch.equal(model.generate(tokens, **GENERATE), plain)


@torch.no_grad()
def test_negative_positions_count_from_the_end_of_the_prompt():
    """With and without a cache, and for every answer of several to one prompt."""
    model, tokens = tiny_model("llama"), tiny_tokens(length=9)
    transcoders = transcoder_set(model)
    lists = [[FeatureEdit(LOW, 1, -2, "set", 5.0)], [FeatureEdit(LOW, 2, slice(-1, None), "set", 5.0)]]
    absolute = [[FeatureEdit(LOW, 1, 7, "set", 5.0)], [FeatureEdit(LOW, 2, slice(8, None), "set", 5.0)]]
    with intervene(model, transcoders, absolute):
        expected, _ = step_by_step(model, tokens, 4)
    with intervene(model, transcoders, lists):
        assert torch.equal(model.generate(tokens, **GENERATE), expected)
        assert torch.equal(model.generate(inputs=tokens, use_cache=False, **GENERATE), expected)
        # The same context serves prompts of other lengths.
        shorter = model(tokens[:, :8]).logits
        torch.manual_seed(0)
        sampled = model.generate(tokens, **{**GENERATE, "do_sample": True, "top_k": 1, "num_return_sequences": 3})
        assert torch.equal(sampled, expected.repeat_interleave(3, dim=0))
    with intervene(model, transcoders, [[FeatureEdit(LOW, 1, 6, "set", 5.0)], [FeatureEdit(LOW, 2, 7, "set", 5.0)]]):
        torch.testing.assert_close(model(tokens[:, :8]).logits, shorter)


@torch.no_grad()
def test_losses_are_those_of_plain_forwards():
    model = tiny_model("llama")
    transcoders = transcoder_set(model)
    blocks = [{"input_ids": row.tolist()} for row in tiny_tokens(batch=5, length=10)]
    edits = [FeatureEdit("layers.1.mlp.transcoder", i, slice(1, None), "scale", 3.0) for i in range(6)]
    losses = intervention_losses(model, blocks, transcoders, edits, batch_size=2, progress=False)
    tokens = torch.tensor([block["input_ids"] for block in blocks])
    plain = model(tokens).logits.log_softmax(-1)[:, 1:-1]
    with intervene(model, transcoders, edits):
        edited = model(tokens).logits.log_softmax(-1)[:, 1:-1]
    labels = tokens[:, 2:, None]
    assert losses["tokens"] == labels.numel()
    assert losses["ce_original"] == pytest.approx(-plain.gather(-1, labels).mean().item(), rel=1e-5)
    assert losses["ce_edited"] == pytest.approx(-edited.gather(-1, labels).mean().item(), rel=1e-5)
    kl = (plain.exp() * (plain - edited)).sum(-1).mean().item()
    assert losses["kl"] == pytest.approx(kl, rel=1e-3) and kl > 0.01
    assert losses["top1_agreement"] == pytest.approx((plain.argmax(-1) == edited.argmax(-1)).float().mean().item())
    with pytest.raises(TranscoderError, match="2 lists of edits"):
        intervention_losses(model, blocks, transcoders, [edits, edits], progress=False)


@torch.no_grad()
def test_ablating_every_feature_leaves_error_and_bias():
    model, tokens = tiny_model("gpt2"), tiny_tokens()
    dictionary = random_dictionary(model, "layers.1.mlp.in", "layers.1.mlp.out")
    site = "layers.1.mlp.out"
    with capture(model, ["layers.1.mlp.in", site]) as activations:
        model(tokens)
        left = activations[site] - dictionary(activations["layers.1.mlp.in"]).reconstruction + dictionary.b_dec
    with intervene(model, dictionary, [FeatureEdit(site, i, "all") for i in range(FEATURES)]):
        with capture(model, site) as activations:
            model(tokens)
            torch.testing.assert_close(activations[site], left, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_mistakes_are_sentences_and_leave_nothing_behind():
    model, tokens = tiny_model("llama"), tiny_tokens()
    transcoders = transcoder_set(model)
    before, plain = hook_state(model), model(tokens).logits

    def run(edits, given=tokens, **options):
        with intervene(model, transcoders, edits, **options):
            model(given)

    for match, call in {
        "choose from layers.0": lambda: run([FeatureEdit("layers.9.mlp.transcoder", 0, 0)]),
        "features are 0 to 23": lambda: run([FeatureEdit(LOW, 24, 0)]),
        "kind='remove' is unknown": lambda: FeatureEdit(LOW, 0, 0, "remove"),
        "mode='linear' is unknown": lambda: run([], mode="linear"),
        "positions 0 to 11": lambda: run([FeatureEdit(LOW, 0, 12)]),
        "positions 0 to 11. For": lambda: run([FeatureEdit(LOW, 0, [0, -13])], mode="direct", frozen_at=tokens),
        "leave `frozen_at` out": lambda: run([], frozen_at=tokens),
        "give its token ids": lambda: run([], mode="frozen"),
        "another prompt": lambda: run([], tiny_tokens(seed=1), mode="frozen", frozen_at=tokens),
        "takes no value": lambda: FeatureEdit(LOW, 0, 0, "ablate", 1.0),
        "takes a value": lambda: FeatureEdit(LOW, 0, 0, "set"),
        "one finite number": lambda: FeatureEdit(LOW, 0, 0, "set", [1.0]),
        "one for each position": lambda: FeatureEdit(LOW, 0, 0, "patch", 1.0),
        "3 values for 2 positions": lambda: run([FeatureEdit(LOW, 0, [1, 2], "patch", [1.0, 2.0, 3.0])]),
        "is not a position": lambda: FeatureEdit(LOW, 0, slice(None, None, -1)),
        "'last' is not a position": lambda: FeatureEdit(LOW, 0, "last"),
        "Two edits": lambda: run([FeatureEdit(LOW, 0, "all"), FeatureEdit(LOW, 0, -1, "set", 1.0)]),
        "3 lists of edits": lambda: run([[FeatureEdit(LOW, 0, 0)]] * 3),
        "list of FeatureEdit": lambda: run([FeatureEdit(LOW, 0, 0), [FeatureEdit(LOW, 0, 0)]][1:] + [["edit"]]),
        "no activations at layers.0.mlp.in": lambda: run([], mode="direct", frozen_at=record_frozen(model, tokens)),
        "Cannot read feature 3": lambda: measure_effect(model, transcoders, tokens, [], read=[(LOW, 3, 12)]),
        "2 lists of edits for 3 prompts": lambda: measure_effect(model, transcoders, tokens[[0, 1, 0]], [[], []]),
    }.items():
        with pytest.raises(TranscoderError, match=match):
            call()
        assert hook_state(model) == before, match
    with pytest.raises(ZeroDivisionError), intervene(model, transcoders, [], mode="direct", frozen_at=tokens):
        raise ZeroDivisionError
    assert hook_state(model) == before
    assert torch.equal(model(tokens).logits, plain)


def test_dictionaries_that_do_not_fit_are_refused():
    model = tiny_model("llama")
    wide = random_dictionary(tiny_model("llama"), "layers.0.mlp.in", "layers.0.mlp.out", d_in=16, d_out=16)
    late = random_dictionary(model, "layers.2.mlp.in", "layers.1.mlp.out")
    middle = random_dictionary(model, "layers.1.resid_mid")
    nowhere = random_dictionary(model, "layers.7.mlp.in", "layers.7.mlp.out")
    twice = [
        random_dictionary(model, "layers.1.mlp.in", "layers.1.mlp.out", skip_connection=True, seed=i) for i in (0, 1)
    ]
    edit = FeatureEdit("layers.1.mlp.out", 0, 0, "set", 1.0)
    for match, dictionaries, edits, options in (
        ("has width 16", [wide], [], {}),
        ("cannot read 'layers.2.mlp.in'", [late], [edit], {}),
        ("can be read but not written", [middle], [], {}),
        ("layers 0 to 2", [nowhere], [], {}),
        ("more than one dictionary", twice, [edit], {}),
        ("count twice", twice, [], {"mode": "direct", "frozen_at": tiny_tokens()}),
    ):
        with pytest.raises(TranscoderError, match=match), intervene(model, dictionaries, edits, **options):
            model(tiny_tokens())
