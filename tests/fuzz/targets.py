"""Everything that reads files which others may have made: how to make a good one, read it, and use what was read."""

import contextlib
import copy
import io
import json
import shutil
from pathlib import Path

import torch

from hf_transcoders import TranscoderConfig, TranscoderError, TranscoderEvaluator, TranscoderModel, TranscoderSet
from hf_transcoders.cli import main
from hf_transcoders.cli import train as train_command
from hf_transcoders.data.harvest import ActivationHarvester
from hf_transcoders.data.text import load_texts
from hf_transcoders.evaluation import EvaluationReport
from hf_transcoders.evaluation.drift import DriftProbe
from hf_transcoders.hub import card_of_folder
from hf_transcoders.reports import measured_in, pareto_fronts, write_report
from hf_transcoders.tasks import Task, from_auto_circuit_json, from_eap_csv, from_pairs_json, measure
from hf_transcoders.tracking import find_runs
from hf_transcoders.tracking.run import EVALUATION_FILE
from hf_transcoders.training import TranscoderTrainer, TranscoderTrainingArguments
from hf_transcoders.training.checkpoint_files import commit, find_checkpoint
from hf_transcoders.training.run_folder import PLAN_FILE
from hf_transcoders.training.sweep import run_sweep
from tests.cli.setups import WORDS, fill_workplace
from tests.cli.test_sweep import arguments as sweep_arguments
from tests.data.test_harvest import token_rows
from tests.models.reference_dictionary import VARIANTS, make_model
from tests.tiny_models import tiny_model, tiny_tokens

from .foreign import ForeignCrossLayer, ForeignDictionary, ForeignSet
from .mutations import damage_file, damage_json
from .target import Target, trusted_numbers, used_dictionary


NAME = "layers.1.mlp.transcoder"
SITES = "layers.1.mlp.in", "layers.1.mlp.branch"


def with_results(config: TranscoderConfig) -> None:
    """Puts into a configuration what training and evaluation leave in it."""
    config.input_site, config.output_site = SITES
    config.base_model_name_or_path = "some/base"
    config.training_summary = {
        "tokens": 64_000, "steps": 20, "batch_tokens": 3200, "context_length": 32, "dataset": "wikitext", "learning_rate": 1e-3,
        "optimizer": "adamw_torch_fused", "precision": "fp32", "seed": 1, "versions": {"torch": "2.13.0"}, "dead_after_tokens": 1000,
    }  # fmt: skip
    report = sample_report()
    config.evaluation = report.of(NAME)


_REPORT = None


def sample_report() -> EvaluationReport:
    """Numbers of a real evaluation, made once."""
    global _REPORT
    if _REPORT is None:
        base = tiny_model("llama")
        rows = [{"input_ids": row} for row in tiny_tokens(6, 16)]
        named = {NAME: base_dictionary(), "layers.0.mlp.transcoder": base_dictionary(layer=0)}
        evaluator = TranscoderEvaluator(base, rows, max_tokens=80, max_loss_tokens=60, progress=False)
        _REPORT = evaluator.evaluate(TranscoderSet(named), together=True)
    return copy.deepcopy(_REPORT)


def base_dictionary(layer=1, **changes) -> TranscoderModel:
    torch.manual_seed(layer)
    sites = f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch"
    changes = {"num_features": 40, "k": 4, "decoder_init": "random", **changes}
    return TranscoderModel(TranscoderConfig.for_model(tiny_model("llama"), *sites, **changes)).eval()


class Dictionary(Target):
    weight = 5.0

    def make(self, folder):
        for name, activation, variant, shards in (
            ("topk", "topk", "plain", "1GB"),
            ("jumprelu", "jumprelu", "all", "1GB"),
            ("batchtopk", "batchtopk", "standardize", "1GB"),
            ("gated", "gated", "skip", 400),
            ("tied", "relu", "tied_2023", 400),
        ):
            model = make_model(activation, **VARIANTS[variant])
            if name == "topk":
                with_results(model.config)
            model.save_pretrained(folder / name, max_shard_size=shards)

    def load(self, sample):
        return TranscoderModel.from_pretrained(sample)

    def use(self, loaded, work):
        return used_dictionary(loaded)

    def numbers(self, loaded, used):
        return trusted_numbers([loaded], used)


