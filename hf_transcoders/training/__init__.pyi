from .arguments import TranscoderTrainingArguments as TranscoderTrainingArguments
from .baseline_dictionaries import fit_baselines as fit_baselines
from .grid import Grid as Grid
from .grid import expand_grid as expand_grid
from .grid import mlp_sites as mlp_sites
from .sweep import SweepResult as SweepResult
from .sweep import run_sweep as run_sweep
from .trainer import TranscoderTrainer as TranscoderTrainer
