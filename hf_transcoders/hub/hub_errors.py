"""Turn errors of the Hub client into one-sentence messages."""

import contextlib
from collections.abc import Iterator

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..errors import TranscoderError


@contextlib.contextmanager
def hub_errors(repo_id: str, token: str | bool | None = None) -> Iterator[None]:
    """Turns errors of the Hub client into a one-sentence [`TranscoderError`] that says how to fix them."""
    try:
        yield
    except TranscoderError:
        raise
    except Exception as error:
        # The reason for a failed upload is in the cause of the client's own error.
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        for link in chain:
            if (sentence := _explain(link, repo_id, token)) is not None:
                raise TranscoderError(sentence) from error
        raise


def _explain(error: BaseException, repo_id: str, token: str | bool | None) -> str | None:
    again = "push again, and files that arrived are not sent twice."
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
                f"The token may not write to {repo_id}: use one with the right to write there, push to your own repo, "
                "or propose the change with `create_pr`."
            )
        if isinstance(error, RepositoryNotFoundError):
            return f"There is no repo {repo_id} on the Hub that this token can see: check the name, or make it first."
        if status == 412:
            return f"Somebody else pushed to {repo_id} at the same moment: push again."
        if status >= 500:
            return f"The Hub failed in the middle of the push (status {status}): {again}"
        return f"The Hub refused the push to {repo_id} ({' '.join(str(error).split())}): fix that and push again."
    if isinstance(error, HTTPError):
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"The connection to the Hub at {constants.ENDPOINT} failed ({reason}): check the network and {again}"
    if isinstance(error, RuntimeError) and error.__cause__ is None:
        # The client for large files reports an interrupted transfer in this way.
        return f"The upload to {repo_id} broke off ({' '.join(str(error).split())}): {again}"
    return None
