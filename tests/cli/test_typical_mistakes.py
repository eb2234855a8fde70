"""A hundred typical mistakes on the command line: each is one sentence and exit code 2, and nothing is left behind."""

import functools
import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
from tqdm.std import tqdm

from hf_transcoders.cli import main
from hf_transcoders.cli.main import _COMMANDS
from tests.studies.test_circuit_reuse import TOKENIZER, model_for_tasks


# Words that several rows share.
T = "--transcoders"
TRAIN = ["train", "--model", "model", "--data", "text.txt", "--layers", "1", "--num-features", "16", "--k", "4"]
TRAIN += ["--use-cpu", "--report-to", "none", "--max-tokens", "64", "--sequence-length", "16"]
TRAIN += ["--per-device-train-batch-size", "32"]
CONVERT = ["convert", "set", "out"]
PATCH = ["circuits", "patch", "ioi", "--model", "model", "--output", "out"]
GRAPH = ["graph", "The war", T, "set", "--model", "model", "--output", "out"]
PATHS = ["paths", "The war", T, "set", "--model", "model"]
EVALUATE = ["evaluate", T, "one", "--model", "model", "--data", "text.txt", "--device", "cpu"]
FEATURES = ["features", T, "set", "--model", "model", "--data", "text.txt", "--device", "cpu"]

