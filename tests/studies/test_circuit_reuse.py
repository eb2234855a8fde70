"""Circuit reuse: overlap against enumeration, roles on planted scores, and edits against forward passes."""

import itertools
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_transcoders import TranscoderError, edit_attention
from hf_transcoders.circuits import AttentionEdit, PatchResult, edited_attention, logit_attribution
from hf_transcoders.evaluation.rank_correlation import spearman_correlation
from hf_transcoders.studies.circuit_reuse import (
    Predictions,
    RoleTests,
    Stage,
    assign_roles,
    circuit_of,
    forced,
    mover_change,
    overlaps,
    predict_at_end,
    published_for,
    repair_outcomes,
    reuse_circuit,
    save_reuse,
    trace_stages,
)
from hf_transcoders.studies.circuit_reuse.repair import control_heads, outcome, random_tokens
from hf_transcoders.studies.circuit_reuse.roles import acts
from hf_transcoders.studies.circuit_reuse.stages import receiving_heads, strongest_heads
from hf_transcoders.tasks import colored_objects, end_logits, indirect_object_identification
from tests.tasks.conftest import byte_level_bpe
from tests.tiny_models import TINY_CONFIGS


TOKENIZER = byte_level_bpe()


def model_for_tasks(family="llama", seed=0):
    """A tiny model with the vocabulary of the tasks."""
    config = TINY_CONFIGS[family]()
    config.vocab_size = len(TOKENIZER)
    for name in ("max_position_embeddings", "n_positions"):
        if hasattr(config, name):
            setattr(config, name, 128)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return model_for_tasks()


@pytest.fixture(scope="module")
def colors():
    return colored_objects(TOKENIZER, 5)


