"""Train dictionaries with the Hugging Face Trainer."""

from .arguments import TranscoderTrainingArguments
from .grid import Grid, expand_grid, mlp_sites
from .sweep import SweepResult, run_sweep
from .trainer import TranscoderTrainer


__all__ = [
    "Grid",
    "SweepResult",
    "TranscoderTrainer",
    "TranscoderTrainingArguments",
    "expand_grid",
    "mlp_sites",
    "run_sweep",
]
