"""`hf-transcoders baselines`: dictionaries of components, random directions and neurons, to compare trained ones with."""

from .arguments import add_shared, measuring_arguments, model_arguments, output_arguments, text_arguments
from .common import load_model, load_text
from .outline import LibraryNames
from .terminal import Parser, echo, print_json, print_table
from .values import output_folder, whole


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Makes dictionaries that trained ones are compared with: principal components (pca), independent "
        "components (ica), random directions, a random rotation, and the coordinates of the site (identity). Each kind is a set "
        "of dictionaries in a folder of its own, which every other command takes by --transcoders.",
        epilog="example:\n"
        "  hf-transcoders baselines --model smollm2-135m-instruct --sites layers.8.resid_post --kinds pca ica random \\\n"
        "      --output runs/baselines\n"
        "  hf-transcoders evaluate --transcoders runs/baselines/pca",
    )
    parser.add_argument(
        "--sites",
        nargs="+",
        required=True,
        metavar="SITE",
        help="sites of the dictionaries, such as layers.8.resid_post",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        metavar="KIND",
        choices=LibraryNames("..training.baseline_dictionaries", "BASELINES"),
        default=["pca", "random", "identity"],
        help="kinds of baselines: pca, ica, random, rotation or identity",
    )
    add_shared(parser, "num_features", "for random; by default, the width of the site")
    model_arguments(parser, required=True)
    text_arguments(parser, max_tokens=100_000)
    group = measuring_arguments(parser, "fitting")
    group.add_argument(
        "--ica-tokens", type=whole(2), metavar="N", default=20_000, help="tokens that ica is fitted to, held in memory"
    )
    group.add_argument(
        "--ica-iterations", type=whole(1), metavar="N", default=200, help="largest number of iterations of ica"
    )
    add_shared(group, "seed", "the same seed gives the same directions", default=0)
    output_arguments(parser, "a set for each kind", default="runs/baselines")
    return parser.parse_args(argv)


def run(args):
    from ..training.baseline_dictionaries import fit_baselines

    folder = output_folder(args.output)
    base_model, tokenizer = load_model(args.model, revision=args.revision, dtype=args.dtype, device=args.device)
    found = fit_baselines(
        base_model,
        load_text(args, tokenizer),
        args.sites,
        args.kinds,
        num_features=args.num_features,
        max_tokens=args.max_tokens,
        ica_tokens=args.ica_tokens,
        ica_iterations=args.ica_iterations,
        batch_size=args.batch_size,
        skip_first=args.skip_first,
        special_token_ids=tokenizer.all_special_ids,
        seed=args.seed,
        progress=not args.json,
    )
    rows = []
    for kind, dictionaries in found.items():
        dictionaries.save_pretrained(folder / kind)
        for name, dictionary in dictionaries.items():
            rows.append(
                {
                    "kind": kind,
                    "name": name,
                    "site": dictionary.config.input_site,
                    "num_features": dictionary.config.num_features,
                    "tokens": dictionary.config.training_summary.get("tokens"),
                    "folder": str(folder / kind),
                }
            )
    if args.json:
        print_json({"output": str(folder), "dictionaries": rows})
        return
    shown = [[row["kind"], row["name"], f"{row['num_features']:,}", _count(row["tokens"])] for row in rows]
    print_table(["kind", "dictionary", "features", "tokens"], shown, left=2)
    echo("", f"Saved in {folder}")


def _count(tokens) -> str:
    return "–" if tokens is None else f"{tokens:,}"
