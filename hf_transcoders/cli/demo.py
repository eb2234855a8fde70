"""`hf-transcoders demo`: train, evaluate, save and inspect dictionaries of a real model, by the public API."""

import time

from .arguments import add_shared
from .common import fastest_cpu_dtype
from .terminal import Parser, echo
from .values import output_folder


# Layer whose transcoder is compared with an SAE.
_COMPARED = 8
# The MLPs with the most influence in graphs of this model, and the compared one: half of the influence of all thirty.
_LAYERS = (0, 1, 2, _COMPARED, 9, 28, 29)
# Text of the kind that the dictionaries learn from; the model continues it with " deviation".
_PROMPT = "Compute the mean and the standard"


def parse(argv, prog):
    layers = ", ".join(map(str, _LAYERS[:-1]))
    parser = Parser(
        prog=prog,
        description=f"Trains transcoders for the MLPs of the layers {layers} and {_LAYERS[-1]} of SmolLM2-135M-Instruct, and an "
        f"SAE at layer {_COMPARED}, on the same forward passes; compares them on held-out text; saves and loads them; shows "
        "features; and writes a report and the attribution graph of a prompt. The model comes from a Python package and the "
        "text from the docstrings of installed packages, so nothing is downloaded from the Hub.",
    )
    add_shared(
        parser, "output", "holds report.html, graph.html, evaluation.json and dictionaries", default="runs/demo"
    )
    add_shared(parser, "num_features", default=2304)
    add_shared(parser, "k", default=32)
    add_shared(parser, "max_tokens", default=140_000)
    return parser.parse_args(argv)


def run(args):
    from ..lm.devices import input_device

    started = time.time()
    output = output_folder(args.output)

    _say(1, "Model: SmolLM2-135M-Instruct, from a Python package")
    import torch

    from hf_transcoders import (
        TranscoderConfig,
        TranscoderModel,
        TranscoderSet,
        TranscoderTrainer,
        TranscoderTrainingArguments,
        explain_features,
        load_language_model,
        load_texts,
        pack_tokens,
        write_report,
    )

    base_model, tokenizer = load_language_model(
        dtype=torch.bfloat16 if torch.cuda.is_available() else fastest_cpu_dtype()
    )

    _say(2, "Text: English docstrings of installed packages, split by document")
    texts = load_texts("docstrings", limit=1_300).train_test_split(test_size=100, seed=0)  # pyright: ignore[reportAttributeAccessIssue]
    train, held_out = (pack_tokens(texts[part], tokenizer, 128) for part in ("train", "test"))
    echo(f"   {len(train):,} rows of 128 tokens to train on, {len(held_out):,} held out")

    _say(3, f"Training transcoders of {len(_LAYERS)} layers and an SAE at layer {_COMPARED}, together")
    shared = {"num_features": args.num_features, "activation": "topk", "k": args.k}
    torch.manual_seed(0)
    configs = [
        *(TranscoderConfig.for_model(base_model, *_sites(layer), **shared) for layer in _LAYERS),
        TranscoderConfig.for_model(base_model, _sites(_COMPARED)[1], **shared),
    ]
    trainer = TranscoderTrainer(
        model=TranscoderSet([TranscoderModel(config) for config in configs]),
        base_model=base_model,
        args=TranscoderTrainingArguments(
            output_dir=str(output / "dictionaries"),
            overwrite=True,  # A demo can be run again.
            max_tokens=args.max_tokens,
            learning_rate=4e-3,
            logging_steps=0.05,
            save_strategy="no",
            report_to="none",
            eval_tokens=6_000,
            eval_loss_tokens=1_000,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.train()

    _say(4, "Evaluating them on held-out text")
    report = trainer.evaluation_report()
    report.save_json(output / "evaluation.json")
    echo(*report.to_text().split("\n"))

    _say(5, "Saving and loading")
    trainer.save_model()
    loaded = TranscoderSet.from_pretrained(output / "dictionaries").to(input_device(base_model)).eval()
    echo(f"   {len(loaded)} dictionaries: loaded from {output / 'dictionaries'}")

    name = f"layers.{_COMPARED}.mlp.transcoder"
    _say(6, f"Features of {name}")
    explanations = explain_features(
        base_model, loaded[name], held_out, tokenizer, num_features=12, num_contexts=4, max_tokens=10_000
    )
    for explanation in explanations[:4]:
        echo(*explanation.to_text().split("\n"), "")
    page = write_report(
        output / "report.html",
        title="Dictionaries of SmolLM2-135M-Instruct",
        history=trainer.state.log_history,
        report=report,
        features={name: explanations},
        info={
            "base model": base_model.config.name_or_path,
            "layers": ", ".join(map(str, _LAYERS)),
            "features": f"{args.num_features:,}",
            "active per token": args.k,
            "training tokens": f"{trainer.state.global_step * trainer.args.tokens_per_step:,}",
            "text": "docstrings of installed packages",
            "took": f"{time.time() - started:.0f} s",
        },
    )

    _say(7, f"Attribution graph of {_PROMPT!r}")
    # In half precision, contributions do not sum exactly.
    base_model.float()
    transcoders = {each: dictionary for each, dictionary in loaded.items() if not dictionary.config.is_autoencoder}
    graph_page = _graph(base_model, transcoders, tokenizer, held_out, output)
    folder = output / "dictionaries"
    echo(
        "",
        f"Done in {time.time() - started:.0f} s. Open these pages in a browser:",
        f"   graph         {graph_page.resolve()}",
        f"   report        {page.resolve()}",
        f"The numbers are in {(output / 'evaluation.json').resolve()}. Explain other prompts and see more features with",
        f'   hf-transcoders graph "Return True if the string" --transcoders {folder} --kind transcoder --open',
        f"   hf-transcoders features --transcoders {folder} --dictionary {name}",
    )


def _sites(layer):
    """The sites that the transcoder of a layer reads and writes."""
    return f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch"


def _graph(base_model, transcoders, tokenizer, text, output):
    """Write the graph of the prompt and its page, print its scores, and return the path of the page."""
    from hf_transcoders import explain_features
    from hf_transcoders.circuits import attribution_graph, validate_edges

    graph = attribution_graph(base_model, transcoders, _PROMPT, tokenizer=tokenizer)
    pruned = graph.prune()
    features = pruned.feature_numbers()
    count = int(pruned.is_kind("feature").sum())
    explained = {}
    if features:
        validation = validate_edges(base_model, transcoders, pruned, 32)
        graph, pruned = graph.with_validation(validation), pruned.with_validation(validation)
        explained = explain_features(
            base_model, transcoders, text, tokenizer, features=features,
            num_contexts=4, max_tokens=10_000, num_measured=1,
        )  # fmt: skip
    graph.save_pretrained(output / "graph")
    page = pruned.to_html(output / "graph.html", explained or None)
    scores, target = graph.scores(), graph.targets[0]
    echo(
        f"   The model continues with {target.label!r} ({target.probability:.0%}).",
        f"   {count} of the {pruned.num_nodes} nodes on the page are features. All features carry "
        f"{graph.influence()[graph.is_kind('feature')].sum():.0%} of the influence on the prediction;",
        f"   of what the nodes are made of, {1 - scores['completeness']:.0%} is error: the dictionaries are small, and "
        f"{graph.num_layers - len(transcoders)} of {graph.num_layers} layers have none.",
    )
    for number, influence in pruned.strongest_features(5):
        echo(f"   {influence:6.3f}  {pruned.label(number)}")
    return page


def _say(step: int, text: str) -> None:
    echo("", f"[{step}/7] {text}")
