"""Dictionaries in the formats of other libraries, opened as if they were saved by this one."""

import copy
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import OSTranscoderError, TranscoderError
from ..files import atomic_directory
from ..formats.choice import PathFacts, choose, path_facts
from ..formats.cross_layer import PlainCrossLayer
from ..formats.detect import WRITERS, detect, members
from ..formats.detect_cross_layer import CROSS_LAYER_WRITERS, detect_cross_layer, write_cross_layer
from ..formats.dictionary import ForeignDictionary, Given, Norm
from ..formats.folder import Folder
from ..formats.tensor_files import LazyTensor
from ..formats.writing import PlainDictionary
from ..text.logging import get_logger
from ..text.printable import printable
from .configuration_transcoder import DTYPES, TranscoderConfig, facts_of
from .cross_layer.configuration_cross_layer import CrossLayerSourceConfig, CrossLayerTranscoderConfig
from .saved_files import CONFIG_NAME, DICTIONARY_TYPES, Files, SavedDictionary, parse_saved
from .set_index import dictionary_name


if TYPE_CHECKING:
    from .cross_layer.modeling_cross_layer import CrossLayerTranscoder
    from .modeling_transcoder import TranscoderModel


#: What the user may say of a dictionary whose files do not say it, of the arguments of `from_pretrained`.
FOREIGN_ARGUMENTS = ("base_model", "input_site", "output_site", "folded", "scaling_factor", "k")

#: What chooses among the dictionaries of a repo, of the arguments of `from_pretrained`.
CHOICE_ARGUMENTS = ("layers", "width", "l0")

#: Formats that can be written, of sets or of cross-layer transcoders.
FORMATS = tuple(dict.fromkeys([*WRITERS, *CROSS_LAYER_WRITERS]))

logger = get_logger(__name__)

_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


def foreign_folder(files: Files, choice: Mapping[str, Any] | None = None) -> tuple[ModuleType, Folder] | None:
    """
    The format of a dictionary of another library and its files; `None` where it is one of this library. The only one in
    the sub-folders of a folder is found too.

    Args:
        files ([`Files`]): Where the dictionary lies.
        choice (`Mapping[str, Any]`, *optional*): Those of [`CHOICE_ARGUMENTS`] that were given.

    Raises:
        [`TranscoderError`]: the files are those of several dictionaries.
    """
    folder, own = _listed(files)
    if folder is None:
        return None
    module = detect(folder, own)
    if module is None and not own and (found := members(folder)):
        found = chosen(found, choice or {})
        if len(found) == 1:
            return next(iter(found.values()))
        names = ", ".join(list(found)[:8]) + (" ..." if len(found) > 8 else "")
        raise TranscoderError(
            f"{printable(files.place)} holds {len(found)} dictionaries ({printable(names)}): load one of them by its folder or "
            "file, or all of them with TranscoderSet.from_pretrained."
        )
    if module is None and not own:
        _refuse_cross_layer(files, folder)
    if choice:
        raise TranscoderError(
            f"{printable(files.place)} holds one dictionary, so there is nothing to choose: leave out {', '.join(choice)}."
        )
    return None if module is None else (module, folder)


