"""A Trainer callback that measures the drift of a fine-tuned model by transcoders of the original model."""

import os
import random
import sys
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

from ..data.packing import packed_rows
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
from .local import FOLDER, PAGES, file_name
from .run import Run
from .tracker import Tracker
from .trackers import trackers_for


logger = logging.get_logger(__name__)

#: Names of the probe's records: scalars `probe/<dictionary>/fvu` ..., a table and a page.
PREFIX = "probe/"
CHANGED_FEATURES, DRIFT_PAGE = "probe/changed_features", "probe/drift"
_BASELINE_FILE = "probe_baseline.safetensors"


class TranscoderProbeCallback(TrainerCallback):
    """
    Measures the drift of a language model during fine-tuning, by the features of transcoders of the original model. It works
    with any Trainer: [`~transformers.Trainer`] and those of TRL, with PEFT and data parallelism.

    A baseline is taken when training begins. At every evaluation and at the last step the same probe text is run again, and
    the results are recorded in `output_dir/tracking`, in the trackers of `report_to`, and (the numbers) in `state.log_history`:

    - `probe/<dictionary>/fvu`, `normalized_mse`, `l0`: the original transcoder on the current activations;
    - `probe/<dictionary>/ce_spliced`, `kl_spliced`, and `probe/together/...` with all dictionaries at once: the current
      model with the reconstruction in place of its MLP's output;
    - `probe/<dictionary>/features_changed`: the share of features whose firing rate or mean activation has changed by more
      than 10%, beyond chance;
    - `probe/ce`, `probe/kl`, `probe/top1_agreement`: the model itself, and its predictions compared with the baseline;
    - `probe/task/<metric>`: the result of `task_metrics`;
    - the table `probe/changed_features` (see [`FeatureChange`]) and the page `probe/drift`.

    The callback does not affect training, which ends with the same weights bit for bit. Only the first process measures and
    records; models whose weights are sharded over processes (FSDP, ZeRO-3) are refused.

    Args:
        transcoders ([`TranscoderModel`], [`TranscoderSet`], a mapping from name to dictionary, or a list):
            Dictionaries of the model before fine-tuning. They are moved to its device.
        probe_dataset (`datasets.Dataset`, `Iterable[Mapping]` or `list[str]`):
            Probe text: rows with `input_ids` (and `attention_mask`, if they are padded) or with `text`, or texts, which are
            packed. A few dozen rows, of a kind that the model should remain good at.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer that packs texts and decodes the labels of features. Defaults to the Trainer's `processing_class`.
        task_metrics (`Callable[[torch.nn.Module], Mapping[str, float]]`, *optional*):
            Function that computes additional metrics of the model (with adapters, in eval mode) at every measurement.
        at_start (`bool`, *optional*, defaults to `True`):
            Whether to record the baseline as step 0.
        sequence_length (`int`, *optional*, defaults to 128):
            Number of tokens per row when texts are packed.
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
            base_model = language_model(model)
            if self.probe is None:
                tokenizer = self.tokenizer or processing_class
                rows = packed_rows(_as_dataset(self.probe_dataset), tokenizer, self.sequence_length, "tokenizer")
                self.probe = DriftProbe(self.transcoders, rows, tokenizer=tokenizer, **self.kwargs)
            for dictionary in self.probe.dictionaries.values():
                dictionary.to(input_device(base_model))
            # In every process, so that an error ends all of them.
            self.probe.check(model)
            self._trackers = trackers_for(args, state)
            if self._trackers:
                self._begin(args, state, model, base_model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._record(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # Not in `on_train_end`: by then trackers have closed their runs, and the best weights may have been restored.
        if state.global_step >= state.max_steps:
            self._record(state, model)

    def on_train_end(self, args, state, control, **kwargs):
        if self._trackers and self.history and not args.disable_tqdm:
            page = Path(args.output_dir, FOLDER, PAGES, f"{file_name(DRIFT_PAGE)}.html")
            print(f"The page of the drift is {page}.", file=sys.stderr)
        others = self._trackers[1:] if self._joins else self._trackers
        for tracker in others:
            tracker.finish("finished")
        self._trackers = []

    def _begin(self, args, state, model, base_model) -> None:
        resumed = state.global_step > 0
        # If every log is recorded too, that callback starts and ends the records.
        self._joins = "hf_transcoders" in args.report_to
        if not self._joins:
            facts = self._describe(args, base_model)
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
            self._write(state, self._baseline_task)

    def _describe(self, args, base_model) -> dict[str, Any]:
        return {
            "name": args.run_name or Path(args.output_dir).resolve().name,
            "project": args.project,
            "base_model": model_name(base_model),
            "dictionaries": {
                name: {"input_site": d.config.input_site, "output_site": d.config.output_site}
                for name, d in self.probe.dictionaries.items()
            },
            "max_steps": args.max_steps,
            "arguments": changed_arguments(args),
            "report_to": args.report_to,
            "versions": versions(),
        }

    def _record(self, state, model) -> None:
        if not self._trackers or (self.history and self.history[-1]["step"] == state.global_step):
            return
        with _left_alone(model):
            self.report = self.probe.measure(model)
            self._write(state, self._measure_task(model))

    def _measure_task(self, model) -> dict[str, float]:
        if self.task_metrics is None:
            return {}
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        with torch.no_grad(), in_eval_mode(model):
            return {f"{PREFIX}task/{name}": value for name, value in self.task_metrics(model).items()}

    def _write(self, state, task) -> None:
        step = state.global_step
        scalars = self.report.scalars(PREFIX) | task
        # In the Trainer's own log as well, where its users look first.
        state.log_history.append({**scalars, "epoch": state.epoch, "step": step})
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
    """The recorded measurements of an interrupted run."""
    lines = [
        {name.removeprefix(PREFIX): value for name, value in line.items() if name == "step" or name.startswith(PREFIX)}
        for line in Run.load(output_dir).scalars
    ]
    return [line for line in lines if len(line) > 1]


def _as_dataset(texts):
    """A list of texts as a dataset; other rows as they are."""
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        from datasets import Dataset

        return Dataset.from_dict({"text": texts})
    return texts


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
    """Restores the state of all random number generators afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    device = module_device(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
