"""Store repos on disk: blobs by their hash, commits as lists of files, branches as names of commits."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...files import atomic_file, write_text


# Suffixes in the Hub's default .gitattributes for LFS, and the size above which all files are sent by LFS.
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".png", ".parquet", ".gz", ".zip", ".npz", ".onnx")
LFS_SIZE = 10 * 2**20


@dataclass
class Repo:
    private: bool = False
    # Commit -> {"parent", "message", "files": {path: {"oid", "sha256", "size", "lfs"}}}
    commits: dict[str, dict] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


class Store:
    """
    The repos in a folder. Commits persist for the next store in that folder.

    Args:
        folder (`str` or `os.PathLike`): Folder of the repos.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.repos: dict[str, Repo] = {}
        state = self.folder / "repos.json"
        if state.exists():
            self.repos = {name: Repo(**repo) for name, repo in json.loads(state.read_text()).items()}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repo, read without the server."""
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

    def blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256

    def store(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        with atomic_file(self.blob(sha256)) as partial:
            partial.write_bytes(content)
        return sha256

    def create(self, repo_id: str, private: bool) -> None:
        self.repos[repo_id] = Repo(private=private)
        attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS_ENDINGS).encode()
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
        write_text(self.folder / "repos.json", json.dumps({name: asdict(repo) for name, repo in self.repos.items()}))
