"""Which trackers a run has."""

from transformers import TrainerState, TrainingArguments

from .local import LocalTracker
from .tensorboard import TensorBoardTracker
from .tracker import Tracker
from .trackio import TrackioTracker
from .wandb import WandbTracker


def trackers_for(args: TrainingArguments, state: TrainerState, trackio_optimizer_steps: bool = False) -> list[Tracker]:
    """
    The places that a run's rich records go to: its own folder, then those of `report_to` that can show more than scalars.

    Make them in `on_train_begin`, and record no earlier than the first log, when transformers' callbacks have opened
    their runs. Scalars of `Trainer.log` reach those runs by themselves and need recording in the [`LocalTracker`] alone.

    Args:
        args ([`~transformers.TrainingArguments`]): Of any Trainer: `output_dir` and `report_to` are read.
        state ([`~transformers.TrainerState`]): Says which process writes.
        trackio_optimizer_steps (`bool`, *optional*, defaults to `False`):
            See [`TrackioTracker`]; `True` where [`TranscoderTrainer`] runs.

    Returns:
        `list[Tracker]`: the [`LocalTracker`] first (not started); empty in every process but the first.
    """
    if not state.is_world_process_zero:
        return []
    trackers: list[Tracker] = [LocalTracker(args.output_dir)]
    if "trackio" in args.report_to:
        trackers.append(TrackioTracker(trackio_optimizer_steps, resumed=state.global_step > 0))
    if "tensorboard" in args.report_to:
        trackers.append(TensorBoardTracker(args.output_dir))
    if "wandb" in args.report_to:
        trackers.append(WandbTracker())
    return trackers
