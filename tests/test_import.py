"""Importing the package changes nothing for the process that imports it."""

import subprocess
import sys


SCRIPT = """
import importlib, pkgutil, sys, warnings

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
for module in pkgutil.walk_packages(hf_transcoders.__path__, "hf_transcoders."):
    if not module.name.endswith("__main__"):
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
