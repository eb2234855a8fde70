"""Dictionaries in the files of other libraries."""

import pickle
import random
import shutil
import zipfile
from pathlib import Path

import torch

from hf_transcoders import CrossLayerTranscoder, TranscoderModel, TranscoderSet
from tests.formats.peers import FIXTURES
from tests.formats.writers import (
    pickled,
    write_gemma_scope_1,
    write_gemma_scope_2,
    write_linear_pair,
    write_llama_scope,
    write_llama_scope_r1,
    write_old_saelens,
    write_openai,
    write_qwen_scope,
)
from tests.models.cross_layer.setups import cross_layer

from .mutations import damage_bytes
from .target import Target, trusted_numbers, used_dictionary


# What the files leave out.
SAID = {"base_model": "some/base", "input_site": "layers.1.resid_post"}
ARCHIVES = (".pt", ".npz")


class ForeignDictionary(Target):
    """One dictionary: settings as JSON beside safetensors, torch or NumPy files."""

    weight = 4.0

    def make(self, folder):
        for name in (
            "saelens_gated", "saelens_jumprelu", "saelens_skip_transcoder", "sparsify_sae",
            "dictionary_learning_BatchTopKSAE", "dictionary_learning_JumpReluAutoEncoder", "saelens_layer_norm",
            "llamascopium_jumprelu",
        ):  # fmt: skip
            shutil.copytree(FIXTURES / name, folder / name)
        write_gemma_scope_1(folder / "gemma_scope_1" / "params.npz")
        write_gemma_scope_2(
            folder / "gemma_scope_2",
            {
                "architecture": "jump_relu",
                "model_name": "google/gemma-3-270m",
                "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
                "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
            },
        )
        write_llama_scope(folder / "llama_scope", "blocks.1.hook_resid_post", "blocks.1.hook_resid_post")
        write_old_saelens(folder / "old_saelens", "blocks.1.hook_resid_post")
        write_llama_scope_r1(folder / "llama_scope_r1")
        for name, write in (
            ("openai", write_openai), ("linear_pair", write_linear_pair), ("qwen_scope", write_qwen_scope),
        ):  # fmt: skip
            (folder / name).mkdir()
            write(folder / name / "layer_1.pt")

    def damage(self, rng, sample, outside):
        archives = [path for path in sorted(sample.rglob("*")) if path.suffix in ARCHIVES]
        if archives and rng.random() < 0.6:
            path = rng.choice(archives)
            return f"{path.relative_to(sample)}: {damage_archive(rng, path, outside)}"
        return super().damage(rng, sample, outside)

    def load(self, sample):
        # Settings that the files hold themselves are refused when they are given, unless they agree.
        said = SAID if sample.name in ("gemma_scope_1", "openai", "linear_pair") else {}
        said = {**SAID, "k": 3} if sample.name == "qwen_scope" else said
        said = {"base_model": "some/base"} if sample.name in ("sparsify_sae", "llama_scope") else said
        said = {"folded": False} if sample.name == "old_saelens" else said
        said = {"base_model": "some/base", "folded": False} if sample.name == "llamascopium_jumprelu" else said
        if sample.name == "llama_scope_r1":
            said = {"base_model": "some/base", "folded": False, "scaling_factor": 1.5}
        return TranscoderModel.from_pretrained(sample, **said)

    def use(self, loaded, work):
        return used_dictionary(loaded)

    def numbers(self, loaded, used):
        return trusted_numbers([loaded], used)


class ForeignCrossLayer(Target):
    """A cross-layer transcoder: settings as JSON or YAML beside safetensors."""

    weight = 3.0

    def make(self, folder):
        for path in sorted(FIXTURES.glob("clt_*")):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
        model = cross_layer("jumprelu", base_model_name_or_path="some/base", tanh_coefficient=0.0)
        model.save_pretrained(folder / "gemma_scope", format="gemma-scope")

    def load(self, sample):
        said = {"base_model": "some/base", "folded": False} if "llamascopium" in sample.name else {}
        if "crosslayer" in sample.name:
            said = {"base_model": "some/base", "input_site": "mlp.in", "output_site": "mlp.branch"}
        return CrossLayerTranscoder.from_pretrained(sample, **said)

    @torch.no_grad()
    def use(self, loaded, work):
        generator = torch.Generator().manual_seed(0)
        inputs = {site: torch.randn(5, loaded.config.d_in, generator=generator) for site in loaded.config.input_sites}
        outputs = loaded.eval()(inputs).outputs.values()
        numbers = [[output.reconstruction, output.features] for output in outputs]
        return [numbers, loaded.config.to_diff_dict() | {"_name_or_path": ""}]

    def numbers(self, loaded, used):
        return trusted_numbers([loaded], used)


class ForeignSet(Target):
    """A set of circuit-tracer, whose settings are YAML."""

    weight = 1.0

    def make(self, folder):
        for name in ("circuit_tracer_relu", "circuit_tracer_jumprelu"):
            shutil.copytree(FIXTURES / name, folder / name)

    def load(self, sample):
        return TranscoderSet.from_pretrained(sample)

    def use(self, loaded, work):
        return [used_dictionary(dictionary) for dictionary in loaded.values()]

    def numbers(self, loaded, used):
        return trusted_numbers(loaded.values(), used)


def damage_archive(rng: random.Random, path: Path, outside: Path) -> str:
    """One change to a zip file of arrays or tensors: to an entry, to the list of entries, or a pickle that is a program."""
    kind = rng.choice(["entry", "entry", "entry", "drop", "rename", "double", "bomb", "program"])
    if kind == "program":
        path.write_bytes(rng.choice([pickled({"W_enc": Program(outside)}), pickled([1, 2]), pickle.dumps(None)]))
        return "a pickle that runs a program"
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = rng.randrange(len(entries))
    name, content = entries[at]
    what = f"{kind} {name}"
    compression = zipfile.ZIP_STORED
    if kind == "entry":
        content, damage = damage_bytes(rng, content)
        entries[at] = name, content
        what += f": {damage}"
    elif kind == "drop":
        del entries[at]
    elif kind == "rename":
        entries[at] = rng.choice(["../outside.npy", "/etc/x.npy", name + "x", "a/" + name, ""]) or "x", content
    elif kind == "double":
        entries.append((name, content[::-1]))
    else:
        entries[at], compression = (name, content + bytes(64 << 20)), zipfile.ZIP_DEFLATED
    path.unlink()
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return what


class Program:
    """Unpickled by a careless reader, it makes a file in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return open, (str(self.folder / "ran"), "w")
