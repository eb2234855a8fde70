"""Steps that several commands share: load models, dictionaries and text, and print the result."""

import contextlib
import timeit
from pathlib import Path

from ..errors import TranscoderError
from ..hub_ids import is_hub_id, refuse_missing
from ..lm.offline_models import OFFLINE_MODELS, load_language_model, model_path
from ..text.strict_json import read_json
from .terminal import echo, print_json


@contextlib.contextmanager
def explained(what: str, name: str):
    """Refuse the name of a missing language model, and turn an error of loading it, or a part of it, into one sentence."""
    advice = (
        f"give by --model a Hub id that exists and can be reached, a folder with a model, or one of "
        f"{', '.join(OFFLINE_MODELS)}"
    )
    if name not in OFFLINE_MODELS:
        refuse_missing(name, advice)
    config = Path(name, "config.json")
    if config.is_file():
        from ..models.saved_files import DICTIONARY_TYPES

        if read_json(config).get("model_type") in DICTIONARY_TYPES:
            raise TranscoderError(f"{name} holds a dictionary, not a language model: {advice}.")
    try:
        yield
    except TranscoderError:
        raise
    except (OSError, ValueError) as error:
        raise TranscoderError(f"{what} could not be loaded: {advice} ({_first_sentence(error)}).") from error


def load_model(
    name: str, *, revision: str | None = None, dtype: str = "auto", device: str | None = None, source: str = ""
):
    """Load a language model and its tokenizer.

    Args:
        name (`str`): Hub id, folder, or name of a packaged model.
        revision, dtype, device: Values of the options of these names.
        source (`str`, *optional*): Where the name came from if not from the command line, as a clause after it.

    Returns:
        `tuple(PreTrainedModel, PreTrainedTokenizerBase)`
    """
    import torch

    from ..lm.devices import moved

    device = device or best_device()
    if dtype == "auto":
        chosen = "auto" if device != "cpu" else fastest_cpu_dtype()
    else:
        chosen = getattr(torch, dtype)
    with explained(f"The language model '{name}'{source}", name):
        model, tokenizer = load_language_model(name, revision=revision, dtype=chosen)
    return moved(model, device).eval(), tokenizer


def load_tokenizer(name: str, revision: str | None = None):
    """Load the tokenizer of a language model, which [`load_model`] would load."""
    from transformers import AutoTokenizer

    with explained(f"The tokenizer of '{name}'", name):
        return AutoTokenizer.from_pretrained(model_path(name), revision=revision)


def load_dictionaries(args):
    """Load the dictionaries that `--transcoders` names as [`open_dictionaries`] does, only those of `--kind` if it is given."""
    from ..models.transcoder_set import TranscoderSet

    loaded = open_dictionaries(args.transcoders, args.transcoders_revision)
    if args.kind is None:
        return loaded
    chosen = {name: each for name, each in loaded.items() if each.config.is_autoencoder == (args.kind == "sae")}
    if not chosen:
        raise TranscoderError(
            f"{args.transcoders} has no dictionary of --kind {args.kind}: it has {', '.join(loaded)}."
        )
    return loaded if len(chosen) == len(loaded) else TranscoderSet(chosen).eval()


def check_dictionaries_path(path: str) -> None:
    """Refuse a local path that leads to no dictionaries, such as the folder of a run that was not finished."""
    from ..models.foreign import holds_dictionaries
    from ..models.saved_files import WEIGHT_SUFFIXES
    from ..models.set_index import INDEX_NAME

    local = Path(path)
    if local.is_file() and local.suffix not in WEIGHT_SUFFIXES:
        raise TranscoderError(f"{path} is not a file of weights: give the folder that training wrote, or a Hub id.")
    if local.is_dir() and not (local / INDEX_NAME).exists() and not holds_dictionaries(local):
        from ..training.checkpoint_files import checkpoint_folders

        if checkpoints := checkpoint_folders(local):
            raise TranscoderError(
                f"The run in {path} was not finished: give its last checkpoint, {checkpoints[-1]}, or finish it with "
                "`hf-transcoders train --resume` and the options of its start."
            )
        raise TranscoderError(
            f"{path} holds neither a dictionary (config.json) nor a set ({INDEX_NAME}): give the folder that training wrote."
        )


def saved_configs(path: str, revision: str | None = None) -> dict:
    """
    Read the configurations of saved dictionaries of this library, without their weights.

    Args:
        path (`str`): Folder or Hub id of a set, a dictionary or a cross-layer transcoder.
        revision (`str`, *optional*): Commit, tag or branch on the Hub.

    Returns:
        `dict[str, TranscoderConfig]`: name of a dictionary -> its configuration.
    """
    from ..models.model_types import dictionary_configs, saved_config
    from ..models.modeling_transcoder import TranscoderModel
    from ..models.saved_files import Files, open_dictionary
    from ..models.set_index import dictionary_name
    from ..models.transcoder_set import open_set

    check_dictionaries_path(path)
    files = Files.at(path, revision=revision)
    try:
        return {name: saved_config(saved, TranscoderModel) for name, saved in open_set(files).items()}
    except TranscoderError as no_set:
        if not isinstance(no_set.__cause__, OSError):
            raise
        try:
            config = saved_config(open_dictionary(files))
        except OSError as error:
            raise _not_loaded(path, error) from no_set
    return dictionary_configs(config) or {dictionary_name(config): config}


