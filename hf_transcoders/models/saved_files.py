"""Find, open and check the files of a saved dictionary."""

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
from ..hub_ids import refuse_missing
from ..mapped_memory import release_pages
from ..text.printable import printable
from ..text.strict_json import parse_json
from .configuration_transcoder import FORMAT_VERSION, check_format_version


CONFIG_NAME = "config.json"
#: Names of weight files: a single file, or shards and their index.
WEIGHT_FILES = "model*.safetensors*"
WEIGHTS_NAME, SHARDS_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
ADAPTER_NAME = "adapter_config.json"
#: Explanations of the features, beside the weights.
EXPLANATIONS_NAME = "feature_explanations.json"
#: Ends of the names of weight files, by which a path to a file in a repo is told from one to a folder.
WEIGHT_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".pkl", ".gz")

#: Arguments of `from_pretrained` for the location of the files.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")

#: Values of `model_type` in the `config.json` of dictionaries of this library.
DICTIONARY_TYPES = "transcoder", "cross_layer_transcoder"

# Torch puts tensors at multiples of this many bytes.
_ALIGNMENT = 64
# Elements that are copied and checked while they are in the cache: 4 MB of float32.
_CACHED_ELEMENTS = 2**20

# Names of the types in headers of safetensors.
_DTYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass
class SavedDictionary:
    """
    The opened files of one dictionary. A later save to the same folder does not change them.

    Args:
        path (`str`): Folder or Hub id.
        place (`str`): Folder or Hub id with subfolder, for messages.
        fields (`dict[str, Any]`): Content of `config.json`.
        tensors (`dict[str, safe_open]`): Name of a tensor -> opened file with the tensor.
    """

    path: str
    place: str
    fields: dict[str, Any]
    tensors: dict[str, Any]


class Files:
    """
    The files of a folder, or of a repo on the Hub, which are downloaded when they are needed.

    Args:
        path (`str` or `os.PathLike`): Folder or Hub id.
        subfolder (`str`, *optional*): Folder of the files inside it.
        hub: Arguments for downloads, see [`HUB_ARGUMENTS`].
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
        refuse_missing(
            path,
            "give the folder that training or `save_pretrained` wrote, or a Hub id",
            cache_dir=hub.get("cache_dir"),
        )
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
                folder = snapshot_download(self.path, **asked, cache_dir=cache_dir, local_files_only=True)  # pyright: ignore[reportCallIssue]
                return _names_in(Path(folder, self.subfolder), levels)
            found = HfApi().repo_info(self.path, **asked)
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
            raise OSTranscoderError(
                f"The files of {printable(self.place)} cannot be listed ({printable(error)[:200]})."
            ) from error
        # What is read afterwards comes from the commit that was listed.
        self.hub["revision"] = found.sha
        start = f"{self.subfolder}/" if self.subfolder else ""
        return [entry.rfilename.removeprefix(start) for entry in found.siblings if entry.rfilename.startswith(start)]  # pyright: ignore[reportAttributeAccessIssue]

    def inside(self, name: str) -> "Files":
        """The files of a subfolder."""
        return Files(self.path, f"{self.subfolder}/{name}" if self.subfolder else name, **self.hub)

    def parent(self) -> "Files | None":
        """Those of the folder around this one; `None` at the top of a repo."""
        if self.subfolder:
            return Files(self.path, self.subfolder.rpartition("/")[0], **self.hub)
        return Files(os.path.dirname(os.path.abspath(self.path))) if self.is_local else None

    def find(self, name: str, optional: bool = False) -> Path | None:
        """
        The local path of a file, downloaded if needed; `None` if it does not exist and is optional.

        Raises:
            `OSError`: the file does not exist, or cannot be downloaded.
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
            # Further files are read from the same commit.
            self.hub["revision"] = extract_commit_hash(found, None) or self.hub.get("revision")
        return None if found is None else Path(found)

    def find_all(self, names: list[str]) -> list[Path]:
        """The local paths of several files, see [`~Files.find`]."""
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
        files ([`Files`]): Files of the dictionary.
        variant (`str`, *optional*): Variant in the names of the weights, as in `save_pretrained`.
    """
    if not files.is_local:
        return open_files(files, variant)
    folder = Path(files.path, files.subfolder)
    depth = len(Path(files.subfolder).parts) or 1
    return read_settled(folder, lambda opening: open_files(files, variant, opening), inside=depth)


def open_files(files: Files, variant: str | None = None, opening=lambda path: path) -> SavedDictionary:
    """Opens a saved dictionary inside [`read_settled`], whose `opening` is called with each path before it is opened."""
    if files.is_local and files.find(ADAPTER_NAME, optional=True):
        raise TranscoderError(
            f"{printable(files.place)} holds {ADAPTER_NAME}, and a dictionary has no adapters: remove that file, or give "
            "the folder of the dictionary."
        )
    path = opening(files.find(CONFIG_NAME))
    fields = parse_saved(path.read_bytes(), str(path))
    # First, because a newer format may differ in everything else.
    check_format_version(fields.get("format_version", FORMAT_VERSION))
    if (kind := fields.get("model_type", DICTIONARY_TYPES[0])) not in DICTIONARY_TYPES:
        raise TranscoderError(
            f"{printable(files.place)} holds a model of type '{printable(kind)[:40]}', not a dictionary: give the folder or "
            "repo of a dictionary."
        )
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
    Compares the headers of the weights with the configuration.

    Args:
        saved ([`SavedDictionary`]): Opened files.
        shapes (`dict[str, tuple[int, ...]]`): Name -> shape of every tensor of a dictionary with its configuration.
        any_size (`bool`, *optional*, defaults to `False`): Whether to accept other shapes; such tensors are initialized.

    Raises:
        [`TranscoderError`]: a tensor is missing or unknown, or its shape or type is wrong.
    """
    weights = f"The weights in {printable(saved.place)}"
    again = "save the dictionary again or convert it from its own format"
    if lacking := sorted(shapes.keys() - saved.tensors.keys()):
        raise TranscoderError(
            f"{weights} lack {', '.join(lacking)}: they do not belong to its config.json, so {again}."
        )
    if further := sorted(saved.tensors.keys() - shapes.keys()):
        raise TranscoderError(
            f"{weights} hold {printable(', '.join(further))[:200]}, which its config.json does not have: the dictionary "
            f"would compute another function, so {again}."
        )
    found = {name: tuple(opened.get_slice(name).get_shape()) for name, opened in saved.tensors.items()}
    if not any_size and (other := sorted(name for name, shape in shapes.items() if found[name] != shape)):
        sizes = "; ".join(f"{name} is {found[name]} in the file and {shapes[name]} by the config" for name in other)
        raise TranscoderError(f"{weights} do not fit its config.json ({sizes[:300]}): {again}.")
    for name, opened in saved.tensors.items():
        if (dtype := opened.get_slice(name).get_dtype()) not in _DTYPES:
            raise TranscoderError(
                f"{weights} have {name} in {printable(dtype)}, which is not a type of dictionaries: {again}, in float32, "
                "float64, bfloat16 or float16."
            )


