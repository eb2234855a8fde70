"""Feature patching: against whole forward passes with plain hooks, the published loop, and planted effects."""

import json

import pytest
import torch

from hf_transcoders import TranscoderConfig, TranscoderError, TranscoderModel
from hf_transcoders.circuits.patching.engine import PatchEngine
from hf_transcoders.lm.architectures import locate
from hf_transcoders.models import direction_dictionary, directions_config
from hf_transcoders.studies.feature_patching.patched_features import CounterfactualKL, PatchedFeatures
from hf_transcoders.studies.feature_patching.patching_report import save_feature_patching
from hf_transcoders.studies.feature_patching.patching_results import PatchingPoint, patching_area
from hf_transcoders.studies.feature_patching.study import feature_patching_study
from hf_transcoders.studies.feature_patching.threshold_sweep import threshold_sweep
from tests.circuits.patching.brute_force import tiny_task
from tests.studies.greater_than.setups import transcoder_of
from tests.tiny_models import HIDDEN_SIZE, tiny_model


STREAM = "layers.1.resid_post"


def sae_of(model, site=STREAM, num_features=40, seed=0):
    config = TranscoderConfig.for_model(model, site, num_features=num_features, activation="relu")
    dictionary = TranscoderModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return dictionary


def identity_of(model, site=STREAM):
    fields = directions_config(HIDDEN_SIZE, HIDDEN_SIZE, both_signs=True, centered=False)
    config = TranscoderConfig.for_model(model, site, **fields)
    return direction_dictionary(config, torch.eye(HIDDEN_SIZE))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").eval()


@pytest.fixture(scope="module")
def engine(model):
    task = tiny_task()
    return PatchEngine(model, task, metric=CounterfactualKL(model, task))


@torch.no_grad()
def brute_force(model, task, dictionary, features):
    """Mean KL and size of the edit, one prompt at a time."""
    kls, norms = [], []
    for row in task:
        clean, other = (torch.tensor([row[f"{which}_ids"]]) for which in ("clean", "corrupted"))
        seen = {}

        def see(module, args, kwargs, seen=seen):
            seen["input"] = (args[0] if args else kwargs["hidden_states"]).clone()

        site = dictionary.config.input_site
        location = locate(model, site)
        codes = {}
        for which, ids in (("clean", clean), ("other", other)):
            if location.side == "in":
                handle = location.module.register_forward_pre_hook(see, with_kwargs=True)
            else:
                handle = location.module.register_forward_hook(
                    lambda module, args, output, seen=seen: seen.update(input=output.clone())
                )
            logits = model(ids).logits[0, -1]
            handle.remove()
            codes[which] = dictionary.encode(seen["input"][0])
        target = logits.log_softmax(-1)
        change = torch.zeros_like(codes["clean"])
        change[:, features] = (codes["other"] - codes["clean"])[:, features]
        edit = change @ dictionary.W_dec
        norms += edit.norm(dim=-1).tolist()
        handle = locate(model, dictionary.config.output_site).module.register_forward_hook(
            lambda module, args, output, edit=edit: output + edit
        )
        patched = model(clean).logits[0, -1].log_softmax(-1)
        handle.remove()
        kls.append((patched.exp() * (patched - target)).sum().item())
    return sum(kls) / len(kls), sum(norms) / len(norms)


def places_of(patched, features):
    """The units of some features, of those that change."""
    rows = patched.dictionary.W_dec[features]
    return (patched.changes.rows[:, None] == rows).all(-1).any(1)


@pytest.mark.parametrize(
    "make", [sae_of, lambda model: transcoder_of(model, 1), lambda model: transcoder_of(model, 2, output="mlp.out")]
)
def test_sets_of_features_equal_whole_forward_passes(model, engine, make):
    dictionary = make(model)
    patched = PatchedFeatures(engine, dictionary)
    sets = [[], [0], [1, 2, 5, 7], list(range(dictionary.config.num_features))]
    kept = torch.stack([places_of(patched, features) for features in sets])
    found = patched.kl(kept)
    for features, value, units in zip(sets, found, kept, strict=True):
        kl, size = brute_force(model, engine.task, dictionary, features)
        assert value.item() == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert patched.changes.edit_size(units) == pytest.approx(size, rel=1e-4, abs=1e-7)
    assert patched.measured == 4 and found.std() > 1e-3


def test_all_coordinates_give_the_counterfactual_prediction_and_none_the_own(model, engine):
    patched = PatchedFeatures(engine, identity_of(model))
    everything = torch.ones(1, len(patched.changes.rows), dtype=torch.bool)
    assert abs(patched.kl(everything).item()) < 1e-6
    assert patched.kl(~everything).item() == pytest.approx(
        brute_force(model, engine.task, patched.dictionary, [])[0], rel=1e-4
    )


def test_a_pair_is_both_signs_of_a_direction(model, engine):
    dictionary = identity_of(model)
    pairs, single = PatchedFeatures(engine, dictionary, pairs=True), PatchedFeatures(engine, dictionary)
    assert pairs.changes.num_units == HIDDEN_SIZE and single.changes.num_units == 2 * HIDDEN_SIZE
    for coordinate in (0, 7):
        one = (pairs.changes.rows[:, coordinate] != 0)[None]
        both = (single.changes.rows[:, coordinate] != 0)[None]
        assert one.sum() == 1 and both.sum() in (1, 2)
        torch.testing.assert_close(pairs.kl(one), single.kl(both), rtol=1e-5, atol=1e-7)


