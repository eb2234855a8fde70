"""Single torch files, which are told apart by the tensors in them: they are opened only to be read."""

import re
from types import ModuleType

from ..errors import TranscoderError
from ..text.printable import printable
from . import gpt2_transcoders, linear_pair, openai, qwen_scope
from .dictionary import ForeignDictionary, Given
from .folder import Folder
from .tensor_files import open_weights


NAME = "torch file"
# The Trainer of transformers leaves torch files of its own.
FILES = r"(?!optimizer|scheduler|scaler|rng_state|pytorch_model)(.+?)\.(?:pt|pth|pkl)(?:\.gz)?"

#: Each module has `NAME`, `fits(weights)` and `read(weights, given)`.
TORCH_FORMATS: list[ModuleType] = [gpt2_transcoders, openai, linear_pair, qwen_scope]


class Settings:
    """Stands for the class of the settings in a torch file: its values are kept, and no code of it is run."""


# Classes that published files name, of a package that need not be installed.
_CLASSES = tuple(
    (Settings, f"sae_training.config.{name}") for name in ("LanguageModelSAERunnerConfig", "RunnerConfig")
)


def detect(folder: Folder) -> bool:
    return bool(folder.matching(FILES))


def members(folder: Folder) -> dict[str, Folder]:
    """Each file of a folder that has several, by its name without its ending."""
    found = folder.matching(FILES)
    return {re.fullmatch(FILES, name)[1]: folder.one_file(name) for name in found} if len(found) > 1 else {}


def read(folder: Folder, given: Given) -> ForeignDictionary:
    weights = open_weights(folder.find(folder.only(FILES)), _CLASSES)
    for module in TORCH_FORMATS:
        if module.fits(weights):
            dictionary = module.read(weights, given)
            dictionary.facts["converted_from"] = module.NAME
            return dictionary
    held = ", ".join(weights.tensors) or "no tensors"
    raise TranscoderError(
        f"{printable(weights.path)} holds {printable(held)[:200]}, which fits none of the known formats: convert it to one of "
        "those in docs/formats.md."
    )
