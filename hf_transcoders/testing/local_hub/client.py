"""Point `huggingface_hub` and transformers at a local server temporarily."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from .server import LocalHub
from .traffic import TOKEN, Account


@contextlib.contextmanager
def local_hub(
    folder: str | os.PathLike | None = None,
    token: str | None = TOKEN,
    accounts: Mapping[str, Account] | None = None,
) -> Iterator[LocalHub]:
    """
    Starts a [`LocalHub`] and points `huggingface_hub` (and with it transformers) at it, with a token and an empty download
    cache. All settings are restored when the block ends.

    Args:
        folder (`str` or `os.PathLike`, *optional*): Folder of the repos. By default they are deleted when the block ends.
        token (`str`, *optional*, defaults to that of the account `me`): Access token for requests, or `None` for none.
        accounts (`Mapping[str, Account]`, *optional*): Token -> account. By default there is only `me`.

    Example:

    ```python
    >>> with local_hub() as hub:
    ...     model.push_to_hub("me/my-transcoder")
    ...     loaded = TranscoderModel.from_pretrained("me/my-transcoder")
    ```
    """
    workplace = Path(tempfile.mkdtemp(prefix="local-hub-"))
    hub = LocalHub(folder or workplace / "repos", accounts)
    hub.start()
    try:
        with _pointed_at(hub.url, token, workplace / "cache"):
            yield hub
    finally:
        hub.stop()
        shutil.rmtree(workplace, ignore_errors=True)


@contextlib.contextmanager
def _pointed_at(url: str, token: str | None, cache: Path):
    from huggingface_hub import constants, hf_api
    from transformers.utils import hub as transformers_hub

    changed = [
        (constants, "ENDPOINT", url),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"),
        (constants, "HF_HUB_OFFLINE", False),
        # Large files are then sent by LFS, which is plain HTTP.
        (constants, "HF_HUB_DISABLE_XET", True),
        (constants, "HF_HUB_CACHE", str(cache)),
        (constants, "HF_TOKEN_PATH", str(cache / "no-token")),
        # Two clients that are created once and keep their address.
        (hf_api.api, "endpoint", url),
        (transformers_hub.hf_api(), "endpoint", url),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changed]
    token_before = {name: os.environ.pop(name, None) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    try:
        for owner, name, value in changed:
            setattr(owner, name, value)
        if token is not None:
            os.environ["HF_TOKEN"] = token
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        os.environ.pop("HF_TOKEN", None)
        os.environ.update({name: value for name, value in token_before.items() if value is not None})
