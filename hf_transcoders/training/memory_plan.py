"""Estimate the memory, disk space and time of a training run before it starts.

Estimates are computed from sizes only: nothing is loaded, and modules may be on the `meta` device.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from ..errors import TranscoderError
from ..lm.sites import Site
from ..lm.wrappers import takes_model
from ..models.configuration_transcoder import TranscoderConfig
from ..models.model_types import count_parameters, dictionary_configs
from .arguments import TranscoderTrainingArguments, check_length


# Bytes of optimizer state per parameter; other optimizers are planned as Adam.
_OPTIMIZER_BYTES = {"sgd": 0, "lion_32bit": 4, "rmsprop": 4, "adagrad": 4, "adafactor": 0}
_ADAM_BYTES, _ADAM_8BIT_BYTES = 8, 2
# Scores that the sparse encoder computes at a time (ops/sparse.py).
_CPU_SCORES, _SCORES = 1 << 21, 1 << 28
# Tensors (tokens, features) alive at once in a step with an activation that computes all features: pre-activations,
# features, their gradients and those of the monitor, as measured.
_DENSE_COPIES = {"relu": 4, "jumprelu": 8, "gated": 9, "batchtopk": 1}
# Elements of the largest temporaries of an evaluation (evaluation/evaluator.py).
_EVALUATION_ELEMENTS = 2**23
# Share of dead features that the AuxK loss is planned for.
_DEAD_SHARE = 0.1
# Share of the peak performance that matrix products of these sizes reach.
_UTILIZATION = 0.5


@dataclass
class RunPlan:
    """
    Result of [`plan_run`]. Memory and disk space are in bytes, and memory is that of one process.

    Args:
        processes (`int`): Number of processes.
        parameters, base_parameters (`int`): Number of parameters of all dictionaries and of the language model.
        tokens (`int`, *optional*), steps (`int`, *optional*), tokens_per_step (`int`):
            Length of the run and of one step, over all processes.
        held (`dict[str, dict[str, int]]`):
            `"ddp"` and (with several processes) `"fsdp"` -> memory in use throughout the run.
        phases (`dict[str, int]`):
            Additional memory for reading activations, a step and an evaluation, which follow each other.
        disk (`dict[str, int]`): Final dictionaries, one checkpoint, all checkpoints kept, cached activations.
        flops (`dict[str, float]`):
        Floating point operations per token: forward pass of the language model, dictionaries.
        tokens_per_second (`dict[str, float]`):
        Speed of one process for each of these, and for `run`, over all processes.
        notes (`list[str]`): Assumptions of the estimate.
    """

    processes: int
    parameters: int
    base_parameters: int
    tokens: int | None
    steps: int | None
    tokens_per_step: int
    held: dict[str, dict[str, int]]
    phases: dict[str, int]
    disk: dict[str, int]
    flops: dict[str, float]
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def peak(self, sharing: str = "ddp") -> int:
        """Peak memory of one process in bytes."""
        return sum(self.held[sharing].values()) + max(self.phases.values())

    @property
    def hours(self) -> float | None:
        """Duration of the run in seconds; `None` if its length or speed is not known."""
        if self.tokens is None or not self.tokens_per_second.get("run"):
            return None
        return self.tokens / self.tokens_per_second["run"] / 3600

    def to_dict(self) -> dict:
        return {**asdict(self), "peak": {sharing: self.peak(sharing) for sharing in self.held}, "hours": self.hours}

    def set_speed(self, forward: float, step: float) -> None:
        """
        Args:
            forward, step (`float`): Tokens per second of one process, through the language model and the dictionaries.
        """
        self.tokens_per_second = {
            "language model": forward,
            "dictionaries": step,
            "run": self.processes / (1 / forward + 1 / step),
        }


@takes_model
def plan_run(
    base_model,
    configs: Mapping[str, TranscoderConfig] | Iterable[TranscoderConfig],
    args: TranscoderTrainingArguments,
    *,
    processes: int = 1,
    device_type: str = "cpu",
    rows: int | None = None,
    runtime_bytes: int = 0,
) -> RunPlan:
    """
    Estimates memory and disk space of a run.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            Language model in its precision for the run. It may be on the `meta` device.
        configs (`Mapping[str, TranscoderConfig]` or `Iterable[TranscoderConfig]`):
            Configurations of the dictionaries, or of a cross-layer transcoder.
        args ([`TranscoderTrainingArguments`]):
            Arguments of the run. Sizes of batches and blocks are those of one process.
        processes (`int`, *optional*, defaults to 1):
            Number of processes.
        device_type (`str`, *optional*, defaults to `"cpu"`):
            Type of the device of each process.
        rows (`int`, *optional*):
            Number of rows of the data, if known: a run over less than all data caches nothing.
        runtime_bytes (`int`, *optional*, defaults to 0):
            Memory of Python, PyTorch and the device's context before anything is loaded.

    Returns:
        [`RunPlan`], without speeds.
    """
    configs = list(configs.values() if isinstance(configs, Mapping) else configs)
    if processes < 1:
        raise TranscoderError(f"A run needs at least one process, not {processes}.")
    notes = []
    # Layers of a cross-layer transcoder are planned one by one, and it cannot be sharded.
    is_shardable = all(dictionary_configs(config) is None for config in configs)
    configs = [one for config in configs for one in (dictionary_configs(config) or {"": config}).values()]
    sizes = [count_parameters(config) for config in configs]
    parameters = sum(sizes)
    base_bytes = sum(p.numel() * p.element_size() for p in base_model.parameters())
    element = base_model.dtype.itemsize
    widths = {config.input_site: config.d_in for config in configs} | {c.output_site: c.d_out for c in configs}
    token_bytes = sum(widths.values()) * element  # pyright: ignore[reportCallIssue]
    batch = args.per_device_train_batch_size
    step_tokens = batch * args.gradient_accumulation_steps * processes
    steps, tokens = _length(args, step_tokens, rows)
    kept = args.sequence_length - args.skip_first

    shards = max(1, args.data_shards // processes)
    buffer = (
        args.buffer_tokens
        if rows is None
        else min(args.buffer_tokens, rows * kept // max(args.data_shards, processes))
    )
    cached = 0
    if rows is None:
        notes.append("The data was not counted: planned as if one pass over it were longer than the run.")
    elif tokens is not None and tokens > rows * kept:
        cached = min(int(args.activation_cache_gb * 2**30), rows * kept * token_bytes // processes)
    per_parameter = _optimizer_bytes(str(getattr(args.optim, "value", args.optim)), notes)
    common = {
        "language model": base_bytes,
        "activation block": shards * max(buffer, batch // shards) * token_bytes,
        "activations kept for later epochs": cached,
        "runtime": runtime_bytes,
    }
    held = {
        "ddp": {
            "dictionaries": 4 * parameters,
            # DistributedDataParallel sums gradients in its own buckets.
            "gradients": 4 * parameters * (2 if processes > 1 else 1),
            "optimizer": per_parameter * parameters,
            **common,
        }
    }
    if processes > 1 and is_shardable:
        share = -(-parameters // processes)
        held["fsdp"] = {
            "dictionaries": 4 * share,
            "gradients": 4 * share,
            "optimizer": per_parameter * share,
            # One dictionary at a time is gathered, with its gradient.
            "gathered": 8 * max(sizes),
            **common,
        }
    if processes > 1:
        notes.append("Communication is not included in the time.")
    chunk = args.harvest_batch_size * args.sequence_length
    text = base_model.config.get_text_config()
    # Residual stream, its norm, queries, keys, values and output of attention; gate, up and product of the MLP.
    forward = chunk * (8 * text.hidden_size + 3 * _intermediate(text)) * element + 2 * chunk * token_bytes
    logits = min(chunk * text.vocab_size, _EVALUATION_ELEMENTS)
    phases = {
        "reading activations": forward,
        "step": batch * token_bytes + sum(_step_bytes(config, batch, device_type) for config in configs),
        # Logits of a few positions, of the original and of a spliced model, and log-probabilities in float32.
        "evaluation": forward + logits * (element + 4 * 4),
    }
    checkpoint = (4 + per_parameter) * parameters
    disk = {"dictionaries": 4 * parameters, "checkpoint": checkpoint}
    disk["checkpoints"] = checkpoint * _checkpoints(args, steps)
    disk["activation cache"] = rows * kept * token_bytes if args.activation_cache_dir and rows is not None else 0
    last = (
        max((Site.parse(site).layer or 0) + 1 for site in widths)
        if all(Site.parse(site).layer is not None for site in widths)
        else text.num_hidden_layers
    )
    flops = {
        "language model": _forward_flops(base_model, last, args.sequence_length),
        "dictionaries": float(sum(_step_flops(config) for config in configs)),
    }
    return RunPlan(
        processes=processes,
        parameters=parameters,
        base_parameters=sum(p.numel() for p in base_model.parameters()),
        tokens=tokens,
        steps=steps,
        tokens_per_step=step_tokens,
        held=held,
        phases=phases,
        disk=disk,
        flops=flops,
        notes=notes,
    )


def estimate_speed(plan: RunPlan, forward_flops: float, step_flops: float) -> None:
    """
    Returns a plan with speeds estimated from floating point operations.

    Args:
        plan ([`RunPlan`]): Plan without speeds.
        forward_flops, step_flops (`float`):
            Peak operations per second of one device in the precision of the language model and of the dictionaries.
    """
    plan.set_speed(
        _UTILIZATION * forward_flops / plan.flops["language model"],
        _UTILIZATION * step_flops / plan.flops["dictionaries"],
    )
    plan.notes.append(f"Speed is an estimate: {_UTILIZATION:.0%} of the peak of matrix products alone.")


def _length(args, step_tokens: int, rows: int | None) -> tuple[int | None, int | None]:
    if args.max_steps > 0:
        return args.max_steps, args.max_steps * step_tokens
    tokens = args.max_tokens
    if tokens is None:
        if rows is None:
            return None, None
        tokens = int(args.num_train_epochs * rows * (args.sequence_length - args.skip_first))
    check_length(tokens, step_tokens)
    return tokens // step_tokens, tokens // step_tokens * step_tokens


def _optimizer_bytes(name: str, notes: list[str]) -> int:
    if "8bit" in name:
        return _ADAM_8BIT_BYTES
    if name not in _OPTIMIZER_BYTES and "adam" not in name:
        notes.append(f"Planned the optimizer '{name}' as if it kept as much as Adam.")
    return _OPTIMIZER_BYTES.get(name, _ADAM_BYTES)


def _written(config: TranscoderConfig) -> int:
    """Numbers that a dictionary writes for each token, at all of its sites."""
    return config.d_out * max(1, len(config.output_sites))  # pyright: ignore[reportOptionalOperand]


def _step_bytes(config: TranscoderConfig, tokens: int, device_type: str) -> int:
    """Memory of one forward and backward pass besides parameters, all in float32."""
    rows = 5 * tokens * (config.d_in + _written(config))
    if config.is_sparse:
        pairs = 8 * tokens * config.k
        scores = tokens * config.num_features
        if config.activation == "topk":
            limit = _CPU_SCORES if device_type == "cpu" else _SCORES
            scores = min(scores, max(limit, config.num_features))
        else:
            scores *= _DENSE_COPIES["batchtopk"]
    else:
        pairs, scores = 0, _DENSE_COPIES[config.activation] * tokens * config.num_features
    dead = int(_DEAD_SHARE * config.num_features) if config.auxk_coefficient else 0
    return 4 * (rows + pairs + scores + 4 * tokens * dead)


def _step_flops(config: TranscoderConfig) -> float:
    """Operations per token of a dictionary, forward and backward."""
    n, d_in, d_out = config.num_features, config.d_in, _written(config)
    if config.is_sparse:
        return 2 * n * d_in + 6 * config.k * (d_in + d_out)
    return 6 * n * (d_in + d_out) - 2 * n * d_in


def _forward_flops(base_model, layers: int, length: int) -> float:
    """Operations per token of the language model, up to the last block that is read."""
    text = base_model.config.get_text_config()
    embeddings = {
        id(p)
        for module in (base_model.get_input_embeddings(), base_model.get_output_embeddings())
        if module
        for p in module.parameters()
    }
    blocks = sum(p.numel() for p in base_model.parameters() if id(p) not in embeddings)
    share = layers / text.num_hidden_layers
    return 2 * blocks * share + 4 * layers * length * text.hidden_size


def _intermediate(text) -> int:
    return next(
        (getattr(text, name) for name in ("intermediate_size", "ffn_dim", "n_inner") if getattr(text, name, None)),
        4 * text.hidden_size,
    )


def _checkpoints(args, steps: int | None) -> int:
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "no" or steps is None:
        return 0
    every = args.save_steps if args.save_steps >= 1 else args.save_steps * steps
    written = math.ceil(steps / every)
    # The checkpoint being written comes in addition to those that are kept.
    return written if args.save_total_limit is None else min(written, args.save_total_limit + 1)
