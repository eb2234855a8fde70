"""Accounts, requests and faults of the local Hub server."""

from dataclasses import dataclass


#: The default account of [`local_hub`].
USER = "me"
TOKEN = "hf_local"


@dataclass
class Account:
    """The user of a token, and whether the token may write."""

    user: str
    can_write: bool = True


@dataclass
class Fault:
    """
    A fault of requests to a [`LocalHub`].

    Args:
        method (`str`): Method of the requests, such as `"PUT"`.
        pattern (`str`): Regular expression to find in their path.
        times (`int`, *optional*, defaults to 1): Number of requests with the fault.
        status (`int`, *optional*): Status to respond with instead of handling the request.
        after_bytes (`int`, *optional*):
            Number of bytes of the request's body (of the response's body for `GET`) after which the connection is closed.
        delay (`float`, *optional*, defaults to 0.0): Seconds to wait before handling the request.
        stop (`bool`, *optional*, defaults to `False`): Whether to stop the server, so that later requests fail.
    """

    method: str
    pattern: str
    times: int = 1
    status: int | None = None
    after_bytes: int | None = None
    delay: float = 0.0
    stop: bool = False


@dataclass
class Request:
    """A completed or aborted (`status` 0) request. `received` and `sent` are the sizes of the bodies in bytes."""

    method: str
    path: str
    status: int = 0
    received: int = 0
    sent: int = 0
