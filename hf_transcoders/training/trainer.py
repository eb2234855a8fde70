"""A Trainer whose batches are activations of a language model."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.integrations import TrackioCallback
from transformers.trainer_utils import TrainOutput, get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

from ..data.activations import ActivationStream
from ..data.harvest import ActivationHarvester
from ..errors import TranscoderError
from ..evaluation import EvaluationReport, TranscoderEvaluator
from ..files import atomic_file
from ..lm import site_width
from ..models import TranscoderModel, TranscoderSet
from ..models.transcoder_set import dictionary_name
from ..tracking import TranscoderTrackingCallback, TranscoderTrackioCallback
from .arguments import TranscoderTrainingArguments
from .monitor import DictionaryMonitor
from .progress import TrainingPrinterCallback, TrainingProgressCallback


logger = logging.get_logger(__name__)

# Optimizer steps between two looks at which features are dead; a look waits for the device.
_REFRESH_STEPS = 16
_MONITOR_STATE = "monitors_{rank}.safetensors"
# Tokens of a batch whose pre-activations are shown.
_SAMPLE_TOKENS = 256
_STREAM_STATE = "activation_stream_{rank}.json"


class TranscoderTrainer(Trainer):
    """
    Trains one dictionary, or several on the same forward passes of the base model.

    It is a [`~transformers.Trainer`]: schedulers, accumulation, mixed precision (`bf16`, `fp16`), callbacks,
    `report_to`, `resume_from_checkpoint` and `accelerate launch` work as everywhere. The run is recorded in
    `output_dir/tracking` too, whatever `report_to` says (see [`TranscoderTrackingCallback`]). Differences: a batch is a batch of
    tokens, the gradient is clipped for each dictionary alone (so that training together changes nothing), and
    [`~TranscoderTrainer.evaluate`] runs a [`TranscoderEvaluator`].

    Logged for each dictionary, under `<name>/`: every loss term, `l0`, `l1`, `mse`, `fvu`, `explained_variance`,
    `shrinkage` (relative reconstruction bias, 1 is unbiased), `dead_fraction` (within `dead_after_tokens`), `grad_norm`;
    and for the run `tokens`, `tokens_per_second`.

    Args:
        model ([`TranscoderModel`], [`TranscoderSet`], `Iterable[TranscoderModel]` or `Mapping[str, TranscoderModel]`):
            What is trained. Their configurations say where they read and write.
        base_model ([`~transformers.PreTrainedModel`]):
            The language model whose activations are learned. It is never changed.
        args ([`TranscoderTrainingArguments`], *optional*):
            Defaults to a run into `transcoder_output`.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Rows with `input_ids` (see [`pack_tokens`]), or with `text`, which are then packed with `processing_class`.
        eval_dataset (`datasets.Dataset`, *optional*):
            The same, held out.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The base model's tokenizer: packs texts and says which tokens are special.
        callbacks, optimizers:
            As for [`~transformers.Trainer`].

    Example:

    ```python
    >>> config = TranscoderConfig.for_model(base, "layers.8.mlp.in", "layers.8.mlp.branch", num_features=4608, k=64)
    >>> trainer = TranscoderTrainer(
    ...     model=TranscoderModel(config),
    ...     base_model=base,
    ...     args=TranscoderTrainingArguments("runs/l8", max_tokens=1_000_000),
    ...     train_dataset=blocks,
    ... )
    >>> trainer.train()
    >>> trainer.save_model()
    ```
    """

    def __init__(
        self,
        model: TranscoderModel | TranscoderSet | Iterable[TranscoderModel] | Mapping[str, TranscoderModel],
        base_model=None,
        args: TranscoderTrainingArguments | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers=(None, None),
    ):
        args = args or TranscoderTrainingArguments("transcoder_output")
        if base_model is None:
            raise TranscoderError("Give the language model to learn from as `base_model`.")
        if not isinstance(model, TranscoderModel | TranscoderSet):
            model = TranscoderSet(model)
        if isinstance(model, TranscoderModel):
            self.dictionaries = {dictionary_name(model.config): model}
        else:
            self.dictionaries = dict(model.items())
        for name, dictionary in self.dictionaries.items():
            _check_fits(name, dictionary, base_model)
        self.base_model = base_model.to(args.device)
        # It belongs to the base model: given to the Trainer, it would be saved beside the dictionary and would write the
        # text's special tokens into the dictionary's configuration.
        self.tokenizer = processing_class
        self.stream: ActivationStream | None = None
        self.monitors: dict[str, DictionaryMonitor] = {}
        self._resume_from: str | None = None
        train_dataset = _token_rows(train_dataset, processing_class, args.sequence_length)
        eval_dataset = _token_rows(eval_dataset, processing_class, args.sequence_length)
        if args.max_steps <= 0:
            args.max_steps = _count_steps(args, train_dataset)
        # The stream continues by itself; the Trainer would replay it batch by batch.
        args.ignore_data_skip = True
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        #: The newest [`EvaluationReport`], and activations of some tokens of the last logged step.
        self.last_evaluation: EvaluationReport | None = None
        self.activation_sample: dict[str, torch.Tensor] | None = None
        self.tracking = self.pop_callback(TranscoderTrackingCallback) or TranscoderTrackingCallback()
        self.tracking.attach(self)
        # First, so that it names the run before others open theirs, and adds to them before they close.
        self.callback_handler.callbacks.insert(0, self.tracking)
        # Before it, so that every other callback sees the dictionaries as they are after the step.
        self.callback_handler.callbacks.insert(0, _StepCallback(self))
        for plain, own in (
            (ProgressCallback, TrainingProgressCallback),
            (PrinterCallback, TrainingPrinterCallback),
            (TrackioCallback, TranscoderTrackioCallback),
        ):
            if self.pop_callback(plain) is not None:
                self.add_callback(own())

    # ------------------------------------------------------------------------------------------------ data

    def harvested_sites(self) -> list[str]:
        """Where activations are read in a forward of the base model: wherever a dictionary reads or writes."""
        return [s for d in self.dictionaries.values() for s in (d.config.input_site, d.config.output_site)]

    def make_harvester(self, dataset) -> ActivationHarvester:
        """The source of activations for a dataset, as the arguments want it."""
        args = self.args
        rows = len(dataset) if hasattr(dataset, "__len__") else None
        epoch_tokens = rows * len(dataset[0]["input_ids"]) if rows else math.inf
        needs_again = args.max_steps * args.tokens_per_step > epoch_tokens
        return ActivationHarvester(
            self.base_model,
            dataset,
            self.harvested_sites(),
            rows_per_chunk=args.harvest_batch_size,
            skip_first=args.skip_first,
            special_token_ids=self._special_token_ids(),
            outlier_factor=args.outlier_factor or None,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            autocast=self.accelerator.autocast,
            cache_dir=args.activation_cache_dir,
            memory_cache_bytes=int(args.activation_cache_gb * 2**30) if needs_again else 0,
        )

    def _special_token_ids(self) -> list[int]:
        if not self.args.skip_special_tokens or self.tokenizer is None:
            return []
        return list(self.tokenizer.all_special_ids)

    def get_train_dataloader(self) -> ActivationStream:
        """The stream of activation batches, at the place where the run is."""
        if self.stream is None:
            args = self.args
            self.stream = ActivationStream(
                self.make_harvester(self.train_dataset),
                batch_size=args.per_device_train_batch_size,
                buffer_tokens=args.buffer_tokens,
                seed=args.data_seed if args.data_seed is not None else args.seed,
                rank=args.process_index,
                world_size=args.world_size,
                progress=not args.disable_tqdm and args.process_index == 0,
            )
        return self.stream

    # ------------------------------------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Trains, as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint folder, or `True` for the last one in `args.output_dir`. The run continues exactly: weights,
                optimizer, shuffling, dead-feature counts and running logs.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]
        """
        if resume_from_checkpoint is True:
            output_dir = self.args.output_dir
            resume_from_checkpoint = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
            if resume_from_checkpoint is None:
                raise TranscoderError(
                    f"There is no checkpoint to resume from in {output_dir}: start without resuming, or give the folder of "
                    "a checkpoint."
                )
        if resume_from_checkpoint and not os.path.isfile(os.path.join(resume_from_checkpoint, "trainer_state.json")):
            raise TranscoderError(
                f"{resume_from_checkpoint} is no checkpoint (it has no trainer_state.json): give a `checkpoint-…` folder "
                "of an earlier run."
            )
        self._resume_from = resume_from_checkpoint or None
        self.stream, self.last_evaluation, self.activation_sample = None, None, None
        window = self.args.dead_window(self.args.max_steps)
        self.monitors = {name: DictionaryMonitor(d, window) for name, d in self.dictionaries.items()}
        if not self._resume_from:
            self._initialize_dictionaries()
        self._tokens_logged, self._time_logged = None, None
        if self._resume_from:
            state = TrainerState.load_from_json(os.path.join(self._resume_from, "trainer_state.json"))
            if state.global_step >= self.args.max_steps:
                # The Trainer would take one step more before it notices.
                logger.warning(f"The run in {self._resume_from} is complete: nothing is left to train.")
                self._load_from_checkpoint(self._resume_from)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except BaseException as error:
            self.tracking.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise

    def _initialize_dictionaries(self) -> None:
        """Measures scales and biases on the first block and says what the coefficients amount to."""
        sample = self.get_train_dataloader().sample(self.args.initialization_tokens)
        for name, dictionary in self.dictionaries.items():
            config = dictionary.config
            dictionary.initialize_from_activations_(sample[config.input_site], sample[config.output_site])
            # Parameters come from the first process when the model is wrapped; this number lies in the configuration.
            config.target_variance = broadcast_object_list([config.target_variance])[0]
            if config.l1_coefficient:
                effective = dictionary.effective_l1_coefficient()
                note = f" (as {effective:.4g} against a squared error summed over dimensions)" if effective else ""
                logger.warning(
                    f"{name}: L1 coefficient {config.l1_coefficient:g} with loss_reduction='{config.loss_reduction}'{note}"
                )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        One forward of every dictionary on one batch of activations.

        Args:
            model: The dictionary or set, as the Trainer has wrapped it.
            inputs (`dict[str, torch.Tensor]`): Site -> activations `(tokens, width)`.

        Returns:
            `torch.Tensor` of shape `()`, the sum over dictionaries (with `return_outputs` also their outputs).
        """
        dead = {name: monitor.dead_features for name, monitor in self.monitors.items()}
        scale = self._sparsity_scale()
        if isinstance(self.model, TranscoderSet):
            result = model(inputs, dead_features=dead, sparsity_scale=scale, output_features=False)
            outputs = result.outputs
        else:
            (name,) = self.dictionaries
            config = self.model.config
            result = model(
                inputs[config.input_site],
                inputs[config.output_site],
                dead_features=dead.get(name),
                sparsity_scale=scale,
                output_features=not config.is_sparse,
            )
            outputs = {name: result}
        for name, monitor in self.monitors.items():
            monitor.update(inputs[self.dictionaries[name].config.output_site], outputs[name])
        if self.state.logging_steps and (self.state.global_step + 1) % self.state.logging_steps == 0:
            self.activation_sample = {site: rows[:_SAMPLE_TOKENS].clone() for site, rows in inputs.items()}
        for name, dictionary in self.dictionaries.items():
            if dictionary.config.activation == "batchtopk":
                dictionary.update_threshold_(outputs[name].feature_values)
        return (result.loss, outputs) if return_outputs else result.loss

    def _sparsity_scale(self) -> float:
        rise = self.args.sparsity_warmup * self.args.max_steps
        return min(1.0, (self.state.global_step + 1) / rise) if rise else 1.0

    def _clip_grad_norm(self, model):
        """Clips each dictionary by itself; returns the norm over all, before clipping."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients(self.optimizer)
        norms = []
        for name, dictionary in self.dictionaries.items():
            norm = torch.nn.utils.clip_grad_norm_(dictionary.parameters(), self.args.max_grad_norm)
            self.monitors[name].grad_norm += norm
            self.monitors[name].steps += 1
            norms.append(norm)
        return torch.stack(norms).norm()

    def floating_point_ops(self, inputs) -> int:
        """Of the dictionaries alone: the dense products of one step on `inputs`."""
        tokens = next(iter(inputs.values())).shape[0]
        total = 0
        for dictionary in self.dictionaries.values():
            config = dictionary.config
            dense = 2 * tokens * config.num_features * config.d_in
            total += dense if config.is_sparse else 2 * dense + 6 * tokens * config.num_features * config.d_out
        return total

    def _track_num_input_tokens(self, inputs):
        """The Trainer looks for token ids; `tokens` in the logs counts activations instead."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the dictionaries' running metrics to a training log."""
        if "learning_rate" in logs:
            tokens = self.state.global_step * self.args.tokens_per_step
            now = time.perf_counter()
            logs["tokens"] = tokens
            if self._time_logged is not None and now > self._time_logged:
                logs["tokens_per_second"] = (tokens - self._tokens_logged) / (now - self._time_logged)
            self._tokens_logged, self._time_logged = tokens, now
            popped = {name: monitor.pop() for name, monitor in self.monitors.items()}
            for name, metrics in popped.items():
                logs |= {f"{name}/{key}": value for key, value in metrics.items()}
            if all(popped.values()):
                # The Trainer's own mean forgets, on resuming, the steps before the checkpoint.
                logs["loss"] = sum(metrics["loss"] for metrics in popped.values())
        if self.stream is not None and self.state.epoch is not None:
            self.state.epoch = self.stream.epoch
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluation_report(self, eval_dataset=None) -> EvaluationReport:
        """
        Every metric of every dictionary on held-out text, with the protocol.

        Args:
            eval_dataset (`datasets.Dataset`, *optional*): Overrides `self.eval_dataset`.

        Returns:
            [`EvaluationReport`]
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise TranscoderError("There is nothing to evaluate on: give `eval_dataset`.")
        args = self.args
        evaluator = TranscoderEvaluator(
            self.base_model,
            _token_rows(dataset, self.tokenizer, args.sequence_length),
            batch_size=args.harvest_batch_size,
            max_tokens=args.eval_tokens,
            max_loss_tokens=args.eval_loss_tokens,
            skip_first=args.skip_first,
            special_token_ids=self._special_token_ids(),
            progress=not args.disable_tqdm,
        )
        return evaluator.evaluate(self.dictionaries)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Evaluates every dictionary on held-out text and logs the metrics.

        Args:
            eval_dataset (`datasets.Dataset`, *optional*): Overrides `self.eval_dataset`.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): Of the metric names.

        Returns:
            `dict[str, float]`: `<prefix>_<dictionary>/<metric>`, and `<prefix>_loss`, the mean FVU.
        """
        start = time.time()
        report = self.last_evaluation = self.evaluation_report(eval_dataset)
        columns = report.columns()
        metrics = {
            f"{metric_key_prefix}_{name}/{metric}": value
            for name, values in columns.items()
            for metric, value in values.items()
        }
        metrics[f"{metric_key_prefix}_loss"] = sum(values["fvu"] for values in columns.values()) / len(columns)
        metrics[f"{metric_key_prefix}_runtime"] = time.time() - start
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------------------------------------------ files

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """Writes the dictionary or set, and the arguments as JSON (the Trainer's own file would be a pickle)."""
        output_dir = output_dir or self.args.output_dir
        if not self.args.should_save:
            return
        for dictionary in self.dictionaries.values():
            dictionary.config.training_summary = self._training_summary()
        self.model.save_pretrained(output_dir)
        with atomic_file(Path(output_dir) / "training_args.json") as partial:
            partial.write_text(self.args.to_json_string())

    def _training_summary(self) -> dict:
        args = self.args
        rows = self.train_dataset
        sized = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
        return {
            "tokens": self.state.global_step * args.tokens_per_step,
            "steps": self.state.global_step,
            "batch_tokens": args.tokens_per_step,
            "context_length": len(rows[0]["input_ids"]) if sized else args.sequence_length,
            "dataset": getattr(getattr(rows, "info", None), "dataset_name", None),
            "dataset_rows": len(rows) if sized else None,
            "learning_rate": args.learning_rate,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            "base_model_dtype": str(self.base_model.dtype).removeprefix("torch."),
            "skip_first": args.skip_first,
            "seed": args.seed,
        }

    def _get_output_dir(self, trial) -> str:
        # While a checkpoint is written its pieces go into a folder that is no checkpoint yet.
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, ".partial") if self._saving_checkpoint else directory

    _saving_checkpoint = False

    def _save_checkpoint(self, model, trial) -> None:
        """Writes a checkpoint in full and only then gives it its name, so that a broken one is never found."""
        output_dir = super()._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        partial = os.path.join(output_dir, ".partial", name)
        if self.args.should_save:
            shutil.rmtree(os.path.dirname(partial), ignore_errors=True)
            os.makedirs(partial)
        self.accelerator.wait_for_everyone()
        rank = self.args.process_index
        monitors = {
            f"{dictionary}/{key}": value
            for dictionary, monitor in self.monitors.items()
            for key, value in monitor.state_dict().items()
        }
        save_file(monitors, os.path.join(partial, _MONITOR_STATE.format(rank=rank)))
        Path(partial, _STREAM_STATE.format(rank=rank)).write_text(json.dumps(self.stream.state_dict()))
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            final = os.path.join(output_dir, name)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            shutil.rmtree(os.path.dirname(partial), ignore_errors=True)
            rotate_checkpoints(
                output_dir=output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Weights, dead-feature counts, running metrics and the place in the data."""
        if isinstance(self.model, TranscoderSet):
            saved = dict(TranscoderSet.from_pretrained(resume_from_checkpoint).items())
        else:
            saved = {next(iter(self.dictionaries)): TranscoderModel.from_pretrained(resume_from_checkpoint)}
        if set(saved) != set(self.dictionaries):
            raise TranscoderError(
                f"The checkpoint holds {', '.join(saved)} and this run trains {', '.join(self.dictionaries)}: resume with "
                "the same dictionaries."
            )
        for name, dictionary in self.dictionaries.items():
            try:
                dictionary.load_state_dict(saved[name].state_dict())
            except RuntimeError as error:
                raise TranscoderError(
                    f"The checkpoint's '{name}' has other sizes than the one of this run: resume with the same "
                    "configuration."
                ) from error
            dictionary.config.target_variance = saved[name].config.target_variance
        if not self.monitors:
            return  # The best model is loaded after training; there is nothing to continue.
        rank = self.args.process_index
        monitors = load_file(os.path.join(resume_from_checkpoint, _MONITOR_STATE.format(rank=rank)))
        for name, monitor in self.monitors.items():
            prefix = f"{name}/"
            monitor.load_state_dict({k.removeprefix(prefix): v for k, v in monitors.items() if k.startswith(prefix)})
        stream = json.loads(Path(resume_from_checkpoint, _STREAM_STATE.format(rank=rank)).read_text())
        self.get_train_dataloader().load_state_dict(stream)


class _StepCallback(TrainerCallback):
    """What every optimizer step of a dictionary needs before and after it."""

    def __init__(self, trainer: TranscoderTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for dictionary in self.trainer.dictionaries.values():
            dictionary.project_gradient_()

    def on_optimizer_step(self, args, state, control, **kwargs):
        for dictionary in self.trainer.dictionaries.values():
            dictionary.constrain_()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % _REFRESH_STEPS == 0:
            for monitor in self.trainer.monitors.values():
                monitor.refresh()


def _check_fits(name: str, dictionary: TranscoderModel, base_model) -> None:
    config = dictionary.config
    for site, width, field in (
        (config.input_site, config.d_in, "d_in"),
        (config.output_site, config.d_out, "d_out"),
    ):
        if site is None:
            raise TranscoderError(
                f"The dictionary '{name}' does not say where it reads and writes: make its configuration with "
                "TranscoderConfig.for_model(base_model, input_site, output_site)."
            )
        expected = site_width(base_model, site)
        if expected is not None and expected != width:
            raise TranscoderError(
                f"The dictionary '{name}' has {field}={width}, but the base model's activations at {site} are {expected} "
                f"wide: set `{field}={expected}`."
            )


def _token_rows(dataset, tokenizer, sequence_length):
    """Rows with `input_ids`: the dataset itself, or its texts packed."""
    if dataset is None:
        return None
    columns = getattr(dataset, "column_names", None)
    if columns is None or "input_ids" in columns or "text" not in columns:
        return dataset
    if tokenizer is None:
        raise TranscoderError("The dataset holds text: give the base model's tokenizer as `processing_class`.")
    from ..data import pack_tokens

    return pack_tokens(dataset, tokenizer, sequence_length)


def _count_steps(args: TranscoderTrainingArguments, dataset) -> int:
    """Optimizer steps of the run: from the token budget, or from the epochs."""
    tokens = args.max_tokens
    if tokens is None:
        if dataset is None:
            return -1
        if not hasattr(dataset, "__len__"):
            raise TranscoderError("A streamed dataset has no length: set `max_tokens` or `max_steps`.")
        if len(dataset) == 0:
            raise TranscoderError("The dataset has no rows: give a text that is longer than one token block.")
        kept = max(len(dataset[0]["input_ids"]) - args.skip_first, 0)
        tokens = int(args.num_train_epochs * len(dataset) * kept)
    if tokens < args.tokens_per_step:
        raise TranscoderError(
            f"The run has {tokens} tokens, less than one step of {args.tokens_per_step}: give more text or tokens, or lower "
            "`per_device_train_batch_size`."
        )
    return tokens // args.tokens_per_step