class Set(Target):
    weight = 2.0

    def make(self, folder):
        base_set().save_pretrained(folder / "set")

    def load(self, sample):
        return TranscoderSet.from_pretrained(sample)

    def use(self, loaded, work):
        widths = {site: width for m in loaded.values() for site, width in ((m.config.input_site, m.config.d_in),)}
        activations = {site: torch.ones(3, width) for site, width in widths.items()}
        outputs = loaded(activations).outputs
        return [
            {name: output.reconstruction for name, output in outputs.items()},
            *map(used_dictionary, loaded.values()),
        ]

    def numbers(self, loaded, used):
        return trusted_numbers(loaded.values(), used)


def base_set() -> TranscoderSet:
    return TranscoderSet(
        {"layers.0.mlp.transcoder": base_dictionary(layer=0), NAME: base_dictionary(activation="relu", k=None)}
    )


class Card(Target):
    """The model card of a folder that training and evaluation have filled."""

    weight = 1.0

    def make(self, folder):
        model = base_dictionary()
        with_results(model.config)
        model.save_pretrained(folder / "one")
        sample_report().save_json(folder / "one" / "evaluation.json")
        base_set().save_pretrained(folder / "set")

    def damage(self, rng, sample, outside):
        path = rng.choice(sorted(sample.rglob("*.json")))
        return f"{path.relative_to(sample)}: {damage_file(rng, path, outside)}"

    def load(self, sample):
        return card_of_folder(sample).text


class Info(Target):
    """`hf-transcoders info` on a dictionary or set, as text and as JSON."""

    weight = 0.7

    def make(self, folder):
        base_dictionary().save_pretrained(folder / "one")
        base_set().save_pretrained(folder / "set")

    def load(self, sample):
        return [command("info", "--transcoders", str(sample)), command("info", "--transcoders", str(sample), "--json")]


class SavedReport(Target):
    """An evaluation's numbers, in a file and written into configurations."""

    weight = 1.5
    keeps_nan = True
    writes = ("dictionary/*/config.json",)

    def make(self, folder):
        folder = folder / "report"
        folder.mkdir()
        report = sample_report()
        report.save_json(folder / "evaluation.json")
        base_set().save_pretrained(folder / "dictionary")

    def damage(self, rng, sample, outside):
        choices = ["evaluation.json"] * 5 + ["dictionary/transcoder_set.json", f"dictionary/{NAME}/config.json"]
        path = sample / rng.choice(choices)
        return f"{path.relative_to(sample)}: {damage_file(rng, path, outside)}"

    def load(self, sample):
        report = EvaluationReport.load_json(sample / "evaluation.json")
        report.save_into(sample / "dictionary")
        return report

    def use(self, loaded, work):
        fronts = pareto_fronts(measured_in(loaded, "run"))
        page = write_report(work / "report.html", title="t", history=[], report=loaded)
        return [loaded.to_text(), loaded.markdown(), loaded.columns(), loaded.protocol_lines(), loaded.to_dict(),
                [loaded.of(name) for name in loaded.dictionaries], len(fronts), page.read_text(encoding="utf-8")]  # fmt: skip


class Graph(Target):
    weight = 2.5
    keeps_nan = True

    def make(self, folder):
        from hf_transcoders.circuits import attribution_graph

        prompt = tiny_tokens(1, 6)[0].tolist()
        graph = attribution_graph(
            tiny_model("llama"),
            base_set(),
            prompt,
            targets=[7, (5, 9)],
            max_features=8,
            edges_per_node=20,
            progress=False,
        )
        graph.save_pretrained(folder / "graph")

    def load(self, sample):
        from hf_transcoders.circuits.graphs import AttributionGraph

        return AttributionGraph.from_pretrained(sample)

    def use(self, loaded, work):
        pruned = loaded.prune(0.9, 0.99)
        page, viewer = loaded.to_html(work / "graph.html"), pruned.to_viewer_json(work / "graph.json")
        pruned.save_pretrained(work / "again")
        scores = loaded.scores()
        if not all(0 <= value <= 1 for value in scores.values()):
            raise ArithmeticError(f"scores are shares, not {scores}")
        return [scores, loaded.influence(), loaded.row_residuals(), loaded.weight, pruned.num_nodes,
                [loaded.label(number) for number in range(loaded.num_nodes)], [loaded.incoming(n) for n in range(3)],
                page.read_text(encoding="utf-8"), viewer.read_text(encoding="utf-8")]  # fmt: skip


