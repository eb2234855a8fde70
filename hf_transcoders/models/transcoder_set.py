"""Sets of dictionaries of one base model, saved together."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import TranscoderError
from ..files import is_inside, read_settled
from ..text.printable import printable
from .foreign import chosen, foreign_members, open_foreign, refuse_foreign_arguments, take_choice, take_given
from .modeling_transcoder import TranscoderModel
from .named_dictionaries import NamedDictionaries, TranscoderSetOutput
from .publishing import PublishMixin
from .saved_files import HUB_ARGUMENTS, Files, SavedDictionary, open_files
from .set_index import INDEX_NAME, check_names, dictionary_name, has_index, parse_index, write_index


class TranscoderSet(NamedDictionaries, PublishMixin, nn.Module):
    """
    Dictionaries of one base model, by name. Saved as one folder or repo: an index file and a sub-folder for each
    dictionary, which also loads alone with `TranscoderModel.from_pretrained(repo, subfolder=name)`. A set need not cover
    every layer.

    It behaves like a `dict`: `transcoders["layers.8.mlp.transcoder"]`, `len`, `in`, `items()`.

    Args:
        dictionaries (`Mapping[str, TranscoderModel]` or `Iterable[TranscoderModel]`):
            Dictionaries by name. Dictionaries without names are named after their sites.
    """

    accepts_loss_kwargs = False

    def __init__(self, dictionaries: Mapping[str, TranscoderModel] | Iterable[TranscoderModel]):
        super().__init__()
        if isinstance(dictionaries, Mapping):
            named = dict(dictionaries.items())
        else:
            named = _named(list(dictionaries))
        if not named:
            raise TranscoderError("A set needs at least one dictionary.")
        bases = {d.config.base_model_name_or_path for d in named.values()} - {None}
        if len(bases) > 1:
            raise TranscoderError(
                f"The dictionaries belong to different base models ({', '.join(sorted(bases))}): make one set for each."
            )
        check_names(named)
        # Module names must not contain dots.
        self.dictionaries = nn.ModuleDict({name.replace(".", "/"): model for name, model in named.items()})  # pyright: ignore[reportCallIssue]

    def named(self) -> dict[str, TranscoderModel]:
        return {key.replace("/", "."): model for key, model in self.dictionaries.items()}

    def forward(
        self,
        activations: Mapping[str, torch.Tensor],
        dead_features: Mapping[str, torch.LongTensor] | None = None,
        sparsity_scale: float = 1.0,
        output_features: bool = True,
        across_processes: bool = False,
    ) -> TranscoderSetOutput:
        """
        Args:
            activations (`Mapping[str, torch.Tensor]`):
                Site -> activations of shape `(..., width)`. Dictionaries whose output site is among them have a loss.
            dead_features (`Mapping[str, torch.LongTensor]`, *optional*):
                Name of a dictionary -> dead features for its AuxK loss.
            sparsity_scale (`float`, *optional*, defaults to 1.0): Factor of the L1 and L0 penalties.
            output_features (`bool`, *optional*, defaults to `True`): Whether to return all features densely.
            across_processes (`bool`, *optional*, defaults to `False`): See [`TranscoderModel.forward`].

        Returns:
            [`TranscoderSetOutput`]
        """
        if missing := {model.config.input_site for model in self.values()} - activations.keys():
            raise TranscoderError(
                f"There are no activations of {', '.join(map(str, missing))}, which this set reads: capture them too, or "
                "load only the dictionaries that you need."
            )
        outputs = {
            name: model(
                activations[model.config.input_site],
                activations.get(model.config.output_site),
                dead_features=(dead_features or {}).get(name),
                sparsity_scale=sparsity_scale,
                output_features=output_features,
                across_processes=across_processes,
            )
            for name, model in self.items()
        }
        losses = [output.loss for output in outputs.values() if output.loss is not None]
        return TranscoderSetOutput(loss=sum(losses) if losses else None, outputs=outputs)

    def _save_files(self, folder, **kwargs) -> None:
        for name, model in self.items():
            model.save_pretrained(folder / name, **kwargs)
        write_index(folder, {name: name for name in self}, self.base_model_name_or_path)

    def _saved_folders(self) -> list[str]:
        return list(self)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        names: Iterable[str] | None = None,
        subfolder: str = "",
        **kwargs,
    ) -> "TranscoderSet":
        """
        Loads a set from a folder or the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub id of the set.
            names (`Iterable[str]`, *optional*): Names of the dictionaries to load. All by default.
            subfolder (`str`, *optional*, defaults to `""`): Folder of the set inside the repo.
            kwargs: Same as in [`~TranscoderModel.from_pretrained`]: `layers`, `width`, `l0`, `revision`, `dtype`,
                `device_map`, `token` ...

        Returns:
            [`TranscoderSet`]
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        variant = kwargs.pop("variant", None)
        files = Files.at(pretrained_model_name_or_path, subfolder, **hub)
        names = names if names is None else list(names)
        choice = take_choice(kwargs)
        if choice and names is not None:
            raise TranscoderError(
                f"`names` and {', '.join(choice)} both say which dictionaries to load: give one of them."
            )
        if not has_index(files) and (found := foreign_members(files)):
            found = chosen(found, choice)
            wanted = _chosen(found, names)
            given = take_given(kwargs)
            return cls(
                {
                    name: TranscoderModel.from_saved(open_foreign(*found[name], given), **dict(kwargs))  # pyright: ignore[reportCallIssue]
                    for name in wanted
                }
            )
        refuse_foreign_arguments(kwargs)

        opened = open_set(files, names, variant, choice)
        return cls({name: TranscoderModel.from_saved(saved, **dict(kwargs)) for name, saved in opened.items()})


