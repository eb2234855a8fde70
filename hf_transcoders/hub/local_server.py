"""A server on this machine that answers as the Hub does: for tests, and for trying out a push without an account.

It speaks the part of the Hub's HTTP protocol that pushing and loading model repos needs: accounts and tokens, private
repos, branches and pull requests, commits of small files inline and of large ones by LFS, file trees, downloads with
ETag and Range. It is no place to publish: it listens on this machine only and trusts whoever reaches it.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from ..files import atomic_file


#: The account that [`local_hub`] logs in.
USER, TOKEN = "me", "hf_local"

# What the Hub's default .gitattributes sends to LFS, and the size above which everything goes there.
_LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".png", ".parquet", ".gz", ".zip", ".npz", ".onnx")
_LFS_SIZE = 10 * 2**20
_PIECE = 1 << 16


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


@dataclass
class _Repo:
    private: bool = False
    # Commit -> {"parent", "message", "files": {path: {"oid", "sha256", "size", "lfs"}}}
    commits: dict[str, dict] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


class LocalHub:
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
        self.folder = Path(folder)
        self.accounts = dict(accounts or {TOKEN: Account(USER)})
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.repos: dict[str, _Repo] = {}
        state = self.folder / "repos.json"
        if state.exists():
            self.repos = {name: _Repo(**repo) for name, repo in json.loads(state.read_text()).items()}
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        """Listens, again on the same port after a [`~LocalHub.stop`]."""
        handler = type("Handler", (_Handler,), {"hub": self})
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

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repo holds, past the server."""
        repo = self.repos[repo_id]
        files = repo.commits[repo.refs.get(revision, revision)]["files"]
        return {path: self.blob(entry["sha256"]).read_bytes() for path, entry in files.items()}

    def log(self, repo_id: str, revision: str = "main") -> list[str]:
        """Commit messages, newest first."""
        repo = self.repos[repo_id]
        commit, messages = repo.refs.get(revision, revision), []
        while commit is not None:
            messages.append(repo.commits[commit]["message"])
            commit = repo.commits[commit]["parent"]
        return messages

    def bytes_received(self, method: str, pattern: str) -> int:
        """Bytes of the bodies of all requests so far whose path matches."""
        return sum(r.received for r in self.requests if r.method == method and re.search(pattern, r.path))

    # ------------------------------------------------------------------------------------------------ storage

    def blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256

    def store(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        with atomic_file(self.blob(sha256)) as partial:
            partial.write_bytes(content)
        return sha256

    def create(self, repo_id: str, private: bool) -> None:
        self.repos[repo_id] = _Repo(private=private)
        attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in _LFS_ENDINGS).encode()
        self.commit(repo_id, "main", "initial commit", {".gitattributes": self.entry(self.store(attributes), False)})

    def entry(self, sha256: str, lfs: bool) -> dict:
        content = self.blob(sha256).read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"oid": oid, "sha256": sha256, "size": len(content), "lfs": lfs}

    def commit(self, repo_id: str, ref: str, message: str, files: dict[str, dict], parent: str | None = None) -> str:
        repo = self.repos[repo_id]
        facts = {"parent": parent, "message": message, "files": files}
        commit = hashlib.sha1(json.dumps([facts, len(repo.commits)]).encode()).hexdigest()
        repo.commits[commit] = facts
        repo.refs[ref] = commit
        self.save()
        return commit

    def save(self) -> None:
        with atomic_file(self.folder / "repos.json") as partial:
            partial.write_text(json.dumps({name: asdict(repo) for name, repo in self.repos.items()}))