def saved_dtype(saved: SavedDictionary, name: str) -> torch.dtype:
    """The type of a saved tensor, from the header of its file."""
    return _DTYPES[saved.tensors[name].get_slice(name).get_dtype()]


def read_tensors(saved: SavedDictionary) -> dict[str, torch.Tensor]:
    """
    Reads the tensors of a dictionary, and checks each by [`check_numbers`].

    Tensors are mapped from their files, except those that are not aligned there as torch aligns them, which are copied:
    MKL picks another kernel for them, so that matrix products of few rows round differently, and a loaded dictionary would
    not compute the same bits as the saved one.
    """
    tensors = {}
    for name, opened in saved.tensors.items():
        mapped = opened.get_tensor(name)
        if mapped.data_ptr() % _ALIGNMENT:
            tensors[name], found = _copy_within_bounds(mapped)
            # Files of this library are opened by safetensors, which maps them.
            if not hasattr(opened, "is_mapped") or opened.is_mapped(name):
                release_pages(mapped)
        else:
            tensors[name], found = mapped, bounds(mapped)
        check_numbers(saved.place, name, tensors[name], found)
    return tensors


def _copy_within_bounds(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
    """A copy of a tensor and its [`bounds`], in one pass: each part is checked while it is in the cache."""
    copied = torch.empty_like(tensor)
    parts = zip(copied.view(-1).split(_CACHED_ELEMENTS), tensor.view(-1).split(_CACHED_ELEMENTS), strict=True)
    extremes = [torch.stack(torch.aminmax(part.copy_(mapped))) for part, mapped in parts]
    return copied, bounds(torch.stack(extremes))


def bounds(tensor: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest number of a tensor, or NaN for both if one of its numbers is NaN."""
    # One pass, a hundred times faster than `isfinite`.
    return tuple(torch.stack(torch.aminmax(tensor.detach())).tolist())


def check_numbers(
    place: str, name: str, tensor: torch.Tensor, found: tuple[float, float] | None = None, converted: bool = False
) -> None:
    """
    Refuses weights that are not finite, and scales that are not positive.

    Args:
        place (`str`): Folder or Hub id of the dictionary.
        name (`str`): Name of the tensor.
        tensor (`torch.Tensor`): Weights.
        found (`tuple[float, float]`, *optional*): [`bounds`] of the tensor, if known.
        converted (`bool`, *optional*, defaults to `False`): Whether the tensor was converted from another precision.
    """
    low, high = found or bounds(tensor)
    what = f"{name} in {printable(place)}"
    if converted:
        what, advice = f"{what} as {str(tensor.dtype).removeprefix('torch.')}", "load it in the precision of its file"
    else:
        advice = "go back to an earlier save"
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
        content (`str` or `bytes`): Content of the file.
        source (`str`): Path of the file, for messages.
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
    """Name of each tensor of a sharded dictionary -> opened shard with the tensor."""
    shards = parse_saved(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise damaged(index, "it has no `weight_map`")
    names = sorted({inner_path(shard, str(index)) for shard in shards.values()})
    for name in names:
        if "/" in name or not name.endswith(".safetensors"):
            raise TranscoderError(
                f"{printable(index)} names the shard '{printable(name)[:100]}', which must be a safetensors file in the same folder: "
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
