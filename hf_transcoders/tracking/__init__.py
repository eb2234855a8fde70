"""The record of a run: what is measured, under which name, and where it goes."""

from .local import LocalTracker
from .run import Run, find_runs
from .tracker import Alert, Tracker
from .trackio_runs import trackio_run, trackio_runs
