"""Handle one HTTP request, with optional fault injection."""

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from .traffic import Request


if TYPE_CHECKING:
    from .server import LocalHub

_PIECE = 1 << 16


class Answer(Exception):
    """An error response, with the wording of the Hub."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Broken(Exception):
    """The connection is closed without a response."""


class Connection(BaseHTTPRequestHandler):
    """Reads requests and sends the responses of `route`, which subclasses implement."""

    protocol_version = "HTTP/1.1"
    hub: "LocalHub"
    route: Callable[[str], None]

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self):
        split = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        self.entry = Request(self.command, split.path)
        self.hub.requests.append(self.entry)
        self.fault = self._next_fault(split.path)
        try:
            if self.fault:
                time.sleep(self.fault.delay)
                if self.fault.stop:
                    # From another thread, because it waits for the loop of this request.
                    threading.Thread(target=self.hub.stop).start()
                    raise Broken
            self.body = self._read_body()
            if self.fault and self.fault.status:
                raise Answer(self.fault.status, "made to fail")
            self.route(split.path)
        except Answer as answer:
            self.reply(answer.status, {"error": answer.message}, answer.headers)
        except (Broken, ConnectionError):
            self.close_connection = True

    def _next_fault(self, path):
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times > 0 and fault.method == self.command and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def _read_body(self) -> bytes:
        limit = self.fault.after_bytes if self.fault and self.command != "GET" else None
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = self._chunks()
        else:
            pieces = self._pieces(int(self.headers.get("Content-Length") or 0))
        body = bytearray()
        for piece in pieces:
            body += piece
            self.entry.received = len(body)
            if limit is not None and len(body) >= limit:
                raise Broken
        return bytes(body)

    def _chunks(self):
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield from self._pieces(size)
            self.rfile.readline()
        self.rfile.readline()

    def _pieces(self, size):
        while size:
            piece = self.rfile.read(min(size, _PIECE))
            if not piece:
                raise Broken
            size -= len(piece)
            yield piece

    def reply(self, status, value=None, headers=None, content=None):
        content = json.dumps(value).encode() if content is None else content
        self.entry.status = status
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.fault.after_bytes if self.fault and self.command == "GET" else None
        for start in range(0, len(content), _PIECE):
            piece = content[start : start + _PIECE]
            if limit is not None and start + len(piece) > limit:
                self.wfile.write(piece[: limit - start])
                self.entry.sent = limit
                raise Broken
            self.wfile.write(piece)
            self.entry.sent = start + len(piece)
