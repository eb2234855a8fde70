"""The cross-layer transcoder against dense reference arithmetic in float64."""

import pytest
import torch

from hf_transcoders import CrossLayerTranscoder, TranscoderError
from hf_transcoders.models.linear_parts import decoder_rows, skip_and_bias
from tests.models.cross_layer.setups import ACTIVATIONS, KINDS, activations, cross_layer, per_layer_set


def reference_features(model, given, training):
    """Features of all layers by plain formulas, in float64."""
    config, features = model.config, []
    for site, source in zip(config.input_sites, model.sources, strict=True):
        x = given[site].double()
        if config.normalization != "none":
            x = (x - source.input_mean.double()) / source.input_scale.double()
        features.append(x @ source.W_enc.double().T + source.b_enc.double())
    if config.activation == "topk":
        kept = [f >= f.topk(config.k).values[:, -1:] for f in features]
    elif config.activation == "batchtopk" and training and config.batchtopk_scope == "all":
        every = torch.cat([f.flatten() for f in features])
        least = every.topk(config.k * len(features[0]) * len(features)).values.min()
        kept = [f >= least for f in features]
    elif config.activation == "batchtopk" and training:
        kept = [f >= f.flatten().topk(config.k * len(f)).values.min() for f in features]
    elif config.activation in ("batchtopk", "jumprelu"):
        kept = [f > source.threshold.double() for f, source in zip(features, model.sources, strict=True)]
    else:
        kept = [f > 0 for f in features]
    return [torch.where(keep, f, 0).clamp(min=0) for f, keep in zip(features, kept, strict=True)]


def reference_sites(model, given, features):
    """Reconstructions of all sites by a loop over all pairs of layers, in float64 and in the units of the sites."""
    config, found = model.config, []
    for later in range(config.num_sources):
        own = model.sources[later]
        total = own.b_dec.double().expand(len(features[0]), -1)
        for layer in range(later + 1):
            if config.window is None or later - layer <= config.window:
                total = total + features[layer] @ model.sources[layer].W_dec[:, later - layer].double()
        if config.skip_connection:
            x = given[config.input_sites[later]].double()
            if config.normalization != "none":
                x = (x - own.input_mean.double()) / own.input_scale.double()
            total = total + x @ own.W_skip.double().T
        if config.normalization != "none":
            total = total * own.output_scale[0].double() + own.output_mean.double()
        found.append(total)
    return found


