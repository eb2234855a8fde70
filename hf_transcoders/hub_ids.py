"""Tell names of repos on the Hub from paths of local folders and files."""

import os
import re
from pathlib import Path

from .errors import OSTranscoderError
from .text.printable import printable


# Ends of local folders and files, which names of repos do not have.
_LOCAL_ENDS = re.compile(
    r"(^|/)(checkpoint-\d+|[^/]+\.(safetensors|npz|pt|pth|bin|txt|csv|jsonl?|parquet|ya?ml)(\.(gz|bz2|xz|zst|zip))?)/?$"
)


def is_hub_id(name: str | None) -> bool:
    """Whether a string can be the id of a repo on the Hub. The path of a local folder is not one."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not isinstance(name, str):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not is_local(name)


def is_local(name: str, repo_type: str = "model", cache_dir: str | os.PathLike | None = None) -> bool:
    """Whether a name is that of a local folder or file, which may be missing, and not the id of a repo on the Hub.

    This is so if it exists, or begins or ends as only paths do, or its first folder exists: `runs/l9` next to `runs/l8`. A
    repo that was downloaded before remains one.

    Args:
        name (`str`): Name to judge.
        repo_type (`str`, *optional*, defaults to `"model"`): Kind of the repo: `"model"` or `"dataset"`.
        cache_dir (`str` or `os.PathLike`, *optional*): Folder of downloads; by default, that of `huggingface_hub`.
    """
    if os.path.exists(name) or name.startswith((".", "/", "~")) or "\\" in name:
        return True
    owner, _, rest = name.partition("/")
    if _LOCAL_ENDS.search(name) and rest.count("/") == 0:
        return True
    return bool(rest) and os.path.isdir(owner) and not _is_cached(name, repo_type, cache_dir)


def refuse_missing(
    name: str | os.PathLike,
    advice: str,
    *,
    what: str = "folder",
    repo_type: str = "model",
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Refuse a name of a missing local folder at once, and one of a repo that cannot be downloaded because the Hub is offline.

    Args:
        name (`str` or `os.PathLike`): Path of a folder or file, or id of a repo, or path in a repo.
        advice (`str`): What to do, in the message.
        what (`str`, *optional*, defaults to `"folder"`): What a path leads to.
        repo_type, cache_dir: Same as in [`is_local`].

    Raises:
        [`OSTranscoderError`]: there is neither such a folder nor, as far as can be known without the network, such a repo.
    """
    from huggingface_hub import is_offline_mode

    name = str(name)
    if os.path.exists(name):
        return
    if is_local(name, repo_type, cache_dir) or not is_hub_id("/".join(name.split("/")[:2])):
        raise OSTranscoderError(f"There is no {what} {printable(name)}: {advice}.")
    if is_offline_mode() and not _is_cached(name, repo_type, cache_dir):
        raise OSTranscoderError(
            f"There is no {what} {printable(name)}, and no download of this name, which the Hub is not asked for offline "
            f"(HF_HUB_OFFLINE is set): {advice}."
        )


def _is_cached(name, repo_type, cache_dir):
    from huggingface_hub.constants import HF_HUB_CACHE

    owner_and_name = name.split("/")[:2]
    folders = [Path(cache_dir or HF_HUB_CACHE, "--".join([f"{repo_type}s", *owner_and_name]))]
    if repo_type == "dataset":
        from datasets.config import HF_DATASETS_CACHE

        # Converted data sets remain when the files that they were converted from are deleted.
        folders.append(Path(HF_DATASETS_CACHE, "___".join(owner_and_name)))
    return any(folder.is_dir() for folder in folders)
