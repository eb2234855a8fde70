"""How a language model drifts while any Trainer fine-tunes it, seen through transcoders of the model it was."""

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from ..data.rows import refuse_splits
from ..errors import TranscoderError
from ..evaluation.drift import DriftProbe
from ..lm.devices import input_device, module_device
from ..lm.modes import in_eval_mode
from ..lm.wrappers import language_model
from ..models.modeling_transcoder import TranscoderModel
from ..models.transcoder_set import TranscoderSet
from ..reports.drift_page import drift_page
from ..text import logging
from ..version import versions
from .callback import changed_arguments, model_name
from .local import FOLDER
from .run import Run
from .tracker import Tracker
from .trackers import trackers_for


logger = logging.get_logger(__name__)

#: What the probe's records are called: scalars `probe/<dictionary>/fvu` ..., a table and a page.
PREFIX = "probe/"
CHANGED_FEATURES, DRIFT_PAGE = "probe/changed_features", "probe/drift"
_BASELINE_FILE = "probe_baseline.safetensors"


class TranscoderProbeCallback(TrainerCallback):
    """
    Measures, while a language model is fine-tuned, how far it has drifted in terms of the features of transcoders that
    were trained on it before. For any Trainer: [`~transformers.Trainer`], TRL's, with PEFT, with data parallelism.

    A baseline is taken when training begins. At every evaluation and at the last step the same probe text is run again
    and recorded, in `output_dir/tracking` and in the trackers of `report_to`:

    - `probe/<dictionary>/fvu`, `normalized_mse`, `l0`: the old transcoder on the activations of now;
    - `probe/<dictionary>/ce_spliced`, `kl_spliced`, and `probe/together/...` with all in place at once: the model of now
      with the reconstruction in place of its MLP's output;
    - `probe/<dictionary>/features_changed`: the share of features whose firing rate or mean activation changed by more
      than 10%, beyond what chance explains;
    - `probe/ce`, `probe/kl`, `probe/top1_agreement`: the model itself, and its predictions against the baseline's;
    - `probe/task/<metric>`: what `task_metrics` returns;
    - the table `probe/changed_features` (see [`FeatureChange`]) and the page `probe/drift`.

    Training is not touched: with and without the callback it ends in the same weights, bit for bit. Only the first
    process measures and records; models whose weights are split over processes (FSDP, ZeRO-3) are refused.

    Args:
        transcoders ([`TranscoderModel`], [`TranscoderSet`], a mapping from name to dictionary, or a list):
            Dictionaries of the model as it is before fine-tuning. They are moved to its device.
        probe_dataset (`datasets.Dataset`, `Iterable[Mapping]` or `list[str]`):
            The fixed text: rows with `input_ids` (and `attention_mask`, where they are padded) or with `text`, or texts, which
            are packed. A few dozen rows, of a kind that the model should still be good at.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Packs texts and writes the labels of features. By default the Trainer's `processing_class`.
        task_metrics (`Callable[[torch.nn.Module], Mapping[str, float]]`, *optional*):
            Further numbers: called with the model (its adapters on, in eval mode) at every measurement.
        at_start (`bool`, *optional*, defaults to `True`):
            Whether the baseline is recorded too, as step 0.
        sequence_length (`int`, *optional*, defaults to 128):
            Tokens per row when texts are packed.
        kwargs:
            Further arguments of [`DriftProbe`]: `num_features`, `max_tokens`, `max_loss_tokens`, `max_kl_tokens`,
            `batch_size`, `skip_first`, `special_token_ids`.

    Example:

    ```python
    >>> transcoders = TranscoderSet.from_pretrained("me/smollm2-transcoders")
    >>> trainer = SFTTrainer(model, args, train_dataset=data, eval_dataset=held_out)
    >>> trainer.add_callback(TranscoderProbeCallback(transcoders, load_texts("probe.txt"), tokenizer))
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        transcoders: TranscoderModel | TranscoderSet | Mapping[str, TranscoderModel] | Iterable[TranscoderModel],
        probe_dataset: Iterable[Mapping] | list[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        task_metrics: Callable[[torch.nn.Module], Mapping[str, float]] | None = None,
        at_start: bool = True,
        sequence_length: int = 128,
        **kwargs,
    ):
        self.transcoders = transcoders
        self.probe_dataset = probe_dataset
        self.tokenizer = tokenizer
        self.task_metrics = task_metrics
        self.at_start = at_start
        self.sequence_length = sequence_length
        self.kwargs = kwargs
        self.probe: DriftProbe | None = None
        self.report = None
        self.history: list[dict[str, float]] = []
        self._baseline_task: dict[str, float] = {}
        self._trackers: list[Tracker] = []
        self._joins = False

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        if _is_sharded(model):
            raise TranscoderError(
                "The probe runs the model in one process, and here its weights are split over several: use data "
                "parallelism, or measure checkpoints afterwards with `measure_drift`."
            )
        with _left_alone(model):
            base = language_model(model)
            if self.probe is None:
                tokenizer = self.tokenizer or processing_class
                rows = _token_rows(self.probe_dataset, tokenizer, self.sequence_length)
                self.probe = DriftProbe(self.transcoders, rows, tokenizer=tokenizer, **self.kwargs)
            for dictionary in self.probe.dictionaries.values():
                dictionary.to(input_device(base))
            # In every process, so that a wrong pairing ends all of them.
            self.probe.check(model)
            self._trackers = trackers_for(args, state)
            if self._trackers:
                self._begin(args, state, model, base)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._record(state.global_step, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # Not at `on_train_end`: trackers have closed their runs by then, and the best weights may have been put back.
        if state.global_step >= state.max_steps:
            self._record(state.global_step, model)

    def on_train_end(self, args, state, control, **kwargs):
        others = self._trackers[1:] if self._joins else self._trackers
        for tracker in others:
            tracker.finish("finished")
        self._trackers = []

    def _begin(self, args, state, model, base) -> None:
        resumed = state.global_step > 0
        # Where every log is recorded too, the records are begun and ended by that callback.
        self._joins = "hf_transcoders" in args.report_to
        if not self._joins:
            facts = self._describe(args, base)
            self._trackers[0].start(facts, resume_step=state.global_step if resumed else None)  # pyright: ignore[reportAttributeAccessIssue]
        path = Path(args.output_dir, FOLDER, _BASELINE_FILE)
        if resumed:
            self.history = _recorded(args.output_dir)
        if resumed and path.exists():
            self.probe.load_baseline(path)
        else:
            if resumed:
                logger.warning(
                    f"There is no {path}: drift is measured from the checkpoint at step {state.global_step}, not from the "
                    "beginning."
                )
            if self.probe.baseline is None:
                self.probe.take_baseline(model)
                self._baseline_task = self._measure_task(model)
            self.probe.save_baseline(path)
        if self.at_start and not resumed:
            self.report = self.probe.baseline_report()
            self._write(state.global_step, self._baseline_task)

    def _describe(self, args, base) -> dict[str, Any]:
        return {
            "name": args.run_name or Path(args.output_dir).resolve().name,
            "project": args.project,
            "base_model": model_name(base),
            "dictionaries": {
                name: {"input_site": d.config.input_site, "output_site": d.config.output_site}
                for name, d in self.probe.dictionaries.items()
            },
            "max_steps": args.max_steps,
            "arguments": changed_arguments(args),
            "report_to": args.report_to,
            "versions": versions(),
        }

    def _record(self, step, model) -> None:
        if not self._trackers or (self.history and self.history[-1]["step"] == step):
            return
        with _left_alone(model):
            self.report = self.probe.measure(model)
            self._write(step, self._measure_task(model))

    def _measure_task(self, model) -> dict[str, float]:
        if self.task_metrics is None:
            return {}
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        with torch.no_grad(), in_eval_mode(model):
            return {f"{PREFIX}task/{name}": value for name, value in self.task_metrics(model).items()}

    def _write(self, step, task) -> None:
        scalars = self.report.scalars(PREFIX) | task
        self.history.append({"step": step} | _without_prefix(scalars))
        rows = [asdict(change) for change in self.report.changed]
        page = drift_page(
            "Drift under fine-tuning",
            self.history,
            self.report,
            baseline=_without_prefix(self.probe.baseline_report().scalars(PREFIX) | self._baseline_task),
        )
        for tracker in self._trackers:
            tracker.scalars(step, scalars)
            if rows:
                tracker.table(step, CHANGED_FEATURES, rows)
            tracker.page(step, DRIFT_PAGE, page)


def _without_prefix(scalars):
    return {name.removeprefix(PREFIX): value for name, value in scalars.items()}


def _recorded(output_dir: str | os.PathLike) -> list[dict[str, float]]:
    """The measurements that an interrupted run has recorded."""
    lines = [
        {name.removeprefix(PREFIX): value for name, value in line.items() if name == "step" or name.startswith(PREFIX)}
        for line in Run.load(output_dir).scalars
    ]
    return [line for line in lines if len(line) > 1]


def _token_rows(dataset, tokenizer, sequence_length):
    """Rows with `input_ids`: the dataset itself, or its texts packed."""
    if isinstance(dataset, list) and all(isinstance(text, str) for text in dataset):
        from datasets import Dataset

        dataset = Dataset.from_dict({"text": dataset})
    refuse_splits(dataset)
    columns = getattr(dataset, "column_names", None)
    if columns is None or "input_ids" in columns:
        return dataset
    if tokenizer is None:
        raise TranscoderError("The probe is text: give the model's tokenizer as `tokenizer`.")
    from ..data.packing import pack_tokens

    return pack_tokens(dataset, tokenizer, sequence_length)


def _is_sharded(model) -> bool:
    if is_deepspeed_zero3_enabled():
        return True
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


@contextmanager
def _left_alone(model) -> Iterator[None]:
    """Random numbers go on afterwards as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    device = module_device(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