@pytest.mark.parametrize("changes", [{}, {"window": 1, "skip_connection": True, "normalization": "standardize"}])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_equals_the_dense_reference(kind, training, changes):
    model = cross_layer(kind, **changes).train(training)
    given = activations(model)
    output = model(given)
    features = reference_features(model, given, training)
    expected = reference_sites(model, given, features)
    for each, ours in zip(range(3), output.outputs.values(), strict=True):
        torch.testing.assert_close(ours.features, features[each].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.reconstruction, expected[each].float(), rtol=1e-5, atol=1e-5)
    # Each layer alone says what it writes at each site; the sum is the reconstruction.
    if not training:
        parts = [
            s(given[site]).reconstruction for site, s in zip(model.config.input_sites, model.sources, strict=True)
        ]
        for site, total in zip(model.config.output_sites, expected, strict=True):
            torch.testing.assert_close(sum(p[site] for p in parts if site in p), total.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk over all"])
def test_gradients(kind):
    model = (
        cross_layer(kind, layers=2, num_features=5, **({"k": 2} if "k" in ACTIVATIONS[kind] else {})).double().train()
    )
    given = activations(model, tokens=4, dtype=torch.float64)
    # The threshold of a JumpReLU learns by a straight-through gradient, which no difference quotient has.
    parameters = {n: p for n, p in model.named_parameters() if not n.endswith("threshold")}

    def reconstructions(*values):
        with torch.nn.utils.stateless._reparametrize_module(model, dict(zip(parameters, values, strict=True))):
            return tuple(output.reconstruction for output in model(given).outputs.values())

    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    if (
        kind == "jumprelu"
    ):  # Away from thresholds, only the value of an active feature changes: a dense reference has it.
        loss = sum(r.square().sum() for r in reconstructions(*values))
        ours = torch.autograd.grad(loss, [values[list(parameters).index("sources.0.W_dec")]])
        dense = reference_features(model, given, True)[0]
        left = [2 * output.reconstruction for output in model(given).outputs.values()]
        expected = torch.stack([dense.T @ left[0], dense.T @ left[1]], dim=1)
        torch.testing.assert_close(ours[0], expected)
        return
    assert torch.autograd.gradcheck(reconstructions, values)


def test_the_tanh_penalty_is_on_the_norm_of_all_decoder_rows():
    source = cross_layer("jumprelu").double().sources[0]
    features = torch.rand(4, 12, dtype=torch.float64, requires_grad=True)
    norm = source.W_dec.square().sum((1, 2)).sqrt()
    expected = 0.1 * torch.tanh(4.0 * features * norm).sum(-1)
    torch.testing.assert_close(source.tanh_penalty(features), expected)

    def penalty(features, decoder):
        with torch.nn.utils.stateless._reparametrize_module(source, {"W_dec": decoder}):
            return source.tanh_penalty(features)

    assert torch.autograd.gradcheck(penalty, (features, source.W_dec.detach().clone().requires_grad_()))
    assert not torch.allclose(expected, 0.1 * torch.tanh(4.0 * features * source.W_dec[:, 0].norm(dim=-1)).sum(-1))


def test_the_penalty_does_not_depend_on_the_batch_size():
    model = cross_layer("jumprelu")
    given = activations(model)
    twice = {site: value.repeat(2, 1) for site, value in given.items()}
    once, doubled = ([o.losses["tanh_loss"] for o in model(a).outputs.values()] for a in (given, twice))
    torch.testing.assert_close(torch.stack(once), torch.stack(doubled))


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("changes", [{}, {"skip_connection": True, "normalization": "standardize"}])
@pytest.mark.parametrize("kind", ["relu", "topk", "batchtopk", "jumprelu"])
def test_a_zero_padded_set_computes_the_same(kind, changes, window):
    transcoders = per_layer_set(kind, **changes)
    model = CrossLayerTranscoder.from_set(transcoders, window=window)
    given = activations(model)
    for training in (False, True):
        ours, theirs = model.train(training)(given), transcoders.train(training)(given)
        if kind == "jumprelu":  # The set has no penalty on decoder norms.
            assert all("tanh_loss" not in output.losses for output in ours.outputs.values())
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
        for mine, other in zip(ours.outputs.values(), theirs.outputs.values(), strict=True):
            # Up to rounding: a longer decoder row may be multiplied by another kernel.
            torch.testing.assert_close(mine.reconstruction, other.reconstruction, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(mine.features, other.features, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.sources[0].W_dec[:, 1:], torch.zeros_like(model.sources[0].W_dec[:, 1:]))


def test_a_window_of_zero_is_a_set_and_all_is_the_default():
    assert [len(s.config.output_sites) for s in cross_layer(window=0).sources] == [1, 1, 1]
    assert [len(s.config.output_sites) for s in cross_layer().sources] == [3, 2, 1]
    assert [len(s.config.output_sites) for s in cross_layer(window=7).sources] == [3, 2, 1]


def test_dead_features_learn_from_all_sites():
    model = cross_layer("topk", auxk=4).train()
    given, dead = activations(model), {"layers.0.mlp.cross_layer_transcoder": torch.tensor([1, 5, 9])}
    output = model(given, dead_features=dead)
    first, second, _ = output.outputs.values()
    assert "auxk_loss" in first.losses and "auxk_loss" not in second.losses
    (gradient,) = torch.autograd.grad(first.losses["auxk_loss"], [model.sources[0].W_dec])
    assert (gradient[[1, 5, 9]].abs().sum((0, 2)) > 0).all() and not gradient[[0, 2]].any()


def test_linear_parts_of_each_site():
    model = cross_layer(skip_connection=True, normalization="standardize")
    source, given = model.sources[0], activations(model)
    inputs = given[model.config.input_sites[0]]
    output = source(inputs)
    for site in source.config.output_sites:
        skip, bias = skip_and_bias(source, site)
        written = output.features @ decoder_rows(source, site=site) + bias
        written = written if skip is None else written + inputs @ skip.T
        torch.testing.assert_close(written, output.reconstruction[site], rtol=1e-5, atol=1e-5)


def test_folding_keeps_the_function():
    model = cross_layer(skip_connection=True, normalization="standardize")
    given = activations(model)
    before = [output.reconstruction for output in model(given).outputs.values()]
    after = [output.reconstruction for output in model.fold_normalization_()(given).outputs.values()]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_bad_inputs_are_refused():
    model = cross_layer()
    given = activations(model)
    missing = {site: value for site, value in given.items() if site != "layers.1.mlp.in"}
    with pytest.raises(TranscoderError, match=r"no activations of layers\.1\.mlp\.in"):
        model(missing)
    with pytest.raises(TranscoderError, match="are 3 wide and this dictionary expects 6"):
        model({**given, "layers.1.mlp.in": torch.zeros(7, 3)})
    with pytest.raises(TranscoderError, match=r"are for tokens of shape \(2,\)"):
        model({**given, "layers.1.mlp.branch": torch.zeros(2, 5)})
    with pytest.raises(TranscoderError, match="cannot be saved alone"):
        model.sources[0].save_pretrained("nowhere")
    with pytest.raises(TranscoderError, match="no separate reconstruction"):
        model.sources[0].decode(torch.zeros(1, 12))
