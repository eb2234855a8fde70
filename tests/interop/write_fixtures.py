"""
Write the small dictionaries in `tests/formats/fixtures` with the libraries whose formats they have.

Run in an environment with those libraries, which need not have this one:

    python -m venv .venv-peers
    .venv-peers/bin/pip install sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0
    .venv-peers/bin/pip install --no-deps circuit-tracer==0.5.0
    .venv-peers/bin/python tests/interop/write_fixtures.py

With names of libraries, such as `saelens_norms`, only their dictionaries are written anew. For each dictionary it writes a folder in the library's format, and beside it `<name>.safetensors` with random inputs and
the features and reconstruction that the library itself computes from them after loading the folder.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


FIXTURES = Path(__file__).parents[1] / "formats" / "fixtures"
D, N, K, TOKENS = 8, 24, 4, 16


def randomize(module, scale=0.5):
    """Gives every parameter random values, thresholds positive ones."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * scale)
            if "threshold" in name:
                parameter.abs_()


def record(name, inputs, features, reconstruction):
    tensors = {"inputs": inputs, "features": features, "reconstruction": reconstruction}
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, FIXTURES / f"{name}.safetensors")


def write_saelens():
    transcoder = {"d_out": D, "apply_b_dec_to_input": False}
    cases = {
        "standard": {"apply_b_dec_to_input": True},
        "topk": {"k": K, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False},
        "jumprelu": {"apply_b_dec_to_input": False},
        "gated": {"apply_b_dec_to_input": True},
        "transcoder": transcoder,
        "skip_transcoder": transcoder,
        "jumprelu_transcoder": transcoder,
        "jumprelu_skip_transcoder": transcoder,
    }
    _write_saelens({f"saelens_{name}": (name, options) for name, options in cases.items()})


def write_saelens_norms():
    cases = {
        "saelens_layer_norm": ("topk", {"k": K, "rescale_acts_by_decoder_norm": False}),
        "saelens_constant_norm_rescale": ("jumprelu", {}),
    }
    for name, (_, options) in cases.items():
        options |= {"normalize_activations": name.removeprefix("saelens_"), "apply_b_dec_to_input": True}
    _write_saelens(cases)


def _write_saelens(cases):
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class

    for name, (architecture, options) in cases.items():
        sae_class, config_class = get_sae_class(architecture)
        config = config_class(d_in=D, d_sae=N, dtype="float32", device="cpu", **options)
        config.metadata.model_name = "gpt2-small"
        config.metadata.model_class_name = "HookedTransformer"
        config.metadata.model_from_pretrained_kwargs = {}
        config.metadata.hook_name = (
            "blocks.1.hook_resid_mid" if "transcoder" in architecture else "blocks.1.hook_resid_post"
        )
        if "transcoder" in architecture:
            config.metadata.hook_name_out = "blocks.1.hook_mlp_out"
        sae = sae_class(config)
        randomize(sae)
        sae.save_model(FIXTURES / name)
        loaded = SAE.load_from_disk(FIXTURES / name)
        inputs = torch.randn(TOKENS, D)
        record(name, inputs, loaded.encode(inputs), loaded(inputs))


def write_sparsify():
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    def dense(coder, inputs):
        values, indices, _ = coder.encode(inputs)
        return torch.zeros(len(inputs), coder.num_latents).scatter_(-1, indices, values)

    cases = {
        "sae": ("layers.1", {}),
        "transcoder": ("layers.1.mlp", {"transcode": True, "normalize_decoder": False}),
        "skip_transcoder": ("layers.0.mlp", {"transcode": True, "skip_connection": True}),
    }
    for case, (hookpoint, options) in cases.items():
        name = f"sparsify_{case}"
        coder = SparseCoder(D, SparseCoderConfig(expansion_factor=N // D, k=K, **options))
        randomize(coder)
        coder.save_to_disk(FIXTURES / name / hookpoint)
        (FIXTURES / name / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-14m", "sae": {}}))
        loaded = SparseCoder.load_from_disk(FIXTURES / name / hookpoint)
        inputs = torch.randn(TOKENS, D)
        record(name, inputs, dense(loaded, inputs), loaded(inputs, torch.randn(TOKENS, D)).sae_out)


def write_circuit_tracer():
    import yaml
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, load_relu_transcoder

    for case in ("relu", "jumprelu"):
        name = f"circuit_tracer_{case}"
        (FIXTURES / name).mkdir(exist_ok=True)
        settings = {
            "model_name": "meta-llama/Llama-3.2-1B",
            "model_kind": "transcoder_set",
            "feature_input_hook": "mlp.hook_in",
            "feature_output_hook": "hook_mlp_out",
            "scan": "tests/fixture",
        }
        (FIXTURES / name / "config.yaml").write_text(yaml.safe_dump(settings))
        for layer in range(2):
            function = JumpReLU(torch.zeros(N), 0.1) if case == "jumprelu" else torch.nn.functional.relu
            skip = case == "relu"
            made = SingleLayerTranscoder(D, N, function, layer, skip, device="cpu", dtype=torch.float32)
            randomize(made)
            path = FIXTURES / name / f"layer_{layer}.safetensors"
            made.to_safetensors(str(path))
        loaded = load_relu_transcoder(str(path), layer, torch.device("cpu"), torch.float32)
        inputs = torch.randn(TOKENS, D)
        record(name, inputs, loaded.encode(inputs), loaded(inputs))


def write_dictionary_learning():
    from dictionary_learning import dictionary
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    def with_threshold(made):
        made.threshold.fill_(0.3)
        return made

    cases = {
        "AutoEncoder": lambda: dictionary.AutoEncoder(D, N),
        "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D, N),
        "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D, N),
        "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D, N),
        "AutoEncoderTopK": lambda: AutoEncoderTopK(D, N, K),
        "BatchTopKSAE": lambda: with_threshold(BatchTopKSAE(D, N, K)),
        "MatryoshkaBatchTopKSAE": lambda: with_threshold(MatryoshkaBatchTopKSAE(D, N, K, [8, 16])),
    }
    for case, make in cases.items():
        name = f"dictionary_learning_{case}"
        folder = FIXTURES / name
        folder.mkdir(exist_ok=True)
        made = make()
        randomize(made)
        torch.save(made.state_dict(), folder / "ae.pt")
        trainer = {
            "dict_class": case,
            "activation_dim": D,
            "dict_size": N,
            "layer": 1,
            "lm_name": "EleutherAI/pythia-70m-deduped",
            "submodule_name": "resid_post_layer_1",
            **({"k": K} if "TopK" in case else {}),
        }
        settings = {"trainer": trainer, "buffer": {"d_submodule": D, "io": "out", "ctx_len": 128}}
        (folder / "config.json").write_text(json.dumps(settings, indent=2))
        loaded, _ = load_dictionary(str(folder), "cpu")
        inputs = torch.randn(TOKENS, D)
        record(name, inputs, loaded.encode(inputs), loaded(inputs))


WRITERS = {
    "saelens": write_saelens,
    "saelens_norms": write_saelens_norms,
    "sparsify": write_sparsify,
    "circuit_tracer": write_circuit_tracer,
    "dictionary_learning": write_dictionary_learning,
}

if __name__ == "__main__":
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for chosen in sys.argv[1:] or WRITERS:
        torch.manual_seed(0)
        WRITERS[chosen]()
    print(f"{sum(path.stat().st_size for path in FIXTURES.rglob('*') if path.is_file())} bytes in {FIXTURES}")
