"""Importing the package is quick, changes nothing for the process that imports it, and makes the Auto classes know dictionaries."""

import subprocess
import sys

import pytest

from hf_transcoders import TranscoderConfig, TranscoderModel
from hf_transcoders.cli.main import _COMMANDS


SCRIPT = """
import importlib, importlib.util, pkgutil, sys, warnings

added = []

def watched(function):
    def call(*args, **kwargs):
        before = {id(entry) for entry in warnings.filters}
        function(*args, **kwargs)
        if sys._getframe(1).f_globals["__name__"].startswith("hf_transcoders"):
            added.extend(entry for entry in warnings.filters if id(entry) not in before)
    return call

warnings.filterwarnings, warnings.simplefilter = watched(warnings.filterwarnings), watched(warnings.simplefilter)
import hf_transcoders
triton = importlib.util.find_spec("triton")
for module in pkgutil.walk_packages(hf_transcoders.__path__, "hf_transcoders."):
    if not module.name.endswith("__main__") and (triton or not module.name.startswith("hf_transcoders.ops.triton.")):
        importlib.import_module(module.name)
left = [entry for entry in added if any(entry is other for other in warnings.filters)]
print(len(sys.modules) > 500, bool(added), left)
"""


def test_warning_filters_stay_as_they_are():
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    # The filter of `ops.sparse` is seen, and gone again.
    assert found.stdout.splitlines()[-1] == "True True []"


def test_no_warning_about_csr_tensors():
    script = (
        "import torch, hf_transcoders.ops.sparse\n"
        "torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1.0]), (1, 1))"
    )
    found = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


AUTO_CLASSES = """
import hf_transcoders
from transformers import AutoConfig, AutoModel
config = AutoConfig.from_pretrained({folder!r})
model = AutoModel.from_pretrained({folder!r})
print(type(config) is hf_transcoders.TranscoderConfig, type(model) is hf_transcoders.TranscoderModel)
"""
# What is imported before the lines above.
FIRST = [
    "",
    "from transformers import AutoModel, AutoTokenizer, pipeline",
    "import hf_transcoders; from transformers import PreTrainedModel, Trainer",
    "from hf_transcoders import TranscoderSet",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "dictionary"
    TranscoderModel(TranscoderConfig(d_in=4, num_features=8, k=2)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("first", FIRST)
def test_auto_classes_know_dictionaries_in_every_order_of_imports(saved, first):
    script = f"{first}\n{AUTO_CLASSES.format(folder=saved)}"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.split() == ["True", "True"], found.stderr


def test_only_a_configuration_needs_no_model_code(saved):
    script = (
        "import sys, hf_transcoders; from transformers import AutoConfig\n"
        f"print(AutoConfig.from_pretrained({saved!r}).k, 'hf_transcoders.models.modeling_transcoder' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["2", "False"]


# Each of these takes from a tenth of a second to seconds to import.
SLOW_MODULES = {
    "torch",
    "transformers",
    "huggingface_hub",
    "datasets",
    "numpy",
    "accelerate",
    "pandas",
    "yaml",
    "httpx",
}


@pytest.mark.parametrize(
    "statement",
    [
        "import hf_transcoders",
        "import hf_transcoders.models, hf_transcoders.lm, hf_transcoders.training, hf_transcoders.data",
        "from hf_transcoders import TranscoderError, __version__",
    ],
)
def test_importing_the_package_is_quick(statement):
    script = f"import sys\n{statement}\nprint(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not SLOW_MODULES & {*found.stdout.split()}


def quick_commands():
    """Command lines that show help or find a mistake."""
    yield from ([], ["--help"], ["--version"], ["nonsense"], ["--debug", "info"])
    for name in _COMMANDS:
        yield [name, "--help"]
        yield [name, "--no-such-option"]
    for line in ("runs list --help", "tasks show --help", "circuits reuse --help", "study blind --help", "evaluate"):
        yield line.split()
    yield ["evaluate", "--transcoders", "x", "--max-tokens", "eight"]
    for command in ("train", "sweep", "plan"):
        for wrong in (
            "--learning-rat 1",
            "--k four",
            "--save-strategy sometimes",
            "--bf16 perhaps",
            "--learning-rate nan",
        ):
            yield [command, *wrong.split()]


def test_help_and_mistakes_are_quick():
    """All in one process: none of them imports a slow module."""
    script = (
        "import contextlib, io, sys\n"
        "from hf_transcoders.cli import main\n"
        f"for argv in {[line for line in quick_commands() if line != ['convert', '--help']]!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        try:\n"
        "            code = main(argv)\n"
        "        except SystemExit as end:\n"
        "            code = end.code\n"
        "    assert code == (0 if '--help' in argv or '--version' in argv else 2), argv\n"
        f"    assert not {SLOW_MODULES!r} & {{*sys.modules}}, argv\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
