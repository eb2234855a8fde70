"""Model cards: metadata that the Hub understands, a usage example that runs, numbers that are those of the report."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_transcoders import (
    EvaluationReport,
    TranscoderConfig,
    TranscoderEvaluator,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
)
from hf_transcoders.cli import main
from hf_transcoders.evaluation.evaluation_report import HEADLINE_METRICS, METRICS, format_number
from hf_transcoders.hub import card_of_folder, make_card, render_card
from hf_transcoders.hub.cards import is_generated
from hf_transcoders.models import saved_files
from hf_transcoders.text.markdown import escape
from hf_transcoders.tracking import Run
from tests.data.test_harvest import token_rows
from tests.tiny_models import VOCAB_SIZE, tiny_model


READ, WRITE = "layers.1.mlp.in", "layers.1.mlp.branch"
NAME = "layers.1.mlp.transcoder"
TEMPLATE = Path(__file__).parents[2] / "model_cards" / "TEMPLATE.md"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny language model in a folder of its own, with a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    model = tiny_model("llama")
    model.save_pretrained(folder)
    model.config.name_or_path = str(folder)
    return model


def dictionary(base, read=READ, write=WRITE, seed=0, **changes):
    torch.manual_seed(seed)
    changes = {"num_features": 64, "k": 4, "decoder_init": "random", **changes}
    return TranscoderModel(TranscoderConfig.for_model(base, read, write, **changes))


def three(base):
    return TranscoderSet(
        [
            dictionary(base),
            dictionary(base, skip_connection=True),
            dictionary(base, WRITE, activation="batchtopk", k=6),
        ]
    )


def trainer_for(base, folder, model, rows=None, **changes):
    changes = {
        "max_steps": 40,
        "per_device_train_batch_size": 32,
        "buffer_tokens": 128,
        "logging_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **changes,
    }
    return TranscoderTrainer(
        model,
        base,
        TranscoderTrainingArguments(str(folder), **changes),
        train_dataset=rows or token_rows(64),
        eval_dataset=rows or token_rows(8, seed=1),
    )


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Folders of a trained single dictionary and a trained set, with their trainers and reports."""
    made = {}
    for kind, model in (("single", dictionary(base)), ("set", three(base))):
        folder = tmp_path_factory.mktemp(kind)
        trainer = trainer_for(base, folder, model)
        trainer.train()
        report = trainer.evaluation_report()
        trainer.save_model()
        trainer.save_state()
        made[kind] = folder, trainer, report
    return made


def load(folder):
    return (TranscoderSet if (folder / "transcoder_set.json").exists() else TranscoderModel).from_pretrained(folder)


# ------------------------------------------------------------------------------------------------ metadata


@pytest.mark.parametrize("kind", ["single", "set"])
def test_metadata_reads_back_with_the_numbers_of_the_report(trained, kind):
    folder, trainer, report = trained[kind]
    data = ModelCard.load(folder / "README.md").data
    assert data.library_name == "hf_transcoders" and data.license is None
    assert "transcoder" in data.tags and "mechanistic-interpretability" in data.tags
    assert ("sparse-autoencoder" in data.tags) == (kind == "set")
    found = {(r.metric_type, r.metric_name): r.metric_value for r in data.eval_results}
    expected = {
        (metric, METRICS[metric] + (f" ({name})" if kind == "set" else "")): values[metric]
        for name, values in report.metrics.items()
        for metric in HEADLINE_METRICS
    }
    assert found == expected


def test_only_ids_of_the_hub_are_named_as_such(base):
    model = dictionary(base)
    model.config.training_summary = {"tokens": 1, "dataset": "wiki", "dataset_id": "Salesforce/wikitext"}
    model.config.base_model_name_or_path = "me/base"
    data = ModelCard(render_card(model, repo_id="me/it", license="mit")).data
    assert (data.base_model, data.base_model_relation, data.license) == ("me/base", "adapter", "mit")
    assert data.datasets == ["Salesforce/wikitext"]
    for path in ("/home/me/base", "../base", "C:\\base", "runs/me/base"):
        model.config.base_model_name_or_path = path
        model.config.training_summary["dataset_id"] = path
        data = ModelCard(render_card(model)).data
        assert data.base_model is None and data.datasets is None and "base_model_relation" not in data


