"""`hf-transcoders info`: facts about a dictionary, a set or this machine."""

from ..errors import TranscoderError
from ..text.columns import paired
from .arguments import add_shared, output_arguments
from .common import load_dictionaries
from .terminal import Parser, echo, print_json


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
    facts = describe_environment() if args.transcoders is None else describe_dictionaries(load_dictionaries(args))
    if args.json:
        print_json(facts)
        return
    if args.transcoders is None:
        echo(*_pairs(facts))
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


def describe_dictionaries(dictionaries) -> dict[str, dict]:
    """Name of each dictionary -> its kind, sites, sizes and training."""
    described = {}
    for name, model in dictionaries.items():
        config = model.config
        sparsity = {
            "topk": f"top {config.k} of each token",
            "batchtopk": f"top {config.k} of each token on average",
            "relu": f"L1 coefficient {config.l1_coefficient:g}",
            "gated": f"L1 coefficient {config.l1_coefficient:g}",
            "jumprelu": f"L0 coefficient {config.l0_coefficient:g}",
        }[config.activation]
        described[name] = {
            "kind": "sparse autoencoder" if config.is_autoencoder else "transcoder",
            "base model": config.base_model_name_or_path,
            "revision": config.base_model_revision,
            "reads": config.input_site,
            "writes": config.output_site,
            "features": config.num_features,
            "width in, out": [config.d_in, config.d_out],
            "activation": f"{config.activation}, {sparsity}",
            "skip connection": config.skip_connection,
            "normalization": config.normalization,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            **{f"trained: {key}": value for key, value in (config.training_summary or {}).items()},
        }
    return described


def _pairs(values: dict, indent: str = "") -> list[str]:
    return paired({key: _text(value) for key, value in values.items()}, indent).split("\n")


def _text(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)