def test_attribution_is_the_derivative_of_the_kl(model, engine):
    patched = PatchedFeatures(engine, sae_of(model))
    scores, values = patched.attribution(), patched.changes.values.clone()
    step = 1e-2
    none = torch.zeros(1, len(scores), dtype=torch.bool)
    for unit in (0, 3, 11):
        one = none.clone()
        one[0, unit] = True
        slopes = []
        for sign in (1, -1):
            patched.changes.values.copy_(values * step * sign)
            slopes.append(patched.kl(one).item())
        patched.changes.values.copy_(values)
        assert (slopes[0] - slopes[1]) / (2 * step) == pytest.approx(scores[unit].item(), rel=2e-2, abs=2e-4)


def published_loop(measure, order, thresholds):
    """Each feature alone, one run each."""
    kept = torch.ones(len(order), dtype=torch.bool)
    current, path = measure(kept[None])[0].item(), []
    for threshold in thresholds:
        for unit in order.tolist():
            if not kept[unit]:
                continue
            kept[unit] = False
            new = measure(kept[None])[0].item()
            if new - current < threshold:
                current = new
            else:
                kept[unit] = True
        path.append((kept.clone(), current))
    return path


def interacting(units, seed=0):
    """A KL of sets with interactions between units."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(units, units, generator=generator, dtype=torch.float64)

    def measure(kept):
        return ((~kept).double() @ weights * 0.1).square().mean(1)

    return measure


def test_groups_of_one_are_the_published_algorithm():
    thresholds = [1e-3, 1e-2, 0.1]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    path = threshold_sweep(interacting(20), order, thresholds, group_size=1)
    for threshold, (kept, kl) in zip(thresholds, published_loop(interacting(20), order, thresholds), strict=True):
        last = [each for each in path if each.threshold is None or each.threshold <= threshold][-1]
        assert torch.equal(last.kept, kept) and last.kl == pytest.approx(kl, abs=1e-12)


@pytest.mark.parametrize("group_size", [1, 4, 32])
def test_how_many_sets_are_measured_together_changes_nothing(group_size):
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    paths = [threshold_sweep(interacting(30), order, [1e-3, 1e-2, 0.1], group_size, most) for most in (1, 3, 16)]
    for path in paths[1:]:
        assert [each.kept.tolist() for each in path] == [each.kept.tolist() for each in paths[0]]


def test_what_stays_mattered_alone_and_what_goes_did_not():
    effects = torch.tensor([0.0, 0.5, 1e-4, 0.02, 0.3, 1e-5, 0.0, 0.0])
    measured = []

    def measure(kept):
        measured.append(len(kept))
        return ((~kept).double() * effects).sum(1)

    path = threshold_sweep(measure, torch.arange(8), [1e-3, 0.1], group_size=8)
    by_threshold = {each.threshold: each.kept.nonzero()[:, 0].tolist() for each in path}
    assert by_threshold[1e-3] == [1, 3, 4] and by_threshold[0.1] == [1, 4]
    assert [each.size for each in path] == sorted((each.size for each in path), reverse=True)
    # More features than tests: four of them go in groups.
    wide = torch.zeros(1000)
    wide[[17, 600]] = 1.0
    count = []
    threshold_sweep(
        lambda kept: (count.append(len(kept)), ((~kept).double() * wide).sum(1))[1], torch.arange(1000), [0.5], 100
    )
    assert sum(count) < 100


def test_the_area_is_the_mean_of_the_largest_set_that_is_not_larger():
    points = [
        PatchingPoint(9, 0.5, 1.0),
        PatchingPoint(4, 1.0, 1.0),
        PatchingPoint(1, 2.0, 1.0),
        PatchingPoint(0, 3.0, 0.0),
    ]
    for limit in (0, 3, 6, 12):
        expected = [next(point.kl for point in points if point.patched <= count) for count in range(limit + 1)]
        assert patching_area(points, limit) == pytest.approx(sum(expected) / len(expected))


def test_the_study_its_text_and_its_page(model, engine, tmp_path):
    dictionaries = {"<b>sae": sae_of(model), "identity": identity_of(model), "transcoder": transcoder_of(model, 1)}
    study = feature_patching_study(
        model,
        engine.task,
        dictionaries,
        thresholds=(1e-4, 1e-2, 1),
        random_orders=2,
        single_signs=True,
        max_patched=20,
        progress=False,
    )
    assert [each.name for each in study.dictionaries] == ["<b>sae", "identity", "± identity", "transcoder"]
    for each in study.dictionaries:
        assert [curve.order for curve in each.curves] == ["attribution", "random, seed 0", "random, seed 1"]
        for curve in each.curves:
            sizes = [point.patched for point in curve.points]
            assert sizes == sorted(sizes, reverse=True) and sizes[0] == each.num_changing and sizes[-1] == 0
            assert curve.kl_at(0) == pytest.approx(each.kl_none) or curve.points[-1].threshold is not None
    # The size of the edit belongs to the set that is kept.
    first = study.dictionaries[0]
    patched = PatchedFeatures(engine, dictionaries["<b>sae"])
    assert first.curves[0].points[0].edit_size == pytest.approx(
        patched.changes.edit_size(torch.ones(first.num_changing, dtype=torch.bool))
    )
    page = save_feature_patching(study, tmp_path / "out").read_text()
    assert "<b>sae" not in page and "&lt;b&gt;sae" in page
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["dictionaries"][1]["kl_all"] == pytest.approx(study.dictionaries[1].kl_all)
    assert f"{study.dictionaries[1].kl_none:.3f}" in study.to_text()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"thresholds": (1, 0.1)}, "ascending"),
        ({"thresholds": ()}, "at least one"),
        ({"group_size": 0}, "group_size is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(model, engine, options, sentence):
    with pytest.raises(TranscoderError, match=sentence):
        feature_patching_study(model, engine.task, {"sae": sae_of(model)}, progress=False, **options)
