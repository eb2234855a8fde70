"""Choose the trackers of a run."""

from transformers import TrainerState, TrainingArguments

from .local import LocalTracker
from .tensorboard import TensorBoardTracker
from .tracker import Tracker
from .trackio import TrackioTracker
from .wandb import WandbTracker


def trackers_for(args: TrainingArguments, state: TrainerState, trackio_optimizer_steps: bool = False) -> list[Tracker]:
    """
    Makes the trackers of a run: the [`LocalTracker`] of its folder, and those of `report_to` that record more than scalars.

    Call it in `on_train_begin`, and record after the first log, when transformers' callbacks have opened their runs. Scalars
    of `Trainer.log` are recorded by these callbacks, and need to be recorded in the [`LocalTracker`] only.

    Args:
        args ([`~transformers.TrainingArguments`]): Arguments of any Trainer, with `output_dir` and `report_to`.
        state ([`~transformers.TrainerState`]): State of the Trainer. Only the first process has trackers.
        trackio_optimizer_steps (`bool`, *optional*, defaults to `False`):
            Same as `optimizer_steps` of [`TrackioTracker`]; `True` for a [`TranscoderTrainer`].

    Returns:
        `list[Tracker]`: the [`LocalTracker`] first (not started); empty in all other processes.
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
