import pytest

from hf_transcoders.errors import TranscoderError
from hf_transcoders.files import inner_path


@pytest.mark.parametrize("name", ["layers.8.mlp.transcoder", "a/b-c/d.safetensors", "..a", "a b"])
def test_a_path_into_the_folder_is_given_back(name):
    assert inner_path(name, "index.json") == name


@pytest.mark.parametrize(
    "name",
    ["", "/", "/etc", "..", "../x", "a/../../x", "a/..", ".", "./a", "a//b", "a/", "C:\\x", "C:x", "a\\b", "a\0b", "\x1b[1m", "x" * 2000, 3, None, ["a"]],
)  # fmt: skip
def test_a_path_elsewhere_is_refused(name):
    with pytest.raises(TranscoderError, match=r"^index\.json names [^\n]*\.$"):
        inner_path(name, "index.json")
