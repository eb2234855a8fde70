"""What every test runs under: no network, no bars, and trackers that write to a folder of this run."""

import atexit
import os
import shutil
import tempfile


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_RECORDS = tempfile.mkdtemp(prefix="hf_transcoders_tests_")
atexit.register(shutil.rmtree, _RECORDS, ignore_errors=True)
os.environ["TRACKIO_DIR"] = os.path.join(_RECORDS, "trackio")
os.environ["WANDB_DIR"] = _RECORDS
os.environ["WANDB_SILENT"] = "true"

import pytest  # noqa: E402
import torch  # noqa: E402


# Without a GPU, Triton's interpreter runs the kernels. It must be chosen before Triton is imported, which transformers may do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import transformers  # noqa: E402


transformers.logging.disable_progress_bar()


def pytest_addoption(parser):
    # On tiny tensors, handing work to a second thread takes longer than the work.
    parser.addoption("--threads", type=int, default=1, help="threads for tests on tiny models; 1 is the fastest")


def pytest_configure(config):
    config.stash["threads"] = torch.get_num_threads()
    torch.set_num_threads(config.getoption("--threads"))


@pytest.fixture(scope="module")
def browser():
    """A real Chromium; tests that want it are skipped where there is none."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
        )
        yield launched
        launched.close()
