"""`hf-transcoders explain`: explain features, and score the explanations beside honest controls."""

from pathlib import Path

from ..errors import TranscoderError
from .arguments import (
    add_shared,
    declare_shared,
    feature_arguments,
    measuring_arguments,
    model_arguments,
    output_arguments,
    text_arguments,
)
from .common import (
    base_model_of,
    choose_dictionary,
    load_base_model,
    load_dictionaries,
    load_model,
    load_text,
)
from .terminal import Parser, echo, print_json
from .values import output_folder, whole


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Explains features by rules that need no service (tables of tokens, bigrams, n-grams, classes of tokens, promoted "
        "tokens, de-embeddings, and their best combination) and, if asked for, by a chat model. Scores every explanation on documents "
        "that its explainer has not seen, beside a table of tokens and a language model with random weights. Saves the explanations "
        "beside the dictionary, where graphs and pushes find them. An interrupted run goes on if it is repeated.",
        epilog="example:\n  hf-transcoders explain runs/l8 --max-features 200 --data wikitext.txt",
    )
    declare_shared(parser.add_argument("transcoders"))
    group = parser.add_argument_group("dictionaries")
    add_shared(group, "transcoders_revision")
    add_shared(group, "kind", "by default, all of a set", choices=["transcoder", "sae"])
    add_shared(group, "dictionary", "required if the set has several")
    feature_arguments(parser, "a random sample of features that are active in the text", 200)
    model_arguments(parser)
    text_arguments(parser, max_tokens=500_000)
    group = measuring_arguments(parser, "explanations and scores")
    group.add_argument(
        "--example-tokens",
        type=whole(8, 4096),
        metavar="N",
        default=64,
        help="tokens of an example, as in the 2023 paper",
    )
    add_shared(group, "seed", "the same seed gives the same numbers", default=0)
    group.add_argument("--no-control", action="store_true", help="leave out the language model with random weights")
    group.add_argument(
        "--surprisal",
        action="store_true",
        help="also score the explanations by how much they help the language model predict text",
    )
    group = parser.add_argument_group("chat model that explains and judges")
    group.add_argument(
        "--chat-model",
        metavar="MODEL",
        help="name of the model at --chat-url, or Hub id or folder of a model that runs here",
    )
    group.add_argument(
        "--chat-url",
        metavar="URL",
        help="address of a service with the API of OpenAI, such as http://localhost:8000/v1; its key is read from OPENAI_API_KEY",
    )
    output_arguments(parser, "report.html, results.json, the examples and the transcript", default="runs/explain")
    return parser.parse_args(argv)


