"""`hf-transcoders train`: run the trainer with options of the command line and of a YAML file."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import TranscoderError
from .arguments import DTYPES, SHARED, add_shared, declare_shared
from .common import load_model
from .config_file import read_defaults
from .outline import LibraryNames, add_declared, declared_fields, fields_of
from .terminal import Parser, echo, print_json, quiet_transformers
from .values import output_folder, truth, whole_number


def _of_config(field: str) -> LibraryNames:
    """The values that a field of the configuration takes."""
    return LibraryNames("..models.configuration_transcoder", f"TranscoderConfig.{field}")


#: The kind of dictionaries that is one model of several layers.
CROSS_LAYER = "cross-layer"


@dataclass
class DictionaryOptions:
    """Options for the dictionaries."""

    layers: list[int] = field(
        default_factory=lambda: [],
        metadata={
            "help": "layers whose MLPs the dictionaries learn; by default, the layer at a third of the depth, and all layers of "
            "a cross-layer transcoder"
        },
    )
    kind: list[str] = field(
        default_factory=lambda: ["transcoder"],
        metadata={"choices": ["transcoder", "sae"]},
    )
    input_site: str | None = field(default=None, metadata={"help": "site to read, such as layers.8.mlp.in"})
    output_site: str | None = field(default=None, metadata={"help": "site to predict, such as layers.8.mlp.branch"})
    num_features: int = 4096
    activation: str = field(
        default="topk",
        metadata={
            "help": "activation function of the features",
            "choices": _of_config("activation"),
        },
    )
    k: int | None = None
    l1_coefficient: float = field(default=0.0, metadata={"help": "coefficient of the L1 penalty, for relu and gated"})
    l0_coefficient: float = field(default=0.0, metadata={"help": "coefficient of the L0 penalty, for jumprelu"})
    target_l0: float | None = field(default=None, metadata={"help": "target L0 of the penalty, for jumprelu"})
    auxk_coefficient: float = field(
        default=0.03125, metadata={"help": "coefficient of the AuxK loss, which revives dead features; 0 for none"}
    )
    tied: bool = field(
        default=False,
        metadata={"help": "tie the decoder to the encoder, with rows of unit norm, as in the SAEs of 2023"},
    )
    decoder_bias: bool = field(default=True, metadata={"help": "give the output a bias; the SAEs of 2023 have none"})
    skip_connection: bool = field(default=False, metadata={"help": "add a linear map from input to output"})
    normalization: str = field(
        default="none",
        metadata={
            "help": "scaling of inputs and outputs, by site or by token",
            "choices": _of_config("normalization"),
        },
    )
    loss_reduction: str = field(
        default="normalized",
        metadata={"help": "scale of the squared error", "choices": _of_config("loss_reduction")},
    )


@dataclass
class RunOptions(DictionaryOptions):
    """Options for the language model, the text and the dictionaries of a run."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    revision: str | None = None
    dtype: str = field(default="auto", metadata={"choices": DTYPES})
    data: str = "docstrings"
    data_split: str = "train"
    text_column: str | None = None
    streaming: bool = field(
        default=False, metadata={"help": "stream a Hub dataset instead of downloading it; needs --max-tokens"}
    )
    documents: int | None = field(
        default=None, metadata={"help": "number of documents to read; by default, all of them"}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "held-out text; by default, one in twenty documents of --data"}
    )
    resume: str | None = field(
        default=None,
        metadata={
            "help": "continue from a checkpoint folder; without a value, from the last checkpoint, if there is one",
            "nargs": "?",
            "const": "last",
        },
    )


@dataclass
class TrainOptions(RunOptions):
    """Options for the language model, the text and the dictionaries of a run, which may be a cross-layer transcoder."""

    kind: list[str] = field(
        default_factory=lambda: ["transcoder"], metadata={"choices": ["transcoder", "sae", CROSS_LAYER]}
    )
    cross_layer_window: int | None = field(
        default=None,
        metadata={"help": "later layers that a feature of a cross-layer transcoder writes at; by default, all"},
    )
    batchtopk_scope: str = field(
        default="layer",
        metadata={
            "help": "features that batchtopk chooses among in a cross-layer transcoder: those of a layer, or of all layers",
            "choices": LibraryNames(
                "..models.cross_layer.configuration_cross_layer", "CrossLayerTranscoderConfig.batchtopk_scope"
            ),
        },
    )
    tanh_coefficient: float = field(
        default=0.0,
        metadata={"help": "coefficient of the tanh penalty of a cross-layer transcoder, for relu and jumprelu"},
    )