class PageLabels(Target):
    """What the page of a graph saves."""

    weight = 0.5

    def make(self, folder):
        (folder / "saved").mkdir()
        saved = {
            "format": "hf_transcoders graph labels",
            "version": 1,
            "labels": {"layers.0.mlp.transcoder": {"3": "plural nouns", "12": "␣ <b>"}},
            "graphs": [{"prompt": "a b", "pins": ["0_3_1", "1_7_2"], "groups": [{"name": "both", "members": ["0_3_1"]}]}],
        }  # fmt: skip
        (folder / "saved" / "labels.json").write_text(json.dumps(saved), encoding="utf-8")

    def load(self, sample):
        from hf_transcoders.circuits.graphs.page_labels import read_labels

        return read_labels(sample / "labels.json")

    def use(self, loaded, work):
        from hf_transcoders.circuits.graphs.page_data import page_data
        from hf_transcoders.reports.graph import write_graph
        from tests.circuits.graphs.random_graph import random_graph

        page = write_graph(work / "graph.html", {**page_data(random_graph(features=1)), "saved": loaded})
        return [loaded, page.read_text(encoding="utf-8")]


class PatchFile(Target):
    weight = 0.8
    keeps_nan = True

    def make(self, folder):
        from tests.circuits.patching.test_results import result

        for name, source in (("share", True), ("unit", False)):
            (folder / name).mkdir()
            result(source=source).to_json(folder / name / "result.json")

    def load(self, sample):
        from hf_transcoders.circuits.patching import PatchResult

        return PatchResult.from_json(sample / "result.json")

    def use(self, loaded, work):
        loaded.to_csv(work / "result.csv")
        loaded.to_json(work / "again.json")
        return [
            loaded.effects,
            loaded.intervals(resamples=20),
            loaded.top(3),
            loaded.top(2, largest=True),
            loaded.to_dict(),
            loaded.shape,
        ]


class Baseline(Target):
    """What a drift probe keeps of the model before training."""

    weight = 0.7

    def make(self, folder):
        (folder / "baseline").mkdir()
        self.base = tiny_model("llama")
        rows = [{"input_ids": row} for row in tiny_tokens(8, 16)]
        self.probe = DriftProbe(base_set(), rows, max_kl_tokens=32)
        self.probe.take_baseline(self.base)
        self.probe.save_baseline(folder / "baseline" / "baseline.safetensors")
        # Compared with a model that has moved: with itself every mistake could cancel.
        self.moved = copy.deepcopy(self.base)
        with torch.no_grad():
            for parameter in self.moved.parameters():
                parameter.mul_(1.05)

    def load(self, sample):
        self.probe.load_baseline(sample / "baseline.safetensors")
        return self.probe

    def use(self, loaded, work):
        report = loaded.measure(self.moved)
        return [report.to_text(), report.to_dict(), report.scalars()]


class Checkpoints(Target):
    """Finding the checkpoint to go on from."""

    weight = 1.5

    def make(self, folder):
        train(folder / "run", resume=False)

    def damage(self, rng, sample, outside):
        checkpoint = sample / rng.choice(["checkpoint-4", "checkpoint-4", "checkpoint-2"])
        what = super().damage(rng, checkpoint, outside)
        if rng.random() < 0.6 and (checkpoint / "checkpoint.json").is_file():
            # With a manifest that fits, the readers that come after it must notice.
            partial = sample / ".partial" / checkpoint.name
            partial.parent.mkdir()
            checkpoint.rename(partial)
            commit(partial, checkpoint)
            partial.parent.rmdir()
            what += ", manifest made anew"
        return f"{checkpoint.name}/{what}"

    def load(self, sample):
        found = find_checkpoint(sample)
        return None if found is None else found.name


class Resume(Checkpoints):
    """Going on from it: a damaged checkpoint is passed over or refused, or the run ends as it would have."""

    weight = 0.6
    writes = ("*",)

    def make(self, folder):
        train(folder / "run", resume=False)
        shutil.rmtree(folder / "run" / "checkpoint-6")

    def load(self, sample):
        trainer = train(sample, resume=True)
        logs = [
            {key: value for key, value in log.items() if "second" not in key and "time" not in key}
            for log in trainer.state.log_history
        ]
        return [trainer.model.state_dict(), logs, trainer.state.global_step]


