"""The search for repairs: against plain forward passes, on a planted repair, and what it writes."""

import csv
import itertools
import json
import random

import pytest
import torch
from datasets import Dataset

from hf_transcoders import TranscoderError
from hf_transcoders.circuits import edited_attention
from hf_transcoders.circuits.patching.engine import PatchEngine
from hf_transcoders.circuits.patching.right_answers import RightAnswers, split_right
from hf_transcoders.studies.circuit_reuse import (
    ForcedAttention,
    ForcedHead,
    find_repair,
    forced_predictions,
    save_repair,
    search_repair,
    token_sets,
    trace_tasks,
)
from hf_transcoders.studies.circuit_reuse.found_repair import unseen
from hf_transcoders.studies.circuit_reuse.judged_repairs import judge_conditions
from hf_transcoders.tasks import Task, accuracy, colored_objects, end_logits, indirect_object_identification
from tests.circuits.patching.brute_force import tiny_task
from tests.studies.test_circuit_reuse import TOKENIZER, model_for_tasks
from tests.tiny_models import tiny_model


FAMILIES = ["llama", "gpt2", "gemma2", "gemma3_text", "gpt_neox", "qwen3", "opt"]
SETS = {"S": ("S",), "first token": ("first token",), "both": ("S", "first token")}


def every_edit(sets, layers=3, heads=4):
    return [ForcedHead((layer, head), name) for name in sets for layer in range(layers) for head in range(heads)]


def right_by_hooks(model, task, edits):
    """Whether answers are right, in the vocabulary and among candidates, by one whole forward pass with plain hooks."""
    with edited_attention(model, edits):
        logits = end_logits(model, task)
    answers = task.answers()
    return accuracy(logits, answers.right) == 1, accuracy(logits, answers.right, answers.candidates) == 1


def answerable(model, task):
    """The task with answers that the model gives with some head forced, so that edits fix and break some of them."""
    attention = ForcedAttention(task, SETS)
    logits = [end_logits(model, task).argmax(-1)]
    for edit in every_edit(SETS):
        with edited_attention(model, attention.edits([edit])):
            logits.append(end_logits(model, task).argmax(-1))
    rows = []
    for number, row in enumerate(task.dataset):
        given = [int(each[number]) for each in logits]
        other = next((token for token in given if token != given[0]), 3)
        # The unchanged model is right on the first prompt only.
        right, wrong = (other, given[0]) if number else (given[0], other)
        rows.append({**row, "answer_ids": [right], "wrong_ids": [wrong], "candidate_ids": [wrong, right]})
    return Task(Dataset.from_list(rows), "answerable")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("query", ["END", "middle"])
