"""The files of a saved dictionary: found, opened and compared with each other before a tensor is made."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import _add_variant
from transformers.utils import cached_file
from transformers.utils.hub import cached_files, extract_commit_hash

from ..errors import OSTranscoderError, TranscoderError
from ..files import inner_path, read_settled
from ..text.printable import printable
from ..text.strict_json import parse_json
from .configuration_transcoder import FORMAT_VERSION, check_format_version


CONFIG_NAME = "config.json"
#: The names under which weights are saved: one file, or shards and their index.
WEIGHT_FILES = "model*.safetensors*"
WEIGHTS_NAME, SHARDS_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
ADAPTER_NAME = "adapter_config.json"
#: Ends of the names of weight files, by which a path to a file in a repo is told from one to a folder.
WEIGHT_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".pkl", ".gz")

#: What tells where files lie, of the arguments of `from_pretrained`.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")

# As the headers of safetensors name them.
_DTYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass
class SavedDictionary:
    """
    The opened files of one dictionary; a later save to the same place changes nothing about them.

    Args:
        path (`str`): Folder or Hub id.
        place (`str`): Where in it they lie, for messages.
        fields (`dict[str, Any]`): What `config.json` holds.
        tensors (`dict[str, safe_open]`): Name of a tensor -> the opened file that holds it.
    """

    path: str
    place: str
    fields: dict[str, Any]
    tensors: dict[str, Any]


class Files:
    """
    Where the files of a folder, or of a repo on the Hub, are on this machine.

    Args:
        path (`str` or `os.PathLike`): Folder or Hub id.
        subfolder (`str`, *optional*): Where in it the files lie.
        hub: Those of [`HUB_ARGUMENTS`] that were given.
    """

    #: The one file in the folder that is meant, where the path named it.
    file: str | None = None

    def __init__(self, path: str | os.PathLike, subfolder: str = "", **hub):
        self.path, self.subfolder, self.hub = str(path), subfolder or "", dict(hub)
        self.is_local = os.path.isdir(self.path)
        self.place = f"{self.path}/{subfolder}" if subfolder else self.path

    @classmethod
    def at(cls, path: str | os.PathLike, subfolder: str = "", **hub) -> "Files":
        """Those of a path that can also lead to one file, or into a repo: `folder/ae.pt` or `owner/name/layer_3.safetensors`."""
        path, file = str(path), None
        if os.path.isfile(path):
            path, file = os.path.split(path)
        elif not os.path.isdir(path) and len(parts := path.split("/")) > 2 and all(parts):
            path, inner = "/".join(parts[:2]), parts[2:]
            if Path(inner[-1]).suffix in WEIGHT_SUFFIXES:
                file = inner.pop()
            subfolder = "/".join([*inner, *filter(None, [subfolder])])
        files = cls(path or ".", subfolder, **hub)
        files.file = file
        return files

    def names(self, levels: int = 3) -> list[str]:
        """
        Paths of the files inside, those of sub-folders included.

        Args:
            levels (`int`, *optional*, defaults to 3): How deep a local folder is searched.

        Raises:
            `OSError`: they cannot be listed.
        """
        if self.is_local:
            return _names_in(Path(self.path, self.subfolder), levels)
        asked = {name: self.hub.get(name) for name in ("revision", "token")}
        try:
            if self.hub.get("local_files_only") or is_offline_mode():
                cache_dir = self.hub.get("cache_dir")
                folder = snapshot_download(self.path, **asked, cache_dir=cache_dir, local_files_only=True)
                return _names_in(Path(folder, self.subfolder), levels)
            found = HfApi().repo_info(self.path, **asked)
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
            raise OSTranscoderError(
                f"The files of {printable(self.place)} cannot be listed ({printable(error)[:200]})."
            ) from error
        # What is read afterwards comes from the commit that was listed.
        self.hub["revision"] = found.sha
        start = f"{self.subfolder}/" if self.subfolder else ""
        return [entry.rfilename.removeprefix(start) for entry in found.siblings if entry.rfilename.startswith(start)]

    def inside(self, name: str) -> "Files":
        """Those of a folder in this one."""
        return Files(self.path, f"{self.subfolder}/{name}" if self.subfolder else name, **self.hub)

    def parent(self) -> "Files | None":
        """Those of the folder around this one; `None` at the top of a repo."""
        if self.subfolder:
            return Files(self.path, self.subfolder.rpartition("/")[0], **self.hub)
        return Files(os.path.dirname(os.path.abspath(self.path))) if self.is_local else None

    def find(self, name: str, optional: bool = False) -> Path | None:
        """
        The path of a file, downloaded if need be; `None` where there is none and it is optional.

        Raises:
            `OSError`: there is none, and why.
        """
        if self.is_local:
            found = Path(self.path, self.subfolder, name)
            if found.is_file():
                return found
            if optional:
                return None
            raise OSTranscoderError(
                f"{printable(self.place)} holds no {printable(name)}: give the folder that `save_pretrained` or training wrote."
            )
        found = cached_file(
            self.path,
            name,
            subfolder=self.subfolder,
            _raise_exceptions_for_missing_entries=not optional,
            **self.hub,
        )
        if found is not None:
            # What else is read comes from the same commit.
            self.hub["revision"] = extract_commit_hash(found, None) or self.hub.get("revision")
        return None if found is None else Path(found)

    def find_all(self, names: list[str]) -> list[Path]:
        """As [`~Files.find`], several at once."""
        if self.is_local:
            return [self.find(name) for name in names]
        found = cached_files(self.path, names, subfolder=self.subfolder, **self.hub)
        return [Path(path) for path in found]


def _names_in(folder: Path, levels: int) -> list[str]:
    # A dictionary lies at most three folders deep; home folders and mounted disks are not searched through.
    found = [path for level in range(1, levels + 2) for path in folder.glob("/".join("*" * level))]
    return [path.relative_to(folder).as_posix() for path in found if path.is_file()]


def open_dictionary(files: Files, variant: str | None = None) -> SavedDictionary:
    """
    Opens a saved dictionary.

    Args:
        files ([`Files`]): Where it lies.
        variant (`str`, *optional*): That of the weights' names, as `save_pretrained` has it.
    """
    if not files.is_local:
        return open_files(files, variant)
    folder = Path(files.path, files.subfolder)
    depth = len(Path(files.subfolder).parts) or 1
    return read_settled(folder, lambda opening: open_files(files, variant, opening), inside=depth)


def open_files(files: Files, variant: str | None = None, opening=lambda path: path) -> SavedDictionary:
    """The work of [`open_dictionary`]. `opening` is called with each path before it is opened, see [`read_settled`]."""
    if files.is_local and files.find(ADAPTER_NAME, optional=True):
        raise TranscoderError(
            f"{printable(files.place)} holds {ADAPTER_NAME}, and a dictionary has no adapters: remove that file, or give "
            "the folder of the dictionary."
        )
    path = opening(files.find(CONFIG_NAME))
    fields = parse_saved(path.read_bytes(), str(path))
    # Says which version to get when this one is too old, whatever else is different then.
    check_format_version(fields.get("format_version", FORMAT_VERSION))
    single = files.find(_add_variant(WEIGHTS_NAME, variant), optional=True)
    if single is not None:
        opened = _open(opening(single))
        return SavedDictionary(files.path, files.place, fields, dict.fromkeys(opened.keys(), opened))
    index = files.find(_add_variant(SHARDS_INDEX_NAME, variant), optional=True)
    if index is None:
        raise TranscoderError(
            f"{printable(files.place)} holds no {_add_variant(WEIGHTS_NAME, variant)}: give a dictionary that was saved as "
            "safetensors."
        )
    return SavedDictionary(files.path, files.place, fields, _open_shards(files, opening(index), opening))


def expect(saved: SavedDictionary, shapes: dict[str, tuple[int, ...]], any_size: bool = False) -> None:
    """
    Compares the headers of the weights with what the configuration asks for.

    Args:
        saved ([`SavedDictionary`]): The files.
        shapes (`dict[str, tuple[int, ...]]`): Name -> shape of every tensor that a dictionary of its configuration has.
        any_size (`bool`, *optional*, defaults to `False`): Whether a tensor of another shape is to be made anew.

    Raises:
        [`TranscoderError`]: a tensor is missing, too much, of another shape or of a type that is no floating point.
    """
    weights = f"The weights in {printable(saved.place)}"
    again = "save the dictionary again or convert it from its own format"
    if lacking := sorted(shapes.keys() - saved.tensors.keys()):
        raise TranscoderError(
            f"{weights} lack {', '.join(lacking)}: they do not belong to its config.json, so {again}."
        )
    if further := sorted(saved.tensors.keys() - shapes.keys()):
        raise TranscoderError(
            f"{weights} hold {printable(', '.join(further))[:200]}, for which its config.json has no use: the dictionary "
            f"would compute something else, so {again}."
        )
    found = {name: tuple(opened.get_slice(name).get_shape()) for name, opened in saved.tensors.items()}
    if not any_size and (other := sorted(name for name, shape in shapes.items() if found[name] != shape)):
        sizes = "; ".join(f"{name} is {found[name]} in the file and {shapes[name]} by the config" for name in other)
        raise TranscoderError(f"{weights} do not fit its config.json ({sizes[:300]}): {again}.")
    for name, opened in saved.tensors.items():
        if (dtype := opened.get_slice(name).get_dtype()) not in _DTYPES:
            raise TranscoderError(
                f"{weights} have {name} in {printable(dtype)}, which no dictionary is saved in: {again}, in float32, "
                "float64, bfloat16 or float16."
            )


def read_tensors(saved: SavedDictionary) -> dict[str, torch.Tensor]:
    """The tensors, which stay in the file until they are used, each checked by [`check_numbers`]."""
    tensors = {name: opened.get_tensor(name) for name, opened in saved.tensors.items()}
    for name, tensor in tensors.items():
        check_numbers(saved.place, name, tensor)
    return tensors


def bounds(tensor: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest number of a tensor; both are NaN where one of its numbers is."""
    # One pass, a hundred times faster than `isfinite`.
    return tuple(torch.stack(torch.aminmax(tensor.detach())).tolist())


