"""Minimal writers of formats whose libraries are not installed, and what such dictionaries compute, in float64."""

import gzip
import io
import json
import pickle
import sys
import types

import numpy as np
import torch
from safetensors.torch import save_file


D, N = 32, 64


def random_tensors(seed=0, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def relu(values):
    return values.clamp(min=0)


def write_gemma_scope_1(path, lower=False):
    made = random_tensors(W_enc=(D, N), W_dec=(N, D), b_enc=(N,), b_dec=(D,), threshold=(N,))
    made["threshold"] = made["threshold"].abs()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name.lower() if lower else name: tensor.numpy() for name, tensor in made.items()})

    def compute(x):
        pre = x.double() @ made["W_enc"].double() + made["b_enc"].double()
        features = relu(pre) * (pre > made["threshold"].double())
        return features, features @ made["W_dec"].double() + made["b_dec"].double()

    return compute


def write_gemma_scope_2(folder, settings):
    made = random_tensors(
        w_enc=(D, N), w_dec=(N, D), b_enc=(N,), b_dec=(D,), threshold=(N,), affine_skip_connection=(D, D)
    )
    made["threshold"] = made["threshold"].abs()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(made, folder / "params.safetensors")
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings))

    def compute(x):
        x = x.double()
        pre = x @ made["w_enc"].double() + made["b_enc"].double()
        features = relu(pre) * (pre > made["threshold"].double())
        output = features @ made["w_dec"].double() + made["b_dec"].double()
        return features, output + x @ made["affine_skip_connection"].double()

    return compute