def train(folder: Path, resume: bool) -> TranscoderTrainer:
    arguments = TranscoderTrainingArguments(
        str(folder), max_steps=6, save_steps=2, per_device_train_batch_size=32, harvest_batch_size=8, buffer_tokens=64,
        logging_steps=2, use_cpu=True, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    trainer = TranscoderTrainer(
        base_dictionary(activation="batchtopk"), tiny_model("llama"), arguments, token_rows(16)
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=resume or None)
    return trainer


class Runs(Target):
    """What runs have recorded, read by the library and by `hf-transcoders runs`."""

    weight = 1.5
    keeps_nan = True

    def make(self, folder):
        from hf_transcoders.tracking.local import LocalTracker

        for number in (1, 2):
            run = folder / "runs" / f"run-{number}"
            tracker = LocalTracker(run)
            tracker.start(
                {
                    "name": f"run {number}",
                    "base_model": "some/base",
                    "dictionaries": {NAME: {"k": 4, "activation": "topk"}},
                    "arguments": {"seed": number},
                }
            )
            for step in (1, 2, 3):
                tracker.scalars(
                    step, {f"train/{NAME}/l0": 4.0, f"train/{NAME}/fvu": 0.5 / step, "train/loss": 1.0 / step}
                )
            tracker.scalars(
                3, {f"eval/{NAME}/l0": 4.0, f"eval/{NAME}/fvu": 0.2, f"eval/{NAME}/ce_recovered_mean": 0.9}
            )
            tracker.histogram(3, f"{NAME}/density", [0.1, 1.0], [5])
            tracker.table(3, "features", [{"feature": 3, "promotes": "a"}])
            tracker.finish("finished")
            sample_report().save_json(run / "evaluation.json")
            base_dictionary().save_pretrained(run)

    def damage(self, rng, sample, outside):
        files = sorted(path for path in sample.rglob("*") if path.suffix in (".json", ".jsonl"))
        path = rng.choice(files)
        return f"{path.relative_to(sample)}: {damage_file(rng, path, outside)}"

    def load(self, sample):
        return sample, list(find_runs(sample))

    def use(self, loaded, work):
        sample, runs = loaded
        folders = [str(run.folder) for run in runs]
        return [
            [[run.name, run.status == "x", run.measured() and 1, run.latest(), run.history("train/loss"), run.table("features"), run.problems == []] for run in runs],
            command("runs", "list", str(sample)), command("runs", "list", str(sample), "--json"),
            command("runs", "compare", *folders),
        ]  # fmt: skip


class Pareto(Runs):
    """Their fronts, as page, picture and table; the picture takes most of a second."""

    weight = 0.2

    def use(self, loaded, work):
        return command("runs", "pareto", str(loaded[0]), "--csv", "--output", str(work / "pareto"))


class CommandLineFile(Target):
    """The YAML file of `hf-transcoders train --config`."""

    weight = 1.0

    def make(self, folder):
        (folder / "yaml").mkdir()
        (folder / "yaml" / "train.yaml").write_text(
            "model: some/model\ndata: docstrings\nlayers: [1, 2]\nkind: transcoder\nnum_features: 64\nk: 4\noutput_dir: runs/x\n"
            "max_tokens: 6400\nlearning_rate: 1e-3\nwarmup_steps: 0.1\nuse_cpu: true\nreport_to: none\nseed: 3\n"
            "activation: topk\nskip_connection: false\nlr_scheduler_type: linear\nsave_steps: 0.5\n"
        )

    def load(self, sample):
        args = quietly(train_command.parse, ["--config", str(sample / "train.yaml")], "hf-transcoders train")
        training = {key: value for key, value in args.training.to_dict().items() if key not in ("logging_dir",)}
        return [vars(args.options), training]


class Texts(Target):
    """Documents in every kind of file."""

    weight = 0.8

    def make(self, folder):
        texts = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(9)) for i in range(12)]
        for kind in ("txt", "json", "jsonl", "csv", "parquet"):
            (folder / kind).mkdir()
        (folder / "txt" / "a.txt").write_text("\n\n".join(texts))
        rows = [{"text": text, "number": number} for number, text in enumerate(texts)]
        (folder / "json" / "a.json").write_text(json.dumps(rows))
        (folder / "jsonl" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "csv" / "a.csv").write_text(
            "text,number\n" + "".join(f"{row['text']},{row['number']}\n" for row in rows)
        )
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "parquet" / "a.parquet")

    def load(self, sample):
        (path,) = [path for path in sample.iterdir() if path.name.startswith("a.")] or [sample / f"a.{sample.name}"]
        return load_texts(path)

    def use(self, loaded, work):
        return [loaded.column_names, list(loaded)]


