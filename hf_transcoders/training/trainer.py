"""Train dictionaries with a Trainer whose batches are activations of a language model."""

import contextlib
import copy
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.integrations import TrackioCallback
from transformers.trainer_utils import SaveStrategy, SchedulerType, TrainOutput
from transformers.training_args import OptimizerNames

from ..data.activation_stream import ShardedStream
from ..data.harvest import ActivationHarvester
from ..data.packing import packed_rows
from ..data.row_facts import is_sized, scan_rows
from ..data.rows import is_several, one_dataset, refuse_splits
from ..data.text import hub_dataset_id
from ..dictionaries import check_fits
from ..errors import TranscoderError
from ..evaluation.cautions import cautions
from ..evaluation.evaluator import EvaluationReport, TranscoderEvaluator
from ..files import write_text
from ..hub.cards.make import make_card
from ..lm.devices import moved
from ..lm.wrappers import language_model
from ..models.cross_layer.modeling_cross_layer import CrossLayerTranscoder
from ..models.cross_layer.source import CrossLayerSource
from ..models.modeling_transcoder import TranscoderModel
from ..models.named_dictionaries import NamedDictionaries
from ..models.set_index import dictionary_name
from ..models.transcoder_set import TranscoderSet
from ..text import logging
from ..tracking.callback import TranscoderTrackingCallback
from ..tracking.trackio import TranscoderTrackioCallback
from ..version import versions
from .arguments import TranscoderTrainingArguments, check_length
from .checkpoint_files import make_run_folder, only_run
from .checkpoints import REFRESH_STEPS, ExactCheckpoints
from .interruption import Interruption
from .monitor import DictionaryMonitor
from .progress import TrainingPrinterCallback, TrainingProgressCallback, working
from .sharding import gathered, is_sharded, shard_, whole
from .trainer_push import TrainerPushMixin
from .trainer_states import read_trainer_state


logger = logging.get_logger(__name__)

# Tokens of a batch whose pre-activations are recorded.
_SAMPLE_TOKENS = 256


