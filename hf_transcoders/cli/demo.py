"""`hf-transcoders demo`: the whole job on a real model, each step a call of the public API."""

import time

from .common import fastest_cpu_dtype
from .terminal import HelpFormatter, Parser, echo
from .values import output_folder, whole


def parse(argv, prog):
    parser = Parser(
        prog=prog,
        description="Trains a transcoder of one MLP of SmolLM2-135M-Instruct, and the SAE of the same size and sparsity on "
        "the same forwards; compares them on held-out text; saves, loads and reads the result; writes a report. The model "
        "comes as a package and the text is the docstrings of the installed packages: nothing is fetched from the Hub.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output-dir", default="transcoder_demo", help="where results go")
    parser.add_argument("--layer", type=whole(0), default=8, help="whose MLP")
    parser.add_argument("--num-features", type=whole(1), default=4608, help="features of each dictionary")
    parser.add_argument("--k", type=whole(1), default=32, help="active features per token")
    parser.add_argument("--max-tokens", type=whole(1), default=400_000, help="training tokens, over several passes")
    return parser.parse_args(argv)


def run(args):
    from ..lm.devices import input_device

    started = time.time()
    output = output_folder(args.output_dir, "--output-dir")

    _say(1, "SmolLM2-135M-Instruct, from a package")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_transcoders import (
        TranscoderConfig,
        TranscoderModel,
        TranscoderSet,
        TranscoderTrainer,
        TranscoderTrainingArguments,
        explain_features,
        load_texts,
        offline_model,
        pack_tokens,
        write_report,
    )

    path = offline_model("smollm2-135m-instruct")
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else fastest_cpu_dtype()
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    base.config.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"  # Rather than the folder it was unpacked to.
    tokenizer = AutoTokenizer.from_pretrained(path)

    _say(2, "Text: English docstrings of the installed packages, split by document")
    texts = load_texts("docstrings", limit=700).train_test_split(test_size=100, seed=0)  # pyright: ignore[reportAttributeAccessIssue]
    train, held_out = (pack_tokens(texts[part], tokenizer, 128) for part in ("train", "test"))
    echo(f"   {len(train):,} rows of 128 tokens to train on, {len(held_out):,} held out")

    _say(3, f"Training a transcoder and an SAE at layer {args.layer}, together")
    read, write = f"layers.{args.layer}.mlp.in", f"layers.{args.layer}.mlp.branch"
    shared = {"num_features": args.num_features, "activation": "topk", "k": args.k}
    torch.manual_seed(0)
    models = TranscoderSet(
        {
            "transcoder": TranscoderModel(TranscoderConfig.for_model(base, read, write, **shared)),
            "sae": TranscoderModel(TranscoderConfig.for_model(base, write, **shared)),
        }
    )
    trainer = TranscoderTrainer(
        model=models,
        base_model=base,
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

    _say(4, "Evaluating both on the held-out text")
    report = trainer.evaluation_report()
    report.save_json(output / "evaluation.json")
    echo(*report.table().split("\n"))

    _say(5, "Saving, and loading it back")
    trainer.save_model()
    loaded = TranscoderSet.from_pretrained(output / "dictionaries").to(input_device(base))
    echo(f"   {', '.join(loaded)}: loaded from {output / 'dictionaries'}")

    _say(6, "What some features of the transcoder do")
    explanations = explain_features(
        base, loaded["transcoder"], held_out, tokenizer, num_features=12, num_contexts=4, max_tokens=10_000
    )
    for explanation in explanations[:4]:
        echo(*explanation.render().split("\n"), "")

    _say(7, "Report")
    page = write_report(
        output / "report.html",
        title=f"Layer {args.layer} of SmolLM2-135M-Instruct",
        history=trainer.state.log_history,
        report=report,
        features={"transcoder": explanations},
        info={
            "base model": base.config.name_or_path,
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
        f"Done in {time.time() - started:.0f} s. Look further with",
        f"   hf-transcoders features {output / 'dictionaries'} --dictionary transcoder",
    )


def _say(step: int, text: str) -> None:
    echo("", f"[{step}/7] {text}")
