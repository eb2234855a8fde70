"""Results that mean little say so in one line each; a good one says nothing."""

import math

import pytest

from hf_transcoders import TranscoderConfig
from hf_transcoders.evaluation.result_caveats import caveats


def config(steps=1000, **changes):
    return TranscoderConfig(d_in=8, num_features=100, training_summary={"steps": steps}, **changes)


GOOD = {"fvu": 0.3, "l0": 4.0}


def test_a_good_result_has_none():
    assert caveats({"a": config()}, {"a": GOOD}, tokens=10_000) == {}
    assert caveats({"a": TranscoderConfig(d_in=8)}, {}) == {}


@pytest.mark.parametrize(
    "kind, given, metrics, tokens, line",
    [
        ("useless", {}, {"fvu": 1.009}, 9_999, "a: worse than predicting the mean activation (FVU 1.009)."),
        ("exploded", {}, {"fvu": 5.5e34}, 9_999, "a: the loss has exploded (FVU 5.5e+34): train again with a lower learning rate."),
        ("exploded", {}, {"fvu": math.nan}, 9_999, "a: the loss has exploded (FVU nan): train again with a lower learning rate."),
        ("steps", {"steps": 3}, {}, 9_999, "a: trained for 3 steps only."),
        ("tokens", {}, {}, 250, "Measured on 250 held-out tokens only: the numbers are rough."),
        (
            "dense", {"activation": "relu"}, {"l0": 55.0}, 9_999,
            "a: not sparse, with 55 features active on a token (the L1 coefficient is 0).",
        ),
    ],
)  # fmt: skip
def test_each_kind(kind, given, metrics, tokens, line):
    assert caveats({"a": config(**given)}, {"a": GOOD | metrics}, tokens) == {kind: line}


def test_a_large_set_has_one_line_for_each_kind():
    names = [f"layers.{i}" for i in range(30)]
    found = caveats(
        {name: config(steps=3) for name in names},
        {name: {"fvu": 1 + i / 100, "l0": 4.0} for i, name in enumerate(names)},
    )
    assert found == {
        "useless": "All 30 dictionaries: worse than predicting the mean activation (FVU 1 to 1.29).",
        "steps": "All 30 dictionaries: trained for 3 steps only.",
    }
