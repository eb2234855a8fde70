"""Pushing a dictionary or a set: one commit that holds what changed, with our card and nothing left over."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers.utils import logging

from ..errors import TranscoderError
from ..evaluation import EvaluationReport
from ..models import TranscoderModel, TranscoderSet
from ..models.transcoder_set import INDEX_NAME
from ..tracking import Run
from .cards import TranscoderCard, is_unedited, make_card
from .cards.card import ASSETS, README
from .remote_code import CODE_FILES, write_code_files, write_remote_code


logger = logging.get_logger(__name__)

# Files of one dictionary, as `save_pretrained` names them.
_DICTIONARY_FILE = re.compile(
    r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|"
    + "|".join(map(re.escape, CODE_FILES))
)
# What training leaves beside them that others can use.
_FACTS = ("evaluation.json", "training_args.json")


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
            folder = stack.enter_context(_with_remote_code(folder))
        # Before anything happens on the Hub: it says what is wrong with a folder that holds no dictionary.
        files = dictionary_files(folder)
        stack.enter_context(hub_errors(repo_id, token))
        api = HfApi(token=token, library_name="hf_transcoders")
        if not create_pr:
            repo_id = make_repo(api, repo_id, private, revision)
        info = api.repo_info(repo_id, revision=revision)
        there = {sibling.rfilename for sibling in info.siblings}

        def read(path: str) -> str:
            return Path(api.hf_hub_download(repo_id, path, revision=info.sha)).read_text(encoding="utf-8")

        new: dict[str, Path | bytes] = {prefix + path: local for path, local in files.items()}
        # transformers looks for code at the top of a repo only.
        new |= {path.removeprefix(prefix): local for path, local in new.items() if path[len(prefix) :] in CODE_FILES}
        new |= {prefix + path: local for path, local in (records or {}).items()}
        stale = _left_by_earlier_push(there, prefix, read)
        if records:
            stale |= {path for path in there if _is_record(path.removeprefix(prefix))}
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


# ---------------------------------------------------------------------------------------------------- which files


def dictionary_files(folder: str | os.PathLike) -> dict[str, Path]:
    """
    The files of the dictionary or set that lies in a folder, and what training says of it.

    Returns:
        `dict[str, Path]`: Path inside the folder, with `/` -> file.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).is_file():
        inside = [Path(name) for name in _subfolders((folder / INDEX_NAME).read_text(encoding="utf-8"))]
        found = [Path(INDEX_NAME), *map(Path, CODE_FILES)]
    elif (folder / "config.json").is_file():
        inside, found = [Path()], []
    else:
        raise TranscoderError(
            f"{folder} holds neither a dictionary (config.json) nor a set ({INDEX_NAME}): give the folder that training or "
            "`save_pretrained` wrote."
        )
    for part in inside:
        names = [path.name for path in (folder / part).iterdir()] if (folder / part).is_dir() else []
        if "config.json" not in names:
            raise TranscoderError(f"The set in {folder} has no dictionary '{part}': copy or save it again.")
        found += [part / name for name in names if _DICTIONARY_FILE.fullmatch(name)]
    found += map(Path, _FACTS)
    return {path.as_posix(): folder / path for path in found if (folder / path).is_file()}


@contextlib.contextmanager
def _with_remote_code(folder: str | os.PathLike) -> Iterator[Path]:
    """A copy of what lies in a folder, with the model's code."""
    with tempfile.TemporaryDirectory() as copy:
        files = dictionary_files(folder)
        for name, path in files.items():
            link_or_copy(path, Path(copy, name))
        for name in files:
            if PurePosixPath(name).name == "config.json":
                write_remote_code(Path(copy, name).parent)
        write_code_files(copy)
        yield Path(copy)


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file that will not be written over a second name; where the disk cannot do that, copies it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def run_records(run: Run | None, largest: int = 10 * 2**20) -> dict[str, Path]:
    """
    What others can use of a run's records: facts, curves, histograms, tables and pictures.

    Args:
        run ([`Run`], *optional*): The run.
        largest (`int`, *optional*, defaults to 10 MiB): Bytes above which a file stays here.

    Returns:
        `dict[str, Path]`: Path in the repo -> file. A file that seems to hold an access token is left out.
    """
    if run is None or run.folder is None:
        return {}
    found = {}
    for path in sorted((run.folder / "tracking").rglob("*")):
        name = path.relative_to(run.folder).as_posix()
        if not _is_record(name) or not path.is_file() or path.stat().st_size > largest:
            continue
        if _holds_token(path.read_bytes()):
            logger.warning(f"{path} holds what looks like an access token and is not pushed.")
            continue
        found[name] = path
    return found


