"""The values of ablations against patches made by hand."""

import pytest
import torch
from datasets import Dataset

from hf_transcoders import TranscoderError
from hf_transcoders.circuits.patching import Patching
from hf_transcoders.circuits.patching.ablations import ABLATIONS
from hf_transcoders.tasks import Task
from tests.circuits.patching.brute_force import activations, at, patched, prompt, tiny_task
from tests.circuits.patching.test_patching import close, positions_of
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("component", ["z", "key", "pattern"])
def test_ablations_write_what_they_say(component):
    model, task = tiny_model("gpt2"), tiny_task(lengths=(9, 9, 9, 10, 10), templates=[0, 0, 1, 1, 1])
    clean = [activations(model, prompt(task, row)) for row in range(5)]
    corrupted = [activations(model, prompt(task, row, "corrupted")) for row in range(5)]
    groups = {0: [0, 1], 1: [0, 1], 2: [2], 3: [3, 4], 4: [3, 4]}
    for name in ("END", "all"):
        found = {
            kind: Patching(model, task, ablation=kind).heads(name, component, layers=[1])
            for kind in ("zero", "mean", "resample")
        }
        assert found["zero"].source is None
        expected = {"zero": torch.empty(1, 4, 5), "mean": torch.empty(1, 4, 5)}
        for row, position in enumerate(positions_of(task, name)):

            def run(head, written, row=row, position=position):
                return patched(model, task, row, [(component, 1, head, position, written)])

            for head in range(4):
                mean = torch.stack([corrupted[other][component, 1] for other in groups[row]]).mean(0)
                value = at(mean, component, head, position)
                expected["zero"][0, head, row] = run(head, torch.zeros_like(value))
                expected["mean"][0, head, row] = run(head, value)
                others = [each for each in range(5) if each != row and (each < 3) == (row < 3)]
                results = [run(head, at(clean[each][component, 1], component, head, position)) for each in others]
                assert min(abs(found["resample"].values[0, head, row] - result) for result in results) < 1e-5
        close(found["zero"].values, expected["zero"])
        close(found["mean"].values, expected["mean"])


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_the_stream_between_attention_and_mlp_can_be_ablated(ablation):
    model, task = tiny_model("gemma2"), tiny_task(lengths=(9, 9), templates=[0, 0])
    found = Patching(model, task, ablation=ablation).residual(["S"], "resid_mid", layers=[1]).values[0, 0]
    for row, position in enumerate(positions_of(task, "S")):
        corrupted = [activations(model, prompt(task, each, "corrupted"))["resid_mid", 1] for each in (0, 1)]
        value = {
            "zero": torch.zeros_like(corrupted[0]),
            "mean": (corrupted[0] + corrupted[1]) / 2,
            "resample": activations(model, prompt(task, 1 - row))["resid_mid", 1],
        }[ablation][position]
        patch = ("resid_mid", 1, None, position, value)
        assert found[row].item() == pytest.approx(patched(model, task, row, [patch]), rel=1e-4, abs=1e-4)


def test_denoising_ablations_come_from_the_run_that_they_say():
    model, task = tiny_model("llama"), tiny_task(lengths=(9, 9))
    runs = {
        which: [activations(model, prompt(task, row, which)) for row in (0, 1)] for which in ("clean", "corrupted")
    }
    sources = {
        # With two prompts of the same length, the other prompt is the only choice.
        "resample": lambda row: runs["corrupted"][1 - row]["z", 1],
        "mean": lambda row: (runs["clean"][0]["z", 1] + runs["clean"][1]["z", 1]) / 2,
        "zero": lambda row: torch.zeros_like(runs["clean"][row]["z", 1]),
    }
    for ablation, source in sources.items():
        found = Patching(model, task, direction="denoising", ablation=ablation).heads("S", layers=[1])
        assert found.source is None
        for row, position in enumerate(positions_of(task, "S")):
            for head in range(4):
                patch = ("z", 1, head, position, at(source(row), "z", head, position))
                expected = patched(model, task, row, [patch], "corrupted")
                assert found.values[0, head, row].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("position", ["S", "all"])
def test_paths_of_ablated_senders(position):
    model, task = tiny_model("llama"), tiny_task(lengths=(9,))
    found = Patching(model, task, ablation="mean").paths(["layers.2.attn.head.1.value"], position, sender_mlps=True)
    # The mean over one corrupted prompt is its activation.
    expected = Patching(model, task).paths(["layers.2.attn.head.1.value"], position, sender_mlps=True)
    close(found.values, expected.values)
    zeroed = Patching(model, task, ablation="zero").paths("logits", "END").values
    assert (zeroed != expected.base).any() and not torch.allclose(zeroed[0], expected.values[0, :4], atol=1e-3)


def test_seeds_choose_the_prompts_of_resample():
    model, task = tiny_model("gpt2"), tiny_task(lengths=(9,) * 6)

    def values(seed):
        return Patching(model, task, ablation="resample", seed=seed).heads().values

    assert torch.equal(values(3), values(3))
    assert torch.equal(values(0), values(None))
    assert any(not torch.allclose(values(seed), values(0)) for seed in (1, 2))


@pytest.mark.parametrize("ablation", [name for name, row in ABLATIONS.items() if not row.is_random])
def test_a_seed_for_an_ablation_that_is_not_random_is_refused(ablation):
    for seed in (0, 1):
        with pytest.raises(TranscoderError, match=f"'{ablation}' is not random: leave out seed={seed}"):
            Patching(tiny_model("llama"), tiny_task(), ablation=ablation, seed=seed)


def test_pairs_of_unequal_length_are_refused_where_they_are_needed():
    rows = tiny_task().dataset.to_list()
    rows[1]["corrupted_ids"].append(5)
    task = Task(Dataset.from_list(rows), "tiny")
    for ablation in ("counterfactual", "mean"):
        with pytest.raises(TranscoderError, match="row 1 have 12 and 13"):
            Patching(tiny_model("llama"), task, ablation=ablation)
    assert Patching(tiny_model("llama"), task, ablation="zero").heads().shape == (3, 4)


def test_means_are_of_the_prompts_themselves_without_corrupted_ones():
    model, task = tiny_model("llama"), tiny_task(lengths=(9, 9), corrupted=False)
    with pytest.raises(TranscoderError, match="no corrupted prompts"):
        Patching(model, task)
    found = Patching(model, task, ablation="mean").heads("END", layers=[1])
    mean = torch.stack([activations(model, prompt(task, row))["z", 1] for row in (0, 1)]).mean(0)
    patch = ("z", 1, 2, 8, at(mean, "z", 2, 8))
    assert found.values[0, 2, 0].item() == pytest.approx(patched(model, task, 0, [patch]), rel=1e-4, abs=1e-4)
