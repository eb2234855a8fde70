"""Publishing what is no dictionary: a folder of files with a card of ours, in one commit."""

import os
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from ..errors import TranscoderError
from ..models.transcoder_set import INDEX_NAME
from ..text import logging
from .cards.card import README, generated, is_unedited
from .hub_errors import hub_errors
from .upload import make_repo


logger = logging.get_logger(__name__)


def push_graph_folder(
    folder: str | os.PathLike,
    repo_id: str,
    card: Callable[[str], str],
    *,
    commit_message: str = "Upload attribution graph",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    subfolder: str = "",
) -> CommitInfo:
    """
    Publishes the files of a graph. A card that was edited on the Hub stays as it is, with a warning.

    Args:
        folder (`str` or `os.PathLike`): Where the files lie.
        repo_id (`str`): Such as `"me/my-graph"`; made if it does not exist.
        card (`Callable[[str], str]`): Makes the card for the repo's full id.
        commit_message, private, token, revision, subfolder: As for [`push`].

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        [`TranscoderError`]: what kept it from happening, and what to do.
    """
    prefix = f"{subfolder.strip('/')}/" if subfolder.strip("/") else ""
    with hub_errors(repo_id, token):
        api = HfApi(token=token, library_name="hf_transcoders")
        repo_id = make_repo(api, repo_id, private, revision)
        info = api.repo_info(repo_id, revision=revision)
        there = {sibling.rfilename for sibling in info.siblings}  # pyright: ignore[reportAttributeAccessIssue]
        if there & {f"{prefix}config.json", f"{prefix}{INDEX_NAME}"}:
            raise TranscoderError(
                f"{repo_id} holds a model at that place, whose card a graph's would replace: push to a repo of its own, or "
                "give a `subfolder`."
            )
        files: dict[str, Path | bytes] = {f"{prefix}{path.name}": path for path in sorted(Path(folder).iterdir())}
        path = prefix + README
        if path in there:
            old = Path(api.hf_hub_download(repo_id, path, revision=info.sha)).read_text(encoding="utf-8")
            if not is_unedited(old):
                logger.warning(f"The card of {repo_id} was edited on the Hub and stays as it is.")
                card = None
        if card is not None:
            files[path] = generated(card(repo_id), {}).text.encode()
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=commit_message,
            revision=revision,
            # What stays was decided on this commit.
            parent_commit=info.sha,
        )
