"""Train many dictionaries on the same activations and compare them."""

import copy
import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..data.row_facts import dataset_digest
from ..errors import TranscoderError
from ..evaluation.evaluator import EvaluationReport
from ..files import write_text
from ..lm.model_fingerprint import model_facts
from ..lm.wrappers import takes_model
from ..models.configuration_transcoder import TranscoderConfig
from ..models.modeling_transcoder import TranscoderModel
from ..models.set_index import write_index
from ..models.transcoder_set import TranscoderSet
from ..reports.page import write_report
from ..reports.pareto.fronts import ParetoFronts, measured_in, pareto_fronts
from ..reports.pareto.write import write_pareto
from ..text.strict_json import read_json
from ..tracking.callback import TranscoderTrackingCallback
from ..tracking.run import EVALUATION_FILE
from .arguments import TranscoderTrainingArguments
from .grid import in_groups
from .run_folder import PLAN_FILE, check_run_folder, clear_run_folder
from .trainer import TranscoderTrainer
from .trainer_states import read_trainer_state


# Arguments that may differ between parts of a sweep: they affect files and logs, not results.
_FREE = (
    "output_dir", "logging", "log_", "report_to", "run_name", "save_", "disable_tqdm", "push_to_hub", "hub_", "project",
    "trackio", "overwrite", "resume_from", "ignore_data_skip", "activation_cache", "eval_strategy", "eval_steps", "dataloader",
)  # fmt: skip


@dataclass
class SweepResult:
    """
    Result of a sweep.

    Args:
        report ([`EvaluationReport`]): Evaluation of all dictionaries.
        fronts (`list[ParetoFronts]`): Pareto fronts of the dictionaries.
        files (`list[Path]`): Written pictures and pages.
    """

    report: EvaluationReport
    fronts: list[ParetoFronts]
    files: list[Path]


