"""Checkpoints from which a run continues bit for bit."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import rotate_checkpoints

from ..errors import TranscoderError
from ..models import TranscoderModel, TranscoderSet
from .monitor import share_out
from .sharding import is_sharded, load_state_, share_out_optimizer_state, whole


_MONITOR_STATE = "monitors_{rank}.safetensors"
_STREAM_STATE = "activation_stream_{shard}.json"


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
        for shard, stream in self.stream.state_dict().items():
            state = {**stream, "tokens_per_step": self.args.tokens_per_step}
            Path(partial, _STREAM_STATE.format(shard=shard)).write_text(json.dumps(state))
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
                load_state_(dictionary, saved[name].state_dict())
            except RuntimeError as error:
                raise TranscoderError(
                    f"The checkpoint's '{name}' has other sizes than the one of this run: resume with the same "
                    "configuration."
                ) from error
            dictionary.config.target_variance = saved[name].config.target_variance
        if not self.monitors:
            return  # The best model is loaded after training; there is nothing to continue.
        self._load_monitors(resume_from_checkpoint)
        self._load_stream(resume_from_checkpoint)

    def _load_monitors(self, checkpoint: str) -> None:
        """Each process its own, or all of them merged where there are now more processes or fewer."""
        rank, world_size = self.args.process_index, self.args.world_size
        count = len(list(Path(checkpoint).glob(_MONITOR_STATE.format(rank="*"))))
        wanted = [rank] if count == world_size else range(count)
        files = [load_file(os.path.join(checkpoint, _MONITOR_STATE.format(rank=number))) for number in wanted]
        for name, monitor in self.monitors.items():
            prefix = f"{name}/"
            states = [{k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)} for file in files]
            monitor.load_state_dict(states[0] if count == world_size else share_out(states, rank, world_size))

    def _load_stream(self, checkpoint: str) -> None:
        stream = self.get_train_dataloader()
        states = {}
        for shard in stream.shards:
            file = Path(checkpoint, _STREAM_STATE.format(shard=shard))
            if not file.exists():
                saved = len(list(file.parent.glob(_STREAM_STATE.format(shard="*"))))
                raise TranscoderError(
                    f"The checkpoint has {saved} data shards and this run has {self.args.data_shards}: resume with "
                    f"`data_shards={saved}`, on a number of processes that divides it."
                )
            states[shard] = json.loads(file.read_text())
            if (tokens := states[shard].pop("tokens_per_step")) != self.args.tokens_per_step:
                raise TranscoderError(
                    f"The checkpoint was made with {tokens} tokens per step and this run has {self.args.tokens_per_step}: "
                    "choose batch size, accumulation and processes so that their product is the same, or start anew."
                )
        stream.load_state_dict(states)

    # ------------------------------------------------------------------------------------------------ sharded optimizers

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # As one file that any number of processes can resume from; every process takes part in gathering it.
        state = self.optimizer.state_dict()
        state = {**state, "state": whole(state["state"], "cpu" if self.args.should_save else "meta")}
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        hook = self.optimizer.optimizer.register_load_state_dict_pre_hook(share_out_optimizer_state)
        super()._load_optimizer_and_scheduler(checkpoint)
        hook.remove()