# Command line -> what the sentence says, as a regular expression.
MISTAKES = [
    # The name of a command
    ("trian", r"did you mean train\?"),
    ("evalute --transcoders one", r"did you mean evaluate\?"),
    ("help", r"must be one of demo, train"),
    ("--transcoders one evaluate", r"there is no option --transcoders"),
    ("--versoin", r"did you mean --version\?"),
    ("--debug info", "command comes first"),
    ("tasks", r"give \{list,show,measure\}"),
    ("tasks lst", r"did you mean list\?"),
    ("runs", r"give \{list,compare,pareto\}"),
    ("circuits ptach ioi", r"did you mean patch\?"),
    ("study", r"give \{greater-than"),
    ("study greater_than --transcoders one", r"did you mean greater-than\?"),
    # The name of an option
    ("evaluate --transcoder one", r"there is no option --transcoder: did you mean --transcoders\?"),
    ("evaluate --transcoders one --max-token 5", r"did you mean --max-tokens\?"),
    ("evaluate --transcoders one --max_token 5", r"did you mean --max-tokens\?"),
    ("train --learning-rat 1e-3", r"did you mean --learning-rate\?"),
    ("train --lr 1e-3", "there is no option --lr"),
    ("train --modle model", r"did you mean --model\?"),
    ("train --n-features 16", r"did you mean --num-features\?"),
    ("sweep --groupsize 2", r"did you mean --group-size\?"),
    ("plan --process 2", r"did you mean --processes\?"),
    ("features --transcoders set --feature 3", r"did you mean --features\?"),
    ("graph x --transcoder set", r"did you mean --transcoders\?"),
    ("graph x --transcoders set --targets are", r"did you mean --target\?"),
    ("paths x --transcoders set --targets are", r"did you mean --target\?"),
    ("push one me/x --privat", r"did you mean --private\?"),
    ("convert set out --too saelens", r"did you mean --to\?"),
    ("circuits patch ioi --model model --components z", r"did you mean --component\?"),
    ("info --transcoder one", r"did you mean --transcoders\?"),
    ("info one", "'one' is one argument too many"),
    ("demo --num-feature 3", r"did you mean --num-features\?"),
    ("train -k 4", "there is no option -k"),
    ("evaluate one", r"give --transcoders"),
    # A value is missing
    ("evaluate", "give --transcoders"),
    ("explain", "give PATH"),
    ("baselines --sites layers.1.mlp.in", "give --model"),
    ("evaluate --transcoders", "--transcoders: expected one argument"),
    ("graph --transcoders set", "There is no prompt"),
    ("convert set out", "give --to"),
    ("convert set --to saelens", "give target"),
    ("push one", "give repo_id"),
    ("runs compare", "give RUN"),
    ("tasks show ioi", "give --model"),
    ("train --config", "--config needs the name of a YAML file"),
    # A value of the wrong kind or out of range
    ("evaluate --transcoders one --max-tokens eight", "'eight' is not a whole number"),
    ("evaluate --transcoders one --max-tokens 1.5", "'1.5' is not a whole number"),
    ("evaluate --transcoders one --max-tokens 0", "give at least 1"),
    ("evaluate --transcoders one --batch-size -8", "give at least 1"),
    ("evaluate --transcoders one --sequence-length 1", "give at least 2"),
    ("evaluate --transcoders one --dtype fp16", "must be one of auto, float32"),
    ("evaluate --transcoders one --device gpu", "'gpu' is not a device"),
    ("evaluate --transcoders one --device cuda:99", "is not a device that PyTorch can use here"),
    ("features --transcoders set --features -1", "give at least 0"),
    ("features --transcoders set --features 1,2", "'1,2' is not a whole number"),
    ("graph x --transcoders set --nodes 1.5", "give a number between 0 and 1"),
    ("graph x --transcoders set --validate many", "'many' is not a whole number"),
    ("plan --device-memory 0", "give a number above 0"),
    ("tasks measure ioi --model model --confidence 95", "both excluded"),
    ("train --num-features lots", "'lots' is not a whole number"),
    ("train --learning-rate fast", "--learning-rate: invalid float value: 'fast'"),
    ("train --learning-rate nan", "must be a finite number"),
    ("train --activation gelu", "must be one of relu, topk, batchtopk"),
    ("train --activation topK", r"did you mean topk\?"),
    ("train --kind transcoders", r"did you mean transcoder\?"),
    ("train --dtype half", "must be one of auto"),
    ("train --bf16 perhaps", "--bf16"),
    ("train --save-strategy sometimes", "save.strategy"),
    ("train --lr-scheduler-type cosin", r"cosin"),
    ("train --seed -1", "give at least 0"),
    ("sweep --k four", "'four' is not a whole number"),
    ("study greater-than --transcoders one --max-k 0", "give at least 1"),
    ("convert set out --to sparsfy", r"did you mean sparsify\?"),
    ("circuits patch ioi --model model --ablation nothing", "counterfactual, zero, mean, resample"),
    (
        "circuits patch ioi --model model --component heads",
        "must be one of resid, resid_mid, mlp, attn, query, key, value, pattern, z ",
    ),
    ("circuits patch ioi --model model --direction forwards", "must be one of noising, denoising"),
    # A path that does not exist, or that of something else
    ("evaluate --transcoders on", "There is no folder on"),
    ("evaluate --transcoders set/l9", "There is no folder set/l9"),
    ("evaluate --transcoders ./one/x", r"There is no folder \./one/x"),
    ("evaluate --transcoders me/transcoders", "There is no folder me/transcoders.* offline"),
    ("evaluate --transcoders model", "model holds a model of type .llama., not a dictionary"),
    ("evaluate --transcoders empty", "holds neither a dictionary"),
    ("evaluate --transcoders text.txt", "text.txt is not a file of weights"),
    ("evaluate --transcoders broken", "config.json"),
    ("info --transcoders one/nothing", "There is no folder one/nothing"),
    ("info --transcoders model", "not a dictionary"),
    ("graph x --transcoders nowhere/at/all", "There is no folder nowhere/at/all"),
    ("convert nowhere out --to saelens", "There is no folder nowhere"),
    ("convert set set --to saelens", "set is not empty"),
    ("push nowhere me/x", "There is no folder nowhere"),
    ("push model me/x", "not a dictionary"),
    ("runs list nowhere", "There is no folder nowhere"),
    ("runs list empty", "no recorded run in empty"),
    ("runs compare one one", "no recorded run in one"),
    ("study replacement --transcoders one/x", "There is no folder one/x"),
    ("train --model modle", "There is no folder modle|no download"),
    ("train --model ./modle", r"There is no folder \./modle: give by --model"),
    ("train --model one", "one holds a dictionary, not a language model"),
    ("train --model empty", "could not be loaded"),
    ("plan --model nowhere/x", "There is no folder nowhere/x"),
    ("tasks show ioi --model nowhere/x", "There is no folder nowhere/x"),
    ("tasks show oi --model model", "There is no task 'oi': choose from ioi"),
    ("circuits reuse --model /no/model --output out", "There is no folder /no/model"),
    ([*EVALUATE, "--model", "empty"], "could not be loaded"),
    ([*EVALUATE, "--model", "bare"], "could not be loaded"),
    ([*TRAIN, "--model", "bare"], "could not be loaded"),
    ([*EVALUATE, "--model", "other"], "'llama', and this is one of type 'gpt2'"),
    ([*EVALUATE, "--output", "/proc/out"], "/proc"),
    ([*TRAIN, "--output-dir", "/proc/out"], "/proc"),
    ([*GRAPH, "--output", "/proc/out"], "/proc"),
    ("convert set /proc/out --to saelens", "/proc"),
    # Text
    ([*EVALUATE, "--data", "txt.txt"], "There is no file or folder txt.txt"),
    ([*EVALUATE, "--data", "binary.txt"], "Could not load text from .binary.txt.*check that the files are whole"),
    ([*EVALUATE, "--data", "broken.jsonl"], "broken.jsonl"),
    ([*EVALUATE, "--data", "binary.parquet"], "binary.parquet"),
    ([*EVALUATE, "--data", "empty.txt"], "'empty.txt' is empty"),
    ([*EVALUATE, "--data", "picture.png"], "not one kind of text file"),
    ([*EVALUATE, "--data", "empty"], r"holds no \.txt"),
    ([*EVALUATE, "--data", "me/dataset"], "There is no file or folder me/dataset"),
    ([*EVALUATE, "--data", "rows.jsonl", "--text-column", "txet"], "no column 'txet'"),
    ([*EVALUATE, "--data", "text.txt", "--data-split", "test"], "split"),
    ([*TRAIN, "--data", "one.txt"], "one document"),
    ([*TRAIN, "--data", "binary.txt"], "Could not load text from .binary.txt.*check that the files are whole"),
    # Values that do not fit the model, the dictionaries or each other
    ([*TRAIN, "--layers", "7"], "There is no layer 7: the layers of the model are 0 to 2, and -1 is the last"),
    ([*TRAIN, "--layers", "-4"], "There is no layer -4"),
    ([*TRAIN, "--input-site", "layers.1.mlp.in"], "either --layers or --input-site"),
    ([*TRAIN[:5], "--input-site", "layers.1.mlp.inn"], "layers.1.mlp.inn"),
    ([*TRAIN[:5], "--output-site", "layers.1.mlp.out"], "--output-site needs --input-site"),
    ([*TRAIN, "--k", "17"], "k is 17"),
    ([*TRAIN, "--activation", "relu"], "`k` has no meaning"),
    ([*TRAIN, "--output-dir", "text.txt"], "text.txt is a file"),
    ([*TRAIN, "--output-dir", "text.txt/below"], "is a file, so nothing can be written below"),
    ([*TRAIN, "--output-dir", "out", "--resume", "nowhere"], "nowhere is not a checkpoint"),
    ([*TRAIN, "--per-device-train-batch-size", "2048"], "less than one step of 2048"),
    ([*EVALUATE, "--output", "text.txt"], "text.txt is a file"),
    ("evaluate --transcoders me/x --save", "--save writes into a folder"),
    ([*FEATURES, "--dictionary", "layers.9"], "There is no dictionary 'layers.9'"),
    (FEATURES, "choose one with --dictionary"),
    ([*FEATURES, "--features", "3", "--max-features", "4"], "not allowed with"),
    ([*FEATURES, "--dictionary", "layers.1.mlp.transcoder", "--features", "100000"], "100000"),
    ([*GRAPH, "--max-logits", "3", "--target", " a"], "--max-logits applies when no targets are given"),
    ([*GRAPH, "--max-tokens", "100"], "that of --features-from|text of --features-from"),
    ([*GRAPH, "--target", " supercalifragilistic"], "supercalifragilistic"),
    (["graph", "", *GRAPH[2:]], "The prompt is empty"),
    ([*PATHS, "--against", " a"], "there is no option --against"),
    ([*PATHS, "--feature", "layers.1.mlp.transcoder", "x"], "'x' is not the number of a feature"),
    ([*PATHS, "--feature", "layers.7.mlp.transcoder", "1"], "layers.7.mlp.transcoder"),
    ([*PATHS, "--only", "sort=head"], "'sort=head' cannot be read"),
    ([*PATHS, "--token-position", "50", "--target", " a"], "token 50 was requested"),
    ([*PATCH, "--position", "NOWHERE"], "NOWHERE"),
    ([*PATCH, "--metric", "acuracy"], "acuracy"),
    ([*PATCH, "--corruption", "swap"], "swap"),
    ([*PATCH, "--component", "mlp", "--per-query-head"], "leave it out"),
    ([*PATCH, "--receivers", "layers.9.attn.head.0.query"], "layer 9, but this model has the layers 0 to 2"),
    ("tasks show greater-than --model model --templates baba", "has no --templates"),
    ("convert set full --to native", "full is not empty"),
    ("convert set out --to native --load-base-model", "give --base-model"),
    ("convert set out --to saelens --folded --not-folded", "not allowed with"),
    ("info --transcoders-revision main", "needs --transcoders"),
    ("push one not_a_repo/id/x", "cannot name a repo"),
    ("runs list --trackio nothing", "no project .nothing."),
    ("demo --output text.txt", "text.txt is a file"),
    # YAML
    ("train --config nowhere.yaml", "nowhere.yaml cannot be read"),
    ("train --config broken.yaml", "broken.yaml is not valid YAML"),
    ("train --config text.txt", "text.txt"),
    ("train --config typo.yaml", r"learning_rat.* does not exist"),
    ("train --config word.yaml", "does not fit"),
    ("sweep nowhere.yaml", "nowhere.yaml cannot be read"),
    ("sweep typo.yaml", "does not exist"),
    ("plan --config empty", "empty"),
]


