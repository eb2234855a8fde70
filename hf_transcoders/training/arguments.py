"""What a training run can be told, on top of `TrainingArguments`."""

import math
from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments
from transformers.integrations import is_trackio_available
from transformers.training_args import OptimizerNames

from ..errors import TranscoderError


# The window after which a silent feature counts as dead in published runs, in tokens.
_DEAD_AFTER_TOKENS = 10_000_000


@dataclass
class TranscoderTrainingArguments(TrainingArguments):
    r"""
    Arguments of a [`TranscoderTrainer`] run. Everything of [`~transformers.TrainingArguments`] holds, with other
    defaults where dictionaries need them; a batch is a batch of *tokens* (activation vectors), not of texts.

    Args:
        per_device_train_batch_size (`int`, *optional*, defaults to 2048):
            Tokens (activation vectors) of one step on one device.
        max_tokens (`int`, *optional*):
            Length of the run in tokens, over all devices. Without it and without `max_steps`, `num_train_epochs` passes
            over the data.
        sequence_length (`int`, *optional*, defaults to 128):
            Length of the token blocks that a text dataset is packed into. Already packed data keeps its own.
        harvest_batch_size (`int`, *optional*):
            Rows of one forward of the base model. Defaults to 8 on a CPU, whose cache larger batches overflow, and to 32
            elsewhere.
        buffer_tokens (`int`, *optional*, defaults to 65536):
            Tokens of one shuffle block. Each data shard has its own.
        data_shards (`int`, *optional*):
            Into how many parts, each shuffled by itself, the data is split. Every step takes equally from all of them, so
            that a run with the same `data_shards` and the same tokens per step gives the same numbers on any number of
            processes that divides it. Defaults to the number of processes.
        skip_first (`int`, *optional*, defaults to 1):
            Positions left out at the start of each row, where language models park an attention sink.
        skip_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether BOS, EOS and padding tokens are left out.
        outlier_factor (`float`, *optional*, defaults to 10.0):
            Tokens whose activation is longer than this many medians are left out. 0 keeps all.
        activation_cache_dir (`str`, *optional*):
            Folder where activations are kept for later runs over the same data.
        activation_cache_gb (`float`, *optional*, defaults to 4.0):
            Memory for activations that are needed again in a later epoch of this run.
        sparsity_warmup (`float`, *optional*, defaults to 0.1):
            Share of the run over which L1 and L0 coefficients rise from zero.
        dead_after_tokens (`int`, *optional*):
            Tokens after which a feature that never fired counts as dead. Defaults to 10 million, or half of the run
            where that is less: a window that is too short takes rare features for dead ones, and reviving them costs
            time and gains nothing.
        initialization_tokens (`int`, *optional*, defaults to 16384):
            Activations that biases, normalisation and the targets' variance are measured on before training.
        eval_tokens (`int`, *optional*, defaults to 16384):
            Tokens of an evaluation that measure fidelity.
        eval_loss_tokens (`int`, *optional*, defaults to 4096):
            Tokens of an evaluation that measure the language model's loss.
        report_to (`str` or `list[str]`, *optional*):
            Trackers besides the records in `output_dir/tracking`, which are always there. Defaults to Trackio where it is
            installed (a local database: `trackio show` opens the dashboard), else to none.
        project (`str`, *optional*, defaults to `"hf_transcoders"`):
            Under which trackers file the run.
        trackio_static_space_id (`str` or `False`, *optional*, defaults to `False`):
            A Space on the Hub that becomes a copy of the dashboard when the model is pushed. With transformers' own default
            of `None` every push would create one.
    """

    per_device_train_batch_size: int = field(
        default=2048, metadata={"help": "Tokens (activation vectors) of one step on one device."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate."})
    warmup_steps: float = field(
        default=0.02, metadata={"help": "Steps of linear warm-up, or their share of the run if below 1."}
    )
    optim: OptimizerNames | str = field(default="adamw_torch_fused", metadata={"help": "The optimizer to use."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two logs, or their share of the run."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Whether to hide NaN losses in the logs."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: batches are made, not loaded."})
    max_tokens: int | None = field(
        default=None, metadata={"help": "Length of the run in tokens over all devices; else `num_train_epochs`."}
    )
    sequence_length: int = field(
        default=128, metadata={"help": "Length of the token blocks that a text dataset is packed into."}
    )
    harvest_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of one forward of the base model; 8 on a CPU, 32 elsewhere."}
    )
    buffer_tokens: int = field(default=65536, metadata={"help": "Tokens of one shuffle block."})
    data_shards: int | None = field(
        default=None,
        metadata={"help": "Parts of the data that are shuffled by themselves; by default one for each process."},
    )
    skip_first: int = field(
        default=1, metadata={"help": "Positions left out at the start of each row (the attention sink)."}
    )
    skip_special_tokens: bool = field(
        default=True, metadata={"help": "Whether BOS, EOS and padding tokens are left out."}
    )
    outlier_factor: float = field(
        default=10.0, metadata={"help": "Leave out activations longer than this many medians; 0 keeps all."}
    )
    activation_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder where activations are kept for later runs over the same data."}
    )
    activation_cache_gb: float = field(
        default=4.0, metadata={"help": "Memory for activations that a later epoch of this run needs again."}
    )
    sparsity_warmup: float = field(
        default=0.1, metadata={"help": "Share of the run over which L1 and L0 coefficients rise from zero."}
    )
    dead_after_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens without firing after which a feature is dead; 10 million or half of the run."},
    )
    initialization_tokens: int = field(
        default=16384, metadata={"help": "Activations that biases and scales are measured on before training."}
    )
    eval_tokens: int = field(default=16384, metadata={"help": "Tokens that measure fidelity in an evaluation."})
    eval_loss_tokens: int = field(
        default=4096, metadata={"help": "Tokens that measure the language model's loss in an evaluation."}
    )
    # `str` as well; so annotated, the command line takes several.
    report_to: list[str] | None = field(
        default=None, metadata={"help": "Trackers, or 'none'; Trackio where it is installed."}
    )
    project: str = field(default="hf_transcoders", metadata={"help": "Under which trackers file the run."})
    trackio_static_space_id: str | None | Literal[False] = field(
        default=False, metadata={"help": "A Space that becomes a copy of the dashboard when the model is pushed."}
    )

    def __post_init__(self):
        if self.report_to is None:
            self.report_to = "trackio" if is_trackio_available() else "none"  # pyright: ignore[reportAttributeAccessIssue]
        super().__post_init__()
        if self.harvest_batch_size is None:
            self.harvest_batch_size = 8 if self.device.type == "cpu" else 32
        for name in (
            "per_device_train_batch_size",
            "sequence_length",
            "harvest_batch_size",
            "buffer_tokens",
            "initialization_tokens",
            "eval_tokens",
            "eval_loss_tokens",
            "gradient_accumulation_steps",
            "dead_after_tokens",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise TranscoderError(f"`{name}` is {getattr(self, name)}; give a number of at least 1.")
        for name in ("outlier_factor", "activation_cache_gb", "weight_decay", "max_grad_norm", "num_train_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise TranscoderError(f"`{name}` is {getattr(self, name)}; give a number of at least 0.")
        if not 0 <= self.seed < 2**32:
            raise TranscoderError(f"`seed` is {self.seed}; give a number from 0 to {2**32 - 1}.")
        if self.data_shards is None:
            self.data_shards = self.world_size
        if self.data_shards < 1 or self.data_shards % self.world_size:
            raise TranscoderError(
                f"`data_shards` is {self.data_shards} but must be a multiple of the {self.world_size} processes, which "
                "share the shards equally."
            )
        if self.per_device_train_batch_size * self.world_size % self.data_shards:
            raise TranscoderError(
                f"`data_shards` is {self.data_shards} but every step takes equally from each shard: choose a "
                f"`per_device_train_batch_size` (now {self.per_device_train_batch_size}) that is a multiple of the "
                f"{self.data_shards // self.world_size} shards of one process."
            )
        if self.skip_first < 0 or self.skip_first >= self.sequence_length:
            raise TranscoderError(
                f"`skip_first` is {self.skip_first} but must lie between 0 and the sequence length "
                f"({self.sequence_length}), or no token is left."
            )
        if not 0 <= self.sparsity_warmup <= 1:
            raise TranscoderError(f"`sparsity_warmup` is {self.sparsity_warmup}; give a share of the run, 0 to 1.")
        if self.n_gpu > 1:
            raise TranscoderError(
                "Several GPUs in one process are not supported: start one process for each with `accelerate launch`, or "
                "choose one with CUDA_VISIBLE_DEVICES."
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all devices."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def dead_window(self, max_steps: int) -> int:
        """Tokens after which a silent feature counts as dead in a run of `max_steps`."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return min(_DEAD_AFTER_TOKENS, max_steps * self.tokens_per_step // 2)