# Documents at the start of a stream that are held out.
_HELD_OUT = 200
# What training adds to the help of shared options.
_MORE = {
    "k": "for topk and batchtopk, by default 32",
    "kind": "one or both for each layer",
    "max_tokens": "over all devices and passes, by default those of --num-train-epochs passes",
}
_MORE_WITH_CROSS_LAYER = _MORE | {"kind": f"one or both for each layer, or {CROSS_LAYER} for one model of all layers"}
# Options of the trainer that --help shows; --help-all shows the others as well.
_SHOWN = {
    "output_dir", "max_tokens", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "seed", "bf16", "fp16",
    "use_cpu", "report_to", "save_steps", "save_strategy", "eval_strategy", "eval_steps", "logging_steps", "sequence_length",
    "activation_cache_dir", "overwrite",
}  # fmt: skip

_TRAINER_SOURCE = Path(__file__).parents[1] / "training" / "arguments.py"
_HELP_ALL = {"--help-all", "--help_all"}

_EXAMPLES = """examples:
  hf-transcoders train --model smollm2-135m-instruct --layers 8 --num-features 4608 --k 64 --output-dir runs/l8
  hf-transcoders train --layers 8 --kind transcoder sae --data wikitext.txt --max-tokens 1000000
  hf-transcoders train --kind cross-layer --layers 4 5 6 7 --num-features 4608 --k 32 --max-tokens 1000000
  hf-transcoders train --config run.yaml --learning-rate 5e-4

A YAML file holds the same names, one per line (`num_features: 4608`); options of the command line override it.
Every argument of transformers.TrainingArguments is accepted: --help-all lists them.
"""


def parse(argv, prog):
    return parse_command(
        argv,
        prog=prog,
        description="Trains transcoders, SAEs or a cross-layer transcoder for MLPs of a language model; several dictionaries share "
        "each forward pass.",
        epilog=_EXAMPLES,
    )


def parse_command(
    argv, options: type = TrainOptions, declare: Callable[[argparse.ArgumentParser], None] | None = None, **texts: str
) -> argparse.Namespace:
    """
    Parse the command line of a command that takes every argument of the trainer.

    Mistakes are named, and help is shown, before the arguments of the trainer are imported, which takes seconds.

    Args:
        argv (`list[str]`): Arguments.
        options (`type`, *optional*, defaults to [`TrainOptions`]): Dataclass of the other options.
        declare (`Callable[[ArgumentParser], None]`, *optional*): Adds the options of the command, or changes others.
        texts (`str`): `prog`, `description` and `epilog` of the parser.

    Returns:
        `argparse.Namespace`: `options`, `training`, and the further arguments of the parser.
    """
    refuse_mistakes(argv, options, declare, **texts)
    quiet_transformers()
    from transformers import HfArgumentParser

    from ..training.arguments import TranscoderTrainingArguments

    class TrainParser(Parser, HfArgumentParser):
        pass

    parser = TrainParser(dataclass_types=[options, TranscoderTrainingArguments], **texts)
    _complete(parser, options, declare)
    return parse_with_config(parser, argv)


def refuse_mistakes(argv, options: type, declare=None, **texts: str) -> None:
    """Refuse mistakes in options, and show help, by the source of the trainer's arguments alone."""
    if _HELP_ALL & {*argv}:
        # Shows what only the classes know, such as values that are computed.
        return
    try:
        fields = declared_fields(_TRAINER_SOURCE, "TranscoderTrainingArguments")
    except (LookupError, OSError, SyntaxError):
        # A distribution without sources: the parser of the classes finds the same mistakes, later.
        return
    parser = Parser(**texts)
    add_declared(parser, fields_of(options) | fields)
    _complete(parser, options, declare)
    _shorten_help(parser, fields)
    config = _config_file(argv)
    # What is no file, such as a pipe, may be readable once only.
    if config is not None and (Path(config).is_file() or not Path(config).exists()):
        read_defaults(parser, config)
    _refuse_infinite(vars(parser.parse_args(argv)))


