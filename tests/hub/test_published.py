"""Files that a push uploads: those of the dictionary, but no code, no files from elsewhere and no local paths."""

import json
import os
import random
import shutil

import pytest
from huggingface_hub import ModelCard

from hf_transcoders import TranscoderModel, TranscoderSet
from hf_transcoders.circuits.graphs import AttributionGraph
from hf_transcoders.cli.main import main
from hf_transcoders.errors import TranscoderError
from hf_transcoders.evaluation import EvaluationReport
from hf_transcoders.evaluation.evaluation_report import METRICS
from hf_transcoders.hub import card_of_folder, push_folder, render_card
from hf_transcoders.hub.public import public_name, public_text, public_values
from hf_transcoders.hub.push_files import with_remote_code
from hf_transcoders.hub.remote_code import AUTO_MAP, CODE_FILES
from hf_transcoders.tracking import LocalTracker
from tests.circuits.graphs.random_graph import random_graph

from .conftest import assert_same_function, make_dictionary, make_set


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def record(folder):
    tracker = LocalTracker(folder)
    tracker.start({"name": "run", "base_model": "/home/jo/client-secret/llama-ft"})
    tracker.scalars(1, {"train/loss": 1.0})
    tracker.finish("finished")


@pytest.fixture
def secret(tmp_path):
    """A file of the user that no push may take along."""
    path = tmp_path / "elsewhere" / "id_rsa"
    path.parent.mkdir()
    path.write_text(json.dumps({"step": 1, "secret": "TOPSECRET"}) + "\n")
    return path


def pushed(hub, repo_id="me/x"):
    files = hub.files(repo_id)
    for name, content in files.items():
        assert b"TOPSECRET" not in content, name
    return files


# ---------------------------------------------------------------------------- links


@pytest.mark.parametrize(
    "name",
    ["scalars.jsonl", "notes.jsonl", "alerts.jsonl", "run.json", "tables/features.jsonl", "images/chart.png"],
)
def test_records_that_are_links_stay_here(name, hub, secret, tmp_path):
    folder = tmp_path / "m"
    make_dictionary().save_pretrained(folder)
    record(folder)
    link = folder / "tracking" / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    main(["push", str(folder), "me/x"])
    assert f"tracking/{name}" not in pushed(hub)


def test_a_folder_of_records_that_is_a_link_stays_here(hub, secret, tmp_path):
    folder = tmp_path / "m"
    make_dictionary().save_pretrained(folder)
    record(folder)
    shutil.move(folder / "tracking", tmp_path / "elsewhere" / "tracking")
    (folder / "tracking").symlink_to(tmp_path / "elsewhere" / "tracking")
    assert main(["push", str(folder), "me/x"]) == 0
    assert not [name for name in pushed(hub) if name.startswith("tracking/")]


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "training_args.json", "evaluation.json", "README.md"]
)
def test_files_that_are_links_are_refused(name, hub, secret, tmp_path, capsys):
    folder = tmp_path / "m"
    make_dictionary().save_pretrained(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    assert main(["push", str(folder), "me/x"]) == 2
    assert "me/x" not in hub.repos or "TOPSECRET" not in str(pushed(hub))
    assert f"{name} is a link to a file outside of" in capsys.readouterr().err


def test_links_inside_the_folder_and_in_the_cache_of_the_hub_are_followed(hub, tmp_path):
    model = make_dictionary()
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "blob")
    (folder / "model.safetensors").symlink_to("blob")
    push_folder(folder, "me/x")
    assert_same_function(model, TranscoderModel.from_pretrained("me/x"))
    from huggingface_hub import snapshot_download

    snapshot = snapshot_download("me/x")
    assert os.path.islink(os.path.join(snapshot, "model.safetensors"))
    push_folder(snapshot, "me/y")
    assert_same_function(model, TranscoderModel.from_pretrained("me/y"))


