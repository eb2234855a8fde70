"""`save_pretrained` and `push_to_hub` of dictionaries and sets: the only imports of this package that point up."""

import os
from pathlib import Path

from ..errors import TranscoderError
from ..files import atomic_directory
from ..text.printable import printable
from .saved_files import WEIGHT_FILES
from .saved_folder import outdated_files


class PublishMixin:
    """Saves and publishes a dictionary or a set, which writes its own files in `_save_files(folder, ...)`."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args,
        push_to_hub: bool = False,
        remote_code: bool = False,
        format: str | None = None,
        **kwargs,
    ) -> None:
        """
        Saves configuration and weights as safetensors, all of them or none: if the process dies at any moment, the folder
        holds one whole save, and readers never see a mixture of two saves. A folder holds one save: those files of an earlier
        dictionary or set in it that this save does not replace are deleted with it.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to save into, created if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to publish the files as well, with those of `kwargs` that `push_to_hub` accepts; `repo_id` defaults
                to the name of the folder.
            remote_code (`bool`, *optional*, defaults to `False`):
                Whether to save the model's code too, for `AutoModel.from_pretrained(..., trust_remote_code=True)` where
                this package is not installed.
            format (`str`, *optional*):
                Library to write for, in place of this one: `"saelens"`, `"sparsify"`, `"circuit-tracer"` or
                `"dictionary-learning"`, and for cross-layer transcoders `"circuit-tracer"` or `"gemma-scope"`. The folder
                must be new or empty. See `docs/formats.md`.
            args, kwargs: Further arguments of [`~transformers.PreTrainedModel.save_pretrained`].

        Raises:
            [`TranscoderError`]: the other library's format cannot express the dictionary; nothing is written.
        """
        from ..hub.commit import take_destination
        from ..hub.remote_code import write_remote_code
        from .foreign import write_foreign

        if format not in (None, "native"):
            asked = {"push_to_hub": push_to_hub, "remote_code": remote_code, "args": args, **kwargs}
            if said := [name for name, value in asked.items() if value and name != "is_main_process"]:
                raise TranscoderError(
                    f"{', '.join(said)} belong to the files of hf_transcoders, and these are those of {printable(format)[:40]}: leave "
                    "them out."
                )
            if kwargs.get("is_main_process", True):
                write_foreign(self, save_directory, format)  # pyright: ignore[reportArgumentType]
            return
        destination = take_destination(kwargs, save_directory) if push_to_hub else {}
        if not kwargs.get("is_main_process", True):
            return
        # A single file left from an earlier save would be loaded instead of the shards of this one.
        outdated = outdated_files(Path(save_directory), self._saved_folders())
        with atomic_directory(save_directory, replacing=WEIGHT_FILES, removing=outdated) as partial:
            self._save_files(partial, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            if remote_code:
                write_remote_code(partial)
        if push_to_hub:
            self.push_to_hub(remote_code=remote_code, **destination)

    def _saved_folders(self) -> list[str]:
        """The folders inside that of the save into which dictionaries are written; `""` is that folder itself."""
        return [""]

    def push_to_hub(self, repo_id: str, **kwargs):
        """
        Publishes the files with a model card in one commit. Dictionaries that an earlier push of a set left in the repo
        and that are no longer part of the set are deleted in the same commit.

        Args:
            repo_id (`str`): Repo on the Hub, such as `"me/my-transcoder"`, created if it does not exist.
            kwargs:
                Further arguments of [`~hf_transcoders.hub.push`]: `commit_message`, `private`, `token`, `revision`,
                `create_pr`, `subfolder`, `remote_code` ...

        Returns:
            [`~huggingface_hub.CommitInfo`]
        """
        from ..hub.upload import push

        return push(self, repo_id, **kwargs)