def check_numbers(place: str, name: str, tensor: torch.Tensor, converted: bool = False) -> None:
    """
    Refuses weights that are no numbers, and scales that cannot be divided by.

    Args:
        place (`str`): Where the dictionary lies.
        name (`str`): The tensor's name.
        tensor (`torch.Tensor`): The tensor.
        converted (`bool`, *optional*, defaults to `False`): Whether it is in another precision than in its file.
    """
    low, high = bounds(tensor)
    what = f"{name} in {printable(place)}"
    if converted:
        what, advice = f"{what} as {str(tensor.dtype).removeprefix('torch.')}", "load it in the precision of its file"
    else:
        advice = "go back to a dictionary that was saved before"
    if not math.isfinite(low) or not math.isfinite(high):
        raise TranscoderError(
            f"{what} has NaN or infinite numbers, so nothing computed from it would mean anything: {advice}."
        )
    if name.endswith("_scale") and low <= 0:
        raise TranscoderError(f"{what} goes down to {low:g}, and activations cannot be divided by that: {advice}.")


def parse_saved(content: str | bytes, source: str) -> dict[str, Any]:
    """
    Reads a JSON file that was saved with weights.

    Args:
        content (`str` or `bytes`): What the file holds.
        source (`str`): The file, for messages.
    """
    try:
        return parse_json(content, source)
    except TranscoderError as error:
        raise damaged(source, str(error).removeprefix(f"{printable(source)} ")) from error


