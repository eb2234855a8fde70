"""Push an attribution graph: its files and a card, in one commit."""

import os
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitInfo

from ..errors import TranscoderError
from ..models.set_index import INDEX_NAME
from .cards.card import generated
from .commit import Destination, pending_commit


def push_graph_folder(
    folder: str | os.PathLike, repo_id: str, card: Callable[[str], str], **destination
) -> CommitInfo:
    """
    Publishes the files of a graph, and deletes those that an earlier push left there and this one does not have. A card
    that was edited on the Hub is kept, with a warning.

    Args:
        folder (`str` or `os.PathLike`): Folder with the files, each named `graph.<suffix>`.
        repo_id (`str`): Repo on the Hub, such as `"me/my-graph"`, created if it does not exist.
        card (`Callable[[str], str]`): Function that writes the card for the full id of the repo.
        destination: Further arguments of [`Destination`].

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        [`TranscoderError`]: why the push failed, and what to do.
    """
    to = Destination(repo_id, **destination)
    prefix = to.prefix
    with pending_commit(to) as commit:
        if commit.files & {f"{prefix}config.json", f"{prefix}{INDEX_NAME}"}:
            raise TranscoderError(
                f"{commit.to.repo_id} holds a model at that place, whose card the graph's card would replace: push to a separate "
                "repo, or give a `subfolder`."
            )
        commit.new |= {f"{prefix}{path.name}": path for path in Path(folder).iterdir()}
        commit.stale |= {f for f in commit.files if f.startswith(f"{prefix}graph.") and "/" not in f[len(prefix) :]}
        commit.add_card(lambda name: generated(card(name), {}))
        return commit.create("Upload attribution graph")