def _complete(parser, options: type, declare) -> None:
    """Add to the fields of the dataclasses what is not in them."""
    more = _MORE_WITH_CROSS_LAYER if options is TrainOptions else _MORE
    parser.set_defaults(
        output_dir="transcoder_output", save_strategy="steps", save_steps=0.1, save_total_limit=1, disable_tqdm=None
    )
    for action in parser._actions:
        # Underscores are accepted as well; showing one spelling is enough.
        action.option_strings = [each for each in action.option_strings if "_" not in each]
        if action.type is int:
            action.type = whole_number
        elif getattr(action.type, "__name__", "") == "string_to_bool":
            action.type = truth
        if action.dest in SHARED:
            declare_shared(action, more.get(action.dest, ""))
        if action.dest == "output_dir":
            action.help = "folder for checkpoints, dictionaries and results"
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with options")
    add_shared(parser, "json", action="store_true")
    parser.add_argument("--help-all", action="store_true", help="list every option and exit")
    if declare is not None:
        declare(parser)


def parse_with_config(parser, argv) -> argparse.Namespace:
    """
    Parse the command line, whose options override the YAML file that it names.

    Returns:
        `argparse.Namespace`: `options`, `training`, and the further arguments of the parser.
    """
    if _HELP_ALL & {*argv}:
        parser.print_help()
        sys.exit(0)
    _shorten_help(parser, {f.name for f in dataclasses.fields(parser.dataclass_types[1])})
    if config := _config_file(argv):
        read_defaults(parser, config)
    # Some arguments of the trainer are objects, which the parser makes from strings.
    try:
        options, training, namespace, _ = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (TypeError, KeyError, AttributeError, ImportError) as error:
        # Arguments of the trainer that are objects or need packages raise various errors.
        raise TranscoderError(
            f"The options of the trainer are invalid: {' '.join(str(error).split())[:300]}."
        ) from error
    _refuse_infinite(vars(options) | vars(training))
    return argparse.Namespace(options=options, training=training, **vars(namespace))


def _refuse_infinite(values: dict) -> None:
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise TranscoderError(f"{name} is {value}, but must be a finite number.")


def _shorten_help(parser, trainer_fields: Container[str]) -> None:
    for action in parser._actions:
        if action.dest in trainer_fields and action.dest not in _SHOWN:
            action.help = argparse.SUPPRESS


