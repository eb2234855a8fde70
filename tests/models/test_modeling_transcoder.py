"""The function, the loss and every gradient against the plain reference."""

import pytest
import torch

from hf_transcoders.errors import TranscoderError
from hf_transcoders.models import TranscoderConfig, TranscoderModel

from .reference_dictionary import (
    ACTIVATIONS,
    D_IN,
    D_OUT,
    PENALTIES,
    ROWS,
    VARIANTS,
    K,
    N,
    Reference,
    assert_same,
    assert_same_gradient,
    make_batch,
    make_model,
)


DEAD = torch.tensor([0, 2, 3, 11, 17])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_forward_encode_and_decode(activation, variant, training):
    model = make_model(activation, **VARIANTS[variant]).train(training)
    inputs, _ = make_batch(model)
    features, reconstruction, _ = Reference(model).forward(inputs)
    output = model(inputs)
    assert_same(output.features, features)
    assert_same(output.reconstruction, reconstruction)
    assert output.loss is None and output.losses is None
    assert torch.equal(model.encode(inputs), output.features)
    assert_same(model.decode(output.features, inputs), reconstruction)
    # Without dense features there are sparse ones; where all are computed they come anyway.
    bare = model(inputs, output_features=False)
    if bare.feature_values is None:
        assert torch.equal(bare.features, output.features)
    else:
        assert bare.features is None and model.config.is_sparse
    assert 0 < (features > 0).sum() < features.numel()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_losses_and_gradients(activation, variant, masked):
    model = make_model(activation, auxk=4, auxk_coefficient=0.5, **PENALTIES[activation], **VARIANTS[variant])
    inputs, targets = make_batch(model)
    mask = torch.arange(ROWS) % 3 != 1 if masked else None
    reference = Reference(model)
    ours, theirs = inputs.clone().requires_grad_(), inputs.double().requires_grad_()

    output = model(ours, targets, mask=mask, dead_features=DEAD, sparsity_scale=0.7, output_features=False)
    _, _, losses = reference.forward(theirs, targets, mask=mask, dead=DEAD, sparsity_scale=0.7)
    assert list(output.losses) == list(losses)
    for name, loss in losses.items():
        assert_same(output.losses[name], loss, name)
    assert_same(output.loss, sum(losses.values()))

    output.loss.backward()
    sum(losses.values()).backward()
    assert_same_gradient(ours.grad, theirs.grad, "inputs")
    for name, gradient in reference.gradients().items():
        assert gradient.any(), name
        assert_same_gradient(model.get_parameter(name).grad, gradient, name)


