"""Greedy search finds the strongest paths, including a planted circuit, and refuses invalid arguments."""

import json

import pytest
import torch

from hf_transcoders import TranscoderError
from hf_transcoders.circuits.graphs.targets import Target
from hf_transcoders.circuits.paths import PathFilter, greedy_paths, select_paths
from hf_transcoders.circuits.paths.steps import KINDS
from hf_transcoders.models.linear_parts import decoder_rows, encoder_rows
from tests.circuits.planted import ANSWER, OTHER, START, planted
from tests.tiny_models import HIDDEN_SIZE, tiny_model, tiny_tokens

from .setups import DICTIONARIES, recorded, transcoders


EVERYTHING = 10**6
PROMPT = tiny_tokens(1, 4)[0].tolist()
TARGETS = {
    "logit": 17,
    "difference": (17, 18),
    "feature": Target.pre_activation("t2", 5),
    "direction": Target.direction(torch.linspace(-1, 1, HIDDEN_SIZE), "layers.2.resid_post", position=2),
    "the most likely token": None,
}


@pytest.fixture(scope="module")
def everything():
    """Most paths of up to three steps of a tiny model: a few thousand."""
    return greedy_paths(
        tiny_model("llama"), transcoders(0, 2), PROMPT, 17, num_paths=EVERYTHING, num_steps=3,
        filter=PathFilter(kind=("feature", "head", "token", "error", "mlp", "bias"), index="!=0"),
    )  # fmt: skip


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_all_paths_of_a_length_are_conserved(target):
    found = greedy_paths(tiny_model("llama"), transcoders(0, 2), PROMPT[:3], target, num_paths=EVERYTHING, num_steps=3)
    assert sum(path.contribution for path in found.levels[0]) == pytest.approx(found.value, rel=1e-4, abs=1e-4)
    for shorter, longer in zip(found.levels, found.levels[1:], strict=False):
        parts = {}
        for path in longer:
            parts[path.key[:-1]] = parts.get(path.key[:-1], 0.0) + path.contribution
        gone_on = {path.key: path.contribution for path in shorter if path.key in parts}
        assert len(gone_on) == len(parts) > 3
        scale = max(map(abs, gone_on.values()))
        for key, total in parts.items():
            assert gone_on[key] == pytest.approx(total, rel=1e-4, abs=1e-5 * scale)
            assert sum(found.sums[key].values()) == pytest.approx(total, rel=1e-4, abs=1e-5 * scale)
        ends = {path.steps[-1].kind for path in shorter if path.key not in parts}
        assert not ends & {"feature", "head"}


@torch.no_grad()
def test_the_contribution_is_the_product_along_the_path(everything):
    """Contributions equal products of the model's weights computed by hand."""
    dictionaries = transcoders(0, 2)
    run = recorded("llama", dictionaries, length=4)
    model = tiny_model("llama")
    head = model.lm_head.weight.detach()
    for path in everything.paths:
        assert path.product == pytest.approx(path.contribution, rel=1e-5, abs=1e-10)
    chosen = select_paths(
        everything.paths, contains=[PathFilter(kind="feature", layer=2), PathFilter(kind="head")],
        ends_with=PathFilter(kind="feature", layer=0),
    )  # fmt: skip
    assert len(chosen) > 20
    for path in chosen[:40]:
        high, through, low = path.steps
        maps = run.layers[through.layer]
        width = model.config.head_dim
        kv = through.index // (model.config.num_attention_heads // model.config.num_key_value_heads)
        output = maps.output[through.index * width : (through.index + 1) * width]
        value = maps.value[kv * width : (kv + 1) * width]
        t, s = high.position, through.position
        written = decoder_rows(dictionaries["t0"])[low.index] * low.activation
        written = maps.attention_norm.scale[s, 0] * maps.attention_norm.gain.gain * written
        written = maps.pattern[through.index, t, s] * (written @ value.T @ output)
        written = run.layers[2].mlp_norm.scale[t, 0] * run.layers[2].mlp_norm.gain.gain * written
        read = encoder_rows(dictionaries["t2"])[0][high.index] @ written
        written = read * decoder_rows(dictionaries["t2"])[high.index]
        written = run.final_norm.scale[t, 0] * run.final_norm.gain.gain * written
        expected = float((head[17] - head.mean(0)) @ written)
        assert path.contribution == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_wide_beams_find_what_enumeration_finds(everything):
    """With a wide beam, greedy search finds the strongest of all paths."""
    filters = [PathFilter(kind=("feature", "head", "token", "error", "mlp", "bias"), index="!=0")]
    narrow = greedy_paths(tiny_model("llama"), transcoders(0, 2), PROMPT, 17, num_paths=5, num_steps=3, filter=filters)
    assert [path.key for path in narrow.levels[0]] == [path.key for path in everything.levels[0][:5]]
    # From the enumeration: the five paths that continue, then the five strongest of their continuations.
    beam = [()]
    for level, reported in zip(everything.levels, narrow.levels, strict=True):
        candidates = [path for path in level if path.key[:-1] in beam]
        assert [path.key for path in reported] == [path.key for path in candidates[:5]]
        assert [path.contribution for path in reported] == pytest.approx(
            [path.contribution for path in candidates[:5]], rel=1e-4
        )
        beam = [path.key for path in candidates if path.steps[-1].kind in ("feature", "head")][:5]
    signs = {path.contribution > 0 for path in everything.levels[-1]}
    assert signs == {True, False}