def _is_record(path: str) -> bool:
    return (
        re.fullmatch(r"tracking/(run\.json|[\w.-]+\.jsonl|tables/[\w.-]+\.jsonl|images/[\w.-]+\.png)", path)
        is not None
    )


def _holds_token(content: bytes) -> bool:
    own = get_token()
    return re.search(rb"\bhf_[A-Za-z0-9]{30,}", content) is not None or bool(own and own.encode() in content)


def _subfolders(index: str) -> list[str]:
    return [entry["subfolder"] for entry in json.loads(index)["dictionaries"].values()]


def _all_files(folder: str | os.PathLike) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def _left_by_earlier_push(there: set[str], prefix: str, read) -> set[str]:
    """The repo's files that belong to dictionaries there, as its own index and configuration name them."""
    folders = set()
    if prefix + INDEX_NAME in there:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            folders = {prefix + name for name in _subfolders(read(prefix + INDEX_NAME))}
    found = {prefix + INDEX_NAME, *(prefix + name for name in CODE_FILES)} & there if folders else set()
    if prefix + "config.json" in there:
        kind = json.loads(read(prefix + "config.json")).get("model_type")
        if kind != "transcoder":
            raise TranscoderError(
                f"The repo holds a model of another kind ({kind}) at that place, which a push would overwrite: push to a "
                "repo of its own, or give a `subfolder`."
            )
        folders.add(prefix.rstrip("/"))
    for path in there:
        parent, _, name = path.rpartition("/")
        if parent in folders and _DICTIONARY_FILE.fullmatch(name):
            found.add(path)
    return found


# ---------------------------------------------------------------------------------------------------- what went wrong


@contextlib.contextmanager
def hub_errors(repo_id: str, token: str | bool | None = None) -> Iterator[None]:
    """Turns what goes wrong between here and the Hub into one sentence that says what to do."""
    try:
        yield
    except TranscoderError:
        raise
    except Exception as error:
        # The reason of a failed upload lies under the client's own words for it.
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        for link in chain:
            if (sentence := _explain(link, repo_id, token)) is not None:
                raise TranscoderError(sentence) from error
        raise


def _explain(error: BaseException, repo_id: str, token: str | bool | None) -> str | None:
    again = "push again, and what has arrived there is not sent twice."
    if isinstance(error, OfflineModeIsEnabled):
        return "The Hub is switched off by HF_HUB_OFFLINE: unset it to push."
    if isinstance(error, HFValidationError):
        return f"'{repo_id}' cannot name a repo: give `name` or `user/name` of letters, digits, '-', '_' and '.'."
    if isinstance(error, LocalTokenNotFoundError):
        return "You are not logged in to the Hub: run `hf auth login`, set HF_TOKEN, or give `token`."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        given = token if isinstance(token, str) else get_token()
        if status == 401 and not given:
            return "You are not logged in to the Hub: run `hf auth login`, set HF_TOKEN, or give `token`."
        if status == 401:
            return (
                f"The Hub does not accept the token: make one that may write at {constants.ENDPOINT}/settings/tokens."
            )
        if status == 403:
            return (
                f"The token may not write to {repo_id}: use one with the right to write there, push to a repo of your own, "
                "or propose the change with `create_pr`."
            )
        if isinstance(error, RepositoryNotFoundError):
            return f"There is no repo {repo_id} on the Hub that this token can see: check the name, or make it first."
        if status == 412:
            return f"Somebody else pushed to {repo_id} at the same moment: push again."
        if status >= 500:
            return f"The Hub failed in the middle of the push (status {status}): {again}"
        return f"The Hub refused the push to {repo_id} ({' '.join(str(error).split())}): mend that and push again."
    if isinstance(error, HTTPError):
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"The connection to the Hub at {constants.ENDPOINT} failed ({reason}): check the network and {again}"
    if isinstance(error, RuntimeError) and error.__cause__ is None:
        # How the client for large files tells of a transfer that broke off.
        return f"The upload to {repo_id} broke off ({' '.join(str(error).split())}): {again}"
    return None
