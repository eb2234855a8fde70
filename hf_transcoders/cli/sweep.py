"""`hf-transcoders sweep`: train a grid of dictionaries on one stream of activations."""

from dataclasses import fields

from ..errors import TranscoderError
from .common import load_model
from .terminal import echo, print_json, print_table
from .train import DictionaryOptions, RunOptions, load_rows, parse_command, sites_of
from .values import output_folder, whole


# These take one value each: a grid of sites is given by layers and kinds.
_PLACES = ("input_site", "output_site")

_EXAMPLES = """examples:
  hf-transcoders sweep sweep.yaml --dry-run
  hf-transcoders sweep sweep.yaml --output-dir runs/sweep
  hf-transcoders sweep sweep.yaml --output-dir runs/sweep --resume
  hf-transcoders sweep --layers 4 8 --kind transcoder sae --k 16 32 64 --num-features 2304 4608 --group-size 6

A YAML file holds the same names; every option of the dictionaries can be a list:
  layers: [4, 8]
  num_features: [2304, 4608]
  k: [16, 32, 64]
All combinations are trained, under names such as layers.8.mlp.transcoder.topk32.n4608.
Every argument of transformers.TrainingArguments is accepted: --help-all lists them.
"""


def parse(argv, prog):
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    return parse_command(
        argv,
        RunOptions,
        _declare,
        prog=prog,
        description="Trains every combination of the given layers, kinds, widths and sparsities on the same forward passes of "
        "the language model, evaluates them on held-out text and draws their Pareto fronts.",
        epilog=_EXAMPLES,
    )


def _declare(parser):
    parser.usage = f"{parser.prog} [config.yaml] [options]"
    grid = {f.name for f in fields(DictionaryOptions)} - set(_PLACES)
    for action in parser._actions:
        if action.dest in grid:
            action.nargs = "+"
    parser.set_defaults(output_dir="transcoder_sweep")
    parser.add_argument(
        "--group-size", type=whole(1), metavar="N", help="dictionaries to train at a time, on cached activations"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the dictionaries and their sizes, and train nothing"
    )


def run(args):
    from ..reports.pareto.caveats import warning
    from ..training.grid import in_groups
    from ..training.run_folder import check_run_folder
    from ..training.sweep import run_sweep
    from .runs import fronts_as_values, report_fronts

    options, training = args.options, args.training
    if args.json:
        training.disable_tqdm = True
    if options.resume not in (None, "last"):
        raise TranscoderError(
            "--resume takes no value in a sweep, which finds its checkpoints in --output-dir: leave the value out."
        )
    output_folder(training.output_dir, "--output-dir")
    if options.resume is None and not args.dry_run:
        check_run_folder(training.output_dir, overwrite=training.overwrite)
    device = "cpu" if training.use_cpu else None
    base_model, tokenizer = load_model(options.model, revision=options.revision, dtype=options.dtype, device=device)
    grid = make_grid(options, base_model)
    groups = in_groups(list(grid.configs), args.group_size)
    sizes = describe_grid(grid, groups, base_model)
    if args.dry_run:
        if args.json:
            print_json(sizes)
        else:
            print_grid(sizes)
        return
    if not args.json:
        print_grid(sizes)
    train, held_out = load_rows(options, training, tokenizer)
    result = run_sweep(
        grid.configs,
        base_model,
        training,
        train,
        held_out,
        tokenizer,
        group_size=args.group_size,
        resume=options.resume is not None,
    )
    if training.process_index:
        return
    notes = [*filter(None, [warning(result.fronts)]), *(f"Left out: {n}: {why}" for n, why in grid.left_out.items())]
    if args.json:
        print_json(
            {
                "output_dir": training.output_dir,
                "files": [str(file) for file in result.files],
                "notes": notes,
                "fronts": fronts_as_values(result.fronts),
            }
        )
        return
    echo()
    report_fronts(result.fronts, result.files, as_json=False, notes=notes)
    echo("", f"Saved in {training.output_dir}")


def make_grid(options, base_model):
    """The grid of dictionaries for the options."""
    from ..training.grid import expand_grid

    own = [f.name for f in fields(DictionaryOptions) if f.name not in ("layers", "kind", *_PLACES)]
    return expand_grid(base_model, sites_of(options, base_model), **{name: getattr(options, name) for name in own})


def describe_grid(grid, groups, base_model) -> dict:
    """Sizes of the dictionaries, group by group."""
    from ..lm.architectures import site_width
    from ..models.model_types import count_parameters
    from ..training.grid import TRAINING_BYTES_PER_PARAMETER

    parameters = {name: count_parameters(config) for name, config in grid.configs.items()}
    sites = {site for config in grid.configs.values() for site in (config.input_site, config.output_site)}
    widths = [site_width(base_model, site) or 0 for site in sites]
    described = [
        [
            {
                "name": name,
                "num_features": grid.configs[name].num_features,
                "parameters": parameters[name],
                "training_bytes": TRAINING_BYTES_PER_PARAMETER * parameters[name],
            }
            for name in names
        ]
        for names in groups
    ]
    return {
        "groups": described,
        "left_out": grid.left_out,
        "training_bytes": max(sum(entry["training_bytes"] for entry in group) for group in described),
        "weight_bytes": 4 * sum(parameters.values()),
        "activation_bytes_per_token": sum(widths) * base_model.dtype.itemsize,
    }


def print_grid(sizes: dict) -> None:
    several = len(sizes["groups"]) > 1
    rows = [
        [
            entry["name"],
            *([str(number)] if several else []),
            f"{entry['num_features']:,}",
            f"{entry['parameters']:,}",
            _size(entry["training_bytes"]),
        ]
        for number, group in enumerate(sizes["groups"], start=1)
        for entry in group
    ]
    head = ["dictionary", *(["group"] if several else []), "features", "parameters", "to train"]
    print_table(head, rows)
    echo(
        "",
        f"{len(rows)} dictionaries: {_size(sizes['training_bytes'])} "
        + ("for the largest group" if several else "to train them together")
        + f" (weights, gradients and Adam in float32), {_size(sizes['weight_bytes'])} when saved.",
    )
    if several:
        echo(
            f"Groups share activations kept on disk: {_size(1_000_000 * sizes['activation_bytes_per_token'])} for a million "
            "tokens of text."
        )
    for name, reason in sizes["left_out"].items():
        echo(f"Left out: {name}: {reason}", error=True)


def _size(size: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{size / limit:.3g} {unit}"
    return f"{size:.0f} B"