def test_a_filter_holds_for_every_step_and_leaves_sums_whole(everything):
    filters = [PathFilter(kind="head", layer=">0"), PathFilter(kind="token", position="<=2")]
    found = greedy_paths(
        tiny_model("llama"), transcoders(0, 2), PROMPT, 17, num_paths=EVERYTHING, num_steps=3, filter=filters
    )
    kinds = {step.kind for path in found.paths for step in path.steps}
    assert kinds == {"head", "token"}
    for path in found.paths:
        for step in path.steps:
            assert (step.kind == "head" and step.layer > 0) or (step.kind == "token" and step.position <= 2)
    assert sum(found.sums[()].values()) == pytest.approx(found.value, rel=1e-4, abs=1e-4)


def test_paths_are_selected_by_what_they_lead_through(everything):
    paths = everything.paths
    head = PathFilter(kind="head", layer=1, index=2)
    through = select_paths(paths, contains=head)
    assert 0 < len(through) < len(paths)
    assert all(any(s.kind == "head" and s.layer == 1 and s.index == 2 for s in path.steps) for path in through)
    without = select_paths(paths, without=head)
    assert len(through) + len(without) == len(paths) and not set(without) & set(through)
    ends = select_paths(paths, ends_with=[PathFilter(kind="head"), PathFilter(kind="token")])
    assert ends and all([s.kind for s in path.steps[-2:]] == ["head", "token"] for path in ends)
    # Conditions give the same answer for one step and for columns of many.
    steps = [path.steps[-1] for path in paths[:200]]
    columns = [[KINDS.index(step.kind) for step in steps]]
    columns += [[getattr(step, name) for step in steps] for name in ("layer", "position", "index")]
    for one in (head, PathFilter(layer="<=1", position="!=3"), PathFilter(kind=("token", "error"), index=">5")):
        mask = one.mask(*map(torch.tensor, columns))
        assert mask.tolist() == [one.matches(step) for step in steps]
    # A sequence matches consecutive steps.
    apart = select_paths(paths, contains=[PathFilter(kind="feature"), PathFilter(kind="error")])
    assert all("feature error" in " ".join(step.kind for step in path.steps) for path in apart) and apart
    assert select_paths(paths) == paths


# ---------------------------------------------------------------------------------------------- a planted circuit


def test_a_planted_circuit_is_found():
    model, dictionaries = planted()
    found = greedy_paths(model, dictionaries, [OTHER, START, OTHER, OTHER], (ANSWER, OTHER), num_steps=5)
    best = found.levels[3][0]
    assert [(step.kind, step.layer, step.index, step.position) for step in best.steps] == [
        ("feature", 1, 5, 3), ("head", 1, 1, 1), ("feature", 0, 3, 1), ("token", -1, START, 1),
    ]  # fmt: skip
    assert best.contribution > 0 and len(found.levels) == 4
    # There is no other path to the direction of the answer.
    assert len(found.levels[3]) == 1
    assert str(best) == '9 - 5 <- L1 f5 @ "5" (3) <- L1 head 1 from "7" (1) <- L0 f3 @ "7" (1) <- token "7" (1)'
    attention = best.steps[1].activation
    assert attention == pytest.approx(0.25)
    graph = found.to_graph()
    labels = [node.label for node in graph.nodes]
    assert labels[0] == "9 - 5"
    node = labels.index('L1 f5 @ "5" (3)')
    ((source, weight),) = graph.incoming(node)
    assert labels[source] == 'L1 head 1 from "7" (1)' and weight == pytest.approx(best.contribution)


