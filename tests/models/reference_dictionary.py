"""A dictionary written plainly from the formulas: dense, in float64, its gradients by autograd."""

import torch

from hf_transcoders.models import TranscoderConfig, TranscoderModel


D_IN, D_OUT, N, K, ROWS = 6, 5, 20, 3, 16

ACTIVATIONS = ["relu", "topk", "batchtopk", "jumprelu", "gated"]

PENALTIES = {
    "relu": {"l1_coefficient": 0.07},
    "topk": {},
    "batchtopk": {},
    "jumprelu": {"l0_coefficient": 0.03, "jumprelu_bandwidth": 0.4},
    "gated": {"l1_coefficient": 0.07},
}

VARIANTS = {
    "plain": {"d_out": D_IN},
    "wide": {},
    "no_decoder_bias": {"decoder_bias": False},
    "skip": {"skip_connection": True},
    "pre_bias": {"pre_bias": True},
    "scale": {"normalization": "scale"},
    "standardize": {"normalization": "standardize"},
    "token_scale": {"normalization": "token_scale"},
    "token_standardize": {
        "d_out": D_IN,
        "normalization": "token_standardize",
        "skip_connection": True,
        "pre_bias": True,
        "matryoshka_sizes": [4, N],
    },
    "matryoshka": {"matryoshka_sizes": [4, 9, N]},
    "tied": {"d_out": D_IN, "tied": True},
    "tied_2023": {"d_out": D_IN, "tied": True, "decoder_bias": False, "loss_reduction": "mean"},
    "tied_all": {
        "d_out": D_IN,
        "tied": True,
        "skip_connection": True,
        "pre_bias": True,
        "normalization": "standardize",
        "matryoshka_sizes": [7, N],
    },
    "all": {
        "skip_connection": True,
        "pre_bias": True,
        "normalization": "standardize",
        "matryoshka_sizes": [1, 8, N],
        "target_variance": 3.0,
    },
}


def make_config(activation, **kwargs):
    sparse = {"k": K} if activation in ("topk", "batchtopk") else {}
    return TranscoderConfig(
        **{"d_in": D_IN, "d_out": D_OUT, "num_features": N, "activation": activation, **sparse, **kwargs}
    )


def make_model(activation, seed=0, **kwargs):
    """A dictionary in which no parameter and no buffer is left at a value that would hide a mistake."""
    model = TranscoderModel(make_config(activation, **kwargs))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            values = torch.randn(tensor.shape, generator=generator)
            if name in ("threshold", "input_scale", "output_scale"):
                values = values.abs() * 0.5 + 0.2
            tensor.copy_(values)
    return model


def make_batch(model, seed=1, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, model.config.d_in, generator=generator)
    targets = torch.randn(rows, model.config.d_out, generator=generator) * 2 + 1
    return inputs, targets


