"""
Write the small cross-layer transcoders in `tests/formats/fixtures`, and the SAEs of llamascopium, with the libraries whose
formats they have.

Run in an environment with those libraries, which need not have this one; crosslayer-transcoder is on no package index:

    python -m venv .venv-peers
    .venv-peers/bin/pip install sae-lens==6.54.12 transformers==4.57.3 nnsight jaxtyping json_repair h5py more_itertools cattrs
    .venv-peers/bin/pip install --no-deps circuit-tracer==0.5.0 llamascopium==2.0.0b34 decode-clt==0.0.1
    git clone https://github.com/Goreg12345/crosslayer-transcoder && git -C crosslayer-transcoder checkout ae29e75
    .venv-peers/bin/python tests/interop/write_cross_layer_fixtures.py crosslayer-transcoder

For each it writes a folder in the library's format, and beside it `<name>.safetensors` with random inputs, and the features
and reconstruction that the library itself computes from them after loading the folder: for cross-layer transcoders of
shape `(layers, tokens, width)`.
"""

import json
import math
import shutil
import sys
import types
from pathlib import Path

import torch
from write_fixtures import FIXTURES, TOKENS, D, K, N, randomize, record


LAYERS = 3


def fresh(name):
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def activations(scale=1.0):
    return torch.randn(LAYERS, TOKENS, D) * scale


def write_circuit_tracer():
    import yaml
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt

    for activation in ("relu", "jump_relu"):
        name = f"clt_circuit_tracer_{activation}"
        folder = fresh(name)
        options = {"activation_function": activation, "lazy_decoder": False, "dtype": torch.float32}
        made = CrossLayerTranscoder(LAYERS, N, D, device=torch.device("cpu"), **options)
        randomize(made)
        made.to_safetensors(str(folder))
        settings = {
            "model_name": "meta-llama/Llama-3.2-1B",
            "model_kind": "cross_layer_transcoder",
            "feature_input_hook": "hook_resid_mid",
            "feature_output_hook": "hook_mlp_out",
            "scan": "tests/fixture",
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        loaded = load_clt(str(folder), device=torch.device("cpu"), dtype=torch.float32)
        inputs = activations()
        record(name, inputs, loaded.encode(inputs), loaded(inputs))


def write_llamascopium():
    from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    stream, reads, writes = "blocks.1.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    saes = {
        "relu": {"act_fn": "relu", "use_decoder_bias": False},
        "jumprelu": {"act_fn": "jumprelu", "hook_point_in": reads, "hook_point_out": writes},
        "topk": {
            "act_fn": "topk",
            "top_k": K,
            "norm_activation": "token-wise",
            "sparsity_include_decoder_norm": False,
        },
        "topk_inference": {"act_fn": "topk", "top_k": K, "norm_activation": "inference"},
    }
    for case, options in saes.items():
        options = {
            "hook_point_in": stream,
            "hook_point_out": stream,
            "d_model": D,
            "expansion_factor": N / D,
            **options,
        }
        config = SAEConfig(**options)
        hooks = [config.hook_point_in, config.hook_point_out]
        made = SparseAutoEncoder(config)
        finish(f"llamascopium_{case}", made, SparseAutoEncoder, dict.fromkeys(hooks))
    hooks_in = [f"blocks.{layer}.hook_resid_mid" for layer in range(LAYERS)]
    hooks_out = [f"blocks.{layer}.hook_mlp_out" for layer in range(LAYERS)]
    for activation in ("jumprelu", "topk"):
        config = CLTConfig(
            d_model=D,
            expansion_factor=N / D,
            act_fn=activation,
            top_k=K,
            hook_points_in=hooks_in,
            hook_points_out=hooks_out,
            sparsity_include_decoder_norm=activation == "jumprelu",
        )
        finish(
            f"clt_llamascopium_{activation}",
            CrossLayerTranscoder(config),
            CrossLayerTranscoder,
            dict.fromkeys([*hooks_in, *hooks_out]),
        )


@torch.no_grad()
def finish(name, made, kind, hooks):
    folder = fresh(name)
    randomize(made)
    for parameter_name, parameter in made.named_parameters():
        if "threshold" in parameter_name:
            parameter.copy_(torch.randn(parameter.shape) * 0.5 - 1)
    norms = {hook: 2.0 + number for number, hook in enumerate(hooks)}
    made.set_dataset_average_activation_norm(norms)
    made.save_pretrained(folder)
    made.cfg.save_hyperparameters(folder)
    loaded = kind.from_pretrained(str(folder))
    inputs = activations() if name.startswith("clt") else torch.randn(TOKENS, D)
    if name.startswith("clt"):
        batch = dict(zip(made.cfg.hook_points_in, inputs, strict=True))
        x = loaded.prepare_input(loaded.normalize_activations(batch))[0]
        features = loaded.encode(x)
        outputs = loaded.decode(features)
        factors = [
            loaded.compute_norm_factor(each, hook)
            for each, hook in zip(outputs, made.cfg.hook_points_out, strict=True)
        ]
        output = torch.stack([each / factor for each, factor in zip(outputs, factors, strict=True)])
        record(name, inputs, features.transpose(0, 1), output)
        return
    hook_in, hook_out = made.cfg.hook_point_in, made.cfg.hook_point_out
    features = loaded.encode(inputs * loaded.compute_norm_factor(inputs, hook_in))
    record(name, inputs, features, loaded.decode(features) / loaded.compute_norm_factor(inputs, hook_out))


