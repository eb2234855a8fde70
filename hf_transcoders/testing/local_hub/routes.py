"""The responses of the local Hub server."""

import base64
import hashlib
import json
import re
from urllib.parse import unquote

from .connection import Answer, Connection
from .store import LFS_ENDINGS, LFS_SIZE, Repo
from .traffic import Account


class Routes(Connection):
    """Supported requests, their required permissions and their responses."""

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

    def route(self, path):
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, name in self._ROUTES:
            if wanted == method and (match := re.fullmatch(pattern, path)):
                found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                with self.hub.lock:
                    send = getattr(self, f"_{name}")(**found)
                send()
                return
        raise Answer(404, "Not Found")

    def _json(self, value, status=200):
        return lambda: self.reply(status, value)

    # ------------------------------------------------------------------------------------------------ rights

    def _account(self) -> Account | None:
        header = self.headers.get("Authorization")
        if not header:
            return None
        account = self.hub.accounts.get(header.removeprefix("Bearer "))
        if account is None:
            raise Answer(401, "Invalid credentials in Authorization header")
        return account

    def _logged_in(self) -> Account:
        account = self._account()
        if account is None:
            raise Answer(401, "Invalid username or password.")
        return account

    def _repo(self, repo: str, write: bool = False) -> Repo:
        account = self._account()
        found = self.hub.repos.get(repo)
        owner = account is not None and account.user == repo.split("/")[0]
        if found is None or (found.private and not owner):
            if account is None:
                raise Answer(401, "Invalid username or password.")
            raise Answer(404, "Repository not found", "RepoNotFound")
        if write and account is None:
            raise Answer(401, "Invalid username or password.")
        if write and not (owner and account.can_write):
            raise Answer(403, "Forbidden: you must use a write token of somebody who may write to this repo")
        return found

    def _revision(self, repo: Repo, revision: str) -> str:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ------------------------------------------------------------------------------------------------ routes

    def _whoami(self):
        account = self._logged_in()
        role = "write" if account.can_write else "read"
        token = {"displayName": "local", "role": role}
        return self._json({"type": "user", "name": account.user, "orgs": [], "auth": {"accessToken": token}})

    def _create(self):
        asked = json.loads(self.body)
        account = self._logged_in()
        if asked.get("type", "model") != "model":
            raise Answer(400, "This server keeps model repos only.")
        namespace = asked.get("organization") or account.user
        if namespace != account.user or not account.can_write:
            raise Answer(403, f'You don\'t have the rights to create a model under the namespace "{namespace}".')
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
        # All who can read a repo may open a pull request.
        found = self._repo(repo, write="create_pr" not in self.query)
        present = found.commits[self._revision(found, revision)]["files"]
        files = []
        for asked in json.loads(self.body)["files"]:
            lfs = asked["path"].endswith(LFS_ENDINGS) or asked["size"] > LFS_SIZE
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
            raise Answer(400, "The content does not have the hash it was announced with")
        self.hub.store(self.body)
        return lambda: self.reply(200, content=b"")

    def _commit(self, repo, revision):
        pull_request = "create_pr" in self.query
        found = self._repo(repo, write=not pull_request)
        parent = self._revision(found, revision)
        if revision not in found.refs:
            raise Answer(400, "Commits go to branches")
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
                    raise Answer(400, f"The content of {value['path']} was never uploaded")
                files[value["path"]] = self.hub.entry(value["oid"], lfs=True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Answer(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                files = {path: entry for path, entry in files.items() if not path.startswith(value["path"])}
        if header.get("parentCommit", parent) != parent:
            raise Answer(412, "A commit has happened since. Please refresh and try again.")
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
            raise Answer(400, "Invalid reference for a branch")
        if revision in found.refs:
            raise Answer(409, "Reference already exists")
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
            raise Answer(404, f"{path} does not exist on {revision}", "EntryNotFound")
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
            raise Answer(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        headers = {
            "Content-Type": "application/octet-stream",
            "ETag": f'"{entry["sha256"] if entry["lfs"] else entry["oid"]}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        content = self.hub.blob(entry["sha256"]).read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return lambda: self.reply(200, headers=headers, content=content)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            raise Answer(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return lambda: self.reply(206, headers=headers, content=content[start : end + 1])
