"""What is measured before training, and done around every optimizer step."""

import pytest
import torch

from hf_transcoders.errors import TranscoderError
from hf_transcoders.models import TranscoderModel

from .reference_dictionary import ACTIVATIONS, D_IN, D_OUT, N, make_batch, make_config, make_model


def sample(tokens=400, seed=3):
    """Activations with a mean and a scale of their own in every dimension."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, D_IN, generator=generator) * torch.arange(1, D_IN + 1) + torch.arange(D_IN) - 2
    targets = torch.randn(tokens, D_OUT, generator=generator) * 0.3 + 5
    return inputs, targets


def close(ours, theirs):
    torch.testing.assert_close(ours.double(), torch.as_tensor(theirs, dtype=torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalization", ["none", "scale", "standardize"])
@pytest.mark.parametrize("pre_bias", [False, True])
def test_initialize_from_activations(activation, normalization, pre_bias):
    config = make_config(activation, normalization=normalization, pre_bias=pre_bias, decoder_init="random")
    model = TranscoderModel(config)
    inputs, targets = sample()
    assert model.initialize_from_activations_(inputs, targets) is model

    x, y = inputs.double(), targets.double()
    if normalization == "standardize":
        close(model.input_mean, x.mean(0)), close(model.output_mean, y.mean(0))
        close(model.input_scale, x.std(0)), close(model.output_scale, y.std(0))
        x, y = (x - x.mean(0)) / x.std(0), (y - y.mean(0)) / y.std(0)
    elif normalization == "scale":
        # The expected squared norm becomes the width.
        close((inputs / model.input_scale).square().sum(-1).mean(), D_IN)
        close(model.normalize_output(targets).square().sum(-1).mean(), D_OUT)
        assert not model.input_mean.any() and not model.output_mean.any()
        x, y = x / x.square().mean().sqrt(), y / y.square().mean().sqrt()
    close(model.b_dec, y.mean(0))
    close(torch.tensor(config.target_variance), (y - y.mean(0)).square().sum(-1).mean())
    if pre_bias:
        close(model.b_pre, x.mean(0))
        assert not model.b_enc.any()
    else:
        close(model.b_enc, -(model.W_enc.double() @ x.mean(0)))
    # Pre-activations begin centred, and so do the magnitudes of a gated dictionary.
    close(model.pre_activations(model.normalize_input(inputs)).mean(0), torch.zeros(N))
    if activation == "gated":
        magnitude = model.normalize_input(inputs) @ model.W_enc.T + model.b_mag
        close(magnitude.mean(0), torch.zeros(N))


@pytest.mark.parametrize("normalization", ["none", "scale", "standardize"])
@pytest.mark.parametrize("variance", [None, 2.5])
def test_a_trained_dictionary_keeps_its_weights(normalization, variance):
    model = TranscoderModel(make_config("topk", normalization=normalization, target_variance=variance))
    inputs, targets = sample()
    with torch.no_grad():
        model.b_dec += 0.5  # Dictionaries of other libraries do not say that they were trained.
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.initialize_from_activations_(3 * inputs + 1, targets)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected = (targets - targets.mean(0)).square().sum(-1).mean() if variance is None else variance
    close(torch.tensor(model.config.target_variance), expected)


def test_a_transcoder_begins_at_the_mean_target_with_a_loss_of_one():
    model = TranscoderModel(make_config("topk"))
    inputs, targets = sample()
    model.initialize_from_activations_(inputs, targets)
    output = model(inputs, targets)
    close(output.reconstruction, targets.mean(0).expand_as(targets))
    close(output.loss, 1.0)


def test_initialization_can_be_declined():
    config = make_config("relu", center_encoder=False, decoder_bias_init="zero")
    model = TranscoderModel(config)
    model.initialize_from_activations_(*sample())
    assert not model.b_enc.any() and not model.b_dec.any()
    TranscoderModel(make_config("relu", decoder_bias=False)).initialize_from_activations_(*sample())


@pytest.mark.parametrize("normalization", ["none", "scale", "standardize"])
def test_what_cannot_be_measured(normalization):
    config = make_config("batchtopk", normalization=normalization, output_site="layers.1.mlp.out")
    inputs, targets = sample(50)
    model = TranscoderModel(config)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.initialize_from_activations_(inputs[:1], targets[:1])
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())
    assert config.target_variance is None
    constant = torch.full_like(targets, 0.1)
    holes = inputs.clone()
    holes[7, 2] = float("nan")
    for given, message in (
        ((inputs[:0], targets[:0]), "no tokens to measure"),
        ((inputs, constant), "output activations at layers.1.mlp.out are the same for every token"),
        ((torch.zeros_like(inputs), targets), "input activations are the same"),
        ((holes, targets), "input activations are NaN"),
    ):
        with pytest.raises(TranscoderError, match=message):
            model.initialize_from_activations_(*given)
        assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())


def test_fresh_weights():
    for activation in ACTIVATIONS:
        model = TranscoderModel(make_config(activation, skip_connection=True, pre_bias=True, normalization="scale"))
        close(model.W_enc.norm(dim=-1), torch.ones(N))
        for name in ("b_enc", "b_dec", "b_pre", "W_skip", "W_dec", "input_mean", "output_mean"):
            assert not getattr(model, name).any(), name
        assert (model.input_scale == 1).all() and (model.output_scale == 1).all()
    assert (TranscoderModel(make_config("jumprelu", threshold_init=0.2)).threshold == 0.2).all()
    assert TranscoderModel(make_config("batchtopk")).threshold == 0
    gated = TranscoderModel(make_config("gated"))
    assert not gated.r_mag.any() and not gated.b_mag.any()
    transposed = TranscoderModel(make_config("topk", d_out=D_IN, decoder_init="transpose"))
    assert torch.equal(transposed.W_dec, transposed.W_enc)
    assert transposed.W_dec.data_ptr() != transposed.W_enc.data_ptr()
    close(TranscoderModel(make_config("topk", decoder_init="random")).W_dec.norm(dim=-1), torch.ones(N))


def test_unit_norm_decoder():
    model = make_model("relu", decoder_norm="unit", decoder_init="random", l1_coefficient=0.1)
    inputs, targets = make_batch(model)
    model.constrain_()
    close(model.W_dec.norm(dim=-1), torch.ones(N))
    model(inputs, targets).loss.backward()
    gradient = model.W_dec.grad.clone()
    model.project_gradient_()
    close((model.W_dec.grad * model.W_dec).sum(-1), torch.zeros(N))
    # Only what lay along the rows is gone.
    difference = gradient - model.W_dec.grad
    assert difference.norm() > 0.01
    close(difference, (difference * model.W_dec).sum(-1, keepdim=True) * model.W_dec)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert (model.W_dec.norm(dim=-1) - 1).abs().max() > 1e-3
    direction = model.W_dec / model.W_dec.norm(dim=-1, keepdim=True)
    model.constrain_()
    close(model.W_dec, direction)


def test_a_free_decoder_is_left_alone():
    model = make_model("relu")
    inputs, targets = make_batch(model)
    model(inputs, targets).loss.backward()
    before, gradient = model.W_dec.clone(), model.W_dec.grad.clone()
    model.project_gradient_()
    model.constrain_()
    assert torch.equal(model.W_dec, before) and torch.equal(model.W_dec.grad, gradient)


def test_constrain_keeps_thresholds_from_falling_below_zero():
    model = make_model("jumprelu")
    with torch.no_grad():
        model.threshold[:5] = -0.3
    expected = model.threshold.clamp(min=0)
    model.constrain_()
    assert torch.equal(model.threshold, expected)
    tied = make_model("topk", d_out=D_IN, tied=True, decoder_norm="unit")
    tied.project_gradient_()
    tied.constrain_()


def test_update_threshold_is_a_moving_average_of_the_smallest_activation():
    model = make_model("batchtopk")
    model.threshold.zero_()
    model.update_threshold_(torch.tensor([3.0, 0.0, 2.0]))
    assert model.threshold == 2.0  # The first value is taken as it is.
    model.update_threshold_(torch.tensor([1.0, 5.0]), decay=0.9)
    close(model.threshold, 0.9 * 2.0 + 0.1 * 1.0)
    for nothing in (torch.zeros(0), torch.zeros(4)):  # Nothing fired.
        before = model.threshold.clone()
        model.update_threshold_(nothing)
        close(model.threshold, before)


def test_batchtopk_lets_about_k_features_through_after_training():
    torch.manual_seed(0)
    config = make_config("batchtopk", num_features=96, k=6, decoder_init="random")
    model = TranscoderModel(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    mixing = torch.randn(12, D_IN + D_OUT)

    def batch(rows):
        return (torch.rand(rows, 12) * (torch.rand(rows, 12) < 0.2) @ mixing).split([D_IN, D_OUT], dim=-1)

    model.initialize_from_activations_(*batch(1000))
    losses = []
    for _ in range(150):
        output = model(*batch(256), output_features=False)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.update_threshold_(output.feature_values, decay=0.9)
        losses.append(output.loss.item())
    assert losses[-1] < 0.3 * losses[0]
    model.eval()
    l0 = (model.encode(batch(4000)[0]) > 0).sum(-1).float().mean()
    assert 0.8 * config.k < l0 < 1.25 * config.k