def take_choice(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes those of [`CHOICE_ARGUMENTS`] that are in `kwargs` out of it."""
    return {name: value for name in CHOICE_ARGUMENTS if (value := kwargs.pop(name, None)) is not None}


def chosen(found: Mapping[str, Any], choice: Mapping[str, Any]) -> dict[str, Any]:
    """Those of several dictionaries that were asked for; where an L0 was given, a message says which are the nearest."""
    if not choice:
        return dict(found)
    names = choose(found, **choice)
    if not isinstance(choice.get("l0"), str | None):
        shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
        logger.warning(f"Nearest to an L0 of {choice['l0']:g}: {shown}.")
    return {name: found[name] for name in names}


def foreign_members(files: Files) -> dict[str, tuple[ModuleType, Folder]]:
    """
    The dictionaries of other libraries in a folder, by name; none where it holds one of this library.

    Args:
        files ([`Files`]): Where the set lies.
    """
    folder, own = _listed(files)
    if folder is None or own:
        return {}
    found = members(folder)
    if not found:
        _refuse_cross_layer(files, folder)
    return found


def _refuse_cross_layer(files: Files, folder: Folder) -> None:
    if (module := detect_cross_layer(folder)) is not None:
        raise TranscoderError(
            f"{printable(files.place)} holds a cross-layer transcoder of {module.NAME}: load it with "
            "CrossLayerTranscoder.from_pretrained."
        )


def _listed(files: Files) -> tuple[Folder | None, bool]:
    """The files of a folder, and whether a dictionary of this library is among them."""
    own = files.file is None and _is_own(files)
    # On the Hub, a list of the files is a request of its own: a dictionary of this library loads without it.
    if own and not files.is_local:
        return None, True
    try:
        return Folder(files, files.names(levels=0 if own else 3), files.file), own
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
    return SavedDictionary(files.path, place, _complete(dictionary, given, module.NAME, files), _slices(dictionary))


@torch.no_grad()
def write_foreign(
    dictionaries: "Mapping[str, TranscoderModel] | TranscoderModel | CrossLayerTranscoder",
    folder: str | os.PathLike,
    to: str,
) -> None:
    """
    Writes dictionaries in the format of another library; all of them or, where it cannot express one, nothing.

    Args:
        dictionaries (`Mapping[str, TranscoderModel]`, [`TranscoderModel`] or [`CrossLayerTranscoder`]):
            Dictionaries by name, or one.
        folder (`str` or `os.PathLike`): The folder to write.
        to (`str`): One of `FORMATS`.
    """
    config = getattr(dictionaries, "config", None)
    if isinstance(config, CrossLayerTranscoderConfig):
        return _write_cross_layer(dictionaries, folder, to)  # pyright: ignore[reportArgumentType]
    if isinstance(config, CrossLayerSourceConfig):
        raise TranscoderError("One layer of a cross-layer transcoder cannot be saved alone: save the whole.")
    if isinstance(config, TranscoderConfig):
        named = {dictionary_name(config): dictionaries}
    else:
        named = dict(dictionaries.items())  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    if to not in WRITERS:
        raise TranscoderError(f"There is no format '{printable(to)[:40]}' to write: choose from {', '.join(WRITERS)}.")
    _refuse_filled(folder)
    with atomic_directory(folder) as partial:
        WRITERS[to].write({name: _plain(model) for name, model in named.items()}, partial)  # pyright: ignore[reportArgumentType]


def _refuse_filled(folder: str | os.PathLike) -> None:
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise TranscoderError(
            f"{printable(folder)} is not empty, and files of several formats cannot be told apart: choose another."
        )


def _plain(model: "TranscoderModel") -> PlainDictionary:
    if model.config.has_site_scales:
        model = copy.deepcopy(model).fold_normalization_()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name == "threshold"}
    if model.config.tied:
        tensors["W_enc"] = tensors["W_dec"] = model.encoder_weight
    tensors.setdefault("b_dec", model.W_enc.new_zeros(model.config.d_out))  # pyright: ignore[reportCallIssue]
    return PlainDictionary({name: getattr(model.config, name) for name in model.config.own_fields()}, tensors)


def open_foreign_cross_layer(files: Files, kwargs: dict[str, Any]) -> SavedDictionary | None:
    """
    Opens a cross-layer transcoder of another library; `None` where the files are those of this one, or of none.

    Args:
        files ([`Files`]): Where it lies.
        kwargs (`dict[str, Any]`): Arguments of `from_pretrained`; those that say or choose something are taken out.
    """
    folder, own = _listed(files)
    module = None if folder is None or own else detect_cross_layer(folder)
    if module is None or folder is None:
        if folder is not None and not own and (other := detect(folder)) is not None:
            raise TranscoderError(
                f"{printable(files.place)} holds a dictionary of {other.NAME} that is no cross-layer transcoder: load it with "
                "TranscoderModel.from_pretrained."
            )
        refuse_foreign_arguments(kwargs)
        if choice := take_choice(kwargs):
            raise TranscoderError(
                f"{printable(files.place)} holds no cross-layer transcoder to choose from: leave out {', '.join(choice)}."
            )
        return None
    given = take_given(kwargs)
    dictionary = module.read(folder, given, take_choice(kwargs))
    fields = _complete(dictionary, given, module.NAME, files, CrossLayerTranscoderConfig)
    return SavedDictionary(files.path, files.place, fields, _slices(dictionary))


def _write_cross_layer(model: "CrossLayerTranscoder", folder: str | os.PathLike, to: str) -> None:
    _refuse_filled(folder)
    if model.config.normalization != "none":
        model = copy.deepcopy(model).fold_normalization_()
    fields = {name: getattr(model.config, name) for name in model.config.own_fields()}
    plain = PlainCrossLayer(fields, [dict(source.state_dict()) for source in model.sources])
    with atomic_directory(folder) as partial:
        write_cross_layer(plain, Path(partial), to)


def refuse_foreign_arguments(kwargs: dict[str, Any]) -> None:
    """Refuses arguments that do not apply to a dictionary of this library; its sites are fields of its configuration."""
    for name in set(FOREIGN_ARGUMENTS) - {"input_site", "output_site", "k"}:
        if kwargs.pop(name, None) is not None:
            raise TranscoderError(
                f"`{name}=` gives information that the files of another library leave out, and this dictionary was saved by hf_transcoders: "
                f"leave `{name}` out."
            )


def holds_cross_layer(files: Files) -> bool:
    """Whether a folder or repo has the files of a cross-layer transcoder, of this library or of another."""
    path = files.find(CONFIG_NAME, optional=True) if files.file is None else None
    if path is not None:
        try:
            kind = parse_saved(path.read_bytes(), str(path)).get("model_type")
        except TranscoderError:  # Said in a sentence by the loader.
            return False
        return kind == CrossLayerTranscoderConfig.model_type
    folder, own = _listed(files)
    return folder is not None and not own and detect_cross_layer(folder) is not None


def holds_dictionaries(folder: str | os.PathLike) -> bool:
    """Whether a folder on this machine has the files of a dictionary, or of several of another library."""
    files = Files(folder)
    if files.find(CONFIG_NAME, optional=True) is not None:
        return True
    names = Folder(files, files.names())
    return detect_cross_layer(names) is not None or detect(names) is not None or bool(members(names))


@dataclass(frozen=True)
class ForeignFacts:
    """
    Facts about a dictionary of another library that are known before its weights are read.

    Args:
        format (`str`): Name of its format.
        path ([`PathFacts`]): What its name says.
        config ([`TranscoderConfig`], *optional*): What its files say; `None` where they were not opened.
        parameters (`int`, *optional*): Number of parameters.
        trouble (`str`, *optional*): Why it cannot be loaded.
    """

    format: str
    path: PathFacts
    config: TranscoderConfig | None = None
    parameters: int | None = None
    trouble: str | None = None


def describe_foreign(files: Files) -> dict[str, ForeignFacts]:
    """
    Facts about the dictionaries of other libraries in a folder or repo, by name, from their settings and the headers of their
    weights. Of several on the Hub nothing is downloaded: only their names tell something.

    Args:
        files ([`Files`]): Where they lie.
    """
    folder, own = _listed(files)
    if folder is None or own:
        return {}
    if (module := detect_cross_layer(folder)) is not None:
        return _describe_cross_layer(module, folder)
    module = detect(folder)
    found = members(folder)
    if module is not None and (folder.file is not None or not found):
        found = {folder.file or folder.name: (module, folder)}
    open_them = files.is_local or len(found) == 1
    return {name: _describe(name, *member, open_them) for name, member in found.items()}


def _describe(name: str, module: ModuleType, folder: Folder, open_it: bool) -> ForeignFacts:
    known = path_facts(name)
    if not open_it:
        return ForeignFacts(module.NAME, known)
    try:
        saved = open_foreign(module, folder, Given(complete=False))
    except TranscoderError as error:
        return ForeignFacts(module.NAME, known, trouble=str(error))
    shapes = [opened.get_slice(key).get_shape() for key, opened in saved.tensors.items()]
    return ForeignFacts(module.NAME, known, TranscoderConfig.from_dict(saved.fields), sum(map(math.prod, shapes)))


def _describe_cross_layer(module: ModuleType, folder: Folder) -> dict[str, ForeignFacts]:
    name = folder.name
    try:
        dictionary = module.read(folder, Given(complete=False), {})
        configs = _described_layers(dictionary.fields)
    except TranscoderError as error:
        return {name: ForeignFacts(module.NAME, path_facts(name), trouble=str(error))}
    sizes = [0] * len(configs)
    for key, tensor in dictionary.tensors.items():
        sizes[int(key.split(".")[1])] += math.prod(tensor.shape)
    return {
        name: ForeignFacts(module.NAME, PathFacts(layer=number), configs[name], sizes[number])
        for number, name in enumerate(configs)
    }


def _described_layers(fields: Mapping[str, Any]) -> dict[str, TranscoderConfig]:
    """The configurations of the layers of a cross-layer transcoder, by name; without sites where its files name none."""
    if None in fields["input_sites"] or None in fields["output_sites"]:
        own = {name: fields[name] for name in TranscoderConfig.own_fields() if name in fields}
        return {f"layer_{number}": TranscoderConfig(**own) for number in range(len(fields["input_sites"]))}
    config = CrossLayerTranscoderConfig(**fields)
    return {name: config.source(number) for number, name in enumerate(config.names)}


def take_given(kwargs: dict[str, Any]) -> Given:
    """Takes those of [`FOREIGN_ARGUMENTS`] that are in `kwargs` out of it."""
    if kwargs.pop("variant", None) is not None:
        raise TranscoderError("`variant=` is a part of the names of this library's own files: leave it out.")
    said = {name: kwargs.pop(name) for name in FOREIGN_ARGUMENTS if name in kwargs}
    model = said.pop("base_model", None)
    if model is None or isinstance(model, str):
        return Given(base_model=model, **said)
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise TranscoderError("`base_model` must be the name of a language model, or a loaded one.")
    facts = facts_of(model)
    known = {name: facts[name] for name in ("base_model_name_or_path", "base_model_revision", "base_model_type")}
    return Given(base_fields=known, norm_of=_norm_of(model), **said)


def _norm_of(model: PreTrainedModel) -> Callable[[str], Norm]:
    # Imported here, because files of models do not import files of lm at module level.
    from ..lm.norms import norm_bias, norm_gain, norm_width
    from ..lm.sites import Site
    from ..lm.stream import norm_before

    def norm_of(text: str) -> Norm:
        site = Site.parse(text)
        if site.point not in ("attn.in", "mlp.in"):
            site = Site("mlp.in", site.layer)
        norm = norm_before(model, site)
        if norm is None:
            raise TranscoderError(f"The language model has no norm before '{site}', so there is none to undo there.")
        gain = norm_gain(norm, norm_width(norm))
        bias = torch.as_tensor(norm_bias(norm)).expand_as(gain.gain)
        return Norm(gain.gain.detach().float().cpu(), bias.detach().float().cpu(), gain.centers)

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
    return settings.get("model_type") in DICTIONARY_TYPES or "format_version" in settings


def _complete(
    dictionary: ForeignDictionary,
    given: Given,
    format: str,
    files: Files,
    config_class: type[TranscoderConfig] = TranscoderConfig,
) -> dict[str, Any]:
    """Fields of a whole configuration, with where the dictionary comes from."""
    origin = {"converted_from": format, "source": files.path}
    if files.hub.get("revision"):
        origin["source_revision"] = files.hub["revision"]
    said = {} if given.k is None else {"k": given.k}
    config = config_class(**(dictionary.fields | said), training_summary=origin | dictionary.facts)
    values = {name: getattr(config, name) for name in config_class.own_fields()}
    dtypes = {
        name.rpartition(".")[2]: str(tensor.dtype).removeprefix("torch.")
        for name, tensor in dictionary.tensors.items()
    }
    dtype = dtypes["W_enc"]
    return values | {"dtype": dtype if dtype in DTYPES else "float32", "model_type": config_class.model_type}


def _slices(dictionary: ForeignDictionary) -> dict[str, "_Slices"]:
    opened = _Slices(dictionary.tensors)
    return dict.fromkeys(dictionary.tensors, opened)


class _Slices:
    """Lazy tensors with the methods of an opened safetensors file that loading needs."""

    def __init__(self, tensors: dict[str, LazyTensor]):
        self._tensors = tensors

    def get_slice(self, name: str) -> "_Header":
        return _Header(self._tensors[name])

    def is_mapped(self, name: str) -> bool:
        return self._tensors[name].is_mapped

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].read()


class _Header:
    def __init__(self, tensor: LazyTensor):
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _NAMES.get(self._tensor.dtype, printable(self._tensor.dtype))