def words(line) -> list[str]:
    return line.split() if isinstance(line, str) else line


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    """The folder of the mistakes."""
    path = tmp_path_factory.mktemp("mistakes")
    for name in ("model", "set", "one"):
        shutil.copytree(folder / name, path / name)
    shutil.copy(folder / "text.txt", path)
    shutil.copytree(folder / "model", path / "bare", ignore=shutil.ignore_patterns("*token*"))
    model_for_tasks("gpt2").save_pretrained(path / "other")
    TOKENIZER.save_pretrained(path / "other")
    (path / "empty").mkdir()
    shutil.copytree(folder / "one", path / "broken")
    (path / "broken" / "config.json").write_text("{")
    (path / "full").mkdir()
    files = {
        "full/notes.md": "mine",
        "one.txt": "The only document.",
        "empty.txt": "",
        "broken.jsonl": '{"text": "a"}\n{"text": \n',
        "rows.jsonl": '{"text": "a"}\n{"text": "b"}\n',
        "broken.yaml": "k: [1, 2\nlayers: 3",
        "typo.yaml": "learning_rat: 0.1",
        "word.yaml": "num_features: lots",
    }
    for name, text in files.items():
        (path / name).write_text(text)
    for name in ("binary.txt", "binary.parquet", "picture.png"):
        (path / name).write_bytes(bytes(range(128, 256)) * 20)
    return path


