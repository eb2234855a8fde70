"""Loading where the package is not installed: `AutoModel` with `trust_remote_code=True`, in processes of their own."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from hf_transcoders import TranscoderModel, TranscoderSet
from hf_transcoders.hub.remote_code import AUTO_MAP, CODE_FILES, remote_code_files
from tests.models.reference_dictionary import ACTIVATIONS, VARIANTS, make_batch, make_model

from .conftest import WRITER, assert_same_function, make_dictionary, make_set


# Loads each of the given (repo or folder, subfolder), and writes what they compute.
STRANGER = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_transcoders":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
try:
    import hf_transcoders
    raise SystemExit("the package can be imported")
except ModuleNotFoundError:
    pass
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel
job = json.loads(sys.argv[1])
# The same bits are promised for the same number of threads, among which a product is divided, and for inputs that lie
# in memory as they did there, which those mapped from a file do not.
torch.set_num_threads(job["threads"])
batch = {name: tensor.clone() for name, tensor in load_file(job["inputs"]).items()}
results = {}
for i, (path, subfolder) in enumerate(job["models"]):
    config = AutoConfig.from_pretrained(path, subfolder=subfolder, trust_remote_code=True)
    model = AutoModel.from_pretrained(path, subfolder=subfolder, trust_remote_code=True)
    assert type(config).__name__ == "TranscoderConfig" and type(model).__name__ == "TranscoderModel"
    assert type(model).__module__.startswith("transformers_modules.")
    output = model(batch["inputs"], batch["targets"])
    results |= {f"{i}.features": output.features, f"{i}.reconstruction": output.reconstruction}
    results[f"{i}.loss"] = output.loss.detach()
    model.save_pretrained(f"{job['outputs']}.{i}")
    model.fold_pre_bias_()
save_file({key: value.detach().contiguous() for key, value in results.items()}, job["outputs"])
print([name for name in sys.modules if name.startswith("hf_transcoders")])
"""


def load_as_a_stranger(models, batch, tmp_path, **environment):
    inputs, targets = batch
    save_file({"inputs": inputs, "targets": targets}, tmp_path / "inputs.safetensors")
    job = {
        "models": [[str(path), subfolder] for path, subfolder in models],
        "inputs": str(tmp_path / "inputs.safetensors"),
        "outputs": str(tmp_path / "outputs.safetensors"),
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, json.dumps(job)],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "[]"
    return load_file(job["outputs"])


def test_folders_of_every_kind_load_bit_for_bit(tmp_path):
    models = [make_model(activation, **VARIANTS["all"]) for activation in ACTIVATIONS]
    models += [make_model("topk", **VARIANTS["tied"], d_in=6), make_model("relu", d_out=5)]
    for i, model in enumerate(models):
        model.eval().save_pretrained(tmp_path / f"m{i}", remote_code=True)
    batch = make_batch(models[0])
    fitting = [i for i, model in enumerate(models) if model.config.d_out == batch[1].shape[-1]]
    outputs = load_as_a_stranger([(tmp_path / f"m{i}", "") for i in fitting], batch, tmp_path)
    assert len(fitting) >= len(ACTIVATIONS)
    for place, i in enumerate(fitting):
        ours = models[i](*batch)
        for name in ("features", "reconstruction", "loss"):
            assert torch.equal(outputs[f"{place}.{name}"], ours[name]), (models[i].config.activation, name)
        # What a stranger saves is again complete for strangers, and ours where the package is installed.
        again = tmp_path / f"outputs.safetensors.{place}"
        assert {path.name for path in again.iterdir()} == {*CODE_FILES, "config.json", "model.safetensors"}
        loaded = AutoModel.from_pretrained(again, trust_remote_code=True)
        assert type(loaded) is TranscoderModel
        for name, value in models[i].state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)


def test_a_repo_and_the_sub_folders_of_a_set(hub, tmp_path):
    single, transcoders = make_dictionary(normalization="scale"), make_set(3, 5)
    single.push_to_hub("me/single", remote_code=True)
    single.push_to_hub("me/deeper", remote_code=True, subfolder="some/where")
    transcoders.push_to_hub("me/set", remote_code=True)
    transcoders.save_pretrained(tmp_path / "set", remote_code=True)
    batch = (torch.randn(5, 16), torch.randn(5, 16))
    models = [("me/single", ""), ("me/deeper", "some/where")]
    models += [(place, name) for place in ("me/set", tmp_path / "set") for name in transcoders]
    models += [(tmp_path / "set" / name, "") for name in transcoders]
    outputs = load_as_a_stranger(models, batch, tmp_path, **hub.environment(WRITER))
    for i, (path, subfolder) in enumerate(models):
        ours = transcoders[subfolder or path.name] if i >= 2 else single
        assert torch.equal(outputs[f"{i}.reconstruction"], ours(*batch).reconstruction), (path, subfolder)
    # With the package, the same repos give our class.
    loaded = AutoModel.from_pretrained("me/set", subfolder="layers.3.mlp.transcoder", trust_remote_code=True)
    assert type(loaded) is TranscoderModel
    assert_same_function(loaded, transcoders["layers.3.mlp.transcoder"])
    assert isinstance(TranscoderSet.from_pretrained("me/set"), TranscoderSet)


def test_code_is_an_opt_in_that_does_not_stick(tmp_path):
    model = make_dictionary()
    model.save_pretrained(tmp_path / "with", remote_code=True)
    assert json.loads((tmp_path / "with" / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert AutoConfig.from_pretrained(tmp_path / "with").num_features == 64
    TranscoderModel.from_pretrained(tmp_path / "with").save_pretrained(tmp_path / "without")
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert not list((tmp_path / "without").glob("*.py"))


def test_the_files_stand_alone():
    files = remote_code_files()
    assert files.keys() == set(CODE_FILES)
    for name, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                assert (node.level == 0 and not node.module.startswith("hf_transcoders")) or (
                    node.level == 1 and node.module == "configuration_transcoder" and name == "modeling_transcoder.py"
                )
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("hf_transcoders") for alias in node.names)
    assert "def push_to_hub" not in files["modeling_transcoder.py"]


@pytest.mark.parametrize("name", CODE_FILES)
def test_every_name_in_the_files_is_defined(name):
    """A name that the joining lost would only be missed when its function is called."""
    import builtins
    import symtable

    source = remote_code_files()[name]
    known = set(dir(builtins)) | {"__file__", "__name__", "__class__"}
    table = symtable.symtable(source, name, "exec")
    known |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}

    def missing(scope):
        for symbol in scope.get_symbols():
            if symbol.is_global() and symbol.get_name() not in known:
                yield symbol.get_name()
        for child in scope.get_children():
            yield from missing(child)

    assert not set(missing(table))
