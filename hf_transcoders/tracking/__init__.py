"""Record training runs: metric names, trackers, and reading records."""

from .alerts import AlertThresholds
from .callback import TranscoderTrackingCallback
from .local import LocalTracker
from .probe import TranscoderProbeCallback
from .run import Run, find_runs, recorded_run
from .tensorboard import TensorBoardTracker
from .tracker import Alert, Tracker
from .trackers import trackers_for
from .trackio import TrackioTracker, TranscoderTrackioCallback
from .trackio_runs import trackio_run, trackio_runs
from .wandb import WandbTracker


__all__ = [
    "Alert",
    "AlertThresholds",
    "LocalTracker",
    "Run",
    "TensorBoardTracker",
    "Tracker",
    "TrackioTracker",
    "TranscoderProbeCallback",
    "TranscoderTrackingCallback",
    "TranscoderTrackioCallback",
    "WandbTracker",
    "find_runs",
    "recorded_run",
    "trackers_for",
    "trackio_run",
    "trackio_runs",
]
