"""`hf-transcoders train`: flags and YAML into one run of the trainer."""

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import TranscoderError
from .common import OFFLINE_MODELS, load_base_model
from .config_file import read_defaults
from .terminal import HelpFormatter, Parser, echo, print_json
from .values import output_folder


@dataclass
class DictionaryOptions:
    """What to train."""

    layers: list[int] = field(default_factory=lambda: [], metadata={"help": "Layers whose MLP to learn, one or more."})
    kind: list[str] = field(
        default_factory=lambda: ["transcoder"],
        metadata={
            "help": "What to train for each layer, one or more: transcoder (MLP input to output), sae (MLP output to itself).",
            "choices": ["transcoder", "sae"],
        },
    )
    input_site: str | None = field(
        default=None, metadata={"help": "Instead of --layers: where to read, such as layers.8.mlp.in"}
    )
    output_site: str | None = field(
        default=None, metadata={"help": "What to predict, such as layers.8.mlp.branch; left out, the input (an SAE)."}
    )
    num_features: int = field(default=4096, metadata={"help": "Features of each dictionary."})
    activation: str = field(
        default="topk",
        metadata={
            "help": "How features become sparse.",
            "choices": ["topk", "batchtopk", "relu", "jumprelu", "gated"],
        },
    )
    k: int | None = field(default=None, metadata={"help": "Active features per token, for topk and batchtopk (32)."})
    l1_coefficient: float = field(default=0.0, metadata={"help": "L1 penalty, for relu and gated."})
    l0_coefficient: float = field(default=0.0, metadata={"help": "L0 penalty, for jumprelu."})
    target_l0: float | None = field(default=None, metadata={"help": "L0 that the penalty of jumprelu aims at."})
    skip_connection: bool = field(default=False, metadata={"help": "Add a linear map from input to output."})
    normalization: str = field(
        default="none",
        metadata={"help": "Scaling of inputs and outputs.", "choices": ["none", "scale", "standardize"]},
    )
    loss_reduction: str = field(
        default="normalized",
        metadata={"help": "Scale of the squared error.", "choices": ["normalized", "mean", "sum", "target_norm"]},
    )


@dataclass
class RunOptions(DictionaryOptions):
    """Model, text and dictionaries of a run."""

    model: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        metadata={
            "help": "Hub id or folder of the language model, or one that comes as a package: "
            + ", ".join(OFFLINE_MODELS)
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the model."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision of the base model; auto: the checkpoint's on a GPU, the faster one on a CPU.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    data: str = field(
        default="docstrings",
        metadata={
            "help": "Text: a Hub dataset id, a file or folder, or `docstrings` (of the installed packages, no download)."
        },
    )
    data_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text, if there are several."})
    streaming: bool = field(default=False, metadata={"help": "Read a Hub dataset as it is needed (set --max_tokens)."})
    documents: int | None = field(default=None, metadata={"help": "Read only so many documents."})
    eval_data: str | None = field(
        default=None, metadata={"help": "Held-out text; left out, one document in twenty of --data."}
    )
    resume: str | None = field(
        default=None,
        metadata={
            "help": "Continue from a checkpoint folder; without a value, from the last one, if there is one yet.",
            "nargs": "?",
            "const": "last",
        },
    )


# Options of the Trainer that a first run may want; the others are listed by --help-all.
_SHOWN = {
    "output_dir", "max_tokens", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "seed", "bf16", "fp16",
    "use_cpu", "report_to", "save_steps", "save_strategy", "eval_strategy", "eval_steps", "logging_steps", "sequence_length",
    "activation_cache_dir",
}  # fmt: skip

_EXAMPLES = """examples:
  hf-transcoders train --model smollm2-135m-instruct --layers 8 --num_features 4608 --k 64 --output_dir runs/l8
  hf-transcoders train --layers 8 --kind transcoder sae --data wikitext.txt --max_tokens 1000000
  hf-transcoders train --config run.yaml --learning_rate 5e-4

A YAML file holds the same names, one a line (`num_features: 4608`); the command line wins over it.
Every argument of transformers.TrainingArguments is understood: --help-all lists them.
"""


def parse(argv, prog):
    parser = make_parser(
        prog, "Trains transcoders (or SAEs) of a language model's MLPs; several at once share each forward.", _EXAMPLES
    )
    return parse_with_config(parser, argv)


