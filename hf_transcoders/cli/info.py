"""`hf-transcoders info`: facts about a dictionary, a set or this machine."""

import contextlib

from ..errors import TranscoderError
from ..text.columns import paired
from .arguments import add_shared, output_arguments
from .common import saved_configs
from .terminal import Parser, echo, print_json, print_table


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Describes a trained dictionary or set. Without --transcoders, prints versions and devices of this "
        "machine.",
    )
    add_shared(parser, "transcoders")
    add_shared(parser, "transcoders_revision")
    output_arguments(parser)
    return parser.parse_args(argv)


def run(args):
    if args.transcoders is None and args.transcoders_revision is not None:
        raise TranscoderError("--transcoders-revision needs --transcoders: give that too.")
    if args.transcoders is None:
        facts = describe_environment()
    else:
        facts = describe_dictionaries(args.transcoders, args.transcoders_revision)
    if args.json:
        print_json(facts)
        return
    if args.transcoders is None:
        echo(*_pairs(facts))
        return
    if len(facts) > 1 and all("format" in values for values in facts.values()):
        columns = ("format", "layer", "reads", "writes", "features", "width", "L0", "parameters", "cannot be loaded")
        columns = [name for name in columns if any(values.get(name) is not None for values in facts.values())]
        rows = [[name, *(_text(values.get(column)) for column in columns)] for name, values in facts.items()]
        print_table(["dictionary", *columns], rows, left=2)
        return
    for name, values in facts.items():
        echo(name, *_pairs(values, indent="  "))


def describe_environment() -> dict:
    """Versions of Python and of packages, and devices."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    facts = {"python": platform.python_version()}
    packages = ("hf_transcoders", "torch", "transformers", "huggingface_hub", "safetensors", "accelerate", "datasets")
    for package in (*packages, "evaluate", "gguf"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["cpu threads"] = torch.get_num_threads()
    facts["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return facts


def describe_dictionaries(path: str, revision: str | None = None) -> dict[str, dict]:
    """Name of each dictionary -> its kind, sites, sizes and training; without loading weights."""
    from ..models.foreign import describe_foreign
    from ..models.model_types import count_parameters
    from ..models.saved_files import Files

    files = Files.at(path, revision=revision)
    # The loader below has the message for a repo that does not exist.
    with contextlib.suppress(OSError):
        if foreign := describe_foreign(files):
            return {name: _foreign_facts(facts) for name, facts in foreign.items()}
    return {name: _facts(config, count_parameters(config)) for name, config in saved_configs(path, revision).items()}


def _foreign_facts(facts) -> dict:
    known = {
        name: value for name, value in zip(("layer", "width", "L0"), facts.path, strict=True) if value is not None
    }
    described = {"format": facts.format, **known}
    if facts.config is not None:
        described |= _facts(facts.config, facts.parameters)
    return described | ({"cannot be loaded": facts.trouble} if facts.trouble else {})


def _facts(config, parameters: int) -> dict:
    sparsity = {
        "topk": f"top {config.k} of each token",
        "batchtopk": f"top {config.k} of each token on average",
        "relu": f"L1 coefficient {config.l1_coefficient:g}",
        "gated": f"L1 coefficient {config.l1_coefficient:g}",
        "jumprelu": f"L0 coefficient {config.l0_coefficient:g}",
    }[config.activation]
    if getattr(config, "tanh_coefficient", 0):
        sparsity = f"tanh coefficient {config.tanh_coefficient:g}"
    return {
        "kind": _kind(config),
        "base model": config.base_model_name_or_path,
        "revision": config.base_model_revision,
        "reads": config.input_site,
        "writes": config.output_site if len(config.output_sites) < 2 else list(config.output_sites),
        "features": config.num_features,
        "width in, out": [config.d_in, config.d_out],
        "activation": f"{config.activation}, {sparsity}",
        "skip connection": config.skip_connection,
        "normalization": config.normalization,
        "parameters": parameters,
        "dtype": str(config.dtype).removeprefix("torch."),
        **{f"trained: {key}": value for key, value in (config.training_summary or {}).items()},
    }


def _kind(config) -> str:
    from ..models.cross_layer.configuration_cross_layer import CrossLayerSourceConfig

    if isinstance(config, CrossLayerSourceConfig):
        return "layer of a cross-layer transcoder"
    return "sparse autoencoder" if config.is_autoencoder else "transcoder"


def _pairs(values: dict, indent: str = "") -> list[str]:
    return paired({key: _text(value) for key, value in values.items()}, indent).split("\n")


def _text(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)