def content(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("line", "says"), MISTAKES, ids=[" ".join(words(line)) for line, _ in MISTAKES])
def test_a_mistake_is_one_sentence(place, monkeypatch, capfd, line, says):
    monkeypatch.chdir(place)
    # As `TQDM_DELAY` does in a process of its own.
    monkeypatch.setattr(tqdm, "__init__", functools.partialmethod(tqdm.__init__, delay=2))
    before = content(place)
    code = main(words(line))
    captured = capfd.readouterr()
    lines = [each for each in (captured.out + captured.err).splitlines() if each.strip()]
    assert code == 2 and len(lines) <= 2
    assert lines[-1].startswith("hf-transcoders") and len(lines[-1]) < 600
    assert content(place) == before
    import re

    assert re.search(says, lines[-1]), lines


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("evaluate --transcoders one --max-token 5", r"did you mean --max-tokens\?"),
        ("info --transcoders set/l9", "There is no folder set/l9"),
        ([*TRAIN, "--data", "one.txt"], "one document"),
    ],
)
def test_a_mistake_in_a_process_of_its_own(place, line, says):
    before = content(place)
    done = subprocess.run(
        [sys.executable, "-m", "hf_transcoders", *words(line)], cwd=place, capture_output=True, text=True
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and not done.stdout and len(lines) <= 2
    assert re.search(says, lines[-1]), lines
    assert content(place) == before


def test_a_missing_extra_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TRANSCODERS_CACHE", str(tmp_path))
    for package in ("gguf", "trackio"):
        monkeypatch.setitem(sys.modules, package, None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: name != "gguf" and find_spec(name, *more) or None
    )
    for line, extra in (
        ("train --model smollm2-135m-instruct", "gguf"),
        ("plan --model smollm2-135m-instruct", "gguf"),
        ("tasks show ioi --model gemma-3-270m", "gguf"),
        ("runs list --trackio mine", "trackio"),
    ):
        assert main(line.split()) == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and f'pip install "hf_transcoders[{extra}]"' in lines[0], lines
    assert not list(tmp_path.iterdir())


def test_there_are_a_hundred_of_them():
    assert len({tuple(words(line)) for line, _ in MISTAKES}) == len(MISTAKES) >= 100
    assert {words(line)[0] for line, _ in MISTAKES} >= set(_COMMANDS)
