"""Load and save models of this library: the shared parts of `from_pretrained` and `save_pretrained`."""

import math
from dataclasses import fields
from typing import Self

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import TranscoderError
from ..text.printable import printable
from .configuration_transcoder import TranscoderConfig
from .publishing import PublishMixin
from .saved_files import (
    HUB_ARGUMENTS,
    Files,
    SavedDictionary,
    bounds,
    check_numbers,
    expect,
    open_dictionary,
    read_tensors,
)


# Another name than in the files that are joined with this one (hub/remote_code.py).
_logger = logging.get_logger(__name__)


class SavedModel(PublishMixin, PreTrainedModel):
    """A model with a strict configuration that loads, saves and publishes itself."""

    config_class: type[TranscoderConfig]

    @classmethod
    def tensor_shapes(cls, config) -> dict[str, tuple[int, ...]]:
        """The shape of each saved tensor of a model with this configuration."""
        raise NotImplementedError

    def _save_files(self, folder, *args, **kwargs) -> None:
        # Under FSDP no process holds a whole tensor; offloaded tensors are elsewhere.
        held = [(n, t) for n, t in self.state_dict().items() if not t.is_meta and not hasattr(t, "to_local")]
        if broken := [name for name, tensor in held if not all(map(math.isfinite, bounds(tensor)))]:
            _logger.warning(
                f"{', '.join(broken)} of the saved dictionary has NaN or infinite numbers, so it cannot be loaded: save an "
                "earlier one."
            )
        # Where remote code lies is a fact of the folder that a dictionary was loaded from, not of the next one.
        self.config.__dict__.pop("auto_map", None)
        PreTrainedModel.save_pretrained(self, folder, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs) -> Self:
        """
        Loads a dictionary from a folder or the Hub, as [`~transformers.PreTrainedModel.from_pretrained`] does. Files that
        are damaged or do not match are refused before any tensor is made. Of native files, only safetensors are read.

        Folders, repos and single files (`"owner/name/path/to/file"`) of other libraries are recognized by their files and
        converted: see `docs/formats.md`. These arguments give what such files leave out:

        Args:
            base_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
                Language model that the dictionary belongs to. The loaded model is needed if the dictionary reads the output
                of a norm before its gain.
            input_site (`str`, *optional*), output_site (`str`, *optional*):
                Sites that the dictionary reads and writes.
            folded (`bool`, *optional*):
                Whether the dictionary was trained on a model with folded norms and centered weights, the default of
                TransformerLens.
            scaling_factor (`float`, *optional*):
                Factor on the inputs, where the files leave it out: SAELens with
                `normalize_activations="expected_average_only_in"`, and older files of llamascopium.
            k (`int`, *optional*):
                Active features per token of a TopK dictionary whose file does not say it, such as those of Qwen Scope.
            layers (`int`, *optional*), width (`int` or `str`, *optional*), l0 (`float` or `str`, *optional*):
                Choice of one dictionary in a repo that holds many, by the names of its folders; the nearest L0 is taken.
        """
        if pretrained_model_name_or_path is None:  # A configuration and a `state_dict`, with nothing to read.
            return super().from_pretrained(None, *model_args, **kwargs)
        if kwargs.pop("use_safetensors", None) is False:
            raise TranscoderError("Dictionaries are read from safetensors only: leave `use_safetensors` out.")
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        files = Files.at(pretrained_model_name_or_path, kwargs.pop("subfolder", ""), **hub)
        # The file that is published for AutoModel knows no formats of other libraries, and lacks this method.
        foreign = cls._open_foreign(files, kwargs) if hasattr(cls, "_open_foreign") else None
        saved = foreign or open_dictionary(files, kwargs.pop("variant", None))
        return cls.from_saved(saved, *model_args, **kwargs)

    @classmethod
    def _open_foreign(cls, files: Files, kwargs: dict) -> SavedDictionary | None:
        """The opened dictionary of another library, or `None` for a native one."""
        from .foreign import foreign_folder, open_foreign, refuse_foreign_arguments, take_choice, take_given

        if (found := foreign_folder(files, take_choice(kwargs))) is None:
            refuse_foreign_arguments(kwargs)
            return None
        return open_foreign(*found, take_given(kwargs))

    @classmethod
    def from_saved(cls, saved: SavedDictionary, *model_args, **kwargs) -> Self:
        """
        Loads a dictionary from its opened files.

        Args:
            saved ([`SavedDictionary`]): Opened files.
            model_args, kwargs: Same as in [`~TranscoderModel.from_pretrained`], without the location of the files.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        config = cls._config_of(saved, kwargs)
        expect(saved, cls.tensor_shapes(config), any_size=kwargs.get("ignore_mismatched_sizes", False))
        tensors = read_tensors(saved)
        # Without a path, transformers does not look for other files, such as adapters and pickles.
        model, info = super().from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            None, *model_args, config=config, state_dict=tensors, output_loading_info=True, **kwargs
        )
        model.name_or_path = model.config.name_or_path = saved.path
        for name, tensor in model.state_dict().items():
            if tensor.dtype != tensors[name].dtype and not tensor.is_meta:
                check_numbers(saved.place, name, tensor, converted=True)
        return (model, info) if wants_info else model

    @classmethod
    def _config_of(cls, saved: SavedDictionary, kwargs: dict):
        """The given configuration, or the saved one with the fields among `kwargs`."""
        config = kwargs.pop("config", None)
        if config is None:
            names = {field.name for field in fields(cls.config_class)} - {"dtype"}
            changes = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
            return cls.config_class.from_dict(saved.fields, **changes)
        if not isinstance(config, PreTrainedConfig):
            return cls.config_class.from_pretrained(config)
        read = getattr(config, "_saved_fields", None)
        # `AutoModel` has read the configuration before the weights were opened: the folder may have been saved in between.
        if read is not None and str(config.name_or_path) == saved.path:
            now = cls.config_class.from_dict(saved.fields)
            if now._saved_fields != read:
                before = cls.config_class.from_dict(read)
                if any(getattr(config, name) != getattr(before, name) for name in cls.config_class.own_fields()):
                    raise TranscoderError(
                        f"{printable(saved.place)} was saved again after its configuration was read: load it again."
                    )
                return now
        return config
