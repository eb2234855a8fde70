"""Arguments of a training run, in addition to `TrainingArguments`."""

import math
from dataclasses import dataclass, field
from typing import Literal

from transformers import integrations
from transformers.integrations import is_trackio_available

# From its own module, whose source `cli/outline.py` reads.
from transformers.training_args import OptimizerNames, TrainingArguments

from ..errors import TranscoderError
from ..text.similar import did_you_mean


# Tokens after which a feature that does not fire counts as dead in published runs.
_DEAD_AFTER_TOKENS = 10_000_000


@dataclass
class TranscoderTrainingArguments(TrainingArguments):
    r"""
    Arguments of a [`TranscoderTrainer`] run: all [`~transformers.TrainingArguments`], some with other defaults, and the
    following. A batch is a batch of *tokens* (activation vectors), not of texts.

    Args:
        per_device_train_batch_size (`int`, *optional*, defaults to 2048):
            Number of tokens (activation vectors) per step on one device.
        max_tokens (`int`, *optional*):
            Length of the run in tokens, over all devices. Without `max_tokens` and `max_steps` the run is `num_train_epochs`
            passes over the data.
        sequence_length (`int`, *optional*, defaults to 128):
            Length of the token blocks that a text dataset is packed into. Packed data keeps its length.
        harvest_batch_size (`int`, *optional*):
            Number of rows per forward pass of the base model. Defaults to 8 on a CPU, where larger batches leave the cache,
            and to 32 elsewhere.
        buffer_tokens (`int`, *optional*, defaults to 65536):
            Number of tokens in a shuffle block. Each data shard has its own block.
        data_shards (`int`, *optional*):
            Number of parts of the data that are shuffled separately. Every step takes equally from all parts, so a run with
            the same `data_shards` and the same tokens per step gives the same results on any number of processes that
            divides it. Defaults to the number of processes.
        skip_first (`int`, *optional*, defaults to 1):
            Number of positions left out at the start of each row, the attention sink of language models.
        skip_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether BOS, EOS and padding tokens are left out.
        outlier_factor (`float`, *optional*, defaults to 10.0):
            Factor of the median norm above which activations are left out. 0 keeps all.
        activation_cache_dir (`str`, *optional*):
            Folder that caches activations for later runs over the same data.
        activation_cache_gb (`float`, *optional*, defaults to 4.0):
            Memory for activations that a later epoch of this run needs again, in GiB.
        sparsity_warmup (`float`, *optional*, defaults to 0.1):
            Share of the run over which L1 and L0 coefficients rise from zero.
        dead_after_tokens (`int`, *optional*):
            Number of tokens after which a feature that never fired counts as dead. Defaults to 10 million, or half of the
            run if that is less: with a shorter window rare features count as dead, and reviving them costs time without
            benefit.
        initialization_tokens (`int`, *optional*, defaults to 16384):
            Number of activations to measure biases, normalization and the variance of the targets on before training.
        eval_tokens (`int`, *optional*, defaults to 16384):
            Number of tokens for fidelity in an evaluation.
        eval_loss_tokens (`int`, *optional*, defaults to 4096):
            Number of tokens for the language model's loss in an evaluation.
        report_to (`str` or `list[str]`, *optional*):
            Trackers in addition to the records in `output_dir/tracking`. Defaults to Trackio if it is installed (a local
            database: `trackio show` opens the dashboard), otherwise to `"hf_transcoders"`, which is those records alone. With
            `"none"` they have no contexts of features, which take a pass over held-out text.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to delete an earlier run (dictionaries, checkpoints, records, results) that `output_dir` holds. By
            default a folder that holds one is refused.
        project (`str`, *optional*, defaults to `"hf_transcoders"`):
            Project of the run in trackers.
        trackio_static_space_id (`str` or `False`, *optional*, defaults to `False`):
            Space on the Hub that receives a copy of the dashboard when the model is pushed. With transformers' default of
            `None` every push would create a Space.
    """

    per_device_train_batch_size: int = field(
        default=2048, metadata={"help": "Number of tokens (activation vectors) per step on one device."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate."})
    warmup_steps: float = field(
        default=0.02, metadata={"help": "Steps of linear warm-up, or their share of the run if below 1."}
    )
    optim: OptimizerNames | str = field(default="adamw_torch_fused", metadata={"help": "The optimizer to use."})
    logging_steps: float = field(
        default=20, metadata={"help": "Number of steps between two logs, or their share of the run if below 1."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Whether to hide NaN losses in the logs."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Always off: batches are computed, not loaded."}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "Length of the run in tokens over all devices, instead of `num_train_epochs`."}
    )
    sequence_length: int = field(
        default=128, metadata={"help": "Length of the token blocks that a text dataset is packed into."}
    )
    harvest_batch_size: int | None = field(
        default=None, metadata={"help": "Number of rows per forward pass of the base model; 8 on a CPU, 32 elsewhere."}
    )
    buffer_tokens: int = field(default=65536, metadata={"help": "Number of tokens in a shuffle block."})
    data_shards: int | None = field(
        default=None,
        metadata={"help": "Number of parts of the data that are shuffled separately; by default one per process."},
    )
    skip_first: int = field(
        default=1, metadata={"help": "Number of positions left out at the start of each row (the attention sink)."}
    )
    skip_special_tokens: bool = field(
        default=True, metadata={"help": "Whether BOS, EOS and padding tokens are left out."}
    )
    outlier_factor: float = field(
        default=10.0, metadata={"help": "Factor of the median norm above which activations are left out; 0 keeps all."}
    )
    activation_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder that caches activations for later runs over the same data."}
    )
    activation_cache_gb: float = field(
        default=4.0, metadata={"help": "Memory in GiB for activations that a later epoch of this run needs again."}
    )
    sparsity_warmup: float = field(
        default=0.1, metadata={"help": "Share of the run over which L1 and L0 coefficients rise from zero."}
    )
    dead_after_tokens: int | None = field(
        default=None,
        metadata={"help": "Number of tokens after which a silent feature is dead; 10 million or half of the run."},
    )
    initialization_tokens: int = field(
        default=16384, metadata={"help": "Number of activations to measure biases and scales on before training."}
    )
    eval_tokens: int = field(default=16384, metadata={"help": "Number of tokens for fidelity in an evaluation."})
    eval_loss_tokens: int = field(
        default=4096, metadata={"help": "Number of tokens for the language model's loss in an evaluation."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Whether to delete an earlier run in the output folder and start a new one."}
    )
    # Also a `str`; with this annotation the command line accepts several.
    report_to: list[str] | None = field(
        default=None,
        metadata={
            "help": "Trackers, or 'none' for neither trackers nor features; by default Trackio if it is installed."
        },
    )
    project: str = field(default="hf_transcoders", metadata={"help": "Project of the run in trackers."})
    trackio_static_space_id: str | None | Literal[False] = field(
        default=False, metadata={"help": "Space that receives a copy of the dashboard when the model is pushed."}
    )

    def __post_init__(self):
        if self.report_to is None:
            self.report_to = "trackio" if is_trackio_available() else "hf_transcoders"  # pyright: ignore[reportAttributeAccessIssue]
        super().__post_init__()
        self._check_trackers()
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

        if self.max_tokens is not None and self.max_steps <= 0:
            check_length(self.max_tokens, self.tokens_per_step)

    def _check_trackers(self) -> None:
        """Refuses trackers that do not exist or are not installed: Transformers would say so after the model is loaded."""
        known = [name for name in integrations.INTEGRATION_TO_CALLBACK if name != "hf_transcoders"]
        for name in self.report_to or ():
            if name == "hf_transcoders":
                continue
            if name not in known:
                raise TranscoderError(
                    f"`report_to` is '{name}', but must be one of {', '.join(known)} or none{did_you_mean(name, known)}"
                )
            package = {"comet_ml": "comet", "azure_ml": "azureml"}.get(name, name)
            is_available = getattr(integrations, f"is_{package}_available", None)
            if is_available is not None and not is_available():
                key = ", and set COMET_API_KEY, which Transformers asks for offline too" if name == "comet_ml" else ""
                raise TranscoderError(
                    f"The tracker '{name}' of `report_to` is not available: install it (`pip install {name.replace('_', '-')}`)"
                    f"{key}, or leave it out."
                )

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens per optimizer step, over all devices."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def dead_window(self, max_steps: int) -> int:
        """Number of tokens after which a silent feature counts as dead in a run of `max_steps`."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return min(_DEAD_AFTER_TOKENS, max_steps * self.tokens_per_step // 2)


def check_length(tokens: int, tokens_per_step: int) -> None:
    """Refuses a run whose tokens are less than one step."""
    if tokens < tokens_per_step:
        raise TranscoderError(
            f"The run has {tokens} tokens, less than one step of {tokens_per_step}: give more text or tokens, or lower "
            "`per_device_train_batch_size`."
        )
