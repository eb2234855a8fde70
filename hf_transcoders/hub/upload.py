"""Push a dictionary or a set: one commit with the changed files and a model card, which deletes stale files."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import CommitInfo

from ..evaluation.evaluation_report import EvaluationReport
from ..models.cross_layer.modeling_cross_layer import CrossLayerTranscoder
from ..models.modeling_transcoder import TranscoderModel
from ..models.named_dictionaries import NamedDictionaries
from ..models.transcoder_set import TranscoderSet
from ..tracking.run import Run
from .cards.card import TranscoderCard
from .cards.make import make_card
from .commit import Destination, pending_commit
from .push_files import (
    check_weights,
    dictionary_files,
    is_record,
    left_by_earlier_push,
    published,
    run_records,
    with_remote_code,
)
from .remote_code import CODE_FILES


def push(
    dictionaries: TranscoderModel | TranscoderSet | CrossLayerTranscoder,
    repo_id: str,
    *,
    remote_code: bool = False,
    max_shard_size: int | str = "50GB",
    report: EvaluationReport | None = None,
    run: Run | None = None,
    license: str | None = None,
    **destination,
) -> CommitInfo:
    """
    Publishes a dictionary or a set with its card, in one commit.

    Only changed files are sent, and without a change there is no commit. Files that an earlier push left and this one does
    not have (shards, dictionaries that are no longer in the set) are deleted in the same commit; other files of the repo
    are kept. A push that fails changes nothing that others can see: push again, and files that arrived are not sent twice.

    The card replaces that of an earlier push. A card that was edited on the Hub or written by hand is kept, with a warning:
    delete README.md from the repo for a new card.

    Args:
        dictionaries ([`TranscoderModel`], [`TranscoderSet`] or [`CrossLayerTranscoder`]): Dictionary or set to publish.
        repo_id (`str`): Repo on the Hub, such as `"me/my-transcoder"`, created if it does not exist.
        remote_code (`bool`, *optional*, defaults to `False`):
            Whether to publish the model's code too, for `AutoModel.from_pretrained(..., trust_remote_code=True)` without
            this package.
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): Largest size of one file of weights.
        report ([`EvaluationReport`], *optional*), run ([`Run`], *optional*), license (`str`, *optional*):
            Contents of the card, see [`make_card`]. The records of the run are published in the repo's `tracking/`.
        destination:
            Further arguments of [`Destination`]: `commit_message`, `commit_description`, `private`, `token`, `revision`,
            `create_pr`, `subfolder`.

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        [`TranscoderError`]: why the push failed, and what to do.
    """
    with tempfile.TemporaryDirectory() as folder:
        dictionaries.save_pretrained(folder, max_shard_size=max_shard_size)
        if isinstance(dictionaries, NamedDictionaries):
            destination["commit_message"] = (
                destination.get("commit_message") or f"Upload {len(dictionaries)} dictionaries"
            )
        return push_folder(
            folder,
            repo_id,
            card=lambda name: make_card(dictionaries, repo_id=name, report=report, run=run, license=license),
            records=run_records(run),
            remote_code=remote_code,
            **destination,
        )


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    card: Callable[[str], TranscoderCard] | None = None,
    records: Mapping[str, Path] | None = None,
    mirrored: Mapping[str, str | os.PathLike] | None = None,
    remote_code: bool = False,
    **destination,
) -> CommitInfo:
    """
    Publishes the dictionary or set in a folder, as [`push`] does. Other files in the folder are not published.

    Args:
        folder (`str` or `os.PathLike`): Folder that `save_pretrained` or a training run has written.
        card (`Callable[[str], TranscoderCard]`, *optional*):
            Function that makes the card for the repo's full id. Without it the repo's card is kept.
        records (`Mapping[str, Path]`, *optional*): Path in the repo -> further file, see [`run_records`].
        mirrored (`Mapping[str, str]`, *optional*):
            Folder in the repo -> local folder that it becomes a copy of, such as a checkpoint to resume from.
        repo_id, remote_code, destination: As in [`push`].

    Returns:
        [`~huggingface_hub.CommitInfo`]
    """
    to = Destination(repo_id, **destination)
    prefix = to.prefix
    with contextlib.ExitStack() as stack:
        if remote_code:
            folder = stack.enter_context(with_remote_code(folder))
        # A folder that holds no dictionary is refused before anything happens on the Hub.
        files = dictionary_files(folder)
        check_weights(files)
        commit = stack.enter_context(pending_commit(to))
        commit.new |= {prefix + path: content for path, content in published(files, records).items()}
        # transformers looks for code at the top of a repo only.
        commit.new |= {
            path.removeprefix(prefix): local for path, local in commit.new.items() if path[len(prefix) :] in CODE_FILES
        }
        commit.stale |= left_by_earlier_push(commit.files, prefix, commit.read)
        if records:
            commit.stale |= {path for path in commit.files if is_record(path.removeprefix(prefix))}
        for target, source in (mirrored or {}).items():
            commit.new |= {f"{prefix}{target}/{path}": local for path, local in _all_files(source).items()}
            commit.stale |= {path for path in commit.files if path.startswith(f"{prefix}{target}/")}
        if card is not None:
            commit.add_card(card)
        return commit.create("Upload transcoder")


def _all_files(folder: str | os.PathLike) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