class SavedTask(Target):
    weight = 1.2

    def make(self, folder):
        self.model = tiny_model("llama")
        example_task().save(folder / "task")

    def load(self, sample):
        return Task.load(sample)

    def use(self, loaded, work):
        tokens, answers = loaded.tokens(), loaded.answers()
        found = measure(self.model, loaded)
        loaded.save(work / "again")
        return [tokens.input_ids, vars(answers), loaded.rows_by_length(), repr(loaded), loaded.position_names,
                {which: {name: value.mean for name, value in values.items()} for which, values in found.items() if isinstance(values, dict)}]  # fmt: skip


def example_task() -> Task:
    clean = ["the cat sat on the", "the dog ran on the"]
    corrupted = ["the dog sat on the", "the cat ran on the"]
    return Task.from_pairs(
        tokenizer(), clean, corrupted, answers=[[" mat"], [" tree"]], wrong_answers=[[" tree"], [" house"]],
        positions={"who": ["cat", "dog"]}, name="who", description="Who sat where.",
    )  # fmt: skip


_TOKENIZER = None


def tokenizer():
    """Words and the spaces between them, as large as the tiny models' vocabulary."""
    global _TOKENIZER
    if _TOKENIZER is None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        pieces = ["<unk>", "<s>", "</s>", *(f"Ġ{word}" for word in WORDS), *WORDS]
        pieces += [f"w{number}" for number in range(len(pieces), 128)]
        inner = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        _TOKENIZER = PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
    return _TOKENIZER


class ImportedTask(Target):
    """Tasks in the files of other libraries."""

    weight = 1.5

    def make(self, folder):
        self.model = tiny_model("llama")
        clean, other = ["the cat sat on the", "the dog ran on the"], ["the dog sat on the", "the cat ran on the"]
        prompts = [
            {"clean": c, "corrupt": o, "answers": [" mat"], "wrong_answers": [" tree"]}
            for c, o in zip(clean, other, strict=True)
        ]
        ids = [tokenizer()(word).input_ids[-1] for word in (" mat", " tree")]
        for name in ("auto-circuit", "eap", "pairs"):
            (folder / name).mkdir()
        (folder / "auto-circuit" / "task.json").write_text(
            json.dumps({"word_idxs": {"end": 4, "who": 1}, "prompts": prompts})
        )
        lines = [f"{c},{o},{ids[0]},{ids[1]}" for c, o in zip(clean, other, strict=True)]
        (folder / "eap" / "task.csv").write_text(
            "\n".join(["clean,corrupted,correct_idx,incorrect_idx", *lines]) + "\n"
        )
        for name, texts in (("clean", clean), ("corrupted", other)):
            (folder / "pairs" / f"{name}.json").write_text(
                json.dumps([[text, " mat" if name == "clean" else " tree"] for text in texts])
            )

    def load(self, sample):
        if sample.name == "eap":
            return from_eap_csv(sample / "task.csv", tokenizer())
        if sample.name == "pairs":
            return from_pairs_json(sample / "clean.json", tokenizer(), sample / "corrupted.json")
        return from_auto_circuit_json(sample / "task.json", tokenizer())

    def use(self, loaded, work):
        found = measure(self.model, loaded)
        return [loaded.tokens().input_ids, vars(loaded.answers()), loaded.dataset[:], repr(loaded), list(found)]


class SweepState(Target):
    """The files of a sweep that has ended, which is asked to go on."""

    weight = 0.5
    writes = ("*",)

    def make(self, folder):
        self.base = tiny_model("llama")
        self.configs = {NAME: base_dictionary().config, "b": base_dictionary(k=8).config}
        self.sweep(folder / "sweep", resume=False)

    def damage(self, rng, sample, outside):
        path = sample / rng.choice([PLAN_FILE, EVALUATION_FILE, "trainer_state.json"])
        return f"{path.relative_to(sample)}: {damage_file(rng, path, outside)}"

    def sweep(self, folder, resume):
        arguments = sweep_arguments(folder, max_steps=2)
        with contextlib.redirect_stdout(io.StringIO()):
            return run_sweep(self.configs, self.base, arguments, token_rows(16), token_rows(4, seed=1), resume=resume)

    def load(self, sample):
        return self.sweep(sample, resume=True)

    def use(self, loaded, work):
        return [loaded.report.to_text(), len(loaded.fronts), [path.name for path in loaded.files]]


