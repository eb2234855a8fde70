"""What several commands share: the arguments for model and text, and how they are loaded."""

import argparse
import re
import time
from pathlib import Path

from ..errors import TranscoderError
from .values import device, whole


# Language models that come as packages, usable where the Hub is out of reach -> what they are called on the Hub.
OFFLINE_MODELS = {
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gemma-3-270m": "google/gemma-3-270m",
}


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--model",
        required=required,
        help="Hub id or folder of the language model, or one that comes as a package: "
        + ", ".join(OFFLINE_MODELS)
        + ("" if required else "; left out, the one that the dictionary was trained on"),
    )
    group.add_argument("--revision", help="commit, tag or branch of the model on the Hub")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="precision of the base model; auto is the checkpoint's on a GPU and the faster of float32 and bfloat16 here "
        "on a CPU",
    )
    group.add_argument("--device", type=device, help="cuda, cpu, mps ...; left out, the best there is")


def add_text_arguments(parser: argparse.ArgumentParser, default_tokens: int) -> None:
    group = parser.add_argument_group("text")
    group.add_argument(
        "--data",
        default="docstrings",
        help="a Hub dataset id, a file or folder (.txt, .jsonl, .parquet, .csv), or `docstrings`: the English docstrings "
        "of the installed packages, which need no download",
    )
    group.add_argument("--split", default="train", help="split of a Hub dataset")
    group.add_argument("--text-column", help="column that holds the text; left out, the only text column")
    group.add_argument("--sequence-length", type=whole(2), default=128, help="tokens of one row")
    group.add_argument("--max-tokens", type=whole(1), default=default_tokens, help="tokens to read")


def load_base_model(name: str, *, revision: str | None = None, dtype: str = "auto", device: str | None = None):
    """
    The language model and its tokenizer.

    Args:
        name (`str`): Hub id, folder, or the name of a model that comes as a package.
        revision, dtype, device: As the command line gives them.

    Returns:
        `tuple(PreTrainedModel, PreTrainedTokenizerBase)`
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..lm.devices import moved
    from ..lm.offline_models import offline_model

    path = offline_model(name) if name in OFFLINE_MODELS else name
    device = device or best_device()
    if dtype == "auto":
        chosen = "auto" if device != "cpu" else fastest_cpu_dtype()
    else:
        chosen = getattr(torch, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=chosen)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except OSError as error:
        raise TranscoderError(
            f"The language model '{name}' could not be loaded: give by --model a Hub id that exists and can be reached, a "
            f"folder that holds a model, or one of {', '.join(OFFLINE_MODELS)} ({_first_sentence(error)})"
        ) from error
    if name in OFFLINE_MODELS:
        # The folder it was unpacked to is this machine's alone; what is trained on it goes elsewhere.
        model.config.name_or_path = OFFLINE_MODELS[name]
    return moved(model, device).eval(), tokenizer


def load_tokenizer(name: str, revision: str | None = None):
    """The tokenizer of a language model, as [`load_base_model`] finds it."""
    from transformers import AutoTokenizer

    from ..lm.offline_models import offline_model

    try:
        return AutoTokenizer.from_pretrained(
            offline_model(name) if name in OFFLINE_MODELS else name, revision=revision
        )
    except (OSError, ValueError) as error:
        raise TranscoderError(
            f"The tokenizer of '{name}' could not be loaded: give by --model a Hub id that exists and can be reached, a folder "
            f"that holds a model, or one of {', '.join(OFFLINE_MODELS)} ({_first_sentence(error)})"
        ) from error


def load_dictionaries(path: str, revision: str | None = None, **options):
    """
    A [`TranscoderSet`] from the folder or repo of a set, or of a single dictionary.

    Args:
        path (`str`): Folder, file or Hub id, also one of another library.
        revision (`str`, *optional*): Commit, tag or branch on the Hub.
        options: Further arguments of [`~TranscoderModel.from_pretrained`].
    """
    from ..models.foreign import holds_dictionaries
    from ..models.modeling_transcoder import TranscoderModel
    from ..models.transcoder_set import INDEX_NAME, TranscoderSet

    local = Path(path)
    if local.is_dir() and not (local / INDEX_NAME).exists() and not holds_dictionaries(local):
        raise TranscoderError(
            f"{path} holds neither a dictionary (config.json) nor a set ({INDEX_NAME}): give the folder that training wrote."
        )
    if not local.exists() and not may_be_on_hub(path):
        raise TranscoderError(f"There is no folder {path}: give the folder that training wrote, or a Hub id.")
    try:
        return TranscoderSet.from_pretrained(path, revision=revision, **options).eval()
    except TranscoderError as no_set:
        # Else it is a set, and something is wrong with it.
        if not isinstance(no_set.__cause__, OSError):
            raise
        try:
            return TranscoderSet([TranscoderModel.from_pretrained(path, revision=revision, **options)]).eval()
        except OSError as error:
            raise TranscoderError(f"{path} could not be loaded ({_first_sentence(error)})") from no_set


def may_be_on_hub(path: str) -> bool:
    """Whether a path can be that of a repo on the Hub, or lead into one."""
    return "/" in path and path[0] not in "/.~"


def base_of(dictionaries, given: str | None) -> str:
    """Which language model to use: the one given, or the one the dictionaries were trained on."""
    name = given or dictionaries.base_model_name_or_path
    if name is None:
        raise TranscoderError("The dictionary does not say which language model it belongs to: give --model.")
    if not given and not Path(name).exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        # Written where the dictionary was trained: a path from another folder or machine.
        raise TranscoderError(
            f"The dictionary was trained on the language model in the folder {name}, which is not there from here: give its "
            "folder or Hub id by --model."
        )
    packages = {hub_id: package for package, hub_id in OFFLINE_MODELS.items()}
    return name if given else packages.get(name, name)


def load_base_and_rows(args, dictionaries):
    """
    What dictionaries are measured on, as [`add_model_arguments`] and [`add_text_arguments`] have it.

    Returns:
        `tuple`: the language model, its tokenizer and the text as rows of tokens.
    """
    from ..data.packing import pack_tokens
    from ..data.text import load_texts

    name = base_of(dictionaries, args.model)
    base, tokenizer = load_base_model(name, revision=args.revision, dtype=args.dtype, device=args.device)
    texts = load_texts(args.data, split=args.split, text_column=args.text_column)
    return base, tokenizer, pack_tokens(texts, tokenizer, args.sequence_length)


def make_evaluator(args, base, tokenizer, rows):
    """A [`TranscoderEvaluator`] of rows, with the budgets that the command line has."""
    from ..evaluation.evaluator import TranscoderEvaluator

    return TranscoderEvaluator(
        base,
        rows,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        max_loss_tokens=args.loss_tokens,
        skip_first=args.skip_first,
        special_token_ids=tokenizer.all_special_ids,
        progress=not args.json,
    )


def best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def fastest_cpu_dtype():
    """float32, or bfloat16 where this processor multiplies in it natively: measured, in a tenth of a second."""
    import torch

    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        a @ a
        times[dtype] = min(_timed(lambda a=a: a @ a) for _ in range(5))
    return torch.bfloat16 if times[torch.bfloat16] < 0.8 * times[torch.float32] else torch.float32


def _timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")