def run(args):
    if args.chat_url and not args.chat_model:
        raise TranscoderError("--chat-url is the address of a service: give the name of its model by --chat-model.")
    output = output_folder(args.output)
    import torch

    from ..dictionaries import check_features
    from ..features import ExampleSizes, collect_examples
    from ..features.collect import dictionary_digest, tokenizer_digest
    from ..features.explain.explanation_file import chosen_explanations, save_explanations
    from ..features.explain.random_control import random_control
    from ..features.explain.score_means import mean_scores, skip_reasons
    from ..features.explain.scoring import rule_explainers, rule_scorers, sample_features, score_explanations
    from ..features.explain.surprisal import SurprisalScorer
    from ..lm.devices import input_device
    from ..reports.explanation_sections import explanation_sections, score_table
    from ..reports.results_folder import write_results
    from ..reports.sections import tables_text

    dictionaries = load_dictionaries(args)
    name = choose_dictionary(dictionaries, args.dictionary)
    base_model, tokenizer = load_base_model(args, dictionaries)
    dictionary = dictionaries[name].to(input_device(base_model))
    wanted = args.features or []
    check_features(wanted, dictionary.config.num_features)
    rows = load_text(args, tokenizer)
    sizes = ExampleSizes(window=min(args.example_tokens, args.sequence_length))
    options = {"sizes": sizes, "max_tokens": args.max_tokens, "batch_size": args.batch_size, "skip_first": args.skip_first,
               "special_token_ids": tokenizer.all_special_ids, "seed": args.seed, "progress": not args.json}  # fmt: skip
    examples = collect_examples(
        base_model, {name: dictionary}, rows, tokenizer, output_dir=output / "examples", **options
    )[name]
    features = wanted or sample_features(examples, args.max_features, args.seed)
    explainers, chat_scorers = rule_explainers(base_model, dictionary, tokenizer, features), []
    if args.chat_model:
        chat_explainer, chat_scorers = _chat(args, output, tokenizer)
        explainers.append(chat_explainer)
    if args.surprisal:
        chat_scorers.append(SurprisalScorer(base_model, tokenizer))
    facts = {
        "dictionary": dictionary_digest(dictionary),
        "tokenizer": tokenizer_digest(tokenizer),
        "examples": {**vars(sizes), "max_tokens": args.max_tokens, "data": args.data, "seed": args.seed},
        "chat_model": args.chat_model,
    }
    results = score_explanations(
        examples, features, explainers, rule_scorers(), text_scorers=chat_scorers, judged=("combination",),
        output_dir=output, facts=facts, progress=not args.json,
    )  # fmt: skip
    control = None
    if not args.no_control:
        model, untrained = random_control(base_model, dictionary, examples, args.seed)
        others = collect_examples(model, {name: untrained}, rows, tokenizer, output_dir=output / "control", **options)[
            name
        ]
        drawn = sample_features(others, len(features), args.seed)
        control = score_explanations(
            others, drawn, rule_explainers(model, untrained, tokenizer, drawn), rule_scorers(),
            output_dir=output, facts=facts, name="control_", progress=not args.json,
        )  # fmt: skip
    if all(result.skipped for result in results):
        raise TranscoderError(
            f"None of the {len(results)} features could be explained: {results[0].skipped}. Give more text by --data or "
            "--max-tokens, or features that fire more often."
        )
    saved = _save(args, dictionaries, dictionary, name, chosen_explanations(results), save_explanations)
    density = {result.feature: {"density": f"{float(examples.density[result.feature]):.4%}"} for result in results}
    protocol = {
        "dictionary": name,
        "language model": base_model_of(dictionaries, args.model),
        "text": args.data,
        "tokens": examples.num_tokens,
        "rows": f"{args.sequence_length} tokens",
        "windows": f"{sizes.window} tokens, one of each document",
        "control": None
        if control is None
        else "blocks with random weights of the same mean and deviation, untrained features as sparse as these",
        "chat model": args.chat_model,
        "seed": args.seed,
        "versions": f"torch {torch.__version__}",
    }
    content = {
        "protocol": protocol,
        "means": [vars(mean) for mean in mean_scores(results)],
        "control": [vars(mean) for mean in mean_scores(control or ())],
        "features": [result.to_dict() for result in results],
    }
    page = write_results(
        output, f"Explanations of {name}", explanation_sections(results, control, density),
        {key: value for key, value in protocol.items() if value is not None}, content,
    )  # fmt: skip
    if args.json:
        print_json({**content, "page": str(page), "saved": None if saved is None else str(saved)})
        return
    scored = sum(result.skipped is None for result in results)
    echo(*tables_text([score_table(f"{scored} of {len(results)} features", results, control)]).split("\n"), "")
    echo(*(f"skipped: {count} times: {why}" for why, count in skip_reasons(results).items()))
    echo(*([f"The explanations are saved in {saved}"] if saved else []), page)


def _chat(args, output, tokenizer):
    from ..features.explain.chat import LocalChat, ServiceChat, Transcript
    from ..features.explain.scoring import chat_explainer_and_scorers

    if args.chat_url:
        chat = ServiceChat(args.chat_url, args.chat_model)
    else:
        chat = LocalChat(*load_model(args.chat_model, dtype=args.dtype, device=args.device))
    return chat_explainer_and_scorers(Transcript(chat, output / "transcript.jsonl"), tokenizer)


def _save(args, dictionaries, dictionary, name, explanations, save_explanations):
    """Save explanations beside a dictionary in a local folder; that of another format gets none."""
    from ..models.saved_files import CONFIG_NAME
    from ..models.set_index import INDEX_NAME
    from ..models.transcoder_set import set_folders

    folder = Path(args.transcoders)
    if (folder / INDEX_NAME).is_file():
        folder = set_folders(folder).get(name, folder)
    return save_explanations(explanations, dictionary, folder) if (folder / CONFIG_NAME).is_file() else None