@takes_model
def run_sweep(
    configs: Mapping[str, TranscoderConfig],
    base_model,
    args: TranscoderTrainingArguments,
    train_dataset,
    eval_dataset,
    processing_class=None,
    *,
    group_size: int | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> SweepResult:
    """
    Trains dictionaries on the same activations, evaluates them and plots their Pareto fronts.

    All dictionaries share each forward pass of the base model, and each has the initial weights and batches that it would
    have alone, so that it ends with the same bits. (A token is left out if it is an outlier at any site of the sweep; the
    same dictionary trained alone uses it if it is not one at its own sites. `outlier_factor=0` keeps all.)

    The dictionaries are saved in `args.output_dir` as one [`TranscoderSet`], with `evaluation.json`, `report.html` and
    `pareto.html`, `.png` and `.csv`. With several groups, each has its own folder there (`group-1` ...).

    Args:
        configs (`Mapping[str, TranscoderConfig]`):
            Configurations by name, as made by [`expand_grid`].
        base_model ([`~transformers.PreTrainedModel`]):
            Language model.
        args ([`TranscoderTrainingArguments`]):
            Arguments of every group. `max_tokens` is the number of tokens of each dictionary.
        train_dataset, eval_dataset, processing_class:
            Same as in [`TranscoderTrainer`]. Held-out text is required for the evaluation.
        group_size (`int`, *optional*):
            Number of dictionaries to train at a time, if not all fit in memory. The activations are then cached in
            `args.activation_cache_dir`, or in `output_dir/activations` until the sweep is done, so that the base model
            still runs once.
        resume (`bool`, *optional*, defaults to `False`):
            Whether to continue an interrupted sweep: finished groups are not trained again, and the group in progress
            continues from its last checkpoint.
        callbacks (`Sequence[TrainerCallback]`, *optional*):
            Callbacks for the trainer of each group.

    Returns:
        [`SweepResult`]
    """
    if eval_dataset is None:
        raise TranscoderError("A sweep compares dictionaries on held-out text: give `eval_dataset`.")
    output = Path(args.output_dir)
    groups = in_groups(list(configs), group_size)
    if args.process_index == 0:
        _keep_plan(output, configs, groups, args, base_model, train_dataset, eval_dataset, resume)
    own_cache = output / "activations" if len(groups) > 1 and args.activation_cache_dir is None else None
    sites = list(dict.fromkeys(s for c in configs.values() for s in (c.input_site, c.output_site)))
    folders = [output / f"group-{number}" if len(groups) > 1 else output for number in range(1, len(groups) + 1)]
    callbacks = list(callbacks)
    if not any(isinstance(callback, TranscoderTrackingCallback) for callback in callbacks):
        # Tables of features would take longer than the evaluation.
        callbacks.append(TranscoderTrackingCallback(feature_tokens=0))
    for names, folder in zip(groups, folders, strict=True):
        if resume and (folder / EVALUATION_FILE).exists():
            continue
        group_args = copy.copy(args)
        group_args.output_dir = str(folder)
        if own_cache is not None:
            group_args.activation_cache_dir = str(own_cache)
        if len(groups) > 1:
            group_args.run_name = f"{args.run_name or output.resolve().name}-{folder.name}"
        trainer = _SweepTrainer(
            make_models({name: configs[name] for name in names}, args.seed),
            base_model,
            group_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        trainer.sites = sites  # pyright: ignore[reportAttributeAccessIssue]
        _train(trainer, resume)
        del trainer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    reports = [EvaluationReport.load_json(folder / EVALUATION_FILE) for folder in folders]
    report = EvaluationReport(
        {name: entry for part in reports for name, entry in part.dictionaries.items()}, reports[0].protocol
    )
    fronts = pareto_fronts(measured_in(report, output.resolve().name))
    files = []
    if args.process_index == 0:
        if len(groups) > 1:
            subfolders = {
                name: f"{folder.name}/{name}" for names, folder in zip(groups, folders, strict=True) for name in names
            }
            write_index(output, subfolders, base_model.config.name_or_path or None)
            report.save_json(output / EVALUATION_FILE)
        files = _write_pages(output, folders, report, fronts)
        if own_cache is not None:
            shutil.rmtree(own_cache, ignore_errors=True)
    return SweepResult(report, fronts, files)


def make_models(configs: Mapping[str, TranscoderConfig], seed: int) -> TranscoderSet:
    """Dictionaries, each with the initial weights of `seed`, independent of the others."""
    models = {}
    for name, config in configs.items():
        torch.manual_seed(seed)
        models[name] = TranscoderModel(copy.deepcopy(config))
    return TranscoderSet(models)


class _SweepTrainer(TranscoderTrainer):
    """Harvests activations at all sites of the sweep, so that all groups use the same tokens and share one cache."""

    sites: list[str]

    def harvested_sites(self) -> list[str]:
        return self.sites


def _train(trainer: TranscoderTrainer, resume: bool) -> None:
    folder = Path(trainer.args.output_dir)
    started = resume and folder.is_dir() and get_last_checkpoint(str(folder)) is not None
    # The sweep has checked its folder: what is in it is its own.
    trainer._owns_folder = True
    trainer.train(resume_from_checkpoint=True if started else None)
    trainer.save_model()
    trainer.evaluate()
    trainer.save_state()
    # Last, because this file marks a group as done.
    if trainer.is_world_process_zero():
        trainer.last_evaluation.save_json(folder / EVALUATION_FILE)
    trainer.accelerator.wait_for_everyone()


def _keep_plan(output: Path, configs, groups, args, base_model, train_dataset, eval_dataset, resume: bool) -> None:
    """Records the settings of the sweep; with `resume`, checks that they are the same."""
    plan = _plain({
        "format_version": 1,
        "groups": groups,
        "dictionaries": {name: _plain(config.to_diff_dict()) for name, config in configs.items()},
        "rows": len(train_dataset) if hasattr(train_dataset, "__len__") else None,
        "base_model": model_facts(base_model),
        "text": dataset_digest(train_dataset),
        "held-out text": dataset_digest(eval_dataset),
        "arguments": {
            name: value for name, value in _plain(args.to_dict()).items() if not name.startswith(_FREE)
        },
    })  # fmt: skip
    path = output / PLAN_FILE
    if args.overwrite and resume:
        raise TranscoderError("A sweep is either continued or overwritten: give --resume or --overwrite.")
    if not resume:
        check_run_folder(output, overwrite=args.overwrite)
        if args.overwrite:
            clear_run_folder(output)
    if not path.exists():
        if resume:
            raise TranscoderError(
                f"{output} holds no sweep to resume ({PLAN_FILE} is not there): start without resuming, or give the "
                "folder of the sweep."
            )
        write_text(path, json.dumps(plan, indent=2) + "\n")
        return
    if not resume:  # Another process has started it meanwhile.
        raise TranscoderError(
            f"{output} already holds a sweep: continue it with --resume, give another folder, or delete it "
            "first with --overwrite."
        )
    try:
        kept = read_json(path)
    except TranscoderError as error:
        raise TranscoderError(f"{path} is damaged: start the sweep again in another folder.") from error
    differing = [key for key in plan if key != "arguments" and kept.get(key) != plan[key]]
    earlier = kept["arguments"] if isinstance(kept.get("arguments"), dict) else {}
    differing += [name for name, value in plan["arguments"].items() if earlier.get(name) != value]
    if differing:
        raise TranscoderError(
            f"The sweep in {output} was started with other settings ({', '.join(differing)}): resume it with the same ones, "
            "or start a new sweep in another folder."
        )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A value after a round trip through JSON."""
    plain = json.loads(json.dumps(values, default=str))
    plain.pop("transformers_version", None)
    return plain


def _write_pages(output: Path, folders: Sequence[Path], report: EvaluationReport, fronts) -> list[Path]:
    model = report.protocol["base_model"] or "unnamed model"
    history = [entry for folder in folders for entry in read_trainer_state(folder).log_history]
    title = f"Sweep of {len(report.dictionaries)} dictionaries of {model}"
    page = write_report(output / "report.html", title=title, history=history, report=report)
    return [*write_pareto(output / "pareto", fronts, title=title, csv=True), page]
