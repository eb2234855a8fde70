"""Whether a model does a task: warnings where a score may be 0 or an accuracy is at chance."""

import pytest
import torch

from hf_transcoders.tasks import ability_warning, estimate, indirect_object_identification, task_performance
from hf_transcoders.tasks.performance import TaskPerformance, chance
from tests.studies.test_circuit_reuse import TOKENIZER, model_for_tasks


def values(mean, spread, share=False):
    if share:
        return estimate((torch.arange(100) < 100 * mean).float(), share=True)
    return estimate(mean + spread * torch.linspace(-1, 1, 100))


@pytest.mark.parametrize(
    "score, accuracy, sentence",
    [
        (values(1.0, 0.5), values(0.9, 0, share=True), None),
        (values(0.0, 1.0), values(0.9, 0, share=True), "includes 0"),
        (values(-1.0, 0.1), values(0.9, 0, share=True), "is negative"),
        (values(1.0, 0.5), values(0.52, 0, share=True), "is not above chance (0.500)"),
        (values(0.0, 1.0), values(0.5, 0, share=True), "includes 0, and its accuracy"),
    ],
)
def test_a_warning_stands_where_the_task_is_not_done(score, accuracy, sentence):
    found = ability_warning("ioi", ("logit difference", score), ("accuracy", accuracy), 0.5)
    assert (found is None) == (sentence is None)
    if sentence:
        assert sentence in found and found.startswith(
            "The model does not do the task 'ioi': the 95%" if "chance" not in sentence else "The model"
        )
        assert str(score) in found or str(accuracy) in found


def test_an_accuracy_without_chance_is_not_judged():
    assert ability_warning("x", None, ("accuracy", values(0.0, 0, share=True))) is None
    assert "chance (0.000)" in ability_warning("x", None, ("accuracy", values(0.0, 0, share=True)), 0.0)


def test_performance_of_a_random_model():
    task = indirect_object_identification(TOKENIZER, 6, "s2_io_flip", seed=0)
    found = task_performance(model_for_tasks(), task)
    assert chance(task) == found.chance == 0.5
    assert found.headings() == [
        "prompts",
        "logit difference",
        "accuracy, full vocabulary",
        "accuracy among candidates",
    ]
    assert [row[0] for row in found.rows()] == ["clean", "corrupted"]
    assert found.rows()[0][1] == str(found.measured["clean"]["logit_difference"])
    assert found.to_dict()["warning"] == found.warning


def test_tasks_without_wrong_answers():
    clean = {"accuracy": values(0.0, 0, share=True), "candidate_accuracy": values(1.0, 0, share=True)}
    assert "its accuracy, 0.000" in TaskPerformance("x", {"clean": clean}, None).warning
    clean["accuracy"] = values(0.5, 0, share=True)
    assert TaskPerformance("x", {"clean": clean}, None).warning is None