def make_parser(prog: str, description: str, epilog: str):
    """A parser for [`RunOptions`] and every argument of the trainer."""
    from transformers import HfArgumentParser

    from ..training.arguments import TranscoderTrainingArguments

    class TrainParser(Parser, HfArgumentParser):
        pass

    parser = TrainParser(
        [RunOptions, TranscoderTrainingArguments],
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(
        output_dir="transcoder_output", save_strategy="steps", save_steps=0.1, save_total_limit=1, disable_tqdm=None
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="read options from a YAML file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--help-all", action="store_true", help="list every option and exit")
    return parser


def parse_with_config(parser, argv) -> argparse.Namespace:
    """
    Parses the command line over the YAML file that it names.

    Returns:
        `argparse.Namespace`: `options`, `training`, and what else the parser knows.
    """
    own = {action.dest for action in parser._actions} - {
        f.name for dataclass_type in parser.dataclass_types for f in dataclasses.fields(dataclass_type)
    }
    if "--help-all" in argv:
        parser.print_help()
        sys.exit(0)
    _shorten_help(parser, own)
    if config := _config_file(argv):
        read_defaults(parser, config)
    # The Trainer's dataclass wants other objects than strings in places; the parser makes them.
    try:
        options, training, namespace, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (TypeError, KeyError, AttributeError, ImportError) as error:
        # The Trainer's arguments that are objects or need packages fail in ways of their own.
        raise TranscoderError(
            f"The options of the trainer do not fit: {' '.join(str(error).split())[:300]}."
        ) from error
    for name, value in (vars(options) | vars(training)).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise TranscoderError(f"{name} is {value}, but takes a number.")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (see --help, or --help-all for every option)")
    return argparse.Namespace(options=options, training=training, **vars(namespace))


def _shorten_help(parser, own: set[str]) -> None:
    own = own | {f.name for f in dataclasses.fields(RunOptions)} | _SHOWN
    for action in parser._actions:
        if action.dest not in own:
            action.help = argparse.SUPPRESS
        elif len(action.option_strings) > 1 and action.dest != "help":
            # `--max-tokens` works as well as `--max_tokens`; showing one is enough.
            action.option_strings = sorted(action.option_strings, key=lambda s: "-" in s[2:])


def _config_file(argv) -> str | None:
    for position, word in enumerate(argv):
        if word == "--config":
            if position + 1 == len(argv):
                raise TranscoderError("--config needs the name of a YAML file.")
            return argv[position + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None


def run(args):
    from ..training.trainer import TranscoderTrainer

    options, training = args.options, args.training
    if args.json:
        training.disable_tqdm = True
    output_folder(training.output_dir, "--output_dir")
    device = "cpu" if training.use_cpu else None
    base, tokenizer = load_base_model(options.model, revision=options.revision, dtype=options.dtype, device=device)
    models = make_dictionaries(options, base, training.seed)
    train, held_out = load_rows(options, training, tokenizer)
    trainer = TranscoderTrainer(
        model=models[0] if len(models) == 1 else models,
        base_model=base,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint={None: None, "last": True}.get(options.resume, options.resume))
    report = trainer.evaluation_report()
    if trainer.is_world_process_zero():
        report.save_json(Path(training.output_dir) / "evaluation.json")
    trainer.save_model()
    if trainer.is_world_process_zero():
        if args.json:
            print_json({"output_dir": training.output_dir, **report.to_dict()})
        else:
            echo(*report.table().split("\n"), "", f"Saved in {training.output_dir}")
    trainer.save_state()
    # Processes of a run on several devices part in order: one that leaves while others still talk to it takes them down.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def make_dictionaries(options: RunOptions, base, seed: int):
    """The dictionaries that the options ask for, each with the weights it would start from if it were alone."""
    import torch

    from ..models.modeling_transcoder import TranscoderModel
    from ..training.grid import dictionary_config

    shared = shared_options(options)
    models = []
    for read, write in sites_of(options, base):
        skip = options.skip_connection and read != write
        torch.manual_seed(seed)
        models.append(TranscoderModel(dictionary_config(base, read, write, skip_connection=skip, **shared)))
    return models


def shared_options(options: DictionaryOptions) -> dict:
    """Arguments of [`TranscoderConfig`] that all dictionaries of a run have in common."""
    return {
        name: getattr(options, name)
        for name in (
            "num_features", "activation", "k", "l1_coefficient", "l0_coefficient", "target_l0", "normalization",
            "loss_reduction",
        )
    }  # fmt: skip


def sites_of(options: RunOptions, base) -> list[tuple[str, str]]:
    """Where the dictionaries read and write that the options ask for."""
    from ..lm.architectures import num_layers
    from ..training.grid import mlp_sites

    if options.input_site:
        if options.layers:
            raise TranscoderError("Give either --layers or --input_site, not both.")
        return [(options.input_site, options.output_site or options.input_site)]
    if options.output_site:
        raise TranscoderError("--output_site needs --input_site: say where the dictionary reads.")
    layers = options.layers or [num_layers(base) // 3]
    return [mlp_sites(layer, kind) for layer in layers for kind in options.kind]


def load_rows(options: RunOptions, training, tokenizer):
    """Token rows to train on, and held-out ones."""
    from ..data.packing import pack_tokens
    from ..data.text import load_texts

    texts = load_texts(
        options.data,
        split=options.data_split,
        text_column=options.text_column,
        streaming=options.streaming,
        limit=options.documents,
    )
    if options.eval_data:
        held_out = load_texts(options.eval_data, text_column=options.text_column)
    elif options.streaming:
        held_out, texts = texts.take(200), texts.skip(200)
    else:
        # By documents, so that no text is in both.
        share = max(1, len(texts) // 20)
        if len(texts) < 2:
            raise TranscoderError(
                "The text is one document, so that none can be held out: give another with --eval_data."
            )
        parts = texts.train_test_split(test_size=share, seed=training.seed)  # pyright: ignore[reportAttributeAccessIssue]
        texts, held_out = parts["train"], parts["test"]
    length = training.sequence_length
    return pack_tokens(texts, tokenizer, length), pack_tokens(held_out, tokenizer, length)
