"""The local Hub server: accounts, address and recorded requests."""

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
    A local Hub server. [`local_hub`] starts one and points `huggingface_hub` at it.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of the repos, which persist for the next server in this folder.
        accounts (`Mapping[str, Account]`, *optional*):
            Token -> account. Users own the namespace of their name.

    Attributes:
        url (`str`): Address of the server.
        requests (`list[Request]`): Requests so far.
        faults (`list[Fault]`): Faults to inject into coming requests.
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
        """Starts listening, on the same port after a [`~LocalHub.stop`]."""
        handler = type("Handler", (Routes,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Stops listening. Commits are kept."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """The environment variables for another process to use this server."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def bytes_received(self, method: str, pattern: str) -> int:
        """Total size in bytes of the bodies of matching requests so far."""
        return sum(r.received for r in self.requests if r.method == method and re.search(pattern, r.path))
