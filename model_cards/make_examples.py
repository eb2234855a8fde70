# /// script
# dependencies = ["hf_transcoders[gguf]"]
# ///
"""
Make the example cards: train, evaluate, save the records of the run, and write the card from the records alone.

    python model_cards/make_examples.py                                   # all of them
    python model_cards/make_examples.py smollm2-135m-l8-transcoder        # one of them
    python model_cards/make_examples.py --render-only                     # the cards again, from the records

The card of every layer comes from a run of examples/scripts/train_every_layer.py, which is not repeated here:

    python model_cards/make_examples.py smollm2-135m-every-layer --run runs/every_layer
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

from hf_transcoders import (
    EvaluationReport,
    TranscoderConfig,
    TranscoderEvaluator,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
    load_language_model,
    load_texts,
    pack_tokens,
)
from hf_transcoders.hub import TranscoderCard, make_card
from hf_transcoders.tracking import LocalTracker, Run


HERE = Path(__file__).parent
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SIZE = {"num_features": 4608, "k": 64}
READ, WRITE = "layers.{}.mlp.in", "layers.{}.mlp.branch"

# Folder -> tokens to train on, to measure fidelity on and to measure losses on; then where the dictionaries read and
# write, and what else they are.
EXAMPLES = {
    "smollm2-135m-l8-transcoder": ((300_000, 30_000, 5_000), [(8, READ, WRITE, {})]),
    "smollm2-135m-l8-three-kinds": (
        (200_000, 30_000, 5_000),
        [(8, READ, WRITE, {}), (8, READ, WRITE, {"skip_connection": True}), (8, WRITE, WRITE, {})],
    ),
}
_QUANTISED = (
    "The base model's weights came from a "
    "Python package that carries them quantised to four bits; they are close to those on the Hub, but not the same."
)
NOTES = (
    "This is an example: a short run on a small text, evaluated on a tenth of the texts that was held out, to show what a "
    f"card looks like. {_QUANTISED}"
)
EVERY_LAYER = "smollm2-135m-every-layer"
EVERY_LAYER_NOTES = (
    "This is an example: what two CPU cores, shared with other work, trained in 35 minutes, a transcoder for the MLP of every "
    "layer on the same forwards of the language model (`examples/scripts/train_every_layer.py`). The text is that of the "
    "word-level release of WikiText-2, put together again: its validation split to train on, its test split to measure on. "
    f"{_QUANTISED}"
)


def record(name: str) -> None:
    """Trains the dictionaries of an example and keeps everything but the weights."""
    base, tokenizer = load_language_model(dtype=torch.float32)
    texts = load_texts("docstrings", limit=6000).train_test_split(test_size=0.1, seed=0)
    train, test = pack_tokens(texts["train"], tokenizer), pack_tokens(texts["test"], tokenizer)

    (max_tokens, fidelity_tokens, loss_tokens), dictionaries = EXAMPLES[name]
    torch.manual_seed(0)
    models = [
        TranscoderModel(TranscoderConfig.for_model(base, read.format(layer), write.format(layer), **SIZE, **changes))
        for layer, read, write, changes in dictionaries
    ]
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = TranscoderTrainer(
            models[0] if len(models) == 1 else models,
            base,
            TranscoderTrainingArguments(
                output_dir,
                max_tokens=max_tokens,
                logging_steps=5,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=train,
            processing_class=tokenizer,
        )
        trainer.train()
        evaluator = TranscoderEvaluator(
            base,
            test,
            max_tokens=fidelity_tokens,
            max_loss_tokens=loss_tokens,
            special_token_ids=tokenizer.all_special_ids,
        )
        writes = {model.config.output_site for model in models}
        report = evaluator.evaluate(trainer.dictionaries, together=1 < len(models) == len(writes))
        trainer.save_model()
        report.save_into(output_dir)
        report.save_json(Path(output_dir, "evaluation.json"))
        keep(name, Path(output_dir), Run.from_log_history(trainer.state.log_history), list(trainer.dictionaries))


def keep(name: str, output_dir: Path, run: Run, dictionaries: list[str]) -> None:
    """Save everything that a card is made of: all files but the weights, and the log of the run."""
    kept = HERE / name / "record"
    shutil.rmtree(kept, ignore_errors=True)
    tracker = LocalTracker(kept)
    tracker.start({"name": name, "base_model": BASE, "dictionaries": dictionaries})
    for entry in run.scalars:
        tracker.scalars(entry["step"], {key: value for key, value in entry.items() if key not in ("step", "time")})
    tracker.finish("finished")
    for pattern in ("config.json", "layers.*/config.json", "transcoder_set.json", "evaluation.json"):
        for file in output_dir.glob(pattern):
            target = kept / file.relative_to(output_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def card_of_record(folder: Path) -> TranscoderCard:
    """The card that the records in `folder/record` give."""
    kept = folder / "record"

    def dictionary(at: Path) -> TranscoderModel:
        return TranscoderModel(TranscoderConfig.from_pretrained(at))

    index = kept / "transcoder_set.json"
    if index.exists():
        entries = json.loads(index.read_text())["dictionaries"]
        dictionaries = TranscoderSet({name: dictionary(kept / entry["subfolder"]) for name, entry in entries.items()})
    else:
        dictionaries = dictionary(kept)
    return make_card(
        dictionaries,
        repo_id=f"username/{folder.name}",
        report=EvaluationReport.load_json(kept / "evaluation.json"),
        run=Run.load(kept),
        license="apache-2.0",
        notes=EVERY_LAYER_NOTES if folder.name == EVERY_LAYER else NOTES,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which: {', '.join((*EXAMPLES, EVERY_LAYER))}")
    parser.add_argument("--render-only", action="store_true", help="write the cards again, from the records")
    parser.add_argument("--run", type=Path, help=f"folder of the run that {EVERY_LAYER} is about")
    args = parser.parse_args()
    if EVERY_LAYER in args.names and not args.render_only and (args.run is None or len(args.names) > 1):
        parser.error(f"{EVERY_LAYER} is not trained here: name it alone, and the folder of its run with --run")
    if args.run and args.names != [EVERY_LAYER]:
        parser.error(f"--run is for {EVERY_LAYER}")
    for name in args.names or [*EXAMPLES, *([EVERY_LAYER] if args.render_only else [])]:
        if args.run:
            keep(name, args.run, Run.load(args.run), list(TranscoderSet.from_pretrained(args.run)))
        elif not args.render_only:
            record(name)
        card_of_record(HERE / name).save(HERE / name)


if __name__ == "__main__":
    main()