class _Answer(Exception):
    """Ends a request with an error, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class _Broken(Exception):
    """The connection is cut."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    _REPO = r"(?P<repo>[^/]+/[^/]+)"
    _ROUTES = [
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"/api/models/{_REPO}/branch/(?P<revision>[^/]+)", "branch"),
        ("GET", rf"/api/models/{_REPO}/refs", "refs"),
        ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", "info"),
        ("GET", rf"/api/models/{_REPO}", "info"),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

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
                    # From another thread: it waits for the loop that this request came from.
                    threading.Thread(target=self.hub.stop).start()
                    raise _Broken
            self.body = self._read_body()
            if self.fault and self.fault.status:
                raise _Answer(self.fault.status, "made to fail")
            self._route(split.path)
        except _Answer as answer:
            self._reply(answer.status, {"error": answer.message}, answer.headers)
        except (_Broken, ConnectionError):
            self.close_connection = True

    def _next_fault(self, path):
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times > 0 and fault.method == self.command and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def _route(self, path):
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, name in self._ROUTES:
            if wanted == method and (match := re.fullmatch(pattern, path)):
                found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                with self.hub.lock:
                    send = getattr(self, f"_{name}")(**found)
                send()
                return
        raise _Answer(404, "Not Found")

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
                raise _Broken
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
                raise _Broken
            size -= len(piece)
            yield piece

    def _reply(self, status, value=None, headers=None, content=None):
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
                raise _Broken
            self.wfile.write(piece)
            self.entry.sent = start + len(piece)

    def _json(self, value, status=200):
        return lambda: self._reply(status, value)

    # ------------------------------------------------------------------------------------------------ rights

    def _account(self) -> Account | None:
        header = self.headers.get("Authorization")
        if not header:
            return None
        account = self.hub.accounts.get(header.removeprefix("Bearer "))
        if account is None:
            raise _Answer(401, "Invalid credentials in Authorization header")
        return account

    def _repo(self, repo: str, write: bool = False) -> _Repo:
        account = self._account()
        found = self.hub.repos.get(repo)
        owner = account is not None and account.user == repo.split("/")[0]
        if found is None or (found.private and not owner):
            if account is None:
                raise _Answer(401, "Invalid username or password.")
            raise _Answer(404, "Repository not found", "RepoNotFound")
        if write and account is None:
            raise _Answer(401, "Invalid username or password.")
        if write and not (owner and account.can_write):
            raise _Answer(403, "Forbidden: you must use a write token of somebody who may write to this repo")
        return found

    def _revision(self, repo: _Repo, revision: str) -> str:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise _Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ------------------------------------------------------------------------------------------------ routes

    def _whoami(self):
        account = self._account()
        if account is None:
            raise _Answer(401, "Invalid username or password.")
        role = "write" if account.can_write else "read"
        token = {"displayName": "local", "role": role}
        return self._json({"type": "user", "name": account.user, "orgs": [], "auth": {"accessToken": token}})

    def _create(self):
        asked = json.loads(self.body)
        account = self._account()
        if account is None:
            raise _Answer(401, "Invalid username or password.")
        if asked.get("type", "model") != "model":
            raise _Answer(400, "This server keeps model repos only.")
        namespace = asked.get("organization") or account.user
        if namespace != account.user or not account.can_write:
            raise _Answer(403, f'You don\'t have the rights to create a model under the namespace "{namespace}".')
        repo_id = f"{namespace}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self._json({**answer, "error": "You already created this model repo"}, status=409)
        self.hub.create(repo_id, private=asked.get("visibility") == "private" or asked.get("private", False))
        return self._json(answer)

    def _validate_yaml(self):
        import yaml

        content = json.loads(self.body)["content"]
        errors, warnings = [], []
        match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
        try:
            if match is None or not isinstance(yaml.safe_load(match.group(1)), dict):
                warnings.append({"message": "empty or missing yaml metadata in repo card"})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        return self._json({"errors": errors, "warnings": warnings}, status=400 if errors else 200)

    def _preupload(self, repo, revision):
        # Whoever can read a repo may open a pull request.
        found = self._repo(repo, write="create_pr" not in self.query)
        present = found.commits[self._revision(found, revision)]["files"]
        files = []
        for asked in json.loads(self.body)["files"]:
            lfs = asked["path"].endswith(_LFS_ENDINGS) or asked["size"] > _LFS_SIZE
            old = present.get(asked["path"])
            oid = None if old is None else old["sha256"] if old["lfs"] else old["oid"]
            mode = "lfs" if lfs else "regular"
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._json({"files": files})

    def _lfs_batch(self, repo):
        self._repo(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if not self.hub.blob(asked["oid"]).exists():
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            objects.append(answer)
        return self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Answer(400, "The content does not have the hash it was announced with")
        self.hub.store(self.body)
        return lambda: self._reply(200, content=b"")

    def _commit(self, repo, revision):
        pull_request = "create_pr" in self.query
        found = self._repo(repo, write=not pull_request)
        parent = self._revision(found, revision)
        if revision not in found.refs:
            raise _Answer(400, "Commits go to branches")
        files = dict(found.commits[parent]["files"])
        header = {}
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = self.hub.entry(self.hub.store(base64.b64decode(value["content"])), lfs=False)
            elif key == "lfsFile":
                if not self.hub.blob(value["oid"]).exists():
                    raise _Answer(400, f"The content of {value['path']} was never uploaded")
                files[value["path"]] = self.hub.entry(value["oid"], lfs=True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _Answer(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                files = {path: entry for path, entry in files.items() if not path.startswith(value["path"])}
        if header.get("parentCommit", parent) != parent:
            raise _Answer(412, "A commit has happened since. Please refresh and try again.")
        number = sum(name.startswith("refs/pr/") for name in found.refs) + 1
        target = f"refs/pr/{number}" if pull_request else revision
        commit = self.hub.commit(repo, target, header["summary"], files, parent)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        return self._json(answer)

    def _branch(self, repo, revision):
        found = self._repo(repo, write=True)
        if revision.startswith("refs/"):
            raise _Answer(400, "Invalid reference for a branch")
        if revision in found.refs:
            raise _Answer(409, "Reference already exists")
        found.refs[revision] = self._revision(found, (json.loads(self.body) or {}).get("startingPoint", "main"))
        self.hub.save()
        return self._json({})

    def _refs(self, repo):
        found = self._repo(repo)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in found.refs.items()
            if not name.startswith("refs/")
        ]
        return self._json({"branches": branches, "converts": [], "tags": []})

    def _info(self, repo, revision="main"):
        found = self._repo(repo)
        commit = self._revision(found, revision)
        files = found.commits[commit]["files"]
        answer = {"id": repo, "modelId": repo, "sha": commit, "private": found.private, "tags": [], "downloads": 0}
        return self._json({**answer, "likes": 0, "siblings": [{"rfilename": path} for path in sorted(files)]})

    def _tree(self, repo, revision, path=""):
        found = self._repo(repo)
        files = found.commits[self._revision(found, revision)]["files"]
        prefix = f"{path}/" if path else ""
        inside = {name: entry for name, entry in files.items() if name.startswith(prefix)}
        if not inside:
            raise _Answer(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        listed, folders = [], set()
        for name, entry in sorted(inside.items()):
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folders.add(prefix + "/".join(parts[:depth]))
            if recursive or len(parts) == 1:
                item = {"type": "file", "path": name, "size": entry["size"], "oid": entry["oid"]}
                if entry["lfs"]:
                    item["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 134}
                listed.append(item)
        return self._json(
            [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)] + listed
        )

    def _resolve(self, repo, revision, path):
        found = self._repo(repo)
        commit = self._revision(found, revision)
        entry = found.commits[commit]["files"].get(path)
        if entry is None:
            raise _Answer(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        headers = {
            "Content-Type": "application/octet-stream",
            "ETag": f'"{entry["sha256"] if entry["lfs"] else entry["oid"]}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        content = self.hub.blob(entry["sha256"]).read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return lambda: self._reply(200, headers=headers, content=content)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            raise _Answer(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return lambda: self._reply(206, headers=headers, content=content[start : end + 1])


@contextlib.contextmanager
def local_hub(
    folder: str | os.PathLike | None = None,
    token: str | None = TOKEN,
    accounts: Mapping[str, Account] | None = None,
) -> Iterator[LocalHub]:
    """
    Starts a [`LocalHub`] and points `huggingface_hub` (and with it transformers) at it: address, token, and an empty
    cache of downloads. Everything is as before when the block ends.

    Args:
        folder (`str` or `os.PathLike`, *optional*): Where repos are kept. By default they go when the block ends.
        token (`str`, *optional*, defaults to that of the account `me`): With which requests are made; `None` for none.
        accounts (`Mapping[str, Account]`, *optional*): Token -> account; by default there is `me` alone.

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
        # Large files then go by LFS, which is plain HTTP.
        (constants, "HF_HUB_DISABLE_XET", True),
        (constants, "HF_HUB_CACHE", str(cache)),
        (constants, "HF_TOKEN_PATH", str(cache / "no-token")),
        # Two clients that are made once and keep their address.
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