# ---------------------------------------------------------------------------------------------- graphs and files


@pytest.mark.parametrize("name", ["transcoders", "stream SAEs", "relu with skip"])
@pytest.mark.parametrize("count", [4, 30])
def test_the_graph_of_paths_counts_beginnings_once_and_sums(name, count):
    found = greedy_paths(tiny_model("gemma2"), DICTIONARIES[name](), PROMPT, 17, num_paths=count, num_steps=4)
    graph = found.to_graph()
    beginnings = {path.key[: end + 1]: step for path in found.paths for end, step in enumerate(path.steps)}
    assert len({key[-1] for key in beginnings}) + 1 == len(graph.nodes)
    assert sum(weight for *_, weight in graph.edges) == pytest.approx(
        sum(step.contribution for step in beginnings.values()), rel=1e-4, abs=1e-5
    )
    assert all(source > reader for source, reader, _ in graph.edges)
    for number, node in enumerate(graph.nodes):
        incoming = graph.incoming(number)
        if incoming:
            total = sum(weight for _, weight in incoming) + node.errors + node.biases + node.rest
            assert total == pytest.approx(node.total, rel=1e-5, abs=1e-8)
    # With all paths, only contributions that were never expanded are left: none for the target.
    whole = greedy_paths(tiny_model("gemma2"), DICTIONARIES[name](), PROMPT, 17, num_paths=EVERYTHING, num_steps=1)
    node = whole.to_graph().nodes[0]
    assert max(map(abs, (node.errors, node.biases, node.rest))) < 1e-4 * max(
        abs(path.contribution) for path in whole.paths
    )
    part = found.to_graph(found.levels[0])
    assert {reader for _, reader, _ in part.edges} == {0}
    assert f"{node.total:+.4f}" in str(graph).splitlines()[0]


def test_text_and_json_say_the_same():
    found = greedy_paths(tiny_model("gpt2"), transcoders(0, 1, 2), PROMPT, (17, 18), num_paths=4, num_steps=2)
    saved = json.loads(json.dumps(found.to_dict()))
    assert [len(level) for level in saved["levels"]] == [4, 4]
    text = str(found)
    for level, paths in zip(saved["levels"], found.levels, strict=True):
        for entry, path in zip(level, paths, strict=True):
            assert entry["contribution"] == path.contribution == entry["steps"][-1]["contribution"]
            assert f"{path.contribution:+.4f}  {path}" in text and entry["text"] == str(path)
    last = found.levels[1][0].steps[-1]
    line = text.split(str(found.levels[1][0]))[-1].splitlines()[1]
    assert line.endswith(" * ".join(f"{name} {value:.4g}" for name, value in last.factors))
    json.dumps(found.to_graph().to_dict())


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"num_paths": 0}, "`num_paths` is 0"),
        ({"num_steps": 0}, "`num_steps` is 0"),
        ({"prompt": []}, "at least one token"),
        ({"target": 10_000}, "does not exist"),
        ({"target": [1, 2, 3]}, "is not a target"),
        ({"target": Target.pre_activation("t1", 0)}, "no dictionary 't1'"),
        ({"target": "word"}, "Give the tokenizer"),
        ({"filter": "head"}, "is not a filter"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(change, sentence):
    arguments = {"prompt": PROMPT, "target": 17, **change}
    with pytest.raises(TranscoderError, match=sentence):
        greedy_paths(tiny_model("llama"), transcoders(0), **arguments)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"kind": "neuron"}, "no kind of step 'neuron'"),
        ({"layer": "~3"}, "`layer` is '~3'"),
        ({"index": 1.5}, "`index`"),
    ],
)
def test_filters_that_cannot_be_read_are_refused(change, sentence):
    with pytest.raises(TranscoderError, match=sentence):
        PathFilter(**change)