class Reference:
    """Holds float64 copies of a model's tensors as leaves; `forward` as the model's."""

    def __init__(self, model):
        self.config = model.config
        self.training = model.training
        self.p = {name: tensor.detach().double().clone().requires_grad_() for name, tensor in model.named_parameters()}
        self.buffers = {name: tensor.double() for name, tensor in model.named_buffers()}

    def gradients(self):
        return {name: tensor.grad for name, tensor in self.p.items()}

    def forward(self, inputs, targets=None, mask=None, dead=None, sparsity_scale=1.0):
        config, p = self.config, self.p
        x = inputs.double()
        mean, divisor, out_mean, out_scale, out_divisor = self._normalization(x)
        x = (x - mean) / divisor
        if config.pre_bias:
            x = x - p["b_pre"]
        encoder = p["W_enc"]
        if config.tied:
            encoder = encoder / encoder.square().sum(-1, keepdim=True).sqrt()
        decoder = encoder if config.tied else p["W_dec"]
        pre = x @ encoder.T + p["b_enc"]
        features = self._activate(pre, x @ encoder.T)
        linear = torch.zeros(x.shape[0], config.d_out, dtype=torch.float64)
        if config.decoder_bias:
            linear = linear + p["b_dec"]
        if config.skip_connection:
            linear = linear + x @ p["W_skip"].T
        normalized = features @ decoder + linear
        reconstruction = normalized * out_scale + out_mean
        if targets is None:
            return features, reconstruction, None

        y = (targets.double() - out_mean) / out_divisor
        kept = torch.ones(len(y), dtype=torch.bool) if mask is None else mask

        def error(prediction):
            return self._error(prediction, y, kept)

        if config.matryoshka_sizes:
            prefixes = [error(features[:, :size] @ decoder[:size] + linear) for size in config.matryoshka_sizes]
            losses = {"reconstruction_loss": sum(prefixes) / len(prefixes)}
        else:
            losses = {"reconstruction_loss": error(normalized)}
        penalised = features
        if config.activation == "gated":
            penalised = pre.relu()
            frozen = penalised @ decoder.detach()
            if config.decoder_bias:
                frozen = frozen + p["b_dec"].detach()
            if config.skip_connection:
                frozen = frozen + x @ p["W_skip"].detach().T
            losses["gate_loss"] = error(frozen)
        if config.l1_coefficient:
            weight = decoder.square().sum(-1).sqrt() if config.l1_weighting == "decoder_norm" else 1.0
            losses["l1_loss"] = sparsity_scale * config.l1_coefficient * (penalised * weight)[kept].sum(-1).mean()
        if config.l0_coefficient:
            l0 = self._step(pre)[kept].sum(-1).mean()
            l0 = l0 if config.target_l0 is None else (l0 / config.target_l0 - 1) ** 2
            losses["l0_loss"] = sparsity_scale * config.l0_coefficient * l0
        if dead is not None:
            residual = (y - normalized).detach()
            dead_pre = pre[:, dead]
            k = min(config.auxk, len(dead))
            chosen = torch.zeros_like(dead_pre).scatter(1, dead_pre.topk(k).indices, 1.0)
            guess = (dead_pre.relu() * chosen) @ decoder[dead]
            ratio = (residual - guess).square()[kept].sum() / residual.square()[kept].sum()
            losses["auxk_loss"] = config.auxk_coefficient * min(1.0, len(dead) / config.auxk) * ratio
        return features, reconstruction, losses

    def _normalization(self, x):
        """Mean and divisor of inputs, and mean, scale and divisor of outputs."""
        kind, b = self.config.normalization, self.buffers
        if kind == "none":
            return 0.0, 1.0, 0.0, 1.0, 1.0
        if kind == "token_scale":
            factor = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            return 0.0, factor, 0.0, factor, factor
        if kind == "token_standardize":
            mean = x.sum(-1, keepdim=True) / x.shape[-1]
            deviation = ((x - mean).square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
            return mean, deviation + 1e-5, mean, deviation, deviation + 1e-5
        return b["input_mean"], b["input_scale"], b["output_mean"], b["output_scale"], b["output_scale"]

    def _activate(self, pre, products):
        config, p = self.config, self.p
        if config.activation == "relu":
            return pre.relu()
        if config.activation == "topk":
            return pre.relu() * torch.zeros_like(pre).scatter(1, pre.topk(config.k).indices, 1.0)
        if config.activation == "batchtopk" and self.training:
            chosen = pre.flatten().topk(config.k * len(pre)).indices
            return pre.relu() * torch.zeros(pre.numel(), dtype=pre.dtype).scatter(0, chosen, 1.0).view_as(pre)
        if config.activation == "batchtopk":
            return torch.where(pre > self.buffers["threshold"], pre, 0.0)
        if config.activation == "jumprelu":
            threshold = p["threshold"]
            surrogate = -(threshold.detach() / config.jumprelu_bandwidth) * self._kernel(pre)
            return torch.where(pre > threshold, pre, 0.0) + surrogate * (threshold - threshold.detach())
        magnitude = products * p["r_mag"].exp() + p["b_mag"]
        return magnitude.relu() * (pre > 0)

    def _kernel(self, pre):
        distance = (pre.detach() - self.p["threshold"].detach()) / self.config.jumprelu_bandwidth
        return (distance.abs() < 0.5).double()

    def _step(self, pre):
        threshold = self.p["threshold"]
        surrogate = -(1 / self.config.jumprelu_bandwidth) * self._kernel(pre)
        return (pre > threshold).double() + surrogate * (threshold - threshold.detach())

    def _error(self, prediction, y, kept):
        squared = (y - prediction).square()[kept]
        reduction = self.config.loss_reduction
        if reduction == "mean":
            return squared.mean()
        if reduction == "sum":
            return squared.sum(-1).mean()
        if reduction == "target_norm":
            return (squared / y[kept].square().sum(-1, keepdim=True).sqrt()).mean()
        variance = self.config.target_variance
        if variance is None:
            variance = (y[kept] - y[kept].mean(0)).square().sum(-1).mean()
        return squared.sum(-1).mean() / variance


def assert_same(ours, theirs, name=""):
    torch.testing.assert_close(
        ours.double(), theirs.double(), rtol=1e-4, atol=2e-5, msg=lambda text: f"{name}: {text}"
    )


def assert_same_gradient(ours, theirs, name=""):
    """
    [`assert_same`], with room for the cancellation in a matrix product: element `[i, j]` of a weight's gradient is a sum
    over tokens whose terms are as large as the largest elements of row `i`, and float32 rounds the terms, not the sum.
    Eight roundings of the row's norm are allowed.
    """
    rounding = (
        8 * torch.finfo(torch.float32).eps * theirs.double().norm(dim=-1, keepdim=True) if theirs.dim() > 1 else 0.0
    )
    allowed = 2e-5 + 1e-4 * theirs.double().abs() + rounding
    excess = ((ours.double() - theirs.double()).abs() / allowed).max().item()
    assert ours.shape == theirs.shape and excess <= 1, f"{name}: {excess:.3g} times the tolerance"
