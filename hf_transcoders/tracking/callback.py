"""The Trainer callback that records a run."""

import math
import tempfile
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, TrainerCallback, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.integrations.integration_utils import rewrite_logs

from ..data.rows import one_dataset
from ..errors import TranscoderError
from ..evaluation.statistics import density_histogram
from ..features.feature_examples import explain_features
from ..reports.page import render_report
from ..text import logging
from ..text.visible import visible
from ..version import versions
from .alerts import AlertThresholds, AlertWatch
from .local import LocalTracker
from .names import ALIASED, aliases
from .run import Run
from .run_view import RunView
from .tracker import Tracker
from .trackers import trackers_for


logger = logging.get_logger(__name__)

# Bins of the pre-activation histogram.
_BINS = 64


class TranscoderTrackingCallback(TrainerCallback):
    """
    Records a run in its own folder ([`LocalTracker`]), and records other than scalars also in the trackers of `report_to`.

    [`TranscoderTrainer`] adds the callback by itself. Besides the scalars of each log and evaluation it then records
    histograms of feature density and pre-activations, a table of features with their contexts and a report page (at each
    evaluation and at the end, with held-out text and a tokenizer), the sparsity/fidelity plot, alerts, and `run.json` with
    the facts and the status of the run. With any other Trainer, `report_to="hf_transcoders"` records scalars, alerts and
    `run.json`. Names are listed in [`~tracking.names`].

    A resumed run continues its records at the checkpoint. Only the first process writes.

    Args:
        aliases (`"saelens"`, `"sparsify"` or `"dictionary_learning"`, *optional*):
            Library under whose names metrics with the same definition are logged as well.
        histogram_logs (`int`, *optional*, defaults to 10):
            Number of training logs between two sets of histograms. The first log has one.
        num_features (`int`, *optional*, defaults to 12):
            Number of features of each dictionary in tables and on the page.
        feature_tokens (`int`, *optional*, defaults to 4096):
            Number of held-out tokens to search for the contexts of these features. 0 leaves out tables and features, and so
            does `report_to="none"`.
        alerts ([`AlertThresholds`], *optional*):
            Thresholds of alerts.
    """

    def __init__(
        self,
        aliases: str | None = None,
        histogram_logs: int = 10,
        num_features: int = 12,
        feature_tokens: int = 4096,
        alerts: AlertThresholds | None = None,
    ):
        if aliases is not None and aliases not in ALIASED:
            raise TranscoderError(f"There are no aliases of '{aliases}': choose from {', '.join(ALIASED)}.")
        self.aliases = aliases
        self.histogram_logs = histogram_logs
        self.num_features = num_features
        self.feature_tokens = feature_tokens
        self.thresholds = alerts or AlertThresholds()
        self.trackers: list[Tracker] = []
        self.facts: dict[str, Any] = {}
        self._run: RunView | None = None
        self._logs = 0
        self._features_at: int | None = None

    def attach(self, run: RunView) -> None:
        """Connects the callback to the run of a [`TranscoderTrainer`], for records beyond its logs."""
        self._run = run

    # ------------------------------------------------------------------------------------------------ events

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        resumed = state.global_step > 0
        self.trackers = trackers_for(args, state, trackio_optimizer_steps=self._run is not None)
        self._logs, self._features_at = 0, None
        self._watch = AlertWatch(self.thresholds, self._quiet_steps(args, state))
        if not self.trackers:
            return
        self._name_run(args, resumed)
        self.facts = self._describe(args, model)
        self.local.start(self.facts, resume_step=state.global_step if resumed else None)
        if resumed:
            earlier = Run.load(args.output_dir).scalars
            self._watch.replay(earlier)
            self._logs = sum("train/learning_rate" in line for line in earlier)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.trackers:
            return
        values = {name: value for name, value in rewrite_logs(logs).items() if isinstance(value, int | float)}
        self.local.scalars(state.global_step, values)
        if self._run is None:
            dictionaries = sorted({n.split("/")[1] for n in values if n.count("/") == 2})
        else:
            dictionaries = list(self._run.dictionaries)
        if self.aliases and (others := aliases(values, self.aliases, dictionaries)):
            self._record("scalars", state.global_step, others)
        for alert in self._watch.check(state.global_step, values):
            self._record("alert", state.global_step, alert)
        if "learning_rate" in logs:
            if self._run is not None and self._logs % self.histogram_logs == 0:
                self._record_histograms(state.global_step)
            self._logs += 1

    def on_evaluate(self, args, state, control, **kwargs):
        if self.trackers and self._run is not None:
            self.local.update(evaluation_protocol=self._run.last_evaluation.protocol)
            self._record_features(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        if self.trackers and self._run is not None and self._features_at != state.global_step:
            self._record_features(args, state)
        self.finish("finished")

    def finish(self, status: str) -> None:
        """Records the final status of the run: `"finished"`, `"failed"` or `"interrupted"`. Called by the Trainer after an error."""
        for tracker in self.trackers:
            tracker.finish(status)

    # ------------------------------------------------------------------------------------------------ records

    @property
    def local(self) -> LocalTracker:
        """The records in the run's own folder."""
        return self.trackers[0]

    def _record(self, kind: str, step: int, *record) -> None:
        for tracker in self.trackers:
            getattr(tracker, kind)(step, *record)

    @torch.no_grad()
    def _record_histograms(self, step: int) -> None:
        run = self._run
        for name, dictionary in run.dictionaries.items():
            if (density := run.monitors[name].density) is not None:
                histogram = density_histogram(density)
                edges, counts = histogram["log10_edges"], histogram["counts"]
                self._record("histogram", step, f"train/{name}/log10_feature_density", edges, counts)
            # Under FSDP no process has the whole encoder.
            if run.activation_sample is not None and not run.is_sharded:
                inputs = run.activation_sample[dictionary.config.input_site]
                values = dictionary.pre_activations(dictionary.normalize_input(inputs)).float()
                values = values[values.isfinite()]
                if values.numel():
                    low, high = values.min().item(), values.max().item()
                    counts = torch.histc(values, _BINS, low, high).long().tolist()
                    edges = torch.linspace(low, high, _BINS + 1).tolist()
                    self._record("histogram", step, f"train/{name}/pre_activations", edges, counts)

    def _record_features(self, args, state) -> None:
        """Records features with their contexts, the sparsity/fidelity plot and the page."""
        run, step = self._run, state.global_step
        self._features_at = step
        explanations = self._explain(args)
        for name, found in explanations.items():
            self._record("table", step, f"features/{name}", [feature_row(feature) for feature in found])
        report = run.last_evaluation
        if report is not None:
            self._record_picture(step, report)
        page = render_report(
            title=self.facts["name"],
            history=state.log_history,
            report=report,
            features=explanations,
            info={"base model": self.facts["base_model"], "step": f"{step:,} of {state.max_steps:,}"},
        )
        self._record("page", step, "report", page)

    def _explain(self, args) -> dict[str, list]:
        """Name of each dictionary with active features -> explanations of some of them, from one pass over held-out text."""
        run = self._run
        held_out = one_dataset(run.eval_dataset)
        if not self.feature_tokens or not args.report_to or held_out is None or run.tokenizer is None:
            return {}
        if run.is_sharded:
            return {}
        try:
            found = explain_features(  # pyright: ignore[reportCallIssue]
                run.base_model,
                run.dictionaries,
                held_out,
                run.tokenizer,
                num_features=self.num_features,
                num_contexts=3,
                num_quantile_contexts=0,
                num_measured=0,
                max_tokens=self.feature_tokens,
                batch_size=args.harvest_batch_size,
                skip_first=args.skip_first,
                special_token_ids=run.special_token_ids,
                progress=not args.disable_tqdm,
            )
        except TranscoderError as error:  # No feature fires, which is a result and not a reason to stop.
            logger.warning(f"No table of features at this step: {error}")
            return {}
        if silent := [name for name, its in found.items() if not its]:
            logger.warning(
                f"No table of features at this step for {', '.join(silent)}: none of their features is active on the held-out text."
            )
        # With NaN weights, features have no finite activations.
        finite = {name: [f for f in its if math.isfinite(f.max_activation)] for name, its in found.items()}
        return {name: its for name, its in finite.items() if its}

    def _record_picture(self, step: int, report) -> None:
        from transformers.utils.import_utils import is_matplotlib_available

        if not is_matplotlib_available():
            return
        from ..reports.pictures import sparsity_fidelity_png

        with tempfile.TemporaryDirectory() as folder:
            path = sparsity_fidelity_png(report, Path(folder) / "sparsity_fidelity.png")
            self._record("image", step, "sparsity_fidelity", path)

    # ------------------------------------------------------------------------------------------------ what the run is

    def _quiet_steps(self, args, state) -> int:
        return round(args.sparsity_warmup * state.max_steps) if self._run is not None else 0

    def _name_run(self, args, resumed: bool) -> None:
        """
        Sets the name of the run in all trackers: that of its records when it is resumed; otherwise `run_name`, or the name of
        its folder, with a number if Trackio already has a run with this name, which it would continue.
        """
        name = args.run_name or Path(args.output_dir).resolve().name
        if resumed:
            try:
                name = Run.load(args.output_dir).name
            except TranscoderError:
                pass  # A checkpoint of a run that was not recorded here.
        elif self._run is not None and "trackio" in args.report_to and not args.trackio_space_id:
            from .trackio import free_run_name

            name = free_run_name(args.project, name)
        args.run_name = name

    def _describe(self, args, model) -> dict[str, Any]:
        base_model = self._run.base_model if self._run is not None else model
        dictionaries = self._run.dictionaries if self._run is not None else {}
        return {
            "name": args.run_name,
            "project": args.project,
            "base_model": model_name(base_model),
            "dictionaries": {
                name: {
                    field: getattr(dictionary.config, field)
                    for field in ("input_site", "output_site", "d_in", "d_out", "num_features", "activation", "k")
                }
                for name, dictionary in dictionaries.items()
            },
            "max_steps": args.max_steps,
            "arguments": changed_arguments(args),
            "processes": args.world_size,
            "device": str(args.device),
            "report_to": args.report_to,
            "versions": versions(),
        }


def model_name(model) -> str:
    """The name or path of a model, or its type."""
    config = getattr(model, "config", None)  # A Trainer accepts any module.
    return config.name_or_path or config.model_type if isinstance(config, PreTrainedConfig) else type(model).__name__


def feature_row(feature) -> dict[str, Any]:
    """
    Converts an explanation to a row of a table.

    Args:
        feature ([`FeatureExplanation`]): Explanation of a feature.

    Returns:
        `dict[str, Any]`: numbers, and contexts as text with the strongest token in `[[ ]]`.
    """
    row = {
        "feature": feature.feature,
        "density": _rounded(feature.density),
        "max_activation": _rounded(feature.max_activation),
        "mean_activation": _rounded(feature.mean_activation),
        "direct_path_promotes": ", ".join(visible(token) for token, _ in feature.top_tokens[:5]),
        "direct_path_suppresses": ", ".join(visible(token) for token, _ in feature.bottom_tokens[:5]),
    }
    for number in range(3):
        row[f"context_{number + 1}"] = _context(feature.contexts[number]) if number < len(feature.contexts) else None
    return row


def _rounded(value: float) -> float:
    """A number with four digits, for reading."""
    return float(f"{value:.4g}")


def _context(context) -> str:
    texts = [f"[[{text}]]" if i == context.peak else text for i, text in enumerate(context.tokens)]
    return "".join(texts).replace("\n", "⏎")


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that differ from their defaults, as JSON values without access tokens."""
    values = args.to_dict()
    changed = {}
    for field in fields(args):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = default.value if isinstance(default, Enum) else default
        if field.name in values and values[field.name] != default and not field.name.endswith("_token"):
            changed[field.name] = values[field.name]
    return changed


INTEGRATION_TO_CALLBACK["hf_transcoders"] = TranscoderTrackingCallback