def test_forced_runs_equal_whole_forward_passes(family, query):
    model = tiny_model(family)
    task = tiny_task(lengths=(12, 9, 12, 10))
    rows = [{**row, "positions": {**row["positions"], "middle": 6}} for row in task.dataset]
    task = Task(Dataset.from_list(rows), "tiny")
    attention = ForcedAttention(task, SETS, query)
    rows = [[edit] for edit in every_edit(SETS)]
    rows += [
        [ForcedHead((1, 2), "S"), ForcedHead((0, 1), "both")],
        [ForcedHead((2, 0), "S"), ForcedHead((2, 3), "S")],
        [],
    ]
    for metric in ("logit_difference", "rank"):
        engine = PatchEngine(model, task, ablation="zero", metric=metric)
        found = engine.run(attention.plan(rows))
        for values, row in zip(found.values, rows, strict=True):
            with edited_attention(model, attention.edits(row)):
                logits = end_logits(model, task)
            answers = task.answers()
            if metric == "rank":
                expected = (logits > logits.gather(1, answers.right)).sum(1) + 1.0
            else:
                real = answers.wrong >= 0
                expected = logits.gather(1, answers.right)[:, 0] - (logits.gather(1, answers.wrong) * real).mean(1)
            torch.testing.assert_close(values, expected.float(), rtol=1e-5, atol=1e-5)
        if metric == "logit_difference":
            assert (found.values[:-1] != found.base).any(1).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_the_search_equals_a_loop_over_forward_passes(family):
    model = tiny_model(family)
    task = answerable(model, tiny_task(lengths=(12, 9, 12, 10, 11, 9)))
    attention = ForcedAttention(task, SETS)
    found = search_repair(model, task, tokens=SETS, layers=range(3), penalty=0.5, max_heads=2, shortlist=99, beam=1)
    base = right_by_hooks(model, task, [])[0]
    assert 0 < base.sum() < len(task)
    scores = {}
    for edit in every_edit(SETS):
        right, among = right_by_hooks(model, task, attention.edits([edit]))
        place = (list(SETS).index(edit.tokens), *edit.head)
        assert found.alone["accuracy"][place] == pytest.approx(right.double().mean())
        assert found.alone["candidate_accuracy"][place] == pytest.approx(among.double().mean())
        scores[edit] = (right.double().mean() - 0.5 * (base & ~right).double().mean()).item()
        assert found.alone["score"][place] == pytest.approx(scores[edit])
    assert {repair.tokens for repair in found.repairs} == {*SETS, "any tokens"}
    for repair in found.repairs:
        allowed = [edit for edit in scores if repair.tokens in (edit.tokens, "any tokens")]
        best = max(scores[edit] for edit in allowed)
        if not repair.heads:
            assert best <= base.double().mean()
            continue
        assert scores[repair.heads[0]] == pytest.approx(best) and repair.steps[1].score == pytest.approx(best)
        right = right_by_hooks(model, task, attention.edits(repair.heads))[0]
        assert repair.steps[-1].accuracy == pytest.approx(right.double().mean())
        assert (
            repair.steps[-1].fixed == (right & ~base).sum() and repair.steps[-1].new_mistakes == (base & ~right).sum()
        )
        pairs = [[repair.heads[0], edit] for edit in allowed if edit.head != repair.heads[0].head]
        if len(repair.heads) == 2:

            def score(pair):
                right = right_by_hooks(model, task, attention.edits(pair))[0]
                return (right.double().mean() - 0.5 * (base & ~right).double().mean()).item()

            assert repair.steps[2].score == pytest.approx(max(map(score, pairs)))
    assert any(repair.heads for repair in found.repairs)
    # With all of them kept, the best of all pairs is found.
    wide = search_repair(
        model, task, tokens=SETS, layers=range(3), penalty=0.5, max_heads=2, shortlist=99, beam=99
    ).repairs[0]
    assert wide.steps[-1].score >= found.repairs[0].steps[-1].score
    pairs = [
        [one, other]
        for one, other in itertools.combinations(scores, 2)
        if one.head != other.head and max(scores[one], scores[other]) > base.double().mean() + 1e-9
    ]
    best = 0
    for pair in pairs:
        right = right_by_hooks(model, task, attention.edits(pair))[0]
        best = max(best, (right.double().mean() - 0.5 * (base & ~right).double().mean()).item())
    assert wide.steps[-1].score == pytest.approx(max(best, *scores.values()))
    assert found.runs >= len(scores)


def test_few_logits_decide_as_all_logits_do():
    model = tiny_model("llama")
    task = answerable(model, tiny_task(lengths=(12, 9, 12, 10, 11, 9)))
    few = RightAnswers(model, task)
    hidden = 3 * torch.randn(len(task), 50, 32, generator=torch.Generator().manual_seed(0))
    prompts = torch.arange(len(task))
    # Some of the streams give the right answer, and some logits are equal.
    hidden[:, :20] += 30 * model.get_output_embeddings().weight[task.answers().right]
    hidden[0, 0] = 0
    for _ in range(2):
        right, among = split_right(few(hidden, prompts))
        for row in prompts.tolist():
            logits = few.logits(hidden[row])
            answers = task.answers([row] * 50)
            assert torch.equal(right[row], accuracy(logits, answers.right) == 1)
            assert torch.equal(among[row], accuracy(logits, answers.right, answers.candidates) == 1)
    assert 20 < right.sum() < 200