def test_a_downloaded_dataset_is_named_by_its_id(base, tmp_path):
    from datasets import Dataset

    rows = Dataset.from_list(token_rows(8))
    rows.info.download_checksums = {"hf://datasets/me/text@0123abc/train.parquet": {}}
    rows = rows.map(lambda row: row)
    trainer = trainer_for(base, tmp_path, dictionary(base), rows, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.datasets == ["me/text"] and {r.dataset_type for r in data.eval_results} == {"me/text"}


def test_tags_of_users_and_trackers_are_kept(base):
    model = dictionary(base)
    model.add_model_tags(["trackio", "trackio:https://example.org/space"])
    tags = ModelCard(render_card(model)).data.tags
    assert tags[-2:] == ["trackio", "trackio:https://example.org/space"]
    assert "trackio" not in ModelCard(render_card(dictionary(base))).data.tags


# ------------------------------------------------------------------------------------------------ usage


@pytest.mark.parametrize("kind", ["single", "set"])
def test_the_usage_example_runs(trained, base, kind, monkeypatch, capsys):
    folder, trainer, _ = trained[kind]
    for at, repo_id in ((folder, None), (folder.parent, f"./{folder.name}")):
        card = render_card(trainer.model, repo_id=repo_id)
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        monkeypatch.chdir(at)
        names = {}
        exec(code, names)
        printed = capsys.readouterr().out
        # The features that it shows are those of the first dictionary on the model's own activations.
        first = trainer.model if kind == "single" else trainer.model[NAME]
        seen = {}
        handle = base.model.layers[1].mlp.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(x=args[0]))
        base(**names["inputs"])
        handle.remove()
        assert str(first.eval()(seen["x"]).features[0, -1].topk(5).indices.tolist()) in printed
        assert not torch.equal(names["logits"], base(**names["inputs"]).logits)


def test_the_usage_example_of_places_that_cannot_be_written_to(base, tmp_path, monkeypatch, capsys):
    for changes in ({"read": "layers.1.resid_mid", "write": "layers.1.resid_mid"}, {"write": None}):
        model = dictionary(base, **changes)
        if changes["write"] is None:
            model.config.input_site = model.config.output_site = None
        model.save_pretrained(tmp_path)
        (code,) = re.findall(r"```python\n(.*?)```", render_card(model), re.DOTALL)
        monkeypatch.chdir(tmp_path)
        exec(code, {})
        assert "torch.Size([1, 64]) torch.Size([1, 32])" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ numbers and words


@pytest.mark.parametrize("kind", ["single", "set"])
def test_the_table_holds_every_number_of_the_report(trained, kind):
    folder, _, report = trained[kind]
    card = (folder / "README.md").read_text()
    for metric, heading in METRICS.items():
        row = " | ".join(format_number(values[metric]) for values in report.metrics.values())
        assert f"| {heading} | {row} |" in card
    assert f"{report.protocol['fidelity_tokens']:,} for fidelity" in card


def test_the_log_holds_numbers_of_the_run(trained):
    folder, trainer, _ = trained["single"]
    card = (folder / "README.md").read_text()
    logs = [log for log in trainer.state.log_history if f"{NAME}/fvu" in log]
    assert len(logs) == 20 and "12 of its 20 entries" in card
    for log in (logs[0], logs[-1]):
        assert f"| {log['step']} | {log['tokens']:,} | {format_number(log['loss'])} |" in card
        assert f"| {format_number(log[f'{NAME}/fvu'])} | {format_number(log[f'{NAME}/l0'])} |" in card
    rows = re.findall(r"^\| (\d+) \| [\d,]+ \|", card, re.MULTILINE)
    assert len(rows) == 12 and rows == sorted(rows, key=int)


def test_missing_pieces_are_named(base):
    card = render_card(dictionary(base))
    assert "**Not evaluated**" in card and "training log was not recorded" in card
    assert "The training of these weights was not recorded" in card
    assert "model-index" not in card and "FVU" not in card
    # One of two is measured.
    both = TranscoderSet({"a": dictionary(base), "b": dictionary(base, seed=1)})
    report = TranscoderEvaluator(base, token_rows(4), progress=False).evaluate({"a": both["a"]})
    card = render_card(both, report=report)
    assert "Not evaluated: `b`." in card and "| FVU | " + format_number(report.metrics["a"]["fvu"]) in card


def test_weights_that_are_not_those_of_the_name_are_said(base):
    model = dictionary(base)
    assert "were not those of that name" not in render_card(model)
    model.config.base_model_name_or_path = "someone/model"
    model.config.base_model_weights = "the 4-bit copy of <a> package"
    card = render_card(model)
    assert f"were not those of that name, but of {escape('the 4-bit copy of <a> package')}: with" in " ".join(
        card.split()
    )
    assert "<a>" not in card