def test_what_is_not_weights_does_not_go_as_weights(hub, tmp_path):
    make_dictionary().save_pretrained(tmp_path / "m")
    os.remove(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").write_text("TOPSECRET")
    (tmp_path / "m" / "README.md").write_text("# Mine\n")
    assert main(["push", str(tmp_path / "m"), "me/x"]) == 2
    make_dictionary(num_features=32).save_pretrained(tmp_path / "n")
    shutil.copy(tmp_path / "n" / "model.safetensors", tmp_path / "m" / "model.safetensors")
    with pytest.raises(TranscoderError, match="do not fit its config.json"):
        push_folder(tmp_path / "m", "me/x")
    assert "me/x" not in hub.repos


# ---------------------------------------------------------------------------- sets that point elsewhere


@pytest.mark.parametrize("place", ["../victim", "{}", "link"])
def test_a_set_reaches_nothing_outside(place, hub, tmp_path):
    make_set(3).save_pretrained(tmp_path / "set")
    make_dictionary(seed=9).save_pretrained(tmp_path / "victim")
    (tmp_path / "set" / "link").symlink_to("../victim")
    before = {path: path.read_bytes() for path in (tmp_path / "victim").iterdir()}
    place = place.format(tmp_path / "victim")
    edit(tmp_path / "set" / "transcoder_set.json", dictionaries={"a": {"subfolder": place}})
    report = EvaluationReport({"a": {"metrics": {"l0": 1.0}, "density_histogram": {}, "config": {}}}, {"x": 1})
    for use in (
        lambda: TranscoderSet.from_pretrained(tmp_path / "set"),
        lambda: report.save_into(tmp_path / "set"),
        lambda: push_folder(tmp_path / "set", "me/x"),
        lambda: push_folder(tmp_path / "set", "me/x", remote_code=True),
        lambda: card_of_folder(tmp_path / "set"),
        lambda: with_remote_code(tmp_path / "set").__enter__(),
    ):
        with pytest.raises(TranscoderError, match="folder"):
            use()
    assert {path: path.read_bytes() for path in (tmp_path / "victim").iterdir()} == before
    assert "me/x" not in hub.repos


# ---------------------------------------------------------------------------- code


@pytest.mark.parametrize("kind", ["single", "set"])
def test_a_strangers_code_is_not_published(kind, hub, tmp_path):
    folder = tmp_path / "m"
    model = make_dictionary() if kind == "single" else make_set(3, 5)
    model.save_pretrained(folder, remote_code=True)
    inner = folder if kind == "single" else folder / "layers.3.mlp.transcoder"
    (inner / "modeling_transcoder.py").write_text("import os  # TOPSECRET")
    push_folder(folder, "me/x")
    files = pushed(hub)
    prefix = "" if kind == "single" else "layers.3.mlp.transcoder/"
    assert f"{prefix}modeling_transcoder.py" not in files
    assert "auto_map" not in json.loads(files[f"{prefix}config.json"])
    if kind == "set":
        assert json.loads(files["layers.5.mlp.transcoder/config.json"])["auto_map"] == AUTO_MAP
    push_folder(folder, "me/y", remote_code=True)
    files = pushed(hub, "me/y")
    assert json.loads(files[f"{prefix}config.json"])["auto_map"] == AUTO_MAP
    assert {f"{prefix}{name}" for name in CODE_FILES} <= files.keys()


def test_a_map_to_other_code_is_not_published(hub, tmp_path):
    make_dictionary().save_pretrained(tmp_path, remote_code=True)
    edit(tmp_path / "config.json", auto_map={"AutoModel": "you/other--evil.Model"})
    push_folder(tmp_path, "me/x")
    assert "auto_map" not in json.loads(pushed(hub)["config.json"])


# ---------------------------------------------------------------------------- paths of this machine


PATHS = [
    "/home/jo.doe/client-secret/llama-ft",
    "/home/jo.doe/client-secret/llama-ft/",
    "~/client-secret/llama-ft",
    "./client-secret/llama-ft",
    "../client-secret/x/llama-ft",
    "runs/client-secret/llama-ft",
    "C:\\Users\\jo\\client-secret\\llama-ft",
    "C:/Users/jo/client-secret/llama-ft",
    "\\\\server\\client-secret\\llama-ft",
    "file:///home/jo/client-secret/llama-ft",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_name_of_a_local_model_is_published(path, hub, tmp_path):
    base = {"base_model": path, "base_model_revision": None, "dataset": f"text of {path}", "dataset_split": None}
    evaluation = {**measured(), "protocol": {**measured()["protocol"], **base}}
    model = make_dictionary()
    model.config.base_model_name_or_path = path
    model.config.evaluation = evaluation
    model.push_to_hub("me/memory")
    folder = tmp_path / "m"
    TranscoderSet({"a": model}).save_pretrained(folder)
    tracker = LocalTracker(folder)
    tracker.start({"name": "run", "base_model": path, "arguments": {"output_dir": f"{path}/run", "model": path}})
    tracker.scalars(1, {"train/a/fvu": 1.0})
    tracker.finish("finished")
    (folder / "training_args.json").write_text(json.dumps({"output_dir": path, "logging_dir": f"{path}/logs"}))
    report = {"dictionaries": {}, "protocol": base, "together": None}
    (folder / "evaluation.json").write_text(json.dumps(report))
    assert main(["push", str(folder), "me/folder"]) == 0
    (folder / "README.md").write_text(f"# By hand, for {path}\n")
    assert main(["push", str(folder), "me/hand"]) == 0
    for repo in ("me/memory", "me/folder", "me/hand"):
        for name, content in hub.files(repo).items():
            assert b"client-secret" not in content, (repo, name)
    assert b"llama-ft" in hub.files("me/memory")["README.md"]
    assert TranscoderModel.from_pretrained("me/memory").config.base_model_name_or_path == "llama-ft"
    assert ModelCard(hub.files("me/memory")["README.md"].decode()).data.base_model is None
    # Here everything is as it was.
    assert TranscoderSet.from_pretrained(folder)["a"].config.base_model_name_or_path == path


def test_a_folder_by_a_relative_path_is_no_id_of_the_hub(hub, tmp_path, monkeypatch):
    (tmp_path / "client-secret" / "llama-ft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = make_dictionary()
    model.config.base_model_name_or_path = "client-secret/llama-ft"
    model.push_to_hub("me/x")
    assert not any(b"client-secret" in content for content in hub.files("me/x").values())


def test_graphs_name_no_local_model_either(hub):
    graph = random_graph(metadata={"model": PATHS[0], "dictionaries": [], "settings": {}})
    graph.push_to_hub("me/graph")
    assert not any(b"client-secret" in content for content in hub.files("me/graph").values())
    assert AttributionGraph.from_pretrained("me/graph").metadata["model"] == "llama-ft"
    assert graph.metadata["model"] == PATHS[0]


def test_names_and_texts_without_paths_stay():
    for name in ("gpt2", "HuggingFaceTB/SmolLM2-135M", None, "some/base"):
        assert public_name(name) == name
    assert public_name("/x/hub/models--org--name/snapshots/0123") == "org/name"
    for text in (
        "https://huggingface.co/a/b",
        "and/or 1/2 a / b",
        "layers.1.mlp.in",
        "module:model.layers.0:out",
        "a/b/c",
    ):
        assert public_text(text) == text and public_values({"note": text}) == {"note": text}
    assert public_text('saved to "/home/jo/run 1"') == 'saved to "run 1"' or "jo" not in public_text("/home/jo/run")


# ---------------------------------------------------------------------------- odd evaluations and summaries


def measured():
    return {
        "metrics": {
            "l0": 3.5,
            "fvu": 0.25,
            "explained_variance": 0.75,
            "ce_recovered_zero": 0.9,
            "dead_fraction": 0.1,
        },
        "density_histogram": {"log10_edges": [-3.0, -2.0, -1.0], "counts": [10, 20], "never_fired": 6},
        "protocol": {
            "base_model": "some/base",
            "base_model_revision": None,
            "dataset": "some text",
            "dataset_id": None,
            "dataset_split": None,
            "fidelity_tokens": 100,
            "loss_tokens": 50,
            "sequence_length": 16,
            "begins_with_bos": True,
            "skip_first": 1,
            "special_token_ids": [1],
            "ablation": "zero",
            "dtype": "float32",
            "device": "cpu",
            "versions": {"torch": "2.0"},
        },
    }


SUMMARY = {
    "tokens": 100,
    "steps": 3,
    "context_length": 16,
    "dataset": "some text",
    "dataset_rows": 7,
    "learning_rate": 1e-3,
    "skip_first": 1,
    "outlier_factor": 3.0,
    "device": "cpu",
    "base_model_dtype": "float32",
    "versions": {"torch": "2.0"},
}
ODD = [None, True, -1, 0, 0.5, 1e300, 10**400, "", "text", "x" * 5000, [], [1, "a"], {}, {"a": {"b": []}}, [[]]]


def places(value, path=()):
    """Every place in a JSON value, itself included."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def changed(value, path, new):
    """A copy with something else at one place, or without it where `new` is `...`."""
    if not path:
        return new
    copied = json.loads(json.dumps(value))
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return copied


def test_a_card_never_fails_on_what_it_is_told():
    """Every place of an evaluation and of a summary, with every odd value; those of the form are shown."""
    model = make_dictionary()
    model.config.evaluation, model.config.training_summary = measured(), SUMMARY
    good = render_card(model, repo_id="me/x")
    assert "| FVU | 0.2500 |" in good and "100 tokens" in good
    chosen = random.Random(0)
    for field, value in (("evaluation", measured()), ("training_summary", SUMMARY)):
        # The configuration refuses values that are not objects.
        for path in filter(None, places(value)):
            for new in [..., *chosen.sample(ODD, 5)]:
                model.config.evaluation, model.config.training_summary = measured(), SUMMARY
                setattr(model.config, field, changed(value, path, new))
                card = render_card(model, repo_id="me/x")
                assert "nan" not in card.lower().replace("dominan", "") and "x" * 2000 not in card, (path, new)


@pytest.mark.parametrize("metric", [m for m in METRICS if m in ("l0", "fvu", "dead_fraction", "kl", "mse")])
def test_numbers_that_no_measurement_gives_are_left_out(metric):
    model = make_dictionary()
    impossible = {"l0": 65.0, "dead_fraction": 37.0}.get(metric, -0.5 if metric != "kl" else "3")
    model.config.evaluation = changed(measured(), ("metrics", metric), impossible)
    assert "**Not evaluated**" in render_card(model)


def test_dictionaries_of_other_bins_stand_in_pictures_of_their_own(tmp_path):
    both = make_set(3, 5)
    for model, edges in zip(both.values(), ([-3.0, -2.0, -1.0], [-4.0, -3.0, -2.0, -1.0]), strict=True):
        histogram = {"log10_edges": edges, "counts": [1] * (len(edges) - 1), "never_fired": 0}
        model.config.evaluation = {**measured(), "density_histogram": histogram}
    both.save_pretrained(tmp_path)
    assert len([name for name in card_of_folder(tmp_path).files if "density" in name]) == 2


@pytest.mark.parametrize(
    "state", ["[]", "{}", '{"log_history": 3}', '{"log_history": [3, {"step": "a"}, {"loss": 1}]}']
)
def test_an_odd_log_of_the_trainer_is_left_out(state, tmp_path):
    make_dictionary().save_pretrained(tmp_path)
    (tmp_path / "trainer_state.json").write_text(state)
    if state == "[]":
        with pytest.raises(TranscoderError, match="trainer_state.json"):
            card_of_folder(tmp_path)
    else:
        assert "The training log was not recorded" in card_of_folder(tmp_path).text
