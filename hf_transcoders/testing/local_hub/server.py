"""The server: accounts, a port, and what was asked of it."""

import os
import re
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer

from .routes import Routes
from .store import Store
from .traffic import TOKEN, USER, Account, Fault, Request


class LocalHub(Store):
    """
    The server. [`local_hub`] starts one and points `huggingface_hub` at it.

    Args:
        folder (`str` or `os.PathLike`):
            Where repos are kept; a server that is started there again has them.
        accounts (`Mapping[str, Account]`, *optional*):
            Token -> account. A user owns the namespace of the user's name.

    Attributes:
        url (`str`): Its address.
        requests (`list[Request]`): Everything that was asked.
        faults (`list[Fault]`): What shall go wrong next.
    """

    def __init__(self, folder: str | os.PathLike, accounts: Mapping[str, Account] | None = None):
        super().__init__(folder)
        self.accounts = dict(accounts or {TOKEN: Account(USER)})
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        """Listens, again on the same port after a [`~LocalHub.stop`]."""
        handler = type("Handler", (Routes,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Stops listening. What was committed stays."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """The environment variables under which another process uses this server."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def bytes_received(self, method: str, pattern: str) -> int:
        """Bytes of the bodies of all requests so far whose path matches."""
        return sum(r.received for r in self.requests if r.method == method and re.search(pattern, r.path))
