"""Explanations beside the weights: written, read, pushed, and refused where they do not belong."""

import json

import pytest

from hf_transcoders import TranscoderSet
from hf_transcoders.errors import TranscoderError
from hf_transcoders.features.explain import (
    FeatureScores,
    SavedExplanation,
    chosen_explanations,
    load_explanations,
    mean_scores,
    save_explanations,
    saved_labels,
)
from hf_transcoders.hub.push_files import dictionary_files, left_by_earlier_push

from ...evaluation.conftest import random_dictionary


EXPLANATIONS = {
    3: SavedExplanation("names <b>", "combination", 0.5, 0.25),
    1: SavedExplanation("months", "chat model"),
}


@pytest.fixture
def saved(base, tmp_path):
    dictionary = random_dictionary(base, 1)
    dictionary.save_pretrained(tmp_path / "one")
    save_explanations(EXPLANATIONS, dictionary, tmp_path / "one")
    return dictionary, tmp_path / "one"


def test_they_are_read_as_written(saved, base):
    dictionary, folder = saved
    assert load_explanations(folder, dictionary) == EXPLANATIONS
    save_explanations(
        {3: SavedExplanation("other", "combination"), 5: SavedExplanation("five", "a")}, dictionary, folder
    )
    merged = load_explanations(folder / "feature_explanations.json", dictionary)
    assert [merged[feature].text for feature in (1, 3, 5)] == ["months", "other", "five"] and list(merged) == [1, 3, 5]
    # Those of other weights are replaced.
    other = random_dictionary(base, 1, seed=4)
    with pytest.raises(TranscoderError, match="explains the features of other weights"):
        load_explanations(folder, other)
    save_explanations({7: SavedExplanation("seven", "a")}, other, folder)
    assert list(load_explanations(folder, other)) == [7]


def test_a_push_takes_them_along(saved, base, tmp_path):
    dictionary, folder = saved
    assert "feature_explanations.json" in dictionary_files(folder)
    TranscoderSet({"a": dictionary, "b": random_dictionary(base, 2)}).save_pretrained(tmp_path / "set")
    (place,) = (tmp_path / "set").glob("a*")
    save_explanations(EXPLANATIONS, dictionary, place)
    files = dictionary_files(tmp_path / "set")
    name = f"{place.name}/feature_explanations.json"
    assert name in files
    read = lambda path: (tmp_path / "set" / path).read_bytes()  # noqa: E731
    assert name in left_by_earlier_push(set(files), "", read)


def test_labels_of_graphs(saved, base, tmp_path):
    dictionary, folder = saved
    named = {"layers.1": dictionary}
    assert saved_labels(folder, named, 200) == {"layers.1": {3: "names <b>", 1: "months"}}
    assert saved_labels(folder, named, 7) == {"layers.1": {3: "name...", 1: "months"}}
    assert saved_labels("some/hub-id", named, 200) == {}
    both = TranscoderSet({"a": dictionary, "b": random_dictionary(base, 2)})
    both.save_pretrained(tmp_path / "set")
    assert saved_labels(tmp_path / "set", dict(both.items()), 200) == {}
    (place,) = (tmp_path / "set").glob("a*")
    save_explanations(EXPLANATIONS, dictionary, place)
    assert saved_labels(tmp_path / "set", dict(both.items()), 200) == {"a": {3: "names <b>", 1: "months"}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 2}, "has the format 2"),
        ({"dictionary": 3}, "must be text"),
        ({"more": 1}, "has an entry 'more'"),
        ({"explanations": {"x": {}}}, "is not of a feature"),
        ({"explanations": {"1": 2}}, "must be an object"),
        ({"explanations": {"1": {"text": "a"}}}, "lacks 'explainer'"),
        (
            {"explanations": {"1": {"text": "a" * 2001, "explainer": "", "score": None, "floor": None}}},
            "give at most 2,000",
        ),
        ({"explanations": {"40": {"text": "a", "explainer": "", "score": None, "floor": None}}}, "does not have"),
    ],
)
def test_damaged_files_are_refused(saved, change, message):
    dictionary, folder = saved
    path = folder / "feature_explanations.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TranscoderError, match=message):
        load_explanations(folder, dictionary)


def test_the_explanation_that_is_saved():
    scores = {"simulation.top_and_random": 0.5}
    floor = {"token-table floor": {"simulation.top_and_random": 0.25}}
    one = FeatureScores(1, {"combination": "a", "chat model": "b"}, {"combination": scores, **floor})
    other = FeatureScores(2, {"combination": "c"}, {"combination": scores, **floor})
    found = chosen_explanations([one, other, FeatureScores(3, skipped="few")])
    assert found == {
        1: SavedExplanation("b", "chat model", None, 0.25),
        2: SavedExplanation("c", "combination", 0.5, 0.25),
    }


def test_means_have_intervals_and_differences_from_the_floor():
    results = [
        FeatureScores(i, {}, {"token-table floor": {"s": i / 10}, "x": {"s": i / 10 + 0.1 + (i % 2) / 100}})
        for i in range(9)
    ]
    results.append(FeatureScores(9, {}, {"token-table floor": {"s": float("nan")}, "x": {"s": float("nan")}}))
    floor, x = mean_scores(results)
    assert floor.mean == pytest.approx(0.4) and floor.features == x.features == 9 and floor.above_floor is None
    assert floor.low < 0.4 < floor.high and floor.high - floor.low > 0.2
    # The difference is of the same features, so that its interval is narrow.
    assert x.above_floor == pytest.approx(0.1 + 4 / 900) and x.above_high - x.above_low < 0.01
