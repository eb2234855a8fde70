"""Checkpoints from which a run continues bit for bit."""

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers.trainer_utils import rotate_checkpoints

from ..errors import TranscoderError
from ..models import TranscoderModel, TranscoderSet


_MONITOR_STATE = "monitors_{rank}.safetensors"
_STREAM_STATE = "activation_stream_{rank}.json"


class ExactCheckpoints:
    """What [`TranscoderTrainer`] does otherwise than the Trainer when it writes and reads checkpoints."""

    def _get_output_dir(self, trial) -> str:
        # While a checkpoint is written its pieces go into a folder that is no checkpoint yet.
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, ".partial") if self._saving_checkpoint else directory

    _saving_checkpoint = False

    def _save_checkpoint(self, model, trial) -> None:
        """Writes a checkpoint in full and only then gives it its name, so that a broken one is never found."""
        output_dir = super()._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        partial = os.path.join(output_dir, ".partial", name)
        if self.args.should_save:
            shutil.rmtree(os.path.dirname(partial), ignore_errors=True)
            os.makedirs(partial)
        self.accelerator.wait_for_everyone()
        rank = self.args.process_index
        monitors = {
            f"{dictionary}/{key}": value
            for dictionary, monitor in self.monitors.items()
            for key, value in monitor.state_dict().items()
        }
        save_file(monitors, os.path.join(partial, _MONITOR_STATE.format(rank=rank)))
        Path(partial, _STREAM_STATE.format(rank=rank)).write_text(json.dumps(self.stream.state_dict()))
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            final = os.path.join(output_dir, name)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            shutil.rmtree(os.path.dirname(partial), ignore_errors=True)
            rotate_checkpoints(
                output_dir=output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Weights, dead-feature counts, running metrics and the place in the data."""
        if isinstance(self.model, TranscoderSet):
            saved = dict(TranscoderSet.from_pretrained(resume_from_checkpoint).items())
        else:
            saved = {next(iter(self.dictionaries)): TranscoderModel.from_pretrained(resume_from_checkpoint)}
        if set(saved) != set(self.dictionaries):
            raise TranscoderError(
                f"The checkpoint holds {', '.join(saved)} and this run trains {', '.join(self.dictionaries)}: resume with "
                "the same dictionaries."
            )
        for name, dictionary in self.dictionaries.items():
            try:
                dictionary.load_state_dict(saved[name].state_dict())
            except RuntimeError as error:
                raise TranscoderError(
                    f"The checkpoint's '{name}' has other sizes than the one of this run: resume with the same "
                    "configuration."
                ) from error
            dictionary.config.target_variance = saved[name].config.target_variance
        if not self.monitors:
            return  # The best model is loaded after training; there is nothing to continue.
        rank = self.args.process_index
        monitors = load_file(os.path.join(resume_from_checkpoint, _MONITOR_STATE.format(rank=rank)))
        for name, monitor in self.monitors.items():
            prefix = f"{name}/"
            monitor.load_state_dict({k.removeprefix(prefix): v for k, v in monitors.items() if k.startswith(prefix)})
        stream = json.loads(Path(resume_from_checkpoint, _STREAM_STATE.format(rank=rank)).read_text())
        self.get_train_dataloader().load_state_dict(stream)