class CachedActivations(Target):
    """Chunks that an earlier run has harvested: damaged ones are made again, or refused."""

    weight = 0.8

    def make(self, folder):
        self.rows = token_rows(8)
        self.load(folder / "cache")

    def load(self, sample):
        harvester = ActivationHarvester(tiny_model("llama"), self.rows, SITES, rows_per_chunk=4, cache_dir=sample)
        return [harvester.chunk(number) for number in range(harvester.num_chunks)]

    writes = ("*/chunk-*.safetensors",)


class TokenRows(Target):
    """Tokenized rows as a dataset has them, of whatever types and lengths."""

    weight = 1.0

    def make(self, folder):
        (folder / "rows").mkdir()
        rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in token_rows(5)]
        (folder / "rows" / "rows.json").write_text(json.dumps(rows))
        self.dictionary = base_dictionary()

    def damage(self, rng, sample, outside):
        path = sample / "rows.json"
        while True:
            new, what = damage_json(rng, path.read_text(), outside)
            try:
                # Text that is not JSON never becomes a dataset, so no reader of the library meets it.
                value = json.loads(new)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, list):
                path.write_text(json.dumps(value))
                return what

    def load(self, sample):
        return json.loads((sample / "rows.json").read_text())

    def use(self, loaded, work):
        evaluator = TranscoderEvaluator(tiny_model("llama"), loaded, max_tokens=60, max_loss_tokens=40, progress=False)
        report = evaluator.evaluate({NAME: self.dictionary})
        harvester = ActivationHarvester(tiny_model("llama"), loaded, SITES, rows_per_chunk=2)
        return [report.to_text(), [harvester.chunk(number) for number in range(harvester.num_chunks)]]


class Commands(Target):
    """`hf-transcoders evaluate` and `features` on damaged dictionaries, to the end."""

    weight = 0.3
    writes = ("*",)

    def make(self, folder):
        self.workplace = fill_workplace(folder.parent / "workplace")
        for name, saved in (("one", base_dictionary()), ("set", base_set())):
            saved.save_pretrained(folder / name)

    def load(self, sample):
        model, text = str(self.workplace / "model"), str(self.workplace / "test.txt")
        shared = [
            "--transcoders",
            str(sample),
            "--model",
            model,
            "--data",
            text,
            "--max-tokens",
            "100",
            "--device",
            "cpu",
        ]
        found = [command("evaluate", *shared, "--save", "--json")]
        if sample.name == "one":
            found.append(command("features", *shared, "--max-features", "3"))
        return found


def command(*words: str) -> str:
    """What a command prints; what it raises is raised."""
    code, text = quietly(_run, [*words, "--debug"])
    if code:
        raise TranscoderError(f"The command ended with {code}.")
    return text


def _run(words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(words)
    return code, out.getvalue()


def quietly(function, *args):
    """Runs something that may end in argparse's message, which is one line after the usage."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            return function(*args)
    except SystemExit as error:
        lines = err.getvalue().strip().splitlines()
        raise TranscoderError(lines[-1] if lines else f"exit {error.code}") from error


TARGETS: dict[str, Target] = {
    "dictionary": Dictionary(),
    "set": Set(),
    "card": Card(),
    "info": Info(),
    "report": SavedReport(),
    "graph": Graph(),
    "labels": PageLabels(),
    "patch": PatchFile(),
    "baseline": Baseline(),
    "checkpoint": Checkpoints(),
    "resume": Resume(),
    "runs": Runs(),
    "pareto": Pareto(),
    "yaml": CommandLineFile(),
    "texts": Texts(),
    "task": SavedTask(),
    "imports": ImportedTask(),
    "sweep": SweepState(),
    "cache": CachedActivations(),
    "rows": TokenRows(),
    "commands": Commands(),
    "foreign": ForeignDictionary(),
    "foreignset": ForeignSet(),
    "foreignclt": ForeignCrossLayer(),
}
