"""Arguments that several commands share: one name has one meaning, one type and one help text everywhere."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from ..lm.offline_models import OFFLINE_MODELS
from .values import device, seed, unicode_text, whole


class Option(NamedTuple):
    """A shared option: its help, to which a command may add after a semicolon, the name of its value or values, and its type."""

    help: str
    metavar: str | tuple[str, ...] | None = None
    type: Callable[[str], Any] | None = None


SHARED = {
    "add_bos": Option("begin prompts with the beginning-of-sequence token; by default, as the tokenizer does"),
    "batch_size": Option("rows per forward pass", "N", whole(1)),
    "contexts": Option("contexts per feature", "N", whole(1)),
    "corruption": Option("what the corrupted prompt changes, for tasks with several corruptions", "NAME"),
    "data": Option(
        "text: a Hub dataset id, a file or folder (.txt, .jsonl, .parquet, .csv), or `docstrings`, the English docstrings of "
        "the installed packages, which need no download"
    ),
    "data_split": Option("split of a Hub dataset", "SPLIT"),
    "dictionary": Option("name of one dictionary of a set", "NAME"),
    "dtype": Option(
        "precision of the language model; `auto` is the precision of the checkpoint on a GPU, and the faster one of float32 "
        "and bfloat16 on a CPU"
    ),
    "features": Option("numbers of the features", "N", whole(0)),
    "json": Option("print the result as JSON"),
    "k": Option("active features per token", "N", whole(1)),
    "kind": Option("kind of dictionaries: transcoder (from MLP input to output) or sae (from MLP output to itself)"),
    "loss_tokens": Option("tokens for measuring the loss of the language model", "N", whole(1)),
    "max_features": Option("largest number of features", "N", whole(1)),
    "max_tokens": Option("tokens of text to use", "N", whole(1)),
    "measured_contexts": Option(
        "top contexts at which each feature is ablated in the model, to measure the change of its predictions; 0 measures "
        "nothing",
        "N",
        whole(0),
    ),
    "model": Option(
        f"Hub id or folder of the language model, or the name of a packaged model ({', '.join(OFFLINE_MODELS)})"
    ),
    "num_features": Option("features of each dictionary", "N", whole(1)),
    "output": Option("folder for the results", "FOLDER"),
    "prompts": Option("number of prompts", "N", whole(1)),
    "revision": Option("commit, tag or branch of the language model on the Hub"),
    "seed": Option("random seed", "N", seed),
    "sequence_length": Option("tokens per row of text", "N", whole(2)),
    "skip_first": Option("positions to leave out at the start of each row", "N", whole(0)),
    "target": Option('next token to explain, such as " Mary", often with a leading space', "TOKEN", unicode_text),
    "target_difference": Option(
        "explain the logit of one token minus that of another", ("TOKEN", "OTHER"), unicode_text
    ),
    "text_column": Option("column of the text; by default, the only column with text", "NAME"),
    "transcoders": Option("folder or Hub id of a dictionary or of a set of dictionaries", "PATH"),
    "transcoders_revision": Option("commit, tag or branch of the dictionaries on the Hub", "REVISION"),
}
DTYPES = ["auto", "float32", "bfloat16", "float16"]


def add_shared(parser: argparse.ArgumentParser, name: str, more: str = "", **options) -> None:
    """Add a shared option.

    Args:
        parser (`argparse.ArgumentParser`): Parser or argument group.
        name (`str`): Name of the option, with underscores.
        more (`str`, *optional*): Text that this command adds to the help.
        options: Further arguments of `add_argument`.
    """
    declare_shared(parser.add_argument(f"--{name.replace('_', '-')}", **options), more)


def declare_shared(action: argparse.Action, more: str = "") -> None:
    """Give an option the help, the name of its value and the type that it has in every command."""
    option = SHARED[action.dest]
    action.help = f"{option.help}; {more}" if more else option.help
    action.metavar = option.metavar
    action.type = option.type or action.type


def model_arguments(parser: argparse.ArgumentParser, required: bool = False, dtype: str = "auto") -> None:
    """Add the options for the language model; unless `required`, the one that the dictionaries name is the default."""
    group = parser.add_argument_group("language model")
    more = "" if required else "by default, the model that the dictionaries were trained on"
    add_shared(group, "model", more, required=required)
    add_shared(group, "revision")
    add_shared(group, "dtype", default=dtype, choices=DTYPES)
    group.add_argument("--device", type=device, help="cuda, cpu or mps; by default, the best available device")


def dictionary_arguments(parser: argparse.ArgumentParser, choose: str | None = None, more: str = "") -> None:
    """Add the options for trained dictionaries; `choose` extends the help of `--dictionary`, and adds this option."""
    group = parser.add_argument_group("dictionaries")
    add_shared(group, "transcoders", more, required=True)
    add_shared(group, "transcoders_revision")
    add_shared(group, "kind", "by default, all of a set", choices=["transcoder", "sae"])
    if choose is not None:
        add_shared(group, "dictionary", choose)


def feature_arguments(parser: argparse.ArgumentParser, chosen: str, count: int) -> None:
    """Add the options for features: their numbers, or how many are `chosen`."""
    group = parser.add_argument_group("features").add_mutually_exclusive_group()
    add_shared(group, "features", f"by default, {chosen}", nargs="+")
    add_shared(group, "max_features", "used when --features is not given", default=count)


def prompt_arguments(parser: argparse.ArgumentParser, more: str = "", several: bool = False) -> None:
    """Add a prompt or several, the dictionaries that explain them, and the language model in full precision."""
    text = "text; the tokenizer adds its special tokens"
    parser.add_argument("prompt", type=unicode_text, help=text, **({"nargs": "*"} if several else {}))
    if several:
        parser.add_argument("--prompts-from", metavar="FILE", help="text file with one prompt on each line")
    dictionary_arguments(parser, more=more)
    # In lower precision, contributions no longer sum exactly.
    model_arguments(parser, dtype="float32")


def target_arguments(group, several: bool = False) -> None:
    """Add the options for the tokens whose logits are explained: one target, or several."""
    more = (
        ("by default, the most likely ones", "can be given several times")
        if several
        else ("by default, the most likely one", "")
    )
    add_shared(group, "target", more[0], **({"nargs": "+", "action": "extend"} if several else {}))
    add_shared(group, "target_difference", more[1], nargs=2, **({"action": "append"} if several else {}))


def text_arguments(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Add the options for text."""
    group = parser.add_argument_group("text")
    add_shared(group, "data", default="docstrings")
    add_shared(group, "data_split", default="train")
    add_shared(group, "text_column")
    add_shared(group, "sequence_length", default=128)
    add_shared(group, "max_tokens", default=max_tokens)


def measuring_arguments(parser: argparse.ArgumentParser, title: str, loss_tokens: int | None = None):
    """Add the options for measuring on text, and give their group."""
    group = parser.add_argument_group(title)
    if loss_tokens is not None:
        add_shared(group, "loss_tokens", default=loss_tokens)
    add_shared(group, "batch_size", default=8)
    add_shared(group, "skip_first", default=1)
    return group


def task_arguments(parser: argparse.ArgumentParser, prompts: int) -> None:
    """Add a task, and the options for its prompts."""
    parser.add_argument("task", help="name of a task, as `hf-transcoders tasks list` prints it")
    group = parser.add_argument_group("task")
    add_shared(group, "prompts", default=prompts)
    add_shared(group, "corruption")
    add_shared(group, "seed", "the same seed gives the same prompts", default=0)


def output_arguments(parser: argparse.ArgumentParser, files: str | None = None, default: str | None = None):
    """Add `--output` for a folder with `files`, if there are any, and `--json`, and give their group."""
    group = parser.add_argument_group("output")
    if files is not None:
        add_shared(group, "output", f"holds {files}", default=default)
    add_shared(group, "json", action="store_true")
    return group