@pytest.fixture(scope="module")
def planted():
    """An OPT in which head 1.2 lowers the color it attends to, and copies of all listed colors come from head 0.1.

    The model has only these: the head of layer 0 adds all colors that it attends to, so that the model cannot tell the
    listed ones apart; forced onto the two wrong ones, head 1.2 lowers these.
    """
    colors = colored_objects(TOKENIZER, 24)
    tokens = colors.tokens()
    model = model_for_tasks("opt")
    layers, embeddings = model.model.decoder.layers, model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1.0)
        # Colors in lower case (as listed) and in title case (as answers) share directions of opposite pairs.
        prompts = torch.arange(len(colors))
        pairs = {}
        for k in (1, 2, 3):
            listed = tokens.input_ids[prompts, tokens.positions[f"colour_{k}"]].tolist()
            answers = colors.answers().candidates[:, k - 1].tolist()
            pairs |= dict(zip(listed, answers, strict=True))
        assert len(pairs) == 8
        for number, (listed, answer) in enumerate(sorted(pairs.items())):
            # The listed token is written in the first half of the stream, and the answer is read from the second.
            embeddings[listed, number], embeddings[listed, 8 + number] = 1.0, -1.0
            embeddings[answer, 16 + number], embeddings[answer, 24 + number] = 1.0, -1.0
        lowers = layers[1].self_attn
        for number in range(8):
            lowers.v_proj.weight[16 + number, number] = 1.0
            lowers.out_proj.weight[16 + number, 16 + number] = -1.0
            lowers.out_proj.weight[24 + number, 16 + number] = 1.0
        # What the unchanged model adds: every listed color, by attention to all tokens in layer 0.
        adds = layers[0].self_attn
        for number in range(8):
            adds.v_proj.weight[8 + number, number] = 1.0
            adds.out_proj.weight[16 + number, 8 + number] = 2.0
            adds.out_proj.weight[24 + number, 8 + number] = -2.0
    return model


def test_the_planted_repair_is_found(planted):
    task, judged = colored_objects(TOKENIZER, 24), colored_objects(TOKENIZER, 40, seed=1)
    wrong = {"wrong_colour": ("wrong_colour_1", "wrong_colour_2")}
    study = find_repair(
        planted, task, judged, tokens=wrong, layers=[0, 1, 2], objective="candidate_accuracy", head_draws=3
    )
    repair = study.search.repairs[0]
    assert repair.heads[0] == ForcedHead((1, 2), "wrong_colour")
    outcomes = {each.condition: each for each in study.outcomes["wrong_colour"]}
    assert outcomes["none"].candidate_accuracy.mean < 0.7
    assert outcomes["repair"].candidate_accuracy.mean == 1
    assert repair.steps[1].fixed > 6 and repair.steps[1].new_mistakes == 0
    # Controls do nothing of the kind.
    assert all(outcomes[f"random heads {draw}"].candidate_accuracy.mean < 0.7 for draw in (1, 2, 3))
    assert outcomes["same heads to answer_colour"].candidate_accuracy.mean < 0.2
    # The only later heads are those of layer 2, which do nothing.
    assert study.downstream["wrong_colour"].compared == 4


def test_sets_of_tokens_of_tasks():
    colors, ioi = colored_objects(TOKENIZER, 3), indirect_object_identification(TOKENIZER, 4)
    sets = token_sets(colors)
    assert sets["wrong_colour"] == ("wrong_colour_1", "wrong_colour_2")
    assert set(sets["colour"]) == {"colour_1", "colour_2", "colour_3"} and sets["answer_colour"] == ("answer_colour",)
    assert set(token_sets(ioi)) == {"IO", "S1", "S1+1", "S2", "END", "first token"}
    # Nothing attends to what comes later.
    assert set(token_sets(ioi, "S2")) == {"IO", "S1", "S1+1", "S2", "first token"}
    with pytest.raises(TranscoderError, match="comes after the query token"):
        ForcedAttention(ioi, {"END": ("END",)}, "S2")


def test_controls_of_a_repair():
    model, colors = tiny_model("llama"), colored_objects(TOKENIZER, 5)
    sets = token_sets(colors)
    attention = ForcedAttention(colors, sets)
    repair = [ForcedHead((2, 1), "wrong_colour"), ForcedHead((1, 0), "wrong_colour")]
    found = judge_conditions(model, attention, repair, list(sets), 4, 2, random.Random(0))
    assert found["repair"] == repair and found["first 1 of 2 heads"] == repair[:1]
    assert [each.head for each in found["same heads to object"]] == [(2, 1), (1, 0)]
    assert "same heads to wrong_colour" not in found
    draws = [found[f"random heads {number}"] for number in range(1, 5)]
    for draw in draws:
        assert sorted(each.head[0] for each in draw) == [1, 2]
        assert {each.tokens for each in draw} == {"wrong_colour"}
        assert not {each.head for each in draw} & {each.head for each in repair}
    assert len({str(draw) for draw in draws}) == 4
    keys = attention.keys[found["random tokens 2"][0].tokens]
    for row, chosen in enumerate(keys.tolist()):
        taken = {0, int(attention.query[row]), *attention.keys["wrong_colour"][row].tolist()}
        assert len(set(chosen)) == 2 and taken.isdisjoint(chosen)


