"""What a process that fuzzes is set to: caches of its own, nothing printed, one thread."""

import contextlib
import os
from pathlib import Path

import datasets
import torch
import transformers


@contextlib.contextmanager
def quiet(folder: Path):
    """Inside the block caches lie in `folder`, and libraries draw no bars."""
    cache, threads = datasets.config.HF_DATASETS_CACHE, torch.get_num_threads()
    verbosity = transformers.logging.get_verbosity()
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    # Forked processes have none of this one's other threads.
    torch.set_num_threads(1)
    before = os.getcwd()
    try:
        yield
    finally:
        os.chdir(before)
        datasets.config.HF_DATASETS_CACHE = cache
        datasets.enable_progress_bars()
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(verbosity)
