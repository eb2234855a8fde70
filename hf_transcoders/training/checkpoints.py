"""Checkpoints from which a run continues bit for bit, also after it was killed."""

import contextlib
import errno
import itertools
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import SaveStrategy

from ..data.activation_stream import checked_state
from ..errors import TranscoderError
from ..models.modeling_transcoder import TranscoderModel
from ..models.named_dictionaries import NamedDictionaries
from ..text import logging
from ..text.strict_json import read_json, to_json
from .checkpoint_files import (
    FACTS,
    PARTIAL,
    TRAINER_STATE,
    commit,
    find_checkpoint,
    last_checkpoint,
    recover,
    rotate,
    why_unusable,
)
from .interruption import RunInterrupted
from .monitor import share_out
from .progress import working
from .run_facts import changes, run_facts
from .run_folder import check_run_folder, clear_run_folder
from .sharding import load_state_
from .trainer_states import TrainerStates


logger = logging.get_logger(__name__)

#: Optimizer steps between two updates of the dead features, which wait for the device.
REFRESH_STEPS = 16
_MONITOR_STATE = "monitors_{rank}.safetensors"
_STREAM_STATE = "activation_stream_{shard}.json"
_NO_ROOM = {os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}


class ExactCheckpoints(TrainerStates):
    """The methods of [`TranscoderTrainer`] that write and read checkpoints."""

    _saving_checkpoint = False
    # The step and folder of the checkpoint that this run has saved or continued last.
    _saved: tuple[int, Path] | None = None
    # Whether this trainer has written into its folder, so that what is there is its own.
    _owns_folder = False
    # Data, models and settings of the run, recorded when it starts.
    _facts: dict[str, Any]

    # ------------------------------------------------------------------------------------------------ finding

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        """
        Cleans up the folder of the run and finds the checkpoint to resume from.

        Args:
            wanted (`str` or `bool`, *optional*): Same as `resume_from_checkpoint` in [`~TranscoderTrainer.train`].

        Returns:
            `str`: folder of the checkpoint, the same in every process; `None` to start from the beginning.
        """
        self._saved = None
        found: list[str | None] = [None, None]
        if self.args.process_index == 0:
            try:
                found[0] = self._find_checkpoint(wanted)
            except TranscoderError as error:
                found[1] = str(error)
        found, refusal = broadcast_object_list(found)
        if refusal is not None:
            raise TranscoderError(refusal)
        self._owns_folder = True
        return found

    def _find_checkpoint(self, wanted) -> str | None:
        output_dir = self.args.output_dir
        if not self._owns_folder:
            check_run_folder(output_dir, wanted, self.args.overwrite)
        try:
            recover(output_dir)
            if self.args.overwrite and not self._owns_folder:
                clear_run_folder(output_dir)
        except OSError as error:
            raise TranscoderError(
                f"{output_dir} cannot be written to ({_reason(error)}): fix this, or give another `output_dir`."
            ) from error
        if wanted is True:
            with working("checking checkpoints", show=self._shows_progress):
                found = find_checkpoint(output_dir)
            if found is not None:
                return str(found)
            never = " (and none will be written, because `save_strategy` is 'no')"
            logger.warning(
                f"There is no checkpoint in {output_dir} yet{never if self.args.save_strategy == 'no' else ''}: the run "
                "starts from the beginning."
            )
        elif wanted:
            if not os.path.isfile(os.path.join(wanted, TRAINER_STATE)):
                raise TranscoderError(
                    f"{wanted} is not a checkpoint (it has no {TRAINER_STATE}): give a `checkpoint-…` folder of an "
                    "earlier run."
                )
            if reason := why_unusable(wanted):
                raise TranscoderError(f"{wanted} cannot be resumed from ({reason}): give another checkpoint.")
            return str(wanted)
        return None

    def _note_facts(self, checkpoint: str | None) -> None:
        """Records data, models and settings of the run, and refuses a checkpoint that was made with others."""
        self._facts = run_facts(self)
        if checkpoint is None:
            return
        refusal = None
        try:
            self._check_same_run(checkpoint)
        except TranscoderError as error:
            refusal = str(error)
        # The data and the base model may differ in one process only.
        refusals = [text for text in gather_object([refusal]) if text is not None]
        if refusals:
            raise TranscoderError(refusals[0])

    def _check_same_run(self, checkpoint: str) -> None:
        saved = read_json(Path(checkpoint, FACTS))
        found = changes(saved, self._facts)
        stream = self.get_train_dataloader()
        states, shards = self._read_stream_states(checkpoint)
        if set(stream.shards) - set(states):
            found.append(f"it has {shards} data shards and this run has {self.args.data_shards}")
        else:
            for shard, state in states.items():
                found += [text for text in stream.shards[shard].mismatches(state) if text not in found]
        if found:
            raise TranscoderError(
                f"{checkpoint} was made with {'; '.join(found)}: resume with the same model, data, sizes and settings, or "
                "start again in another `output_dir`."
            )
        if saved.get("max_steps") != self.args.max_steps:
            logger.warning(
                f"{checkpoint} is of a run of {saved.get('max_steps')} steps and this run has {self.args.max_steps}: the "
                "learning rate and all other schedules now follow the new length, so the results differ from those of a run "
                "with this length from the start."
            )

    # ------------------------------------------------------------------------------------------------ writing

    def _get_output_dir(self, trial) -> str:
        # While a checkpoint is written, its files are in a folder that is not yet a checkpoint.
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, PARTIAL) if self._saving_checkpoint else directory

    def _save_checkpoint(self, model, trial) -> None:
        """Writes all files of a checkpoint before renaming it, so that a partial one is never found."""
        output_dir = Path(super()._get_output_dir(trial))
        step = self.state.global_step
        if broken := self._not_finite():
            raise TranscoderError(
                f"The weights of {', '.join(broken)} are NaN or infinite at step {step}, so they are not saved: "
                f"{self._way_out(output_dir)}."
            )
        final = output_dir / f"checkpoint-{step}"
        partial = output_dir / PARTIAL / final.name
        try:
            if self.args.should_save:
                shutil.rmtree(partial.parent, ignore_errors=True)
                os.makedirs(partial)
            self.accelerator.wait_for_everyone()
            self._write_checkpoint(model, trial, partial, final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                with working("hashing the checkpoint", show=self._shows_progress):
                    commit(partial, final)
            self._saved = step, final
        # torch and safetensors report failed writes as their own errors.
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = _reason(error)
            advice = "make room" if reason in _NO_ROOM else "fix this"
            raise TranscoderError(
                f"The checkpoint of step {step} could not be written into {output_dir} ({reason}): {advice}, then "
                f"{_resume_from(output_dir)}."
            ) from error
        finally:
            self._saving_checkpoint = False
            if self.args.should_save:
                shutil.rmtree(partial.parent, ignore_errors=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        self._rotate(final)
        self.accelerator.wait_for_everyone()

    def _rotate(self, last: Path) -> None:
        """Deletes the oldest checkpoints beyond the limit, except the last and the best one."""
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(last.parent, self.args.save_total_limit, keep={last} | ({Path(best)} if best else set()))

    def _write_checkpoint(self, model, trial, partial: Path, final: Path) -> None:
        rank = self.args.process_index
        monitors = {
            f"{dictionary}/{key}": value
            for dictionary, monitor in self.monitors.items()
            for key, value in monitor.state_dict().items()
        }
        save_file(monitors, partial / _MONITOR_STATE.format(rank=rank))
        for shard, state in self._stream_state.items():
            (partial / _STREAM_STATE.format(shard=shard)).write_text(to_json(state))
        if self.args.should_save:
            (partial / FACTS).write_text(to_json(self._facts))
        self._saving_checkpoint = True
        with working("saving a checkpoint", show=self._shows_progress):
            super()._save_checkpoint(model, trial)
        self._saving_checkpoint = False
        if self.args.should_save and self.state.best_global_step:
            # The Trainer looks for the best checkpoint in the folder where this one is being written.
            best = final.with_name(f"checkpoint-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best == final or best.exists() else None
            self.state.save_to_json(str(partial / TRAINER_STATE))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # After the checkpoint has its name.
        if not self._saving_checkpoint:
            super()._push_from_checkpoint(checkpoint_folder)

    # ------------------------------------------------------------------------------------------------ stopping

    def get_batch_samples(self, *args, **kwargs):
        """The batches of one step. If the data cannot be read, the last step is saved first."""
        try:
            with self._at_once():
                samples = super().get_batch_samples(*args, **kwargs)
        except TranscoderError as error:
            raise TranscoderError(f"{str(error).removesuffix('.')}; {self._save_last_step()}.") from error
        except Exception:
            logger.error(f"The data cannot be read any further; {self._save_last_step()}.")
            raise
        self._interruption.begin_step()
        return samples

    def _at_once(self):
        """A part of the run that a signal ends at once. Several processes end at the same step instead."""
        return self._interruption.at_once() if self.args.world_size == 1 else contextlib.nullcontext()

    def _save_last_step(self) -> str:
        """Saves a checkpoint of the last whole step if there is none, and returns a sentence with its path."""
        step, output_dir = self.state.global_step, Path(self.args.output_dir)
        if step == 0:
            return "nothing was learned yet"
        # The other processes may have data: they are already in the next step and do not save.
        if self.args.world_size > 1:
            return _resume_from(output_dir)
        if self._saved is None or self._saved[0] != step:
            try:
                self._save_checkpoint(self.model, None)
            except TranscoderError as error:
                return f"its last step could not be saved either: {str(error).removesuffix('.')}"
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return f"the state after step {step} is in {self._saved[1]}, to resume from"

    def stop_if_asked(self) -> None:
        """
        Ends the run after a step in which Ctrl-C or SIGTERM has arrived in any process: a checkpoint is saved first, if the run
        saves any.
        """
        step, signal = self.state.global_step, self._interruption.signal
        if self.args.world_size > 1:
            # Where the processes wait for the device anyway.
            if step % REFRESH_STEPS:
                return
            arrived = torch.tensor(signal or 0, device=self.args.device)
            dist.all_reduce(arrived, op=dist.ReduceOp.MAX)
            self._interruption.signal = signal = int(arrived) or None
        if signal is None:
            return
        if self.args.save_strategy == SaveStrategy.NO:
            raise KeyboardInterrupt
        # The Trainer logs the step and saves; an evaluation may take longer than the patience of a job scheduler.
        self.control.should_save, self.control.should_evaluate = True, False

    def _interrupted(self) -> RunInterrupted:
        """Saves the last step after a signal, unless it is saved or not whole, and says how to resume."""
        args, step = self.args, self.state.global_step
        number = self._interruption.signal
        if args.process_index:
            return RunInterrupted("", number)
        start = f"Stopped by {self._interruption.name}"
        if step >= args.max_steps and not self._interruption.in_step:
            return RunInterrupted(f"{start} after the last step: the dictionaries are in {args.output_dir}.", number)
        saving = args.save_strategy != SaveStrategy.NO
        if saving and not self._interruption.in_step and step and args.world_size == 1:
            self._save_last_step()
        if self._saved is None:
            why = "" if saving or not step else " (`save_strategy` is 'no')"
            return RunInterrupted(f"{start} at step {step} of {args.max_steps}: nothing was saved{why}.", number)
        step, checkpoint = self._saved
        way = (
            "it holds the weights only, as `save_only_model` asks for"
            if args.save_only_model
            else "--resume (`resume_from_checkpoint=True` in Python) goes on from there"
        )
        return RunInterrupted(f"{start}: step {step} of {args.max_steps} is saved in {checkpoint}, and {way}.", number)

    def _not_finite(self) -> list[str]:
        """The dictionaries whose weights have NaN or infinity. Waits for the device."""
        finite = []
        for dictionary in self.dictionaries.values():
            tensors = itertools.chain(dictionary.parameters(), dictionary.buffers())
            mine = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
            finite.append(torch.stack([t.isfinite().all() for t in mine]).all())
        finite = torch.stack(finite).float()
        if self.args.world_size > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return [name for name, good in zip(self.dictionaries, finite.tolist(), strict=True) if not good]

    def _stop_if_diverged(self, losses: dict[str, float]) -> None:
        """Ends the run if a loss (dictionary -> mean since the last log) or a weight is not finite."""
        step = self.state.global_step
        what = [f"the loss of {name} was {loss}" for name, loss in losses.items() if not abs(loss) < float("inf")]
        what += [f"weights of {name} are NaN or infinite" for name in self._not_finite()]
        scaler = self.accelerator.scaler
        if scaler is not None and not losses and scaler.get_scale() < 1:
            what.append("every step since the last log overflowed in fp16, however small the loss was scaled")
        if what:
            raise TranscoderError(f"The run has diverged at step {step} ({'; '.join(what)}): {self._way_out()}.")

    def _way_out(self, output_dir: Path | None = None) -> str:
        return (
            f"start again with a lower `learning_rate`, or, if the cause is fixed, "
            f"{_resume_from(output_dir or self.args.output_dir)}"
        )

    # ------------------------------------------------------------------------------------------------ reading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Loads weights, dead-feature counts, running metrics and the position in the data."""
        self._load_dictionaries(resume_from_checkpoint)
        self._load_monitors(resume_from_checkpoint)
        self._load_stream(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_dictionaries(self.state.best_model_checkpoint)

    def _load_dictionaries(self, checkpoint: str) -> None:
        if isinstance(self.model, NamedDictionaries):
            saved = dict(type(self.model).from_pretrained(checkpoint).items())  # pyright: ignore[reportAttributeAccessIssue]
        else:
            saved = {next(iter(self.dictionaries)): TranscoderModel.from_pretrained(checkpoint)}
        if set(saved) != set(self.dictionaries):
            raise TranscoderError(
                f"The checkpoint holds {', '.join(saved)} and this run trains {', '.join(self.dictionaries)}: resume with "
                "the same dictionaries."
            )
        for name, dictionary in self.dictionaries.items():
            try:
                load_state_(dictionary, saved[name].state_dict())
            except RuntimeError as error:
                raise TranscoderError(
                    f"The checkpoint's '{name}' has other sizes than that of this run: resume with the same "
                    "configuration."
                ) from error
            dictionary.config.target_variance = saved[name].config.target_variance
            dictionary.config.evaluation = saved[name].config.evaluation

    def _load_monitors(self, checkpoint: str) -> None:
        """Loads the monitors of this process, merged and shared out if the number of processes has changed."""
        rank, world_size = self.args.process_index, self.args.world_size
        count = len(list(Path(checkpoint).glob(_MONITOR_STATE.format(rank="*"))))
        wanted = [rank] if count == world_size else range(count)
        try:
            files = [load_file(os.path.join(checkpoint, _MONITOR_STATE.format(rank=number))) for number in wanted]
        except (OSError, SafetensorError) as error:
            raise TranscoderError(
                f"The running metrics in {checkpoint} cannot be read ({_reason(error)}): take another checkpoint."
            ) from error
        for name, monitor in self.monitors.items():
            prefix = f"{name}/"
            states = [{k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)} for file in files]
            if not states or not all(map(monitor.accepts, states)):
                raise TranscoderError(
                    f"The running metrics of '{name}' in {checkpoint} are damaged: take another checkpoint."
                )
            monitor.load_state_dict(states[0] if count == world_size else share_out(states, rank, world_size))

    def _read_stream_states(self, checkpoint: str) -> tuple[dict[int, dict[str, Any]], int]:
        """Positions of the shards of this process in the checkpoint, and the number of its shards."""
        files = {
            shard: file
            for shard in self.get_train_dataloader().shards
            if (file := Path(checkpoint, _STREAM_STATE.format(shard=shard))).exists()
        }
        states = {shard: checked_state(read_json(file)) for shard, file in files.items()}
        return states, len(list(Path(checkpoint).glob(_STREAM_STATE.format(shard="*"))))

    def _load_stream(self, checkpoint: str) -> None:
        self.get_train_dataloader().load_state_dict(self._read_stream_states(checkpoint)[0])


def _resume_from(output_dir: str | os.PathLike) -> str:
    last = last_checkpoint(output_dir)
    return (
        f"resume from {last}, the last whole checkpoint" if last else "start again: there is no whole checkpoint yet"
    )


def _reason(error: BaseException) -> str:
    """The message of the operating system, if an error has one."""
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        # The form of errors of safetensors.
        if number := re.search(r"\(os error (\d+)\)", str(cause)):
            return os.strerror(int(number[1]))
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
