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

import torch  # noqa: E402
import transformers  # noqa: E402


transformers.logging.disable_progress_bar()


def pytest_configure(config):
    # On tiny tensors, handing work to a second thread takes longer than the work.
    config.stash["threads"] = torch.get_num_threads()
    torch.set_num_threads(1)
