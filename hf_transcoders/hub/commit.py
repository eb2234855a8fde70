"""One commit to a repo on the Hub: which files it adds and deletes, and whether it replaces the card."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from ..errors import TranscoderError
from ..text import logging
from .cards.card import ASSETS, README, TranscoderCard, is_unedited
from .hub_errors import hub_errors


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Destination:
    """
    Where on the Hub a push goes, and how.

    Args:
        repo_id (`str`): Repo, such as `"me/my-transcoder"`, created if it does not exist.
        commit_message, commit_description (`str`, *optional*): Title and description of the commit.
        private (`bool`, *optional*): Whether a repo that is created is private.
        token (`str`, *optional*): Access token. Defaults to that of `hf auth login` or `HF_TOKEN`.
        revision (`str`, *optional*, defaults to `"main"`): Branch, created if it does not exist.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead of committing to `main`.
        subfolder (`str`, *optional*, defaults to `""`): Folder of the repo for all files, the card included.
    """

    repo_id: str
    commit_message: str | None = None
    commit_description: str | None = None
    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    create_pr: bool = False
    subfolder: str = ""

    def __post_init__(self):
        if self.create_pr and self.revision not in (None, "main"):
            raise TranscoderError(
                f"A pull request is made against 'main', not against '{self.revision}': give either `create_pr` or "
                "`revision`."
            )

    @property
    def api(self) -> HfApi:
        return HfApi(token=self.token, library_name="hf_transcoders")

    @property
    def prefix(self) -> str:
        """Beginning of the path of every file in the repo."""
        subfolder = self.subfolder.strip("/")
        return f"{subfolder}/" if subfolder else ""


def take_destination(kwargs: dict[str, Any], save_directory: str | os.PathLike) -> dict[str, Any]:
    """
    Removes the arguments of a [`Destination`] from those of `save_pretrained(..., push_to_hub=True)`.

    Args:
        kwargs (`dict[str, Any]`): Arguments of `save_pretrained`; those of the destination are removed from it.
        save_directory (`str` or `os.PathLike`): Folder whose name is the default `repo_id`.
    """
    names = [field.name for field in fields(Destination)]
    found = {name: kwargs.pop(name) for name in names if name in kwargs}
    return {"repo_id": Path(save_directory).resolve().name, **found}


def make_repo(to: Destination) -> Destination:
    """
    Creates the repo, and the branch in it, where they do not exist.

    Args:
        to ([`Destination`]): Where a push will go.

    Returns:
        [`Destination`]: the same with the full id of the repo.
    """
    with hub_errors(to.repo_id, to.token):
        repo_id = to.api.create_repo(to.repo_id, private=to.private, exist_ok=True).repo_id
        if to.private and not to.api.repo_info(repo_id).private:
            raise TranscoderError(
                f"{repo_id} exists and is public: make it private in its settings, or push to another repo."
            )
        # The reference of a pull request exists already.
        if to.revision is not None and not to.revision.startswith("refs/"):
            to.api.create_branch(repo_id, branch=to.revision, exist_ok=True)
    return replace(to, repo_id=repo_id)


class PendingCommit:
    """
    A commit on top of the files that a repo holds now.

    Args:
        to ([`Destination`]): Where the commit goes; its repo exists.

    Attributes:
        files (`set[str]`): Paths of the files that the repo holds.
        new (`dict[str, Path | bytes]`): Path in the repo -> file or content to add.
        stale (`set[str]`): Paths to delete, unless they are among the new ones.
    """

    def __init__(self, to: Destination):
        self.to = to
        info = to.api.repo_info(to.repo_id, revision=to.revision)
        self.parent = info.sha
        self.files = {sibling.rfilename for sibling in info.siblings}  # pyright: ignore[reportAttributeAccessIssue]
        self.new: dict[str, Path | bytes] = {}
        self.stale: set[str] = set()

    def read(self, path: str) -> str:
        """The text of a file that the repo holds."""
        return Path(self.to.api.hf_hub_download(self.to.repo_id, path, revision=self.parent)).read_text(
            encoding="utf-8"
        )

    def add_card(self, make: Callable[[str], TranscoderCard]) -> None:
        """
        Adds a card with its pictures, unless the one in the repo was edited there.

        Args:
            make (`Callable[[str], TranscoderCard]`): Makes the card for the full id of the repo.
        """
        prefix, repo_id = self.to.prefix, self.to.repo_id
        path = prefix + README
        old = self.read(path) if path in self.files else None
        if old is not None and not is_unedited(old):
            logger.warning(
                f"The card of {repo_id} was edited on the Hub and is kept, so its numbers may be those of an earlier push: "
                f"delete its {path} and push again for a new card."
            )
            return
        card = make(repo_id)
        self.new |= {prefix + name: content.encode() for name, content in card.files.items()}
        self.new[path] = card.text.encode()
        self.stale |= {prefix + picture for picture in re.findall(rf"{ASSETS}/[\w./-]+", old or "")} & self.files

    def create(self, message: str) -> CommitInfo:
        """
        Sends the commit.

        Args:
            message (`str`): Title of the commit where the destination has none.
        """
        to, stale = self.to, self.stale - self.new.keys()
        if stale:
            logger.warning(
                f"These files of {to.repo_id} are no longer part of what is pushed and are deleted: "
                f"{', '.join(sorted(stale))}"
            )
        return to.api.create_commit(
            to.repo_id,
            [
                *(CommitOperationDelete(path) for path in sorted(stale)),
                *(CommitOperationAdd(path, content) for path, content in sorted(self.new.items())),
            ],
            commit_message=to.commit_message or message,
            commit_description=to.commit_description,
            revision=to.revision,
            create_pr=to.create_pr,
            # The files to delete and the card were decided on this commit.
            parent_commit=self.parent,
        )


@contextlib.contextmanager
def pending_commit(to: Destination) -> Iterator[PendingCommit]:
    """Opens a repo for one commit, and turns errors of the Hub into one sentence."""
    with hub_errors(to.repo_id, to.token):
        yield PendingCommit(to if to.create_pr else make_repo(to))
