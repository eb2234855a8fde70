"""What every test runs under: no network, no bars."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
import transformers  # noqa: E402


transformers.logging.disable_progress_bar()


def pytest_configure(config):
    # On tiny tensors, handing work to a second thread takes longer than the work.
    config.stash["threads"] = torch.get_num_threads()
    torch.set_num_threads(1)
