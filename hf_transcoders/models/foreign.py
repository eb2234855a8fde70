"""Dictionaries in the formats of other libraries, opened as if they were saved by this one."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import OSTranscoderError, TranscoderError
from ..formats.detect import detect, members
from ..formats.dictionary import ForeignDictionary, Given, Norm
from ..formats.folder import Folder
from ..formats.tensor_files import LazyTensor
from ..text.printable import printable
from .configuration_transcoder import DTYPES, TranscoderConfig
from .saved_files import CONFIG_NAME, Files, SavedDictionary, parse_saved


#: What the user may say of a dictionary whose files do not say it, of the arguments of `from_pretrained`.
FOREIGN_ARGUMENTS = ("base_model", "input_site", "output_site", "folded", "scaling_factor")

_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


def foreign_folder(files: Files) -> tuple[ModuleType, Folder] | None:
    """
    The format of a dictionary of another library and its files; `None` where it is one of this library.

    Args:
        files ([`Files`]): Where the dictionary lies.

    Raises:
        [`TranscoderError`]: the files are those of several dictionaries.
    """
    folder, own = _listed(files)
    if folder is None:
        return None
    module = detect(folder, own)
    if module is None and not own and (found := members(folder)):
        names = ", ".join(list(found)[:8]) + (" ..." if len(found) > 8 else "")
        raise TranscoderError(
            f"{printable(files.place)} holds {len(found)} dictionaries ({printable(names)}): load one of them by its folder or "
            "file, or all of them with TranscoderSet.from_pretrained."
        )
    return None if module is None else (module, folder)


def foreign_members(files: Files) -> dict[str, tuple[ModuleType, Folder]]:
    """
    The dictionaries of other libraries in a folder, by name; none where it holds one of this library.

    Args:
        files ([`Files`]): Where the set lies.
    """
    folder, own = _listed(files)
    return {} if folder is None or own else members(folder)


def _listed(files: Files) -> tuple[Folder | None, bool]:
    """The files of a folder, and whether a dictionary of this library is among them."""
    own = files.file is None and _is_own(files)
    # On the Hub, a list of the files is a request of its own: a dictionary of this library loads without it.
    if own and not files.is_local:
        return None, True
    try:
        return Folder(files, files.names(), files.file), own
    except OSTranscoderError:
        return None, own


def open_foreign(module: ModuleType, folder: Folder, given: Given) -> SavedDictionary:
    """
    Opens a dictionary of another library.

    Args:
        module (`ModuleType`): The module of its format.
        folder ([`Folder`]): Its files.
        given ([`Given`]): What the files do not say.
    """
    dictionary = module.read(folder, given)
    files = folder.files
    place = f"{files.place}/{folder.file}" if folder.file else files.place
    return SavedDictionary(files.path, place, _complete(dictionary, module.NAME, files), _slices(dictionary))


def refuse_foreign_arguments(kwargs: dict[str, Any]) -> None:
    """Refuses what says nothing about a dictionary of this library; its sites are fields of its configuration."""
    for name in set(FOREIGN_ARGUMENTS) - {"input_site", "output_site"}:
        if kwargs.pop(name, None) is not None:
            raise TranscoderError(
                f"`{name}=` says what the files of another library leave out, and this dictionary was saved by hf_transcoders: "
                f"leave `{name}` out."
            )


def take_given(kwargs: dict[str, Any]) -> Given:
    """Takes those of [`FOREIGN_ARGUMENTS`] that are in `kwargs` out of it."""
    said = {name: kwargs.pop(name) for name in FOREIGN_ARGUMENTS if name in kwargs}
    model = said.pop("base_model", None)
    if model is None or isinstance(model, str):
        return Given(base_model=model, **said)
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise TranscoderError("`base_model` must be the name of a language model, or a loaded one.")
    known = TranscoderConfig.for_model(model, "layers.0.mlp.in")
    base = {name: getattr(known, f"base_model_{name}") for name in ("name_or_path", "revision", "type")}
    return Given(
        base_fields={f"base_model_{name}": value for name, value in base.items()}, norm_of=_norm_of(model), **said
    )


def _norm_of(model: PreTrainedModel) -> Callable[[str], Norm]:
    # Sideways: where the norms of a model are is known to the room beside this one.
    from ..lm.norms import norm_bias, norm_gain, norm_width
    from ..lm.order import norm_before
    from ..lm.sites import Site

    def norm_of(text: str) -> Norm:
        site = Site.parse(text)
        if site.point not in ("attn.in", "mlp.in"):
            site = Site("mlp.in", site.layer)
        norm = norm_before(model, site)
        if norm is None:
            raise TranscoderError(
                f"The language model has no norm in front of '{site}', so there is none to undo there."
            )
        gain = norm_gain(norm, norm_width(norm))
        bias = torch.as_tensor(norm_bias(norm)).expand_as(gain.gain)
        return Norm(gain.gain.detach().float().cpu(), bias.detach().float().cpu(), gain.centres)

    return norm_of


def _is_own(files: Files) -> bool:
    """Whether the configuration in a folder is that of a dictionary of this library, damaged ones included."""
    path = files.find(CONFIG_NAME, optional=True)
    if path is None:
        return False
    try:
        settings = parse_saved(path.read_bytes(), str(path))
    except (TranscoderError, OSError):
        return True
    return settings.get("model_type") == TranscoderConfig.model_type or "format_version" in settings


def _complete(dictionary: ForeignDictionary, format: str, files: Files) -> dict[str, Any]:
    """Fields of a whole configuration, with where the dictionary comes from."""
    origin = {"converted_from": format, "source": files.path}
    if files.hub.get("revision"):
        origin["source_revision"] = files.hub["revision"]
    config = TranscoderConfig(**dictionary.fields, training_summary=origin | dictionary.facts)
    values = {name: getattr(config, name) for name in TranscoderConfig.own_fields()}
    dtype = str(dictionary.tensors["W_enc"].dtype).removeprefix("torch.")
    return values | {"dtype": dtype if dtype in DTYPES else "float32", "model_type": TranscoderConfig.model_type}


def _slices(dictionary: ForeignDictionary) -> dict[str, "_Slices"]:
    opened = _Slices(dictionary.tensors)
    return dict.fromkeys(dictionary.tensors, opened)


class _Slices:
    """Lazy tensors with the methods of an opened safetensors file that loading needs."""

    def __init__(self, tensors: dict[str, LazyTensor]):
        self._tensors = tensors

    def get_slice(self, name: str) -> "_Header":
        return _Header(self._tensors[name])

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].read()


class _Header:
    def __init__(self, tensor: LazyTensor):
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _NAMES.get(self._tensor.dtype, printable(self._tensor.dtype))