def _not_loaded(path: str, error: Exception) -> TranscoderError:
    return TranscoderError(f"{path} could not be loaded ({_first_sentence(error)}).")


def open_dictionaries(path: str, revision: str | None = None, **options):
    """
    Load a set, a single dictionary as a [`TranscoderSet`] of one, or a [`CrossLayerTranscoder`].

    Args:
        path (`str`): Folder, file or Hub id, also of another library.
        revision (`str`, *optional*): Commit, tag or branch on the Hub.
        options: Further arguments of [`~TranscoderModel.from_pretrained`].
    """
    from ..models.cross_layer.modeling_cross_layer import CrossLayerTranscoder
    from ..models.foreign import holds_cross_layer
    from ..models.modeling_transcoder import TranscoderModel
    from ..models.saved_files import Files
    from ..models.transcoder_set import TranscoderSet

    check_dictionaries_path(path)
    with contextlib.suppress(OSError):  # The loader below has the message for a repo that does not exist.
        if holds_cross_layer(Files.at(path, revision=revision)):
            return CrossLayerTranscoder.from_pretrained(path, revision=revision, **options).eval()
    try:
        return TranscoderSet.from_pretrained(path, revision=revision, **options).eval()
    except TranscoderError as no_set:
        # Else it is a set, and something is wrong with it.
        if not isinstance(no_set.__cause__, OSError):
            raise
        try:
            return TranscoderSet([TranscoderModel.from_pretrained(path, revision=revision, **options)]).eval()
        except OSError as error:
            raise _not_loaded(path, error) from no_set


def load_base_model(args, dictionaries):
    """Load the language model that `--model` names, or else the dictionaries, and its tokenizer."""
    name = base_model_of(dictionaries, args.model)
    source = "" if args.model else ", which the dictionary names as the one it was trained on,"
    return load_model(name, revision=args.revision, dtype=args.dtype, device=args.device, source=source)


def choose_dictionary(dictionaries, name: str | None) -> str:
    """The name of the dictionary that `--dictionary` gives, or of the only one."""
    if name is None and len(dictionaries) > 1:
        raise TranscoderError(
            f"The set has several dictionaries: choose one with --dictionary ({', '.join(dictionaries)})."
        )
    if name is not None and name not in dictionaries:
        raise TranscoderError(f"There is no dictionary '{name}': choose from {', '.join(dictionaries)}.")
    return name or next(iter(dictionaries))


def base_model_of(dictionaries, given: str | None) -> str:
    """The name of the language model: the given one, or the one that the dictionaries were trained on."""
    name = given or dictionaries.base_model_name_or_path
    if name is None:
        raise TranscoderError("The dictionary does not name its language model: give it by --model.")
    if not given and not Path(name).exists() and not is_hub_id(name):
        # Written where the dictionary was trained: a path from another folder or machine.
        raise TranscoderError(
            f"The dictionary was trained on the language model in the folder {name}, which does not exist here: give its "
            "folder or Hub id by --model."
        )
    packages = {hub_id: package for package, hub_id in OFFLINE_MODELS.items()}
    return name if given else packages.get(name, name)


def load_text(args, tokenizer):
    """Load the text that [`text_arguments`] describe, as rows of tokens."""
    from ..data.packing import pack_tokens
    from ..data.text import load_texts

    texts = load_texts(args.data, split=args.data_split, text_column=args.text_column)
    return pack_tokens(texts, tokenizer, args.sequence_length)


def make_evaluator(args, base_model, tokenizer):
    """A [`TranscoderEvaluator`] for the text and with the limits of the command line."""
    from ..evaluation.evaluator import TranscoderEvaluator

    return TranscoderEvaluator(
        base_model,
        load_text(args, tokenizer),
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        max_loss_tokens=args.loss_tokens,
        skip_first=args.skip_first,
        special_token_ids=tokenizer.all_special_ids,
        progress=not args.json,
    )


def finish(args, result, page: Path | None = None) -> None:
    """Print a result, as JSON if `--json` asks for it, and where its page is."""
    if args.json:
        print_json(result.to_dict() if page is None else {**result.to_dict(), "report": str(page)})
    else:
        echo(*result.to_text().split("\n"), *(() if page is None else ("", page)))


def best_device() -> str:
    """The name of the best device that PyTorch can use."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def fastest_cpu_dtype():
    """float32, or bfloat16 if this processor multiplies faster in it: measured in a tenth of a second."""
    import torch

    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        # The first product is slower, and not the fastest of these.
        times[dtype] = min(timeit.repeat(lambda a=a: a @ a, number=1, repeat=6))
    return torch.bfloat16 if times[torch.bfloat16] < 0.8 * times[torch.float32] else torch.float32


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")