def open_set(
    files: Files,
    names: Iterable[str] | None = None,
    variant: str | None = None,
    choice: Mapping[str, Any] | None = None,
) -> dict[str, SavedDictionary]:
    """
    Opens dictionaries of a saved set, all of one save.

    Args:
        files ([`Files`]): Files of the set.
        names (`Iterable[str]`, *optional*): Names of the dictionaries to open. All by default.
        variant (`str`, *optional*): Variant in the names of the weights, as in `save_pretrained`.
        choice (`Mapping[str, Any]`, *optional*): Choice by `layers`, `width` and `l0`.
    """
    names = None if names is None else list(names)

    def open_wanted(opening=lambda path: path):
        folders = _folders(files, opening)
        wanted = _chosen(chosen(folders, choice or {}), names)
        return {name: open_files(files.inside(folders[name]), variant, opening) for name in wanted}

    return read_settled(Path(files.path, files.subfolder), open_wanted) if files.is_local else open_wanted()


def set_folders(folder: str | os.PathLike) -> dict[str, Path]:
    """
    The folders of the dictionaries of a local set, all of them inside the folder of the set.

    Args:
        folder (`str` or `os.PathLike`): Folder of the set.

    Returns:
        `dict[str, Path]`: name of a dictionary -> its folder.
    """
    folders = read_settled(folder, lambda opening: _folders(Files(folder), opening))
    return {name: Path(folder, place) for name, place in folders.items()}


def _chosen(available: Mapping[str, object], names: list[str] | None) -> list[str]:
    """The wanted names of the dictionaries of a set."""
    if missing := [name for name in names or [] if name not in available]:
        raise TranscoderError(f"The set has no dictionary {', '.join(missing)}: choose from {', '.join(available)}.")
    return list(available) if names is None else names


def _folders(files: Files, opening) -> dict[str, str]:
    """Name of a dictionary -> its folder inside that of the set."""
    try:
        path = files.find(INDEX_NAME)
    except OSError as error:
        raise TranscoderError(
            f"{printable(files.place)} is not a set of dictionaries (no {INDEX_NAME} there): give the folder or repo of a set, "
            "or load a single dictionary with TranscoderModel.from_pretrained, or a cross-layer transcoder with "
            "CrossLayerTranscoder.from_pretrained."
        ) from error
    folders = parse_index(opening(path).read_bytes(), str(path))
    for place in folders.values() if files.is_local else ():
        if not is_inside(path.parent / place, path.parent):
            raise TranscoderError(
                f"'{place}' in {printable(path.parent)} is a link that leads out of that folder: put the dictionary itself "
                "there."
            )
    return folders


def _named(models: list[TranscoderModel]) -> dict[str, TranscoderModel]:
    named: dict[str, TranscoderModel] = {}
    for model in models:
        name = base = dictionary_name(model.config)
        number = 2
        while name in named:
            name, number = f"{base}.{number}", number + 1
        named[name] = model
    return named
