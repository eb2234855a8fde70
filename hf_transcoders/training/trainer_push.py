"""Push from the trainer: at the end of a run and, depending on `hub_strategy`, with every checkpoint."""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..files import write_text
from ..hub.cards.card import own_card
from ..hub.cards.make import make_card
from ..hub.commit import Destination, make_repo
from ..hub.public import hidden_names, public_values
from ..hub.push_files import dictionary_files, link_or_copy, run_records
from ..hub.upload import push_folder
from ..models.saved_files import CONFIG_NAME
from ..models.set_index import INDEX_NAME
from ..text import logging
from ..text.strict_json import read_json
from ..tracking.run import Run, recorded_run
from .checkpoint_files import MANIFEST
from .trainer_part import TrainerPart


logger = logging.get_logger(__name__)

_STAGED = ".push-"


class TrainerPushMixin(TrainerPart):
    """
    The methods of [`TranscoderTrainer`] that push to the Hub, instead of those of [`~transformers.Trainer`]: with model
    cards, sets of dictionaries, one commit per push, deletion of stale files, and the records of the run in `tracking/`.

    With `TrainingArguments(push_to_hub=True)`, `hub_strategy` has its usual meaning: `"end"` pushes on
    [`~TranscoderTrainer.save_model`], `"every_save"` also pushes the dictionaries of each checkpoint when it is saved,
    `"checkpoint"` also the checkpoint itself, with its optimizer, to `last-checkpoint`, and `"all_checkpoints"` each one
    to `checkpoint-<step>`. These pushes run in the background; if one fails, there is a warning and the run continues.
    """

    @functools.cached_property
    def _push_queue(self) -> ThreadPoolExecutor:
        """A queue that runs pushes one after the other."""
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repo `args.hub_model_id` (by default the name of the output folder) and its branch `args.hub_revision`."""
        if self.is_world_process_zero():
            args = self.args
            name = args.hub_model_id or Path(args.output_dir).absolute().name
            token = token or args.hub_token
            private = args.hub_private_repo if private is None else private
            made = make_repo(Destination(name, private=private, token=token, revision=args.hub_revision))
            self.hub_model_id = made.repo_id
            for left in Path(args.output_dir).glob(f"{_STAGED}*"):
                shutil.rmtree(left, ignore_errors=True)  # Left by a process that was killed.
        self.push_in_progress = None

    def push_to_hub(
        self,
        repo_id: str | None = None,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        remote_code: bool = False,
        license: str | None = None,
    ) -> CommitInfo | None:
        """
                Saves the dictionaries into `args.output_dir` and publishes them with a model card. If they were trained since the
                last evaluation, they are evaluated first, if there is an `eval_dataset`.

        Args:
                repo_id (`str`, *optional*): Repo on the Hub. Defaults to `args.hub_model_id`, or the name of the output folder.
                    blocking (`bool`, *optional*, defaults to `True`): Whether to wait for the push instead of pushing in the background.
                    commit_message, token, revision, private, create_pr, remote_code, license: Same as in [`~hf_transcoders.hub.push`].

                Returns:
                    [`~huggingface_hub.CommitInfo`], or a `Future` of it if not `blocking`; `None` on all processes but the first.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if self.eval_dataset is not None and any(d.config.evaluation is None for d in self.dictionaries.values()):
            self.evaluation_report()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        repo_id = repo_id or self.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name
        token = token or args.hub_token
        private = args.hub_private_repo if private is None else private
        revision = revision or (None if create_pr else args.hub_revision)
        if not create_pr:
            repo_id = make_repo(Destination(repo_id, private=private, token=token, revision=revision)).repo_id
        self._finish_current_push()
        job = self._push_job(
            self._staged(args.output_dir),
            license,
            repo_id=repo_id,
            commit_message=commit_message,
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            remote_code=remote_code,
        )
        return job() if blocking else self._push_queue.submit(job)

    def _push_job(self, folder: Path, license: str | None = None, mirrored=None, **arguments):
        """A function that pushes a staged folder and then deletes it."""
        # Made now, because the run changes while the job is in the background. The records are staged for the same reason.
        run = self._run_in(folder)
        card = own_card(self.args.output_dir) or make_card(
            self.model, repo_id=arguments["repo_id"], run=run, license=license
        )

        def job():
            try:
                return push_folder(
                    folder, card=lambda _: card, records=run_records(run), mirrored=mirrored, **arguments
                )
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        return job

    def _run_in(self, folder: str | os.PathLike) -> Run:
        """The run recorded in a folder or, without records, the Trainer's log."""
        return recorded_run(folder) or Run.from_log_history(self.state.log_history, name=self.args.run_name or "")

    def _staged(self, folder: str | os.PathLike) -> Path:
        """A separate folder with the files to push from `folder`, because the run continues to write and delete files."""
        staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=self.args.output_dir))
        for name, path in dictionary_files(folder).items():
            link_or_copy(path, staged / name)
        for name, path in run_records(recorded_run(self.args.output_dir)).items():
            # Lines are added to these while the run goes on.
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staged / name)
        return staged

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes a whole checkpoint in the background, depending on `args.hub_strategy`."""
        args, checkpoint = self.args, Path(checkpoint_folder)
        if not args.push_to_hub or args.hub_strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        step = self.state.global_step
        staged, mirrored = self._staged(checkpoint), {}
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            target = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            for path in checkpoint.rglob("*"):
                if path.is_file():
                    link_or_copy(path, staged / "checkpoint" / path.relative_to(checkpoint))
            _hide_paths(staged / "checkpoint")
            mirrored[target] = staged / "checkpoint"
        target = {"repo_id": self.hub_model_id, "token": args.hub_token, "revision": args.hub_revision}
        job = self._push_job(staged, mirrored=mirrored, commit_message=f"Training in progress, step {step}", **target)

        def quietly():
            try:
                job()
            except Exception as error:
                logger.warning(f"The push of step {step} failed, and the run continues: {error}")

        future = self._push_queue.submit(quietly)
        if busy:
            self.push_in_progress.jobs.append(future)
        else:
            self.push_in_progress = PushInProgress([future])


def _hide_paths(checkpoint: Path) -> None:
    """Removes local paths from a copy of a checkpoint, which can still be resumed from."""
    described = (CONFIG_NAME, INDEX_NAME, "trainer_state.json", "training_args.json")
    found = {path: read_json(path, allow_nan=True) for path in checkpoint.rglob("*.json") if path.name in described}
    names = hidden_names(values.get("base_model_name_or_path") for values in found.values())
    manifest = read_json(checkpoint / MANIFEST)
    for path, values in found.items():
        before, after = (json.dumps(each, indent=2) + "\n" for each in (values, public_values(values, names)))
        if before != after:
            # The original is a hard link and must not change: a new file replaces it in the copy.
            write_text(path, after)
            name = path.relative_to(checkpoint).as_posix()
            manifest["files"][name] = len(after.encode())
            if "sha256" in manifest:
                manifest["sha256"][name] = hashlib.sha256(after.encode()).hexdigest()
    write_text(checkpoint / MANIFEST, json.dumps(manifest, indent=2) + "\n")