@pytest.mark.parametrize("target_variance", [None, 4.5])
@pytest.mark.parametrize("reduction", ["normalized", "mean", "sum", "target_norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loss_reductions(activation, reduction, target_variance):
    for extra in ({}, {"normalization": "scale"}, {"matryoshka_sizes": [5, N]}):
        model = make_model(activation, loss_reduction=reduction, target_variance=target_variance, **extra)
        inputs, targets = make_batch(model)
        for mask in (None, torch.arange(ROWS) < 5):
            _, _, losses = Reference(model).forward(inputs, targets, mask=mask)
            output = model(inputs, targets, mask=mask)
            assert list(output.losses) == list(losses)
            for name, loss in losses.items():
                assert_same(output.losses[name], loss, name)


@pytest.mark.parametrize("activation", ["relu", "gated"])
@pytest.mark.parametrize("weighting", ["decoder_norm", "none"])
def test_l1_weighting(activation, weighting):
    model = make_model(activation, l1_coefficient=0.3, l1_weighting=weighting)
    inputs, targets = make_batch(model)
    _, _, losses = Reference(model).forward(inputs, targets)
    assert_same(model(inputs, targets).losses["l1_loss"], losses["l1_loss"])


@pytest.mark.parametrize("masked", [False, True])
def test_target_l0(masked):
    model = make_model("jumprelu", l0_coefficient=0.3, target_l0=4, jumprelu_bandwidth=0.6)
    inputs, targets = make_batch(model)
    mask = torch.arange(ROWS) < 6 if masked else None
    reference = Reference(model)
    _, _, losses = reference.forward(inputs, targets, mask=mask)
    output = model(inputs, targets, mask=mask)
    assert_same(output.losses["l0_loss"], losses["l0_loss"])
    (gradient,) = torch.autograd.grad(output.losses["l0_loss"], model.threshold)
    (expected,) = torch.autograd.grad(losses["l0_loss"], reference.p["threshold"])
    assert expected.any()
    assert_same(gradient, expected)


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu", "gated"])
def test_a_masked_token_changes_nothing(activation):
    penalties = {"l0_coefficient": 0.1, "target_l0": 3} if activation == "jumprelu" else PENALTIES[activation]
    model = make_model(activation, **penalties)
    inputs, targets = make_batch(model)
    mask = torch.arange(ROWS) != 3
    short = model(inputs[mask], targets[mask], dead_features=DEAD).loss
    inputs[3], targets[3] = 1e3, -1e4
    assert_same(model(inputs, targets, mask=mask, dead_features=DEAD).loss, short)


def test_a_batch_without_counting_tokens_has_no_loss():
    model = make_model("topk")
    inputs, targets = make_batch(model)
    loss = model(inputs, targets, mask=torch.zeros(ROWS, dtype=torch.bool), dead_features=DEAD).loss
    loss.backward()
    assert loss == 0 and not model.W_enc.grad.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("lead", [(), (1,), (4, 4), (2, 2, 4), (0,), (2, 0)])
def test_leading_dimensions(activation, lead):
    model = make_model(activation, skip_connection=True).eval()
    inputs = torch.randn(*lead, D_IN, generator=torch.Generator().manual_seed(2))
    output = model(inputs)
    flat = model(inputs.reshape(-1, D_IN))
    assert output.reconstruction.shape == (*lead, D_OUT) and output.features.shape == (*lead, N)
    assert torch.equal(output.reconstruction.flatten(), flat.reconstruction.flatten())
    assert torch.equal(output.features.flatten(), flat.features.flatten())
    assert torch.equal(model.encode(inputs), output.features)
    if activation == "topk":
        assert output.feature_values.shape == output.feature_indices.shape == (*lead, K)
        gathered = output.features.gather(-1, output.feature_indices)
        assert torch.equal(gathered, output.feature_values)


def test_loss_and_mask_of_a_batch_of_sequences():
    model = make_model("topk")
    inputs, targets = make_batch(model)
    mask = torch.arange(ROWS) % 4 != 2
    shaped = model(inputs.view(4, 4, -1), targets.view(4, 4, -1), mask=mask.view(4, 4))
    assert torch.equal(shaped.loss, model(inputs, targets, mask=mask).loss)


def test_batchtopk_features_are_flat_in_training():
    model = make_model("batchtopk")
    inputs, _ = make_batch(model)
    output = model(inputs)
    assert output.feature_values.numel() == K * ROWS and output.feature_offsets[-1] == K * ROWS
    counts = (output.features > 0).sum(-1)
    assert torch.equal(output.feature_offsets.diff(), counts) and counts.unique().numel() > 1
    assert model.eval()(inputs).feature_values is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_writes_nothing_on_the_module(activation):
    model = make_model(activation, normalization="standardize", pre_bias=True, skip_connection=True)
    inputs, targets = make_batch(model)
    for training in (True, False):
        model.train(training)
        attributes = {name: id(value) for name, value in vars(model).items()}
        registered = {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
        values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fields, activation_fields = model.config.to_dict(), dict(vars(model.activation))
        model(inputs, targets, dead_features=DEAD).loss.backward()
        model.encode(inputs)
        assert {name: id(value) for name, value in vars(model).items()} == attributes
        assert {n: id(v) for n, v in [*model.named_parameters(), *model.named_buffers()]} == registered
        assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
        assert model.config.to_dict() == fields and vars(model.activation) == activation_fields == {}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_is_deterministic(activation):
    model = make_model(activation, **VARIANTS["all"])
    inputs, targets = make_batch(model)

    def run():
        model.zero_grad()
        output = model(inputs, targets, dead_features=DEAD)
        output.loss.backward()
        return [output.loss, output.reconstruction, *(p.grad.clone() for p in model.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["plain", "all", "tied_all"])
def test_low_precision_weights(activation, dtype, variant):
    model = make_model(activation, auxk=4, **PENALTIES[activation], **VARIANTS[variant]).to(dtype)
    inputs, targets = make_batch(model)
    inputs, targets = inputs.to(dtype), targets.to(dtype)
    output = model(inputs, targets, dead_features=DEAD)
    (output.loss / 1024).backward()  # The range of fp16 is short.
    assert output.loss.dtype == torch.float32 and output.loss.isfinite()
    for parameter in model.parameters():
        assert parameter.grad.dtype == dtype and parameter.grad.isfinite().all()
    model.eval()
    features = model.encode(inputs)
    expected = model.float()(inputs.float()).reconstruction
    model.to(dtype)
    torch.testing.assert_close(model.decode(features, inputs).float(), expected, rtol=0.1, atol=0.7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_keeps_gradients_and_losses_in_full_precision(activation):
    model = make_model(activation, **PENALTIES[activation], **VARIANTS["all"])
    inputs, targets = make_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(inputs, targets, dead_features=DEAD)
    output.loss.backward()
    assert all(loss.dtype == torch.float32 for loss in output.losses.values())
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    torch.testing.assert_close(output.loss, model(inputs, targets, dead_features=DEAD).loss, rtol=0.1, atol=0.1)


def test_autocast_leaves_the_values_of_topk_features_exact():
    model = make_model("topk")
    inputs, _ = make_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(inputs)
    exact = (inputs @ model.W_enc.T + model.b_enc).gather(1, output.feature_indices).relu()
    torch.testing.assert_close(output.feature_values, exact, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------- defects that other libraries have had


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_auxk_teaches_the_encoder_of_dead_features_and_nothing_else(activation):
    model = make_model(activation, skip_connection=True, auxk=4)
    inputs, targets = make_batch(model)
    with torch.no_grad():
        model.b_enc[DEAD] = 1.0
    loss = model(inputs, targets, dead_features=DEAD).losses["auxk_loss"]
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = dict(zip(parameters, gradients, strict=True))
    dead = torch.zeros(N, dtype=torch.bool)
    dead[DEAD] = True
    for name in ("W_enc", "b_enc", "W_dec"):
        reached = gradients.pop(name).reshape(N, -1).abs().sum(-1) > 0
        assert torch.equal(reached, dead), name
    # The residual is a constant: nothing flows back into what made it.
    assert all(gradient is None or not gradient.any() for gradient in gradients.values())


def test_auxk_is_one_when_dead_features_explain_nothing_and_less_for_few_of_them():
    model = make_model("topk", auxk=10, auxk_coefficient=0.25)
    inputs, targets = make_batch(model)
    with torch.no_grad():
        model.W_dec[DEAD] = 0.0
    loss = model(inputs, targets, dead_features=DEAD).losses["auxk_loss"]
    torch.testing.assert_close(loss, torch.tensor(0.25 * len(DEAD) / 10))
    assert "auxk_loss" not in model(inputs, targets, dead_features=DEAD[:0]).losses
    assert "auxk_loss" not in model(inputs, targets).losses


def test_features_at_zero_send_no_gradient_to_the_encoder():
    model = make_model("topk")
    inputs, targets = make_batch(model)
    with torch.no_grad():
        model.b_enc.fill_(-1e3)
    model(inputs, targets).loss.backward()
    assert not model.W_enc.grad.any() and not model.b_enc.grad.any() and not model.W_dec.grad.any()
    assert model.b_dec.grad.any()


def test_gate_loss_leaves_the_decoder_alone():
    model = make_model("gated", skip_connection=True)
    inputs, targets = make_batch(model)
    loss = model(inputs, targets).losses["gate_loss"]
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    reached = {
        name
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True)
        if gradient is not None and gradient.any()
    }
    assert reached == {"W_enc", "b_enc"}


def test_a_tied_gate_loss_learns_through_the_encoder_alone():
    model = make_model("gated", d_out=D_IN, tied=True)
    inputs, targets = make_batch(model)
    reference = Reference(model)
    _, _, losses = reference.forward(inputs, targets)
    (expected,) = torch.autograd.grad(losses["gate_loss"], reference.p["W_enc"])
    (gradient,) = torch.autograd.grad(model(inputs, targets).losses["gate_loss"], model.W_enc)
    assert_same(gradient, expected)


def test_the_loss_compares_with_the_target_and_not_with_the_input():
    model = make_model("topk", d_out=D_IN)
    inputs, _ = make_batch(model)
    exact = model(inputs).reconstruction.detach()
    assert model(inputs, exact).loss == 0
    assert model(inputs, inputs).loss > 0.1


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m(torch.zeros(2, D_IN + 1)), "inputs are 7 wide.*expects 6"),
        (lambda m: m.encode(torch.zeros(2, D_IN - 1)), "inputs are 5 wide.*expects 6"),
        (lambda m: m(torch.zeros(2, D_IN), torch.zeros(2, D_OUT + 1)), "targets are 6 wide.*expects 5"),
        (lambda m: m(torch.zeros(4, D_IN), torch.zeros(1, D_OUT)), r"targets.*\(1,\).*\(4,\)"),
        (lambda m: m(torch.zeros(4, D_IN), torch.zeros(4, D_OUT), mask=torch.ones(3)), r"mask.*\(3,\).*\(4,\)"),
        (lambda m: m.decode(torch.zeros(2, N)), "skip connection.*give `decode` the inputs"),
        (lambda m: m.decode(torch.zeros(2, N - 1), torch.zeros(2, D_IN)), "features are 19 wide.*has 20"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(call, words):
    with pytest.raises(TranscoderError, match=words):
        call(make_model("topk", skip_connection=True))


def test_an_untrained_transcoder_predicts_its_bias_and_has_unit_encoder_rows():
    model = TranscoderModel(make_model("relu").config)
    torch.testing.assert_close(model.W_enc.norm(dim=-1), torch.ones(N))
    inputs, _ = make_batch(model)
    assert not model(inputs).reconstruction.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", ["plain", "all", "tied_all"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_nan_anywhere_is_seen(activation, variant, training):
    """In the inputs or in any tensor: no comparison may turn it into a feature that is off."""
    names = make_model(activation, **VARIANTS[variant]).state_dict().keys()
    for name in ("inputs", *names):
        model = make_model(activation, **VARIANTS[variant]).train(training)
        inputs, targets = make_batch(model)
        with torch.no_grad():
            {"inputs": inputs, **model.state_dict()}[name].view(-1)[0] = float("nan")
        output = model(inputs, targets)
        # BatchTopK has no use for its threshold in training, and moves it.
        unused = activation == "batchtopk" and training and name == "threshold"
        assert output.loss.isnan() != unused, name
        assert output.reconstruction.isnan().any() != unused, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_loss_of_nothing_is_refused_and_one_of_no_variance_is_seen(activation):
    model = make_model(activation)
    inputs, targets = make_batch(model)
    with pytest.raises(TranscoderError, match="no tokens for a loss"):
        model(inputs[:0], targets[:0])
    assert model(inputs[:0]).reconstruction.shape == (0, D_OUT)
    assert model(inputs, targets).loss.isfinite()
    # One token has no variance, and neither do equal ones; rounding of their mean must not be taken for it.
    for same in (targets[:1], targets[:1].expand(ROWS, -1) * 1e4 + 0.1):
        assert model(inputs[: len(same)], same).loss.isnan()
    model.config.target_variance = 2.0
    assert model(inputs[:1], targets[:1]).loss.isfinite()


def test_the_loss_of_the_2023_sparse_autoencoder():
    """Mean squared error over tokens and dimensions, L1 norm of a token's features, rows of unit norm, one bias."""
    config = TranscoderConfig(
        d_in=D_IN, num_features=20, activation="relu", tied=True, decoder_bias=False, loss_reduction="mean",
        l1_coefficient=8.6e-4, auxk_coefficient=0.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = TranscoderModel(config)
    with torch.no_grad():
        model.W_enc.copy_(3 * torch.randn(20, D_IN, generator=generator))
        model.b_enc.copy_(torch.randn(20, generator=generator))
    inputs = torch.randn(50, D_IN, generator=generator)
    assert set(dict(model.named_parameters())) == {"W_enc", "b_enc"}
    rows = model.W_enc / model.W_enc.square().sum(1, keepdim=True).sqrt()
    codes = (inputs @ rows.T + model.b_enc).clamp(min=0)
    expected = ((codes @ rows - inputs) ** 2).mean() + 8.6e-4 * codes.sum(1).mean()
    torch.testing.assert_close(model(inputs, inputs, dead_features=torch.arange(5)).loss, expected)
