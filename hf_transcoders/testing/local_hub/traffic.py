"""Who asks the server, what was asked, and what shall go wrong."""

from dataclasses import dataclass


#: The account that [`local_hub`] logs in.
USER = "me"
TOKEN = "hf_local"


@dataclass
class Account:
    """Who a token belongs to, and whether it may write."""

    user: str
    can_write: bool = True


@dataclass
class Fault:
    """
    Something that goes wrong with requests to a [`LocalHub`].

    Args:
        method (`str`): Of the request, such as `"PUT"`.
        pattern (`str`): Regular expression that its path contains.
        times (`int`, *optional*, defaults to 1): How many requests it strikes.
        status (`int`, *optional*): Answer this status instead of doing the work.
        after_bytes (`int`, *optional*):
            Close the connection after so many bytes of the request's body (of the answer's body for `GET`).
        delay (`float`, *optional*, defaults to 0.0): Seconds to wait before anything else.
        stop (`bool`, *optional*, defaults to `False`): Stop listening, so that later requests find no server.
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
    """A request that was answered, or broken off (`status` 0). `received` and `sent` count bytes of the bodies."""

    method: str
    path: str
    status: int = 0
    received: int = 0
    sent: int = 0