def test_numbers_that_are_not_finite_are_left_out(base, tmp_path):
    model = dictionary(base)
    report = TranscoderEvaluator(base, token_rows(4), progress=False).evaluate(model)
    report.metrics[NAME]["ce_recovered_mean"] = math.nan
    model.save_pretrained(tmp_path)
    report.save_into(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)
    assert config["evaluation"]["metrics"]["ce_recovered_mean"] is None
    card = render_card(TranscoderModel.from_pretrained(tmp_path))
    assert card == render_card(model, report=report)
    assert "| CE recovered (mean) | - |" in card and ".nan" not in card
    assert "ce_recovered_mean" not in {r.metric_type for r in ModelCard(card).data.eval_results}


def test_dictionaries_measured_under_different_protocols_stand_apart(base):
    both = TranscoderSet({"a": dictionary(base), "b": dictionary(base, seed=1)})
    for name, rows in (("a", 4), ("b", 6)):
        report = TranscoderEvaluator(base, token_rows(rows), progress=False).evaluate({name: both[name]})
        both[name].config.evaluation = report.of(name)
    card = render_card(both)
    assert card.count("**Protocol.**") == 2 and "36 for fidelity" in card and "54 for fidelity" in card


def test_numbers_of_the_whole_set(base):
    both = TranscoderSet([dictionary(base), dictionary(base, "layers.2.mlp.in", "layers.2.mlp.branch")])
    evaluator = TranscoderEvaluator(base, token_rows(4), progress=False)
    missing = "the language model with all dictionaries in place at once"
    assert missing in render_card(both, report=evaluator.evaluate(both))
    report = evaluator.evaluate(both, together=True)
    card = render_card(both, report=report)
    assert missing not in card
    found = {r.metric_name: r.metric_value for r in ModelCard(card).data.eval_results}
    assert found["KL to original (all together)"] == report.together["kl"]


def test_a_set_of_many_is_named_once_and_measured_whole(base):
    places = [("mlp.in", "mlp.branch"), ("attn.in", "attn.branch"), ("resid_pre", "resid_post")]
    many = TranscoderSet(
        dictionary(base, f"layers.{i}.{read}", f"layers.{i}.{write}") for i in range(3) for read, write in places
    )
    report = TranscoderEvaluator(base, token_rows(4), progress=False).evaluate(many, together=True)
    made = make_card(many, report=report)
    card = made.text
    # One sparsity and nine histograms make no picture.
    assert not made.files
    # The index has the whole, the tables have each, the rest speaks of all of them.
    results = ModelCard(card).data.eval_results
    assert {r.metric_name for r in results} == {
        f"{METRICS[metric]} (all together)" for metric in HEADLINE_METRICS if metric in report.together
    }
    for name, metrics in report.columns().items():
        (fidelity, losses) = re.findall(rf"^\| {re.escape(escape(name))} \| (.*) \|$", card, re.MULTILINE)
        assert fidelity.split(" | ")[1] == format_number(metrics.get("fvu"))
        assert losses.split(" | ")[0] == format_number(metrics["ce_spliced"])
    assert "All of them:\n\n```text\nfeatures" in card and "<summary>Each of the 9</summary>" in card
    together = report.together
    assert f"With all 9 in place at once they recover **{together['ce_recovered_zero']:.1%} of the loss**" in card
    assert f"after {together['top1_agreement']:.1%} of the tokens (KL to the original {together['kl']:.3f})" in card
    never = {name: entry["density_histogram"]["never_fired"] for name, entry in report.dictionaries.items()}
    most = max(never, key=never.get)
    silent = sum(count > 0 for count in never.values())
    assert f"some in {silent} of 9 dictionaries, at most {never[most]} of 64 in `{most}`." in card


NASTY = (
    "<script>alert(1)</script> | [x](javascript:y) `code` **b**\n---\nlicense: mit\n# heading: {a: !b} \x00\u2028end"
)