def damaged(source: str | os.PathLike, reason: str) -> TranscoderError:
    """The error that a saved file cannot be read."""
    return TranscoderError(
        f"{printable(source)} cannot be read ({printable(reason)[:200].removesuffix('.')}): the file is damaged or cut short, "
        "so copy or download it again."
    )


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from error


def _open_shards(files: Files, index: Path, opening) -> dict[str, Any]:
    """Every tensor of a sharded dictionary with the opened shard that holds it."""
    shards = parse_saved(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise damaged(index, "it has no `weight_map`")
    names = sorted({inner_path(shard, str(index)) for shard in shards.values()})
    for name in names:
        if "/" in name or not name.endswith(".safetensors"):
            raise TranscoderError(
                f"{printable(index)} names the shard '{printable(name)[:100]}', which must be a safetensors file beside it: "
                "copy or download the dictionary again."
            )
    try:
        opened = {name: _open(opening(path)) for name, path in zip(names, files.find_all(names), strict=True)}
    except OSError as error:
        raise TranscoderError(
            f"{printable(files.place)} lacks a shard of its weights ({printable(error).splitlines()[0][:200]}): copy or "
            "download the dictionary again."
        ) from error
    held = {(tensor, name) for name, shard in opened.items() for tensor in shard.keys()}
    if held != set(shards.items()):
        wrong = sorted({tensor for tensor, _ in held ^ set(shards.items())})
        raise TranscoderError(
            f"The shards in {printable(files.place)} do not hold what {index.name} says "
            f"({printable(', '.join(wrong))[:200]}): they are from different saves, so copy or download them all again."
        )
    return {tensor: opened[shard] for tensor, shard in shards.items()}