def write_gpt2_transcoder(path, layer=1):
    """A torch file with settings of a class that is not installed, gzip-compressed if its name says so."""
    made = random_tensors(W_enc=(D, N), W_dec=(N, D), b_enc=(N,), b_dec=(D,), b_dec_out=(D,))
    module = types.ModuleType("sae_training.config")
    module.LanguageModelSAERunnerConfig = type(
        "LanguageModelSAERunnerConfig", (), {"__module__": "sae_training.config"}
    )
    settings = module.LanguageModelSAERunnerConfig()
    settings.__dict__ |= {
        "is_transcoder": True,
        "hook_point": f"blocks.{layer}.ln2.hook_normalized",
        "out_hook_point": f"blocks.{layer}.hook_mlp_out",
        "model_name": "gpt2-small",
        "l1_coefficient": 0.00014,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    sys.modules["sae_training"], sys.modules["sae_training.config"] = types.ModuleType("sae_training"), module
    try:
        content = io.BytesIO()
        torch.save({"cfg": settings, "state_dict": made}, content)
    finally:
        del sys.modules["sae_training"], sys.modules["sae_training.config"]
    path.write_bytes(gzip.compress(content.getvalue()) if path.suffix == ".gz" else content.getvalue())

    def compute(normalized):
        made64 = {name: tensor.double() for name, tensor in made.items()}
        features = relu((normalized.double() - made64["b_dec"]) @ made64["W_enc"] + made64["b_enc"])
        return features, features @ made64["W_dec"] + made64["b_dec_out"]

    return compute


def write_openai(path, activation="ReLU"):
    made = random_tensors(
        **{"encoder.weight": (N, D), "decoder.weight": (D, N), "pre_bias": (D,), "latent_bias": (N,)}
    )
    state = {**made, "stats_last_nonzero": torch.zeros(N, dtype=torch.long), "activation": activation}
    torch.save(state | ({"activation_state_dict": {"k": 4}} if activation == "TopK" else {}), path)

    def compute(x):
        x, mean, deviation = x.double(), 0.0, 1.0
        if activation == "TopK":
            mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            x = (x - mean) / (deviation + 1e-5)
        centred = x - made["pre_bias"].double()
        pre = centred @ made["encoder.weight"].double().T + made["latent_bias"].double()
        if activation == "TopK":
            largest = pre.topk(4).indices
            pre = torch.zeros_like(pre).scatter(-1, largest, pre.gather(-1, largest))
        features = relu(pre)
        output = features @ made["decoder.weight"].double().T + made["pre_bias"].double()
        return features, output * deviation + mean

    return compute


def write_linear_pair(path, encoder="encoder_linear", decoder="decoder_linear"):
    shapes = {
        f"{encoder}.weight": (N, D),
        f"{encoder}.bias": (N,),
        f"{decoder}.weight": (D, N),
        f"{decoder}.bias": (D,),
    }
    made = random_tensors(**shapes)
    torch.save(made, path)

    def compute(x):
        features = relu(x.double() @ made[f"{encoder}.weight"].double().T + made[f"{encoder}.bias"].double())
        return features, features @ made[f"{decoder}.weight"].double().T + made[f"{decoder}.bias"].double()

    return compute


def write_qwen_scope(path, k=5):
    made = random_tensors(W_enc=(N, D), W_dec=(D, N), b_enc=(N,), b_dec=(D,))
    torch.save(made, path)

    def compute(x):
        pre = x.double() @ made["W_enc"].double().T + made["b_enc"].double()
        features = relu(torch.zeros_like(pre).scatter(-1, pre.topk(k).indices, pre.topk(k).values))
        return features, features @ made["W_dec"].double().T + made["b_dec"].double()

    return compute


def write_llama_scope_r1(folder, hook="blocks.8.hook_resid_post", dtype=torch.float32, **settings):
    """The files of Llama Scope R1-Distill: settings of lm-saes beside two linear layers and logarithms of thresholds."""
    made = random_tensors(
        **{"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N), "decoder.bias": (D,)},
        log_jumprelu_threshold=(N,),
    )
    made = {name: tensor.to(dtype) for name, tensor in made.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(made, folder / "sae_weights.safetensors")
    settings = {
        "sae_type": "sae",
        "act_fn": "jumprelu",
        "d_model": D,
        "expansion_factor": N // D,
        "hook_point_in": hook,
        "hook_point_out": hook,
        "sparsity_include_decoder_norm": False,
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(settings))

    def compute(x, factor):
        encoder, bias, decoder, output_bias, logarithm = (tensor.double() for tensor in made.values())
        pre = (x.double() * factor) @ encoder.T + bias
        features = pre * (pre > logarithm.exp())
        return features, (features @ decoder.T + output_bias) / factor

    return compute


def write_llama_scope(folder, hook_in, hook_out, norm_in=3.0, norm_out=2.0, threshold=0.4):
    made = random_tensors(
        **{"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N), "decoder.bias": (D,)}
    )
    (folder / "checkpoints").mkdir(parents=True)
    save_file(made, folder / "checkpoints" / "final.safetensors")
    settings = {
        "d_model": D,
        "d_sae": N,
        "hook_point_in": hook_in,
        "hook_point_out": hook_out,
        "jump_relu_threshold": threshold,
        "dataset_average_activation_norm": {"in": norm_in, "out": norm_out},
        "sparsity_include_decoder_norm": True,
    }
    (folder / "hyperparams.json").write_text(json.dumps(settings))

    def compute(x):
        """In the scaled units of training: inputs and outputs there have norm sqrt(width) on average."""
        encoder, bias, decoder, output_bias = (tensor.double() for tensor in made.values())
        scale_in, scale_out = D**0.5 / norm_in, D**0.5 / norm_out
        pre = (x.double() * scale_in) @ encoder.T + bias
        written = (decoder * scale_in / scale_out).norm(dim=0)
        # What a feature writes at the site, and where its threshold is.
        features = pre / scale_in * written
        features = features * (features > threshold)
        return features, features @ (decoder * scale_in / scale_out / written).T + output_bias / scale_out

    return compute


def pickled(value):
    """A torch file of the old kind that would run code when it is loaded without care."""
    content = io.BytesIO()
    pickle.dump(value, content)
    return content.getvalue()


def write_old_saelens(folder, hook, activation="relu", **settings):
    """A folder as SAELens wrote it before version 6, with a scale of its own for each feature."""
    made = random_tensors(W_enc=(D, N), W_dec=(N, D), b_enc=(N,), b_dec=(D,), scaling_factor=(N,), log_threshold=(N,))
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: tensor for name, tensor in made.items() if activation == "jumprelu" or name != "log_threshold"}
    save_file(held, folder / "sae_weights.safetensors")
    settings = {
        "architecture": "jumprelu" if activation == "jumprelu" else "standard",
        "activation_fn_str": "topk" if activation == "topk" else "relu",
        "activation_fn_kwargs": {"k": 5} if activation == "topk" else {},
        "model_name": "gpt2-small",
        "hook_point": hook,
        "hook_point_layer": 1,
        "d_in": D,
        "d_sae": N,
        "finetuning_scaling_factor": True,
        "normalize_activations": False,
        **settings,
    }
    (folder / "cfg.json").write_text(json.dumps(settings))

    def compute(x, factor=1.0):
        made64 = {name: tensor.double() for name, tensor in made.items()}
        pre = (x.double() * factor - made64["b_dec"]) @ made64["W_enc"] + made64["b_enc"]
        features = relu(pre)
        if activation == "topk":
            kept = features.topk(5, dim=-1).indices
            features = torch.zeros_like(features).scatter(-1, kept, features.gather(-1, kept))
        if activation == "jumprelu":
            features = features * (pre > made64["log_threshold"].exp())
        return features, ((features * made64["scaling_factor"]) @ made64["W_dec"] + made64["b_dec"]) / factor

    return compute