def write_crosslayer_transcoder(clone):
    # The package imports its training, which needs Lightning; its models do not.
    for name in ("crosslayer_transcoder", "crosslayer_transcoder.model"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(clone).joinpath(*name.split(".")))]
        sys.modules[name] = package
    from crosslayer_transcoder.model import clt, jumprelu, standardize, topk

    sizes = {"d_acts": D, "d_features": N, "n_layers": LAYERS}
    dimensions = {"n_layers": LAYERS, "activation_dim": D}
    cases = {
        "jumprelu": (jumprelu.JumpReLU(0.1, 0.5, LAYERS, N), "Dimensionwise", clt.CrosslayerDecoder, dimensions),
        "topk": (topk.PerLayerTopK(K, n_layers=LAYERS), "Layerwise", clt.CrosslayerDecoder, {"n_layers": LAYERS}),
        "batchtopk": (topk.BatchTopK(K, 0.01, LAYERS), "folded", clt.CrosslayerDecoder, dimensions),
        "per_layer": (jumprelu.ReLU(), "folded", clt.Decoder, dimensions),
    }
    for case, (nonlinearity, statistics, decoder, arguments) in cases.items():
        name = f"clt_crosslayer_transcoder_{case}"
        folder = fresh(name)
        kind = "Dimensionwise" if statistics == "folded" else statistics
        standardizers = [
            getattr(standardize, f"{kind}{side}Standardizer")(**arguments) for side in ("Input", "Output")
        ]
        made = clt.CrossLayerTranscoder(
            nonlinearity=nonlinearity,
            input_standardizer=standardizers[0],
            output_standardizer=standardizers[1],
            encoder=clt.Encoder(**sizes),
            decoder=decoder(**sizes),
        )
        randomize(made)
        for standardizer in standardizers:
            standardizer.mean.normal_()
            standardizer.std.uniform_(0.5, 2)
            standardizer.is_initialized = True
        if case == "jumprelu":
            with torch.no_grad():
                nonlinearity.theta[0, 0, :5] = -0.3
        inputs = activations()
        with torch.no_grad():
            _, features, _, output = made(inputs.transpose(0, 1))
            if case == "batchtopk":
                # The pass above is one of training, which moves the threshold; in use, layers are called one by one.
                nonlinearity.threshold.fill_(0.4)
                pre = made.encoder(standardizers[0](inputs.transpose(0, 1)))
                features = torch.stack([nonlinearity(pre[:, layer], layer=layer) for layer in range(LAYERS)], dim=1)
                output = standardizers[1](made.decoder(features))
        # Saved without folding, it cannot be used after its own loader: what it computed before is recorded.
        made.save_pretrained(folder, fold_standardizers=statistics == "folded")
        record(name, inputs, features.transpose(0, 1), output.transpose(0, 1))


def write_decode_clt():
    from clt.config import CLTConfig
    from clt.models.clt import CrossLayerTranscoder
    from safetensors.torch import load_file, save_file

    templates = {
        "mlp_input_template": "model.layers.{}.mlp.input",
        "mlp_output_template": "model.layers.{}.mlp.output",
    }
    cases = {
        "jumprelu": {"normalization_method": "mean_std"},
        "per_source": {
            "activation_fn": "relu",
            "decoder_tying": "per_source",
            "enable_feature_scale": True,
            "normalization_method": "sqrt_d_model",
        },
        "per_target": {"decoder_tying": "per_target", "skip_connection": True, "normalization_method": "mean_std"},
    }
    for case, options in cases.items():
        name = f"clt_decode_clt_{case}"
        folder = fresh(name)
        config = CLTConfig(
            num_features=N, num_layers=LAYERS, d_model=D, model_name="Qwen/Qwen3-0.6B", **templates, **options
        )
        made = CrossLayerTranscoder(config, process_group=None, device=torch.device("cpu"))
        randomize(made)
        save_file(made.state_dict(), folder / "clt_checkpoint_latest.safetensors")
        config.to_json(str(folder / "cfg.json"))
        loaded = CrossLayerTranscoder(CLTConfig.from_json(str(folder / "cfg.json")), None, torch.device("cpu"))
        loaded.load_state_dict(load_file(folder / "clt_checkpoint_latest.safetensors"))
        inputs = activations()
        ends = {side: (torch.zeros(LAYERS, 1, D), torch.ones(LAYERS, 1, D)) for side in ("inputs", "targets")}
        if options["normalization_method"] == "mean_std":
            statistics = {side: (torch.randn(LAYERS, D), torch.rand(LAYERS, D) + 0.5) for side in ends}
            written = {
                str(layer): {
                    side: {"mean": m[layer].tolist(), "std": s[layer].tolist()} for side, (m, s) in statistics.items()
                }
                for layer in range(LAYERS)
            }
            (folder / "norm_stats.json").write_text(json.dumps(written))
            ends = {side: (m[:, None], s[:, None] + 1e-6) for side, (m, s) in statistics.items()}
        elif options["normalization_method"] == "sqrt_d_model":
            ends = {side: (m, s / math.sqrt(D)) for side, (m, s) in ends.items()}
        normalized = (inputs - ends["inputs"][0]) / ends["inputs"][1]
        by_layer = dict(enumerate(normalized))
        with torch.no_grad():
            features = loaded.get_feature_activations(by_layer)
            outputs = loaded(by_layer)
        stacked = [torch.stack([each[layer] for layer in range(LAYERS)]) for each in (features, outputs)]
        record(name, inputs, stacked[0], stacked[1] * ends["targets"][1] + ends["targets"][0])


if __name__ == "__main__":
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for write in (write_circuit_tracer, write_llamascopium, write_decode_clt):
        torch.manual_seed(0)
        write()
    for clone in sys.argv[1:2]:
        torch.manual_seed(0)
        write_crosslayer_transcoder(clone)
    print(f"{sum(path.stat().st_size for path in FIXTURES.rglob('*') if path.is_file())} bytes in {FIXTURES}")