def _config_file(argv) -> str | None:
    for position, word in enumerate(argv):
        if word == "--config":
            if position + 1 == len(argv):
                raise TranscoderError("--config needs the name of a YAML file: give it.")
            return argv[position + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None


def run(args):
    from ..evaluation.cautions import cautions
    from ..tracking.local import FOLDER, PAGES
    from ..training.run_folder import check_run_folder
    from ..training.trainer import TranscoderTrainer

    options, training = args.options, args.training
    if args.json:
        training.disable_tqdm = True
    output_folder(training.output_dir, "--output-dir")
    if options.resume not in (None, "last") and not Path(options.resume).is_dir():
        raise TranscoderError(
            f"{options.resume} is not a checkpoint: give --resume the folder of one, or no value for the last one."
        )
    resume = {None: None, "last": True}.get(options.resume, options.resume)
    check_run_folder(training.output_dir, resume, training.overwrite)
    device = "cpu" if training.use_cpu else None
    base_model, tokenizer = load_model(options.model, revision=options.revision, dtype=options.dtype, device=device)
    models = make_dictionaries(options, base_model, training.seed)
    train, held_out = load_rows(options, training, tokenizer)
    trainer = TranscoderTrainer(
        model=models[0] if len(models) == 1 else models,
        base_model=base_model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    report = trainer.evaluation_report()
    if trainer.is_world_process_zero():
        report.save_json(Path(training.output_dir) / "evaluation.json")
    trainer.save_model()
    if trainer.is_world_process_zero():
        configs = {name: dictionary.config for name, dictionary in trainer.dictionaries.items()}
        found = cautions(configs, report.metrics, report.protocol["fidelity_tokens"])
        if args.json:
            print_json({"output_dir": training.output_dir, **report.to_dict(), "cautions": found})
        else:
            echo(*report.to_text().split("\n"), "")
            for kind, line in found.items():
                # The trainer has said what training shows by itself.
                if kind not in trainer.cautions:
                    echo(f"Caution: {line}", error=True)
            page = Path(training.output_dir, FOLDER, PAGES, "report.html")
            if page.is_file():
                echo(f"The report page is {page}")
            echo(f"Saved in {training.output_dir}")
    trainer.save_state()
    # A process that exits while others still communicate with it would end them as well.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def make_dictionaries(options: TrainOptions, base_model, seed: int):
    """Make the dictionaries of a run, each with the initial weights that it would have alone."""
    import torch

    from ..models.model_types import model_type_of

    models = []
    for config in configurations(options, base_model):
        torch.manual_seed(seed)
        models.append(model_type_of(config.to_dict())(config))
    return models


def configurations(options: TrainOptions, base_model) -> list:
    """Make the configurations of the dictionaries of a run, or that of its cross-layer transcoder."""
    from ..training.grid import dictionary_config

    shared = shared_options(options)
    if CROSS_LAYER in options.kind:
        return [_cross_layer_config(options, base_model, shared)]
    for name in ("cross_layer_window", "batchtopk_scope", "tanh_coefficient"):
        if getattr(options, name) != TrainOptions.__dataclass_fields__[name].default:
            raise TranscoderError(
                f"--{name.replace('_', '-')} has a meaning for cross-layer transcoders alone: leave it out, or give --kind "
                f"{CROSS_LAYER}."
            )
    return [
        dictionary_config(base_model, read, write, skip_connection=options.skip_connection and read != write, **shared)
        for read, write in sites_of(options, base_model)
    ]


def _cross_layer_config(options: TrainOptions, base_model, shared: dict):
    from ..lm.architectures import num_layers
    from ..models.cross_layer.configuration_cross_layer import CrossLayerTranscoderConfig

    if options.kind != [CROSS_LAYER] or options.input_site or options.output_site:
        other = "other kinds" if options.kind != [CROSS_LAYER] else "--input-site and --output-site"
        raise TranscoderError(
            f"--kind {CROSS_LAYER} trains one model of the MLPs of --layers, without {other}: leave these out, or train them in "
            "another run."
        )
    layers = sorted(_layers(options, base_model) or range(num_layers(base_model)))
    return CrossLayerTranscoderConfig.for_model(
        base_model,
        layers,
        skip_connection=options.skip_connection,
        window=options.cross_layer_window,
        batchtopk_scope=options.batchtopk_scope,
        tanh_coefficient=options.tanh_coefficient,
        **shared,
    )


def shared_options(options: DictionaryOptions) -> dict:
    """Return the arguments of [`TranscoderConfig`] that all dictionaries of a run share."""
    return {
        name: getattr(options, name)
        for name in (
            "num_features", "activation", "k", "l1_coefficient", "l0_coefficient", "target_l0", "auxk_coefficient", "tied",
            "decoder_bias", "normalization", "loss_reduction",
        )
    }  # fmt: skip


def sites_of(options: RunOptions, base_model) -> list[tuple[str, str]]:
    """Return the sites that the dictionaries of a run read and write."""
    from ..lm.architectures import num_layers
    from ..training.grid import mlp_sites

    if options.input_site:
        if options.layers:
            raise TranscoderError("Give either --layers or --input-site, not both.")
        return [(options.input_site, options.output_site or options.input_site)]
    if options.output_site:
        raise TranscoderError("--output-site needs --input-site: give the site that the dictionary reads.")
    layers = _layers(options, base_model) or [num_layers(base_model) // 3]
    return [mlp_sites(layer, kind) for layer in layers for kind in options.kind]


def _layers(options: RunOptions, base_model) -> list[int]:
    """The layers of `--layers`, counted from 0 and without repeats."""
    from ..lm.architectures import num_layers

    count = num_layers(base_model)
    for layer in options.layers:
        if not -count <= layer < count:
            raise TranscoderError(
                f"There is no layer {layer}: the layers of the model are 0 to {count - 1}, and -1 is the last."
            )
    return list(dict.fromkeys(layer % count for layer in options.layers))


def load_rows(options: RunOptions, training, tokenizer):
    """Load token rows for training and held-out token rows."""
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
        held_out, texts = texts.take(_HELD_OUT), texts.skip(_HELD_OUT)
        if next(iter(texts), None) is None:
            raise TranscoderError(
                f"The streamed text has {sum(1 for _ in held_out)} documents, and the first {_HELD_OUT} of a stream are held "
                "out: leave out --streaming, or give held-out text by --eval-data."
            )
    else:
        # Split by documents, so that no text is in both.
        share = max(1, len(texts) // 20)
        if len(texts) < 2:
            raise TranscoderError(
                "The text is one document, so none can be held out: give another text with --eval-data."
            )
        parts = texts.train_test_split(test_size=share, seed=training.seed)  # pyright: ignore[reportAttributeAccessIssue]
        texts, held_out = parts["train"], parts["test"]
    length = training.sequence_length
    return pack_tokens(texts, tokenizer, length), pack_tokens(held_out, tokenizer, length)
