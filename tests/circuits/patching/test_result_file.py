"""Damaged result files: each can be used or is refused in one sentence."""

import json

import pytest

from hf_transcoders.circuits.patching import PatchResult, result_heatmap
from hf_transcoders.errors import TranscoderError
from hf_transcoders.reports.heatmap_svg import heatmap_svg
from tests.circuits.patching.test_results import result
from tests.mutations import mutate_json


def use(loaded, folder):
    loaded.top(3)
    loaded.intervals(resamples=10)
    loaded.to_csv(folder / "x.csv")
    loaded.to_json(folder / "again.json")
    if len(loaded.axes) == 2:
        heatmap_svg(result_heatmap(loaded, "x"))


def test_mutated_results_are_refused_or_usable(tmp_path):
    path = tmp_path / "result.json"
    contents = [result(source).to_dict() for source in (True, False)]
    refused = 0
    for seed in range(150):
        path.write_text(json.dumps(mutate_json(contents[seed % 2], seed)))
        try:
            loaded = PatchResult.from_json(path)
        except TranscoderError as error:
            refused += 1
            assert str(error).isprintable()
        else:
            use(loaded, tmp_path)
    assert 75 < refused < 150


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null", b'{"axes": {}}', b"[" * 10**5])
def test_what_is_no_result_is_one_sentence(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(TranscoderError, match=r"^[^\n]*result\.json[^\n]*\.$"):
        PatchResult.from_json(tmp_path / "result.json")


@pytest.mark.parametrize("value", [True, "1", 1e39, 10**40, [1.0], {}])
def test_what_is_no_number_is_refused(tmp_path, value):
    content = result().to_dict()
    content["values"][0][1][0] = value
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(TranscoderError, match="'values'"):
        PatchResult.from_json(tmp_path / "result.json")


def test_an_infinite_effect_is_written_as_json_has_it(tmp_path):
    each = result()
    each.source = each.base.clone()
    each.to_json(tmp_path / "result.json")
    json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    use(PatchResult.from_json(tmp_path / "result.json"), tmp_path)
