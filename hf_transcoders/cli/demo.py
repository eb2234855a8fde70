"""`hf-transcoders demo`: train, evaluate, save and inspect dictionaries of a real model, by the public API."""

import time

from .arguments import add_shared
from .common import fastest_cpu_dtype
from .terminal import Parser, echo
from .values import output_folder, whole


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Trains a transcoder for one MLP of SmolLM2-135M-Instruct, and an SAE of the same size and sparsity on the "
        "same forward passes; compares them on held-out text; saves and loads them; shows features; and writes a report. The "
        "model comes from a Python package and the text from the docstrings of installed packages, so nothing is downloaded "
        "from the Hub.",
    )
    add_shared(parser, "output", "holds report.html, evaluation.json and dictionaries", default="runs/demo")
    parser.add_argument(
        "--layer", type=whole(0), metavar="N", default=8, help="layer whose MLP the dictionaries learn"
    )
    add_shared(parser, "num_features", default=4608)
    add_shared(parser, "k", default=32)
    add_shared(parser, "max_tokens", "over all passes", default=400_000)
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
    texts = load_texts("docstrings", limit=700).train_test_split(test_size=100, seed=0)  # pyright: ignore[reportAttributeAccessIssue]
    train, held_out = (pack_tokens(texts[part], tokenizer, 128) for part in ("train", "test"))
    echo(f"   {len(train):,} rows of 128 tokens to train on, {len(held_out):,} held out")

    _say(3, f"Training a transcoder and an SAE at layer {args.layer}, together")
    read, write = f"layers.{args.layer}.mlp.in", f"layers.{args.layer}.mlp.branch"
    shared = {"num_features": args.num_features, "activation": "topk", "k": args.k}
    torch.manual_seed(0)
    models = TranscoderSet(
        {
            "transcoder": TranscoderModel(TranscoderConfig.for_model(base_model, read, write, **shared)),
            "sae": TranscoderModel(TranscoderConfig.for_model(base_model, write, **shared)),
        }
    )
    trainer = TranscoderTrainer(
        model=models,
        base_model=base_model,
        args=TranscoderTrainingArguments(
            output_dir=str(output / "dictionaries"),
            max_tokens=args.max_tokens,
            learning_rate=4e-3,
            logging_steps=0.05,
            save_strategy="no",
            report_to="none",
            eval_tokens=10_000,
            eval_loss_tokens=2_500,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.train()

    _say(4, "Evaluating both on held-out text")
    report = trainer.evaluation_report()
    report.save_json(output / "evaluation.json")
    echo(*report.to_text().split("\n"))

    _say(5, "Saving and loading")
    trainer.save_model()
    loaded = TranscoderSet.from_pretrained(output / "dictionaries").to(input_device(base_model))
    echo(f"   {', '.join(loaded)}: loaded from {output / 'dictionaries'}")

    _say(6, "Features of the transcoder")
    explanations = explain_features(
        base_model, loaded["transcoder"], held_out, tokenizer, num_features=12, num_contexts=4, max_tokens=10_000
    )
    for explanation in explanations[:4]:
        echo(*explanation.to_text().split("\n"), "")

    _say(7, "Report")
    page = write_report(
        output / "report.html",
        title=f"Layer {args.layer} of SmolLM2-135M-Instruct",
        history=trainer.state.log_history,
        report=report,
        features={"transcoder": explanations},
        info={
            "base model": base_model.config.name_or_path,
            "reads": read,
            "writes": write,
            "features": f"{args.num_features:,}",
            "active per token": args.k,
            "training tokens": f"{trainer.state.global_step * trainer.args.tokens_per_step:,}",
            "text": "docstrings of installed packages",
            "took": f"{time.time() - started:.0f} s",
        },
    )
    echo(
        f"   report        {page.resolve()}",
        f"   numbers       {(output / 'evaluation.json').resolve()}",
        f"   dictionaries  {(output / 'dictionaries').resolve()}",
        "",
        f"Done in {time.time() - started:.0f} s. See more features with",
        f"   hf-transcoders features --transcoders {output / 'dictionaries'} --dictionary transcoder",
    )


def _say(step: int, text: str) -> None:
    echo("", f"[{step}/7] {text}")