def result_of(effects, prompts=4, noise=0.0, seed=0):
    """A [`PatchResult`] with given effects: the base is 0 and the source 1."""
    effects = torch.as_tensor(effects, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    values = effects[..., None] + noise * torch.randn(*effects.shape, prompts, generator=generator)
    axes = {"layer": list(map(str, range(len(effects)))), "head": list(map(str, range(effects.shape[1])))}
    return PatchResult(values, torch.zeros(prompts), torch.ones(prompts), axes, "logit_difference")


def test_overlap_and_its_null_equal_enumeration():
    first = result_of([[0.9, 0.1, -0.8], [0.2, 0.0, 0.7]])
    second = result_of([[0.6, -0.9, 0.8], [0.1, 0.3, 0.05]])
    found = overlaps({"logits": first}, {"logits": second}, shares=(0.34,), permutations=20000)[0]
    # Top two: heads 0 and 2 against heads 1 and 2.
    assert (found.count, found.shared, found.possible, found.fraction) == (2, 1, 2, 0.5)
    assert found.low == found.high == 0.5
    # Head 4 has no effect in the first task, so it is not shuffled.
    one, other = first.effects.flatten(), second.effects.flatten()
    movable = [0, 1, 2, 3, 5]
    top = set(one.abs().topk(2).indices.tolist())

    def shared(order):
        moved = other.clone()
        moved[movable] = other[list(order)]
        return len(top & set(moved.abs().topk(2).indices.tolist()))

    every = [shared(order) for order in itertools.permutations(movable)]
    assert found.null == pytest.approx(sum(every) / len(every) / 2, abs=0.01)
    assert found.p_value == pytest.approx(sum(each >= 1 for each in every) / len(every), abs=0.01)
    within = [shared([*a, *b]) for a in itertools.permutations([0, 1, 2]) for b in itertools.permutations([3, 5])]
    assert found.layer_null == pytest.approx(sum(within) / len(within) / 2, abs=0.01)
    assert found.layer_p_value == pytest.approx(sum(each >= 1 for each in within) / len(within), abs=0.01)


def test_overlap_interval_equals_resampling_by_hand():
    tasks = [result_of(torch.randn(4, 5, generator=torch.Generator().manual_seed(n)) / 5, 6, 0.2, n) for n in (1, 2)]
    tasks = [{"logits": task, "mover queries": task} for task in tasks]
    found = overlaps(*tasks, shares=(0.2,), resamples=4000)[0]
    generator = torch.Generator().manual_seed(9)
    fractions = []
    for _ in range(1500):
        tops = []
        for task in tasks:
            rows = torch.randint(6, (6,), generator=generator)
            effects = task["logits"].values[..., rows].mean(-1).flatten()
            tops.append(set(effects.abs().topk(4).indices.tolist()))
        fractions.append(len(tops[0] & tops[1]) / 4)
    low, high = torch.tensor(fractions).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    assert found.by_stage == {"logits": found.shared // 2, "mover queries": found.shared // 2}


def test_equal_circuits_overlap_fully_and_stages_must_meet():
    task = {"logits": result_of(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))}
    for found in overlaps(task, task, permutations=1000):
        assert found.fraction == 1
    assert found.p_value < 0.01 and found.null < 0.2
    with pytest.raises(TranscoderError, match="no stage in common"):
        overlaps(task, {"mover queries": task["logits"]})


def planted():
    """Scores of 2 x 4 heads, each planted for one role."""
    tables = {
        name: torch.zeros(2, 4)
        for name in (
            "attention END to IO", "attention END to S1", "attention END to S2", "attention END to thing", "copying",
            "negative copying", "induction", "duplicate token", "previous token",
        )
    }  # fmt: skip
    acting = {
        name: torch.zeros(2, 4) for name in ("IOI, logits", "IOI, mover queries", "Colored Objects, mover queries")
    }
    acting["IOI, logits"][1, 0], tables["attention END to IO"][1, 0], tables["copying"][1, 0] = 1, 0.6, 0.9
    acting["IOI, logits"][1, 1], tables["attention END to S2"][1, 1], tables["negative copying"][1, 1] = -1, 0.3, 0.8
    acting["IOI, mover queries"][0, 2], tables["attention END to S2"][0, 2] = 1, 0.4
    acting["Colored Objects, mover queries"][0, 3], tables["attention END to thing"][0, 3] = 1, 0.5
    tables["induction"][0, 0] = tables["duplicate token"][0, 1] = tables["previous token"][1, 3] = 0.9
    return tables, acting


def test_planted_heads_get_their_roles():
    assert assign_roles(*planted(), RoleTests()) == {
        "mover": [(1, 0)],
        "negative mover": [(1, 1)],
        "inhibition": [(0, 2)],
        "content gatherer": [(0, 3)],
        "induction": [(0, 0)],
        "duplicate token": [(0, 1)],
        "previous token": [(1, 3)],
    }


@pytest.mark.parametrize(
    "table, head, value, role",
    [
        ("attention END to IO", (1, 0), 0.09, "mover"),
        ("attention END to S1", (1, 0), 0.7, "mover"),
        ("copying", (1, 0), 0.4, "mover"),
        ("negative copying", (1, 1), 0.4, "negative mover"),
        ("attention END to S2", (1, 1), 0.05, "negative mover"),
        ("attention END to IO", (0, 2), 0.5, "inhibition"),
        ("attention END to thing", (0, 3), 0.05, "content gatherer"),
        ("induction", (0, 0), 0.2, "induction"),
    ],
)
def test_a_head_that_fails_one_test_has_no_role(table, head, value, role):
    tables, acting = planted()
    tables[table][head] = value
    assert assign_roles(tables, acting, RoleTests())[role] == []


def test_heads_act_by_rank_and_interval():
    effects = torch.zeros(4, 5)
    effects[0, 1], effects[3, 2], effects[2, 2] = 0.9, -0.8, 0.1
    stage = Stage("logits", ["logits"], "END", result_of(effects, prompts=20, noise=0.02))
    expected = torch.zeros(4, 5, dtype=torch.long)
    expected[0, 1], expected[3, 2] = 1, -1
    assert torch.equal(acts(stage, 0.1), expected)
    noisy = Stage("logits", ["logits"], "END", result_of(effects, prompts=4, noise=5.0))
    assert not acts(noisy, 0.1)[2, 2]


def test_who_receives_and_who_is_strongest():
    effects = [[0.9, 0.0, -0.95], [0.2, 0.5, -0.3], [0.0, 0.1, 0.3]]
    # Head 0.0 is in the first layer, with no layer below it; negative heads are not receivers.
    assert receiving_heads(result_of(effects), 0.3) == [(1, 1), (2, 2)]
    assert strongest_heads(torch.tensor(effects), 3) == [(0, 0), (0, 2), (1, 1)]
    # Heads without any effect are never among the strongest.
    assert len(strongest_heads(torch.tensor(effects), 9)) == 7


def test_stages_are_path_patching_with_the_heads_found_before(model):
    task = indirect_object_identification(TOKENIZER, 4, "s2_io_flip")
    stages = trace_stages(model, task)
    assert [stage.name for stage in stages][:2] == ["logits", "mover queries"]
    expected = [f"layers.{layer}.attn.head.{head}.query" for layer, head in receiving_heads(stages[0].result, 0.02)]
    assert stages[1].receivers == expected
    if len(stages) > 2:
        assert stages[2].position == "S2"
        assert {int(site.split(".")[4]) for site in stages[2].receivers} <= set(range(4))
    assert circuit_of(stages[:1], 1.0) == strongest_heads(stages[0].result.effects, 12)
    # Only values are shared by the heads of a group.
    for stage in stages:
        assert stage.result.protocol.get("per_query_head", False) == (stage.name == "steering values")
    frozen = trace_stages(model, task, freeze_mlps=True, metric="rank")[0].result
    assert frozen.protocol["mlps"] == "frozen" and frozen.metric == "rank"
    assert stages[0].result.protocol["mlps"] == "recomputed" and stages[0].result.metric == "logit_difference"
    with pytest.raises(TranscoderError, match="repeated word of the task 'other'"):
        trace_stages(model, type(task)(task.dataset, "other"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_the_repair_forces_the_attention_it_says(family, colors):
    model = model_for_tasks(family)
    patterns = {}
    tokens = colors.tokens()
    edit = forced(colors, [(1, 2), (2, 0)])
    with torch.no_grad(), edited_attention(model, edit):
        with edit_attention(model, pattern=lambda pattern, layer: patterns.__setitem__(layer, pattern.clone())):
            model(tokens.input_ids, attention_mask=tokens.attention_mask)
    prompts = torch.arange(5)
    at = tokens.positions
    for layer, head in ((1, 2), (2, 0)):
        row = patterns[layer][prompts, head, at["END"]]
        expected = torch.zeros_like(row)
        for name in ("wrong_colour_1", "wrong_colour_2"):
            # A color outside the sliding window gets no attention.
            reach = at["END"] - at[name] < (6 if family == "gemma3_text" and layer < 2 else 999)
            expected[prompts, at[name]] = 0.5 * reach
        assert torch.equal(row, expected)
        assert {*at["wrong_colour_1"].tolist()}.isdisjoint({0})
    assert not torch.equal(at["wrong_colour_1"], at["answer_colour"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_predictions_from_the_cache_equal_whole_forward_passes(family, colors):
    model = model_for_tasks(family, seed=3)
    edit = forced(colors, [(1, 1), (2, 3)])
    found = predict_at_end(model, colors, {"none": [], "edit": [edit], "none again": []}, batch_size=2)
    for name, edits in (("none", []), ("edit", [edit]), ("none again", [])):
        with edited_attention(model, edits):
            logits = end_logits(model, colors)
        assert torch.equal(found[name].tokens, logits.argmax(-1))
        among = colors.answers().candidates
        assert torch.equal(found[name].candidates, among[torch.arange(5), logits.gather(1, among).argmax(1)])
    with pytest.raises(TranscoderError, match="must be of attention from END"):
        predict_at_end(model, colors, {"edit": [AttentionEdit([(0, 0)], "force", edit.keys)]})


def test_outcomes_count_by_hand(colors):
    answers = colors.answers()
    right, other = answers.right[:, 0], torch.full((5,), 1)
    wrong = torch.tensor(
        [next(c for c in row.tolist() if c != r) for row, r in zip(answers.candidates, right, strict=True)]
    )
    was = torch.stack([right[0], right[1], wrong[2], other[3], wrong[4]])
    now = torch.stack([right[0], wrong[1], right[2], other[3], wrong[4]])
    before, after = Predictions(was, was), Predictions(now, right)
    found = outcome("edit", [(0, 0)], after, before, colors)
    assert found.confusion == {"right": 2, "wrong_listed": 2, "other": 1}
    assert (found.fixed, found.new_mistakes) == (1, 1)
    assert found.accuracy.mean == pytest.approx(0.4) and found.accuracy.method == "wilson"
    assert found.candidate_accuracy.mean == 1


def test_controls_are_other_heads_and_other_tokens(colors):
    generator = random.Random(0)
    edited = [(1, 0), (1, 2), (2, 3)]
    drawn = control_heads(edited, 9, 10, generator)
    assert len({tuple(heads) for heads in drawn}) == 10
    for heads in drawn:
        assert sorted(layer for layer, _ in heads) == [1, 1, 2]
        assert set(edited).isdisjoint(heads) and len(set(heads)) == 3
    # There are so few other heads that all are tried.
    assert control_heads([(1, 2)], 5, 10, generator, edited) == [[(1, 1)], [(1, 3)], [(1, 4)]]
    assert control_heads([(1, 0)], 2, 10, generator, [(1, 0), (1, 1)]) == []
    at = colors.tokens().positions
    keys = random_tokens(colors, generator)
    for row, pair in enumerate(keys.tolist()):
        taken = {int(at[f"colour_{k}"][row]) for k in (1, 2, 3)} | {0, int(at["END"][row])}
        assert len(set(pair)) == 2 and taken.isdisjoint(pair)


def test_repair_with_one_part_and_with_none(model, colors):
    found = repair_outcomes(model, colors, [(1, 1)], [], head_draws=1, token_draws=1)
    assert [each.condition for each in found] == [
        "none", "inhibition alone", "to the right colour", "random heads 1", "random tokens 1",
    ]  # fmt: skip
    with pytest.raises(TranscoderError, match="at least one"):
        repair_outcomes(model, colors, [], [])


def test_mover_change_equals_two_forward_passes(model, colors):
    edit = forced(colors, [(1, 1)])
    importance = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    found = mover_change(model, colors, edit, [(0, 0), (1, 3), (2, 1)], importance, batch_size=2)
    # Only heads after the edited layer can change.
    assert found.movers == [(2, 1)] and found.compared == 4
    before = logit_attribution(model, colors).values[2, 1].mean().item()
    with edited_attention(model, edit):
        after = logit_attribution(model, colors).values[2, 1].mean().item()
    assert found.attribution_before == pytest.approx(before, rel=1e-4)
    assert found.attribution_after == pytest.approx(after, rel=1e-4)
    assert found.attribution_after != found.attribution_before
    assert mover_change(model, colors, edit, [(0, 0)], importance) is None


def test_spearman():
    assert spearman_correlation(torch.tensor([1.0, 2, 3, 9]), torch.tensor([0.0, 5, 6, 7]))[0] == pytest.approx(1)
    value, p_value = spearman_correlation(torch.tensor([1.0, 2, 2, 3]), torch.tensor([4.0, 3, 1, 2]))
    # Ranks 1, 2.5, 2.5, 4 and 4, 3, 1, 2: covariance -3, norms sqrt(4.5) and sqrt(5).
    assert value == pytest.approx(-3 / (4.5 * 5) ** 0.5)
    one, other = torch.tensor([1.0, 2.5, 2.5, 4]) - 2.5, torch.tensor([4.0, 3, 1, 2]) - 2.5
    every = [abs((one * other[list(order)]).sum()) >= 3 - 1e-6 for order in itertools.permutations(range(4))]
    assert p_value == pytest.approx(sum(every).item() / 24, abs=0.03)


def test_published_heads_are_of_one_model_only():
    published = published_for("openai-community/gpt2-medium")
    assert published.heads["inhibition"] == [(12, 3), (13, 4), (13, 13)]
    assert published.figures["inhibition + negative mover"].startswith("93.7%")
    assert published_for("openai-community/gpt2") is None


def test_the_whole_study_and_its_folder(model, tmp_path):
    model.config.name_or_path = "<script>alert(1)</script>"
    found = reuse_circuit(
        model, TOKENIZER, prompts=4, repair_prompts=4, faithfulness_prompts=3, random_circuits=1, search_prompts=4
    )
    page = save_reuse(found, tmp_path / "reuse").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    data = json.loads((tmp_path / "reuse" / "results.json").read_text())
    for stages in data["stages"].values():
        for stage in stages:
            for layer, row in enumerate(stage["effects"]):
                for head, effect in enumerate(row):
                    low, high = stage["low"][layer][head], stage["high"][layer][head]
                    assert f"layer {layer}, head {head}: {effect:.4g} [{low:.4g}, {high:.4g}]" in page
    for repair in data["repairs"]:
        for each in repair["outcomes"]:
            accuracy = each["accuracy"]
            if each["condition"][-1].isdigit():
                assert f"{accuracy['mean']},{accuracy['low']}" in (tmp_path / "reuse" / "repair.csv").read_text()
            else:
                assert f"{accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]" in page
            assert sum(each["confusion"].values()) == 4
    # The figures of the paper stand beside the repairs found by search, and nowhere else.
    assert found.search is not None and page.lower().count("paper") == 1
    assert (tmp_path / "reuse" / "ioi_1_logits.csv").exists()
    assert "Overlap" in found.to_text() and str(found) == found.to_text()
    with pytest.raises(TranscoderError, match="at least two"):
        reuse_circuit(model, TOKENIZER, prompts=1)


def test_with_the_papers_model_its_figures_stand_beside(tmp_path):
    config = TINY_CONFIGS["gpt2"]()
    config.vocab_size, config.n_layer, config.n_head, config.n_positions = len(TOKENIZER), 20, 16, 128
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.name_or_path = "openai-community/gpt2-medium"
    found = reuse_circuit(model, TOKENIZER, prompts=2, repair_prompts=2, faithfulness_prompts=0, search_prompts=0)
    assert [repair.selection for repair in found.repairs][-1] == "published"
    assert found.repairs[-1].negative == [(19, 1)]
    page = save_reuse(found, tmp_path / "reuse").read_text()
    for figure in ("49.6%", "93.7%", "78.1%", "81.5%", "78% (25 of 32)", "13.14 in appendix B.3"):
        assert figure in page
    printed = found.to_text()
    for figure in ("49.6%", "93.7%", "78% (25 of 32)", "0.69 (p < 0.01)", "(1) The third inhibition head is 13.13"):
        assert figure in printed