def test_predictions_of_rows_equal_forward_passes():
    model, colors = model_for_tasks("gemma3_text", seed=2), colored_objects(TOKENIZER, 5)
    attention = ForcedAttention(colors, token_sets(colors))
    conditions = {"none": [], "two": [ForcedHead((1, 0), "colour"), ForcedHead((2, 1), "first token")]}
    found = forced_predictions(model, colors, attention, conditions)
    for name, heads in conditions.items():
        with edited_attention(model, attention.edits(heads)):
            logits = end_logits(model, colors)
        answers = colors.answers()
        assert torch.equal(found[name].tokens, logits.argmax(-1))
        among = accuracy(logits, answers.right, answers.candidates) == 1
        assert torch.equal(found[name].candidates == answers.right[:, 0], among)


def test_the_page_and_its_files_hold_the_same_numbers(tmp_path):
    model = model_for_tasks()
    model.config.name_or_path = "<script>alert(1)</script>"
    task, judged = colored_objects(TOKENIZER, 6), colored_objects(TOKENIZER, 7, seed=1)
    # Among tiny random models, some edit raises this accuracy.
    study = find_repair(
        model, task, judged, objective="candidate_accuracy", penalty=0, explained=2, head_draws=2, token_draws=1,
        traced=trace_tasks(model, TOKENIZER, 3, depth=2),
    )  # fmt: skip
    assert len(study.explained) == 2 and study.heads and study.in_ioi and study.downstream
    page = save_repair(study, tmp_path / "repair").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    data = json.loads((tmp_path / "repair" / "results.json").read_text())
    with open(tmp_path / "repair" / "outcomes.csv", newline="") as file:
        rows = {(row["task"], row["tokens"], row["edit"]): row for row in csv.DictReader(file)}
    for tokens, outcomes in data["outcomes"].items():
        for each in outcomes:
            row = rows["colored-objects", tokens, each["condition"]]
            assert float(row["accuracy"]) == each["accuracy"]["mean"] and int(row["fixed"]) == each["fixed"]
            assert sum(each["confusion"].values()) == 7
            if tokens in data["explained"] and "random" not in each["condition"]:
                assert f"{each['accuracy']['mean']:.3f} [{each['accuracy']['low']:.3f}" in page
    assert data["protocol"]["edits_tried"] >= 12 * 9
    printed = study.to_text()
    for words in (
        "Repairs found",
        "Attention from END without an edit, IOI",
        "93.7%",
        "Roles by every test",
        "Later heads",
    ):
        assert words in printed
    assert str(study) == printed


def test_only_prompts_that_the_search_has_not_seen_are_judged():
    task = colored_objects(TOKENIZER, 4)
    with pytest.raises(TranscoderError, match="another seed"):
        unseen(task, task)
    twice = Task(Dataset.from_list([*task.dataset, *colored_objects(TOKENIZER, 3, seed=5).dataset]), "twice")
    assert len(unseen(twice, task)) == 3


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"query": "S9"}, "has no position 'S9'"),
        ({"tokens": {"x": ("S9",)}}, "has no position 'S9'"),
        ({"tokens": {"x": ()}}, "is empty"),
        ({"tokens": {}}, "no tokens to force"),
        ({"layers": [9]}, "layer 9 does not exist"),
        ({"layers": []}, "no layers to search"),
        ({"objective": "beauty"}, "There is no objective 'beauty'"),
        ({"penalty": -1}, "penalty is -1"),
        ({"max_heads": 0}, "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, sentence):
    with pytest.raises(TranscoderError, match=sentence):
        search_repair(tiny_model("llama"), tiny_task(), **arguments)


def test_tasks_without_corrupted_prompts_and_other_queries():
    model, task = tiny_model("llama"), tiny_task(corrupted=False)
    found = search_repair(model, task, query="S", objective="candidate_accuracy", batch_size=5)
    assert set(found.sets) == {"S", "first token"}
    # From a quarter of three layers up is from layer 0 up.
    assert not found.alone["accuracy"].isnan().any()
    upper = search_repair(model, task, layers=[2]).alone["accuracy"]
    assert upper[:, :2].isnan().all() and not upper[:, 2].isnan().any()
    pairs = itertools.pairwise(repair.steps[-1].score for repair in found.repairs)
    assert all(one >= other for one, other in pairs)
