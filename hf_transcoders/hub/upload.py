"""Pushing a dictionary or a set: one commit that holds what changed, with our card and nothing left over."""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from ..errors import TranscoderError
from ..evaluation.evaluator import EvaluationReport
from ..models.modeling_transcoder import TranscoderModel
from ..models.transcoder_set import TranscoderSet
from ..text import logging
from ..tracking.run import Run
from .cards.card import ASSETS, README, TranscoderCard, is_unedited
from .cards.make import make_card
from .hub_errors import hub_errors
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


logger = logging.get_logger(__name__)


def push(
    dictionaries: TranscoderModel | TranscoderSet,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    subfolder: str = "",
    remote_code: bool = False,
    max_shard_size: int | str = "50GB",
    report: EvaluationReport | None = None,
    run: Run | None = None,
    license: str | None = None,
) -> CommitInfo:
    """
    Publishes a dictionary or a set with its card, in one commit.

    Only what changed is sent, and without a change there is no commit. Files that an earlier push left and this one does
    not have (shards, dictionaries that are no longer in the set) go in the same commit; other files of the repo stay. A
    push that broke off has changed nothing that others see: push again, and what has arrived is not sent twice.

    The card replaces the one of an earlier push. One that was edited since, or written by hand, stays as it is, with a
    warning: remove README.md from the repo to have it written anew.

    Args:
        dictionaries ([`TranscoderModel`] or [`TranscoderSet`]): What is published.
        repo_id (`str`): Such as `"me/my-transcoder"`; made if it does not exist.
        commit_message, commit_description (`str`, *optional*): Of the commit.
        private (`bool`, *optional*): Whether a repo that is made is private.
        token (`str`, *optional*): By default that of `hf auth login` or `HF_TOKEN`.
        revision (`str`, *optional*, defaults to `"main"`): A branch, made if it does not exist.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of committing to `main`.
        subfolder (`str`, *optional*, defaults to `""`): Where in the repo everything goes, the card too.
        remote_code (`bool`, *optional*, defaults to `False`):
            Also the model's code, for `AutoModel.from_pretrained(..., trust_remote_code=True)` without this package.
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): Of one file of weights.
        report ([`EvaluationReport`], *optional*), run ([`Run`], *optional*), license (`str`, *optional*):
            For the card, see [`make_card`]. The records of the run go into the repo's `tracking/`.

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        [`TranscoderError`]: What kept it from happening, and what to do.
    """
    with tempfile.TemporaryDirectory() as folder:
        dictionaries.save_pretrained(folder, max_shard_size=max_shard_size)
        many = isinstance(dictionaries, TranscoderSet)
        return push_folder(
            folder,
            repo_id,
            card=lambda name: make_card(dictionaries, repo_id=name, report=report, run=run, license=license),
            records=run_records(run),
            commit_message=commit_message
            or (f"Upload {len(dictionaries)} dictionaries" if many else "Upload transcoder"),
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            subfolder=subfolder,
            remote_code=remote_code,
        )


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    card: Callable[[str], TranscoderCard] | None = None,
    records: Mapping[str, Path] | None = None,
    mirrored: Mapping[str, str | os.PathLike] | None = None,
    commit_message: str = "Upload transcoder",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    subfolder: str = "",
    remote_code: bool = False,
) -> CommitInfo:
    """
    Publishes the dictionary or set that lies in a folder, as [`push`] does. Whatever else lies there stays there.

    Args:
        folder (`str` or `os.PathLike`): Where `save_pretrained` or a training run has written.
        card (`Callable[[str], TranscoderCard]`, *optional*):
            Makes the card for the repo's full id. Without it the repo's card is left alone.
        records (`Mapping[str, Path]`, *optional*): Path in the repo -> further files, see [`run_records`].
        mirrored (`Mapping[str, str]`, *optional*):
            Folder in the repo -> folder here that it shall equal, such as a checkpoint to resume from.
        repo_id, commit_message, commit_description, private, token, revision, create_pr, subfolder, remote_code:
            As for [`push`].

    Returns:
        [`~huggingface_hub.CommitInfo`]
    """
    if create_pr and revision not in (None, "main"):
        raise TranscoderError(
            f"A pull request is made against 'main', not against '{revision}': give either `create_pr` or `revision`."
        )
    subfolder = subfolder.strip("/")
    prefix = f"{subfolder}/" if subfolder else ""
    with contextlib.ExitStack() as stack:
        if remote_code:
            folder = stack.enter_context(with_remote_code(folder))
        # Before anything happens on the Hub: it says what is wrong with a folder that holds no dictionary.
        files = dictionary_files(folder)
        check_weights(files)
        stack.enter_context(hub_errors(repo_id, token))
        api = HfApi(token=token, library_name="hf_transcoders")
        if not create_pr:
            repo_id = make_repo(api, repo_id, private, revision)
        info = api.repo_info(repo_id, revision=revision)
        there = {sibling.rfilename for sibling in info.siblings}  # pyright: ignore[reportAttributeAccessIssue]

        def read(path: str) -> str:
            return Path(api.hf_hub_download(repo_id, path, revision=info.sha)).read_text(encoding="utf-8")

        shown = published(files, records)
        new: dict[str, Path | bytes] = {prefix + path: content for path, content in shown.items()}
        # transformers looks for code at the top of a repo only.
        new |= {path.removeprefix(prefix): local for path, local in new.items() if path[len(prefix) :] in CODE_FILES}
        stale = left_by_earlier_push(there, prefix, read)
        if records:
            stale |= {path for path in there if is_record(path.removeprefix(prefix))}
        for target, source in (mirrored or {}).items():
            new |= {f"{prefix}{target}/{path}": local for path, local in _all_files(source).items()}
            stale |= {path for path in there if path.startswith(f"{prefix}{target}/")}
        if card is not None:
            old_card = read(prefix + README) if prefix + README in there else None
            if old_card is None or is_unedited(old_card):
                written = card(repo_id)
                new |= {prefix + path: content.encode() for path, content in written.files.items()}
                new[prefix + README] = written.text.encode()
                shown = re.findall(rf"{ASSETS}/[\w./-]+", old_card or "")
                stale |= {prefix + path for path in shown} & there
            else:
                logger.warning(
                    f"The card of {repo_id} was edited on the Hub and stays as it is, so its numbers may be those of an "
                    f"earlier push: remove its {prefix + README} and push again to have it written anew."
                )
        stale -= new.keys()
        if stale:
            logger.warning(f"No longer part of what is pushed, and removed from {repo_id}: {', '.join(sorted(stale))}")
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(path) for path in sorted(stale)),
                *(CommitOperationAdd(path, content) for path, content in sorted(new.items())),
            ],
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            # What goes and what stays was decided on this commit.
            parent_commit=info.sha,
        )


def make_repo(api: HfApi, repo_id: str, private: bool | None = None, revision: str | None = None) -> str:
    """
    Makes a repo, and a branch in it, where they do not exist.

    Returns:
        `str`: The repo's full id.
    """
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id).private:
        raise TranscoderError(
            f"{repo_id} exists and is public: make it private in its settings, or push to another repo."
        )
    # The reference of a pull request is there already.
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def take_push_arguments(kwargs: dict[str, Any], save_directory: str | os.PathLike) -> dict[str, Any]:
    """Takes those arguments of [`push`] out of `save_pretrained(..., push_to_hub=True)`'s, with the folder's name as repo."""
    names = (
        "repo_id",
        "commit_message",
        "commit_description",
        "private",
        "token",
        "revision",
        "create_pr",
        "subfolder",
    )
    found = {name: kwargs.pop(name) for name in names if name in kwargs}
    return {"repo_id": Path(save_directory).resolve().name, **found}


def _all_files(folder: str | os.PathLike) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