def test_text_from_outside_cannot_become_markup_or_metadata(base):
    model = dictionary(base)
    report = TranscoderEvaluator(
        base, token_rows(4), progress=False, dataset_name=NASTY, dataset_split=NASTY
    ).evaluate(model)
    report.protocol["base_model"] = NASTY
    model.config.base_model_name_or_path = NASTY
    model.config.base_model_revision = NASTY
    model.config.training_summary = {"tokens": 1, "dataset": NASTY, "optimizer": NASTY, "versions": {NASTY: NASTY}}
    run = Run(
        NASTY,
        scalars=[{"step": 1, f"train/{NAME}/fvu": 0.5}],
        alerts=[{"step": 1, "level": "warn", "title": NASTY, "text": ""}],
    )
    card = make_card(model, report=report, run=run, tags=[NASTY]).text
    data = ModelCard(card).data
    assert data.license is None and data.library_name == "hf_transcoders"
    assert data.eval_results[0].dataset_name.startswith("<script>")
    _, _, body = card[4:].partition("\n---\n")
    # Outside of code, where nothing is markup.
    prose = re.sub(r"```.*?\n```|(`+)(?!`).*?(?<!`)\1(?!`)", "", body, flags=re.DOTALL)
    assert "<script" not in prose and "[x](" not in prose and "**b**" not in prose
    assert "&lt;script&gt;" in prose
    assert body.startswith("\n# ") and prose.count("\n# ") == 1
    tables = [line for line in prose.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {3}


def test_a_renderer_makes_no_element_of_text_from_outside(base):
    markdown_it = pytest.importorskip("markdown_it")
    model = dictionary(base)
    model.config.training_summary = {"tokens": 1, "dataset": NASTY}
    model.config.base_model_name_or_path = NASTY
    html = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(render_card(model))
    assert "<script" not in html and "javascript:" not in re.sub(
        r"<code.*?</code>", "", html, flags=re.DOTALL
    ).replace("](javascript:", "")
    assert not re.search(r"href=.javascript", html)


# ------------------------------------------------------------------------------------------------ files


def test_template_is_the_one_in_model_cards():
    import hf_transcoders.hub

    packaged = Path(hf_transcoders.hub.__file__).parent / "templates" / "model_card.md"
    assert packaged.read_bytes() == TEMPLATE.read_bytes()


@pytest.mark.parametrize("kind", ["single", "set"])
def test_saving_and_loading_gives_the_same_card(trained, kind, tmp_path):
    folder, trainer, report = trained[kind]
    written = (folder / "README.md").read_text()
    assert card_of_folder(folder).text == written == card_of_folder(folder, report=report).text
    load(folder).save_pretrained(tmp_path)
    assert render_card(load(tmp_path)) == render_card(trainer.model) == render_card(trainer.model, report=report)


def test_pictures_lie_beside_the_card(trained):
    folder, trainer, _ = trained["set"]
    shown = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", (folder / "README.md").read_text())
    names = ("fvu", "ce_recovered_zero", "density", "training-fvu")
    assert shown == [f"assets/{name}.svg" for name in names]
    assert sorted(shown) == sorted(str(p.relative_to(folder)) for p in folder.glob("assets/*"))
    assert all((folder / path).read_text().startswith("<svg ") for path in shown)
    assert "](assets/" not in render_card(trainer.model)


def test_an_edited_card_stays(trained, tmp_path):
    card = card_of_folder(trained["single"][0])
    path = card.save(tmp_path)
    assert path == card.save(tmp_path) == tmp_path / "README.md" and is_generated(path.read_text())
    path.write_text(path.read_text().replace("# Transcoder", "# My transcoder"))
    edited = path.read_text()
    assert card.save(tmp_path) == tmp_path / "README.generated.md"
    assert path.read_text() == edited and (tmp_path / "README.generated.md").read_text() == card.text


def test_checkpoints_have_no_card(base, tmp_path):
    trainer = trainer_for(base, tmp_path, dictionary(base), save_strategy="steps", save_steps=20)
    trainer.train()
    assert (tmp_path / "checkpoint-20").is_dir() and not list(tmp_path.rglob("README*"))


# ------------------------------------------------------------------------------------------------ numbers travel


def test_numbers_belong_to_the_weights_that_were_measured(base, tmp_path):
    trainer = trainer_for(base, tmp_path, dictionary(base), save_strategy="steps", save_steps=20)
    trainer.evaluate()
    assert trainer.model.config.evaluation is not None
    trainer.train()
    assert trainer.model.config.evaluation is None
    metrics = trainer.evaluate()
    trainer.save_model()
    saved = TranscoderModel.from_pretrained(tmp_path).config.evaluation
    assert saved["metrics"]["fvu"] == metrics[f"eval_{NAME}/fvu"] and saved["protocol"]["loss_tokens"] == 64
    # Weights of a checkpoint come without the numbers of others.
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-40"))
    assert trainer.model.config.evaluation is None


def evaluate_and_save(folder):
    """Evaluate the set in a folder on a text beside it, with `--save`; gives the exit code."""
    (folder / "text.txt").write_text("\n\n".join(f"w{i % 100 + 4} w{i % 90 + 5} w9 w10" for i in range(300)))
    return main(
        [
            "evaluate", "--transcoders", str(folder / "set"), "--data", str(folder / "text.txt"), "--device", "cpu",
            "--dtype", "float32", "--sequence-length", "16", "--max-tokens", "200", "--loss-tokens", "100", "--json",
            "--save",
        ]
    )  # fmt: skip


def test_evaluate_on_the_command_line_saves_numbers_and_card(trained, base, tmp_path, capsys):
    folder, trainer, _ = trained["set"]
    trainer.model.save_pretrained(tmp_path / "set")
    for name in trainer.model:
        path = tmp_path / "set" / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluation": None}))
    weights = {p: p.read_bytes() for p in (tmp_path / "set").rglob("*.safetensors")}
    assert evaluate_and_save(tmp_path) == 0
    report = json.loads(capsys.readouterr().out)
    loaded = TranscoderSet.from_pretrained(tmp_path / "set")
    for name, entry in report["dictionaries"].items():
        assert loaded[name].config.evaluation["metrics"] == entry["metrics"]
        assert loaded[name].config.evaluation["protocol"] == report["protocol"]
    assert {p: p.read_bytes() for p in weights} == weights
    fvu = [entry["metrics"]["fvu"] for entry in report["dictionaries"].values()]
    results = ModelCard.load(tmp_path / "set" / "README.md").data.eval_results
    assert [r.metric_value for r in results if r.metric_type == "fvu"] == fvu
    assert main(["evaluate", "--transcoders", "nobody/nothing", "--save"]) != 0
    assert "download" in capsys.readouterr().err


@pytest.fixture
def reads(monkeypatch):
    """Names of the tensors that are read from files of weights, in order."""
    names = []

    class Recording:
        def __init__(self, opened):
            self.opened = opened

        def __getattr__(self, name):
            return getattr(self.opened, name)

        def get_tensor(self, name):
            names.append(name)
            return self.opened.get_tensor(name)

        def get_slice(self, name):
            return RecordingSlice(self.opened.get_slice(name), name)

    class RecordingSlice:
        def __init__(self, opened, name):
            self.opened, self.name = opened, name

        def __getattr__(self, name):
            return getattr(self.opened, name)

        def __getitem__(self, key):
            names.append(self.name)
            return self.opened[key]

    opened = saved_files.safe_open
    monkeypatch.setattr(saved_files, "safe_open", lambda *args, **kwargs: Recording(opened(*args, **kwargs)))
    return names


@pytest.mark.parametrize("kind", ["set", "single"])
def test_a_card_of_a_folder_reads_no_weights(trained, reads, kind):
    folder, _, report = trained[kind]
    card = card_of_folder(folder, report=report)
    assert not reads and "`float32`" in card.text
    model = (TranscoderSet if kind == "set" else TranscoderModel).from_pretrained(folder)
    assert len(reads) == len(model.state_dict())


def test_evaluating_with_save_reads_weights_once(trained, reads, base, tmp_path, capsys):
    _, trainer, _ = trained["set"]
    trainer.model.save_pretrained(tmp_path / "set")
    assert evaluate_and_save(tmp_path) == 0
    assert (tmp_path / "set" / "README.md").exists() and len(reads) == len(trainer.model.state_dict())


def test_a_report_is_not_saved_into_the_wrong_folder(base, tmp_path):
    model = dictionary(base)
    report = TranscoderEvaluator(base, token_rows(4), progress=False).evaluate({"a": model, "b": model})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no dictionary a, b"):
        report.save_into(tmp_path)
    assert TranscoderModel.from_pretrained(tmp_path).config.evaluation is None


def test_configurations_without_the_field_load(base, tmp_path):
    dictionary(base).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["evaluation"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert TranscoderModel.from_pretrained(tmp_path).config.evaluation is None


# ------------------------------------------------------------------------------------------------ examples


@pytest.mark.parametrize("folder", sorted(p.parent for p in TEMPLATE.parent.glob("*/README.md")), ids=lambda p: p.name)
def test_an_example_card_is_what_its_records_give(folder):
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("make_examples", TEMPLATE.parent / "make_examples.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    card = module.card_of_record(folder)
    written = {str(p.relative_to(folder)): p.read_text() for p in folder.glob("assets/*")}
    assert {"README.md": card.text, **card.files} == {"README.md": (folder / "README.md").read_text(), **written}
    report = EvaluationReport.load_json(folder / "record" / "evaluation.json")
    for name, metrics in report.metrics.items():
        assert f"| {format_number(metrics['fvu'])}" in card.text, name


def test_there_are_examples():
    assert len(list(TEMPLATE.parent.glob("*/README.md"))) >= 3