class TranscoderTrainer(ExactCheckpoints, TrainerPushMixin, Trainer):
    """
    Trains one dictionary, or several on the same forward passes of the base model.

    It is a [`~transformers.Trainer`]: schedulers, accumulation, mixed precision (`bf16`, `fp16`), callbacks,
    `report_to`, `resume_from_checkpoint` and `accelerate launch` work as usual. The run is always recorded in
    `output_dir/tracking` (see [`TranscoderTrackingCallback`]). Differences: a batch is a batch of tokens, the gradient of
    each dictionary is clipped separately (so that training together changes nothing), and
    [`~TranscoderTrainer.evaluate`] runs a [`TranscoderEvaluator`].

    Logged for each dictionary, under `<name>/`: every loss term, `l0`, `l1`, `mse`, `fvu`, `explained_variance`,
    `shrinkage` (relative reconstruction bias, 1 is unbiased), `dead_fraction` (within `dead_after_tokens`), `grad_norm`;
    and for the run `tokens`, `tokens_per_second`.

    Args:
        model ([`TranscoderModel`], [`TranscoderSet`], [`CrossLayerTranscoder`], `Iterable[TranscoderModel]` or `Mapping`):
            Dictionaries to train, with their sites in their configurations.
        base_model ([`~transformers.PreTrainedModel`]):
            Language model whose activations are learned. It is never changed.
        args ([`TranscoderTrainingArguments`], *optional*):
            Arguments of the run. By default it is saved in `transcoder_output`.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Rows with `input_ids` (see [`pack_tokens`]) and, if they are padded, `attention_mask`; or with `text`, which is
            packed with `processing_class`. For a `datasets.DatasetDict` the split `train` is used.
        eval_dataset (`datasets.Dataset` or `dict[str, datasets.Dataset]`, *optional*):
            Held-out rows. Several datasets are evaluated one after the other, each under its name.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the base model, to pack texts and to find special tokens.
        callbacks, optimizers:
            Same as in [`~transformers.Trainer`].

    Example:

    ```python
    >>> config = TranscoderConfig.for_model(model, "layers.8.mlp.in", "layers.8.mlp.branch", num_features=4608, k=64)
    >>> trainer = TranscoderTrainer(
    ...     model=TranscoderModel(config),
    ...     base_model=model,
    ...     args=TranscoderTrainingArguments("runs/l8", max_tokens=1_000_000),
    ...     train_dataset=blocks,
    ... )
    >>> trainer.train()
    >>> trainer.save_model()
    ```
    """

    def __init__(
        self,
        model: TranscoderModel
        | TranscoderSet
        | CrossLayerTranscoder
        | Iterable[TranscoderModel]
        | Mapping[str, TranscoderModel],
        base_model=None,
        args: TranscoderTrainingArguments | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers=(None, None),
    ):
        # A copy, because the values set below are for this trainer only.
        args = self.args = copy.copy(args) if args is not None else TranscoderTrainingArguments("transcoder_output")
        if base_model is None:
            raise TranscoderError("Give the language model to learn from as `base_model`.")
        base_model = language_model(base_model)
        if not isinstance(model, TranscoderModel | NamedDictionaries):
            model = TranscoderSet(model)
        if isinstance(model, CrossLayerSource):
            raise TranscoderError("One layer of a cross-layer transcoder cannot be trained alone: train the whole.")
        if isinstance(model, CrossLayerTranscoder) and args.fsdp:
            raise TranscoderError(
                "Cross-layer transcoders are not sharded: leave `fsdp` out, and use several processes or a smaller `window`."
            )
        if isinstance(model, TranscoderModel):
            self.dictionaries = {dictionary_name(model.config): model}
        else:
            self.dictionaries = dict(model.items())
        check_fits(base_model, self.dictionaries)
        self.base_model = moved(base_model, args.device)
        # It belongs to the base model: the Trainer would save it with the dictionary and write its special tokens into the
        # configuration of the dictionary.
        self.tokenizer = processing_class
        self._standard_optimizer = tuple(optimizers) == (None, None)
        self.stream: ShardedStream | None = None
        self.monitors: dict[str, DictionaryMonitor] = {}
        self._stream_state: dict | None = None
        self._interruption = Interruption()
        train_dataset = packed_rows(_training_split(train_dataset), processing_class, args.sequence_length)
        eval_dataset = _each(
            eval_dataset, lambda dataset: packed_rows(dataset, processing_class, args.sequence_length)
        )
        if args.max_steps <= 0:
            args.max_steps = _count_steps(args, train_dataset, self.special_token_ids)
        if args.fsdp:
            _check_fsdp(args)
            # The trainer shards the dictionaries itself, in the same way on every device.
            args.fsdp_plugin_args = None
        if args.should_save:
            make_run_folder(args.output_dir)
        # The stream resumes itself; the Trainer would replay it batch by batch.
        args.ignore_data_skip = True
        own = [callback for callback in callbacks or () if isinstance(callback, TranscoderTrackingCallback)]
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[callback for callback in callbacks or () if callback not in own],
            optimizers=optimizers,
        )
        #: What makes the result of the last run worthless or uncertain, in one line for each kind (see [`cautions`]).
        self.cautions: dict[str, str] = {}
        #: The latest [`EvaluationReport`], and activations of some tokens of the last logged step.
        self.last_evaluation: EvaluationReport | None = None
        self.activation_sample: dict[str, torch.Tensor] | None = None
        default = self.pop_callback(TranscoderTrackingCallback)  # That of `report_to="hf_transcoders"`.
        self.tracking: Any = own[-1] if own else default or TranscoderTrackingCallback()
        self.tracking.attach(self)
        # First, so that it names the run before other trackers open it, and records before they close it.
        self.callback_handler.callbacks.insert(0, self.tracking)
        # Before it, so that all other callbacks see the dictionaries after the step.
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
        """The input and output sites of all dictionaries, where activations of the base model are captured."""
        return [s for d in self.dictionaries.values() for s in (d.config.input_site, d.config.output_site)]

    def make_harvester(self, dataset) -> ActivationHarvester:
        """Makes the harvester of activations for a dataset, with the arguments of the run."""
        args = self.args
        harvester = ActivationHarvester(
            self.base_model,
            dataset,
            self.harvested_sites(),
            rows_per_chunk=args.harvest_batch_size,
            skip_first=args.skip_first,
            special_token_ids=self.special_token_ids,
            outlier_factor=args.outlier_factor or None,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            autocast=self.accelerator.autocast,
            cache_dir=args.activation_cache_dir,
        )
        found = harvester.row_facts
        if found is not None and args.max_steps * args.tokens_per_step > found.kept:
            harvester.remember(int(args.activation_cache_gb * 2**30))
        return harvester

    @property
    def special_token_ids(self) -> list[int]:
        """Tokens that are left out of training and evaluation."""
        if not self.args.skip_special_tokens or self.tokenizer is None:
            return []
        return list(self.tokenizer.all_special_ids)

    def get_train_dataloader(self) -> ShardedStream:
        """The stream of activation batches, at the current position of the run."""
        if self.stream is None:
            args = self.args
            self.stream = ShardedStream(
                self.make_harvester(self.train_dataset),
                batch_size=args.per_device_train_batch_size,
                num_shards=args.data_shards,
                rank=args.process_index,
                world_size=args.world_size,
                buffer_tokens=args.buffer_tokens,
                seed=args.data_seed if args.data_seed is not None else args.seed,
                progress=self._shows_progress,
            )
        return self.stream

    @property
    def _shows_progress(self) -> bool:
        return not self.args.disable_tqdm and self.args.process_index == 0

    @property
    def is_sharded(self) -> bool:
        """Whether the weights of the dictionaries are split over processes."""
        return bool(self.args.fsdp)

    # ------------------------------------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Trains the dictionaries, as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Folder of a checkpoint, or `True` for the last usable one in `args.output_dir`. The run continues exactly:
                weights, optimizer, shuffling, dead-feature counts and running logs. If there is no checkpoint yet for `True`,
                the run starts from the beginning, with a warning.

        Ctrl-C and SIGTERM end the run after its step, with a checkpoint if `save_strategy` is not `"no"`; a second signal ends
        it at once. The dictionaries are saved in `args.output_dir` after the last step, before the records are completed.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]

        Raises:
            `KeyboardInterrupt`: the run was interrupted; the text says at which step, and how to go on.
        """
        with only_run(self.args.output_dir) if self.args.process_index == 0 else contextlib.nullcontext():
            if is_sharded(self.model):
                raise TranscoderError(
                    "This trainer has sharded its dictionaries already: make a new one to train them again."
                )
            checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
            self.stream, self.last_evaluation, self.activation_sample = None, None, None
            self._tokens_logged, self._time_logged = None, None
            window = self.args.dead_window(self.args.max_steps)
            self.monitors = {name: DictionaryMonitor(d, window) for name, d in self.dictionaries.items()}
            with working("hashing the language model and the data", show=self._shows_progress):
                self._note_facts(checkpoint)
            if checkpoint is None:
                self._initialize_dictionaries()
            else:
                state = read_trainer_state(checkpoint)
                self._saved = state.global_step, Path(checkpoint)
                if state.global_step >= self.args.max_steps:
                    return self._finish_complete_run(checkpoint, state)
                logger.warning(f"Resuming from {checkpoint}: step {state.global_step} of {self.args.max_steps}.")
            if self.args.fsdp:
                self._shard_dictionaries()
            try:
                with self._interruption.watching():
                    output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            except BaseException as error:
                interrupted = isinstance(error, KeyboardInterrupt)
                self.tracking.finish("interrupted" if interrupted else "failed")
                if interrupted and self._interruption.signal is not None:
                    raise self._interrupted() from None
                raise
            self._note_cautions()
            return output._replace(training_loss=output.metrics["train_loss"])

    def _note_cautions(self) -> None:
        """Warns about an invalid result, according to the last evaluation, or else the last log."""
        self._summarize()
        configs = {name: dictionary.config for name, dictionary in self.dictionaries.items()}
        report = self.last_evaluation
        if report is not None:
            self.cautions = cautions(configs, report.metrics, report.protocol["fidelity_tokens"])
        else:
            metrics = {name: {} for name in configs}
            for entry in self.state.log_history:
                for name, values in metrics.items():
                    values.update({key: entry[f"{name}/{key}"] for key in ("fvu", "l0") if f"{name}/{key}" in entry})
            self.cautions = cautions(configs, metrics)
        if self.is_world_process_zero():
            for line in self.cautions.values():
                logger.warning(line)

    def _finish_complete_run(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        """Finishes a run that was stopped after its last step. The Trainer would take one more step."""
        logger.warning(f"The run in {checkpoint} is complete: nothing is left to train.")
        self._load_dictionaries(checkpoint)
        self.state = state
        state.is_local_process_zero, state.is_world_process_zero = (
            self.is_local_process_zero(),
            self.is_world_process_zero(),
        )
        self.control = self.callback_handler.on_train_begin(self.args, state, self.control)
        metrics = {"train_runtime": 0.0, "total_flos": state.total_flos, "train_loss": 0.0}
        self.log(metrics)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        self.control = self.callback_handler.on_train_end(self.args, state, self.control)
        # It may have been stopped after its last checkpoint and before the oldest one was deleted.
        self._rotate(Path(checkpoint))
        return TrainOutput(state.global_step, metrics["train_loss"], metrics)

    def _shard_dictionaries(self) -> None:
        # Before the optimizer is made, so that it has sharded parameters. accelerate would not shard on CPUs, and would
        # shard a set as a whole.
        args = self.args
        resharded = {"reshard_after_forward": bool(args.fsdp_config.get("reshard_after_forward", True))}  # pyright: ignore[reportAttributeAccessIssue]
        shard_(self.model, args.device.type, args.world_size, **resharded)
        # Autocast, but no DistributedDataParallel around it.
        self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)

    def _initialize_dictionaries(self) -> None:
        """Measures scales and biases on the first block, and logs the effective coefficients."""
        sample = self.get_train_dataloader().sample(self.args.initialization_tokens)
        for dictionary in self.dictionaries.values():
            sites = dictionary.config.input_site, dictionary.config.output_site
            dictionary.initialize_from_activations_(*(sample[site] for site in sites))
        if isinstance(self.model, CrossLayerTranscoder):
            self.model.share_scales_()
        for name, dictionary in self.dictionaries.items():
            config = dictionary.config
            # All processes start like the first one, whose sample is that of the first shard for any number of processes.
            for value in dictionary.state_dict().values():
                broadcast(value)
            config.target_variance = broadcast_object_list([config.target_variance])[0]
            if config.l1_coefficient:
                effective = dictionary.effective_l1_coefficient()
                note = f" (as {effective:.4g} against a squared error summed over dimensions)" if effective else ""
                logger.warning(
                    f"{name}: L1 coefficient {config.l1_coefficient:g} with loss_reduction='{config.loss_reduction}'{note}"
                )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        Computes the losses of all dictionaries on one batch of activations.

        Args:
            model: Dictionary or set, wrapped by the Trainer.
            inputs (`dict[str, torch.Tensor]`): Site -> activations `(tokens, width)`.

        Returns:
            `torch.Tensor` of shape `()`: sum of the losses (with `return_outputs` also the outputs by dictionary).
        """
        dead = {name: monitor.dead_features for name, monitor in self.monitors.items()}
        scale = self._sparsity_scale()
        across = self.args.world_size > 1
        if isinstance(self.model, NamedDictionaries):
            result = model(
                inputs, dead_features=dead, sparsity_scale=scale, output_features=False, across_processes=across
            )
            outputs = result.outputs
        else:
            (name,) = self.dictionaries
            config = self.dictionaries[name].config
            result = model(
                inputs[config.input_site],
                inputs[config.output_site],
                dead_features=dead.get(name),
                sparsity_scale=scale,
                output_features=False,
                across_processes=across,
            )
            outputs = {name: result}
        may_overflow = self.accelerator.scaler is not None
        for name, monitor in self.monitors.items():
            monitor.update(inputs[self.dictionaries[name].config.output_site], outputs[name], may_overflow)
        if self.state.logging_steps and (self.state.global_step + 1) % self.state.logging_steps == 0:
            self.activation_sample = {site: rows[:_SAMPLE_TOKENS].clone() for site, rows in inputs.items()}
        joint = isinstance(self.model, CrossLayerTranscoder) and self.model.config.batchtopk_scope == "all"
        chosen = torch.cat([output.feature_values for output in outputs.values()]) if joint else None
        for name, dictionary in self.dictionaries.items():
            if dictionary.config.activation == "batchtopk":
                values = outputs[name].feature_values if chosen is None else chosen
                dictionary.update_threshold_(values, across_processes=across)
        return (result.loss, outputs) if return_outputs else result.loss

    def _sparsity_scale(self) -> float:
        rise = self.args.sparsity_warmup * self.args.max_steps
        return min(1.0, (self.state.global_step + 1) / rise) if rise else 1.0

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.accelerator.scaler is not None:
            # A fused optimizer skips a step after an fp16 overflow by itself, and the scheduler would count it.
            optimizer._step_supports_amp_scaling = False  # pyright: ignore[reportAttributeAccessIssue]
        return optimizer

    def _clip_grad_norm(self, model):
        """Clips the gradient of each dictionary separately; returns the norm over all of them before clipping."""
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients(self.optimizer)
        norms = []
        for name, dictionary in self.dictionaries.items():
            norm = whole(torch.nn.utils.clip_grad_norm_(dictionary.parameters(), self.args.max_grad_norm))
            self.monitors[name].add_gradient(norm, may_overflow=self.accelerator.scaler is not None)
            norms.append(norm)
        return torch.stack(norms).norm()

    def floating_point_ops(self, inputs) -> int:
        """Operations of the dictionaries' dense products in one step on `inputs`."""
        tokens = next(iter(inputs.values())).shape[0]
        total = 0
        for dictionary in self.dictionaries.values():
            config = dictionary.config
            dense = 2 * tokens * config.num_features * config.d_in
            written = config.d_out * len(config.output_sites)
            total += dense if config.is_sparse else 2 * dense + 6 * tokens * config.num_features * written
        return total

    def _track_num_input_tokens(self, inputs):
        """Does nothing: the Trainer would count token ids, but `tokens` in the logs counts activations."""

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
            if self.accelerator.scaler is not None and not math.isfinite(logs.get("grad_norm", 0.0)):
                del logs["grad_norm"]  # The norm of a skipped step.
            # After resuming, the Trainer's own means lack the steps before the checkpoint.
            if all(popped.values()):
                logs["loss"] = sum(metrics["loss"] for metrics in popped.values())
        if "train_loss" in logs:
            logs["train_loss"] = self._mean_loss(default=logs["train_loss"])
            if not any("tokens" in entry for entry in self.state.log_history):
                # The run was shorter than `logging_steps`.
                logs["tokens"] = self.state.global_step * self.args.tokens_per_step
        super().log(logs, start_time)
        if "learning_rate" in logs:
            self._stop_if_diverged({name: metrics["loss"] for name, metrics in popped.items() if metrics})

    def _mean_loss(self, default: float) -> float:
        """The mean loss over all logged steps of the run."""
        total, last = 0.0, 0
        for entry in self.state.log_history:
            if "loss" in entry:
                total, last = total + entry["loss"] * (entry["step"] - last), entry["step"]
        return total / last if last else default

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluation_report(self, eval_dataset=None) -> EvaluationReport:
        """
        Evaluates all dictionaries on held-out text. The evaluations are also written to the configurations, and saved with
        them, until the next optimizer step changes the weights.

        Args:
            eval_dataset (`datasets.Dataset`, *optional*):
                Replacement for `self.eval_dataset`, of which the first dataset is used if there are several.

        Returns:
            [`EvaluationReport`]
        """
        dataset = eval_dataset if eval_dataset is not None else one_dataset(self.eval_dataset)
        if dataset is None:
            raise TranscoderError("There is nothing to evaluate on: give `eval_dataset`.")
        args = self.args
        evaluator = TranscoderEvaluator(
            self.base_model,
            packed_rows(dataset, self.tokenizer, args.sequence_length),
            batch_size=args.harvest_batch_size,
            max_tokens=args.eval_tokens,
            max_loss_tokens=args.eval_loss_tokens,
            skip_first=args.skip_first,
            special_token_ids=self.special_token_ids,
            progress=not args.disable_tqdm,
        )
        with self._at_once():
            report = evaluator.evaluate({name: gathered(dictionary) for name, dictionary in self.dictionaries.items()})
        for name, dictionary in self.dictionaries.items():
            dictionary.config.evaluation = report.of(name)
        return report

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Evaluates all dictionaries on held-out text and logs the metrics.

        Args:
            eval_dataset (`datasets.Dataset` or `dict[str, datasets.Dataset]`, *optional*):
                Replacement for `self.eval_dataset`.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): Prefix of the metric names.

        Returns:
            `dict[str, float]`: `<prefix>_<dictionary>/<metric>`, and `<prefix>_loss`, the mean FVU. For several datasets, the
            name of each follows the prefix.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if is_several(dataset):
            metrics = {}
            # The first comes last: its evaluation is kept in the configurations.
            for name, one in reversed(dataset.items()):  # pyright: ignore[reportAttributeAccessIssue]
                metrics = self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}") | metrics
            return metrics
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
        self._summarize()
        # All processes take part in gathering sharded dictionaries, and one of them keeps the result.
        device = "cpu" if self.args.should_save else "meta"
        with working("saving the dictionaries", show=self._shows_progress):
            dictionaries = {name: gathered(dictionary, device) for name, dictionary in self.dictionaries.items()}
            if not self.args.should_save:
                return
            if isinstance(self.model, CrossLayerTranscoder):
                self.model.save_pretrained(output_dir)
            elif isinstance(self.model, TranscoderSet):
                TranscoderSet(dictionaries).save_pretrained(output_dir)
            else:
                (dictionary,) = dictionaries.values()
                dictionary.save_pretrained(output_dir)
        write_text(Path(output_dir) / "training_args.json", self.args.to_json_string())
        if output_dir == self.args.output_dir:
            self._owns_folder = True

    def _summarize(self) -> None:
        """Writes how the dictionaries were trained into their configurations."""
        summary = self._training_summary()
        for dictionary in self.dictionaries.values():
            dictionary.config.training_summary = copy.deepcopy(summary)

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
            "dataset_id": hub_dataset_id(rows),
            "dataset_rows": len(rows) if sized else None,
            "learning_rate": args.learning_rate,
            "lr_scheduler": SchedulerType(args.lr_scheduler_type).value if self._standard_optimizer else None,
            "warmup_steps": args.get_warmup_steps(args.max_steps),
            "optimizer": OptimizerNames(args.optim).value if self._standard_optimizer else None,
            "weight_decay": args.weight_decay,
            "max_grad_norm": args.max_grad_norm,
            "sparsity_warmup": args.sparsity_warmup,
            "dead_after_tokens": args.dead_window(args.max_steps),
            "processes": args.world_size,
            "device": args.device.type,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            "base_model_dtype": str(self.base_model.dtype).removeprefix("torch."),
            "skip_first": args.skip_first,
            "outlier_factor": args.outlier_factor or None,
            "seed": args.seed,
            "versions": versions(),
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves dictionaries, arguments and the model card, as [`~transformers.Trainer.save_model`] does the model."""
        super().save_model(output_dir, _internal_call)
        if not self._saving_checkpoint:
            self.create_model_card(output_dir=output_dir)

    def create_model_card(
        self,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        output_dir: str | None = None,
    ) -> None:
        """
        Writes the model card of the dictionaries and the run to README.md (see [`make_card`]). A card that was edited by hand
        is kept, and the new one is written to README.generated.md.

        Args:
            license (`str`, *optional*): License of the weights, by its identifier on the Hub.
            tags (`str` or `list[str]`, *optional*): Additional tags of the repo.
            model_name (`str`, *optional*): Name of the model in the metadata. Defaults to the name of the repo.
            output_dir (`str`, *optional*): Folder of the card. Defaults to `args.output_dir`.
        """
        if not self.args.should_save:
            return
        with working("writing the model card", show=self._shows_progress):
            card = make_card(
                self.model,
                repo_id=self.hub_model_id or self.args.hub_model_id,
                run=self._run_in(self.args.output_dir),
                license=license,
                tags=[tags] if isinstance(tags, str) else tags,
                model_name=model_name,
            )
        card.save(output_dir or self.args.output_dir)


class _StepCallback(TrainerCallback):
    """Updates the dictionaries and the state of the stream before and after each optimizer step."""

    def __init__(self, trainer: TranscoderTrainer):
        self.trainer = trainer
        self.states_checked = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.states_checked = False
        if self.trainer.stream is not None:
            self.trainer._stream_state = self.trainer.stream.state_dict()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for dictionary in self.trainer.dictionaries.values():
            dictionary.project_gradient_()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.accelerator.optimizer_step_was_skipped:
            return
        for dictionary in self.trainer.dictionaries.values():
            dictionary.constrain_()
            # The last evaluation was of other weights.
            dictionary.config.evaluation = None

    def on_step_end(self, args, state, control, **kwargs):
        stream = self.trainer.stream
        # The state at this step, not when saving: by then batches of the next step may have been taken.
        self.trainer._stream_state, state.epoch = stream.state_dict(), stream.epoch
        # Possible only once there is a state, and better now than at the first checkpoint.
        if not self.states_checked and args.save_strategy != SaveStrategy.NO and not args.save_only_model:
            self.trainer.check_states()
        self.states_checked = True
        if state.global_step % REFRESH_STEPS == 0:
            for monitor in self.trainer.monitors.values():
                monitor.refresh()
        self.trainer.stop_if_asked()

    def on_save(self, args, state, control, **kwargs):
        interruption = self.trainer._interruption
        if interruption.signal is not None and interruption.in_step:
            interruption.end_steps()
            raise KeyboardInterrupt

    def on_train_end(self, args, state, control, **kwargs):
        # Before the records are completed, which may take minutes.
        if args.save_strategy != SaveStrategy.NO:
            self.trainer._save()
        self.trainer._interruption.end_steps()
        if self.trainer._interruption.signal is not None:
            raise KeyboardInterrupt


def _check_fsdp(args: TranscoderTrainingArguments) -> None:
    config: Any = args.fsdp_config
    if int(config.get("version", 2)) != 2 or config.get("cpu_offload") or config.get("activation_checkpointing"):
        raise TranscoderError(
            "Dictionaries are sharded by FSDP version 2, without CPU offload and activation checkpointing: leave these "
            "out of `fsdp_config`."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise TranscoderError(
            "accelerate's own FSDP would shard the dictionaries a second time: launch without `--use_fsdp` and give the "
            "trainer `fsdp=True`."
        )


def _each(dataset, function):
    return {name: function(one) for name, one in dataset.items()} if is_several(dataset) else function(dataset)


def _training_split(dataset):
    """The split `train` if the splits of a dataset were given; otherwise the dataset itself."""
    if not is_several(dataset):
        return dataset
    return dataset["train"] if "train" in dataset else refuse_splits(dataset)


def _count_steps(args: TranscoderTrainingArguments, dataset, special_token_ids: list[int]) -> int:
    """Number of optimizer steps of the run, from the token budget or from the epochs."""
    tokens = args.max_tokens
    if tokens is None:
        if dataset is None:
            return -1
        if not is_sized(dataset):
            raise TranscoderError("A streamed dataset has no length: set `max_tokens` or `max_steps`.")
        if len(dataset) == 0:
            raise TranscoderError("The dataset has no rows: give a text that is longer than one token block.")
        tokens = int(args.num_train_epochs * scan_rows(dataset, args.skip_first, special_token_ids).kept)
    check_length(tokens, args.tokens_per_step)
    return tokens // args.tokens_per_step
