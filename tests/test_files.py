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


def test_no_cell_of_a_csv_file_is_a_formula(tmp_path):
    import csv

    from hf_transcoders.files import write_csv

    texts = [
        "=1+1", "+cmd", "-cmd", "@sum", "\tx", "\rx", "\n=x", "\uff1d1", "=", "-", "plain", "a=b", "-1.5", "+3e5", "-inf", "'x",
    ]  # fmt: skip
    values = [1, -2.5, True, None, float("nan")]
    write_csv(tmp_path / "x.csv", ["=head", *texts[1:]], [texts, values])
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        head, row, numbers = csv.reader(file)
    assert head[0] == "'=head"
    for cell, text in zip(row, texts, strict=True):
        assert cell == (f"'{text}" if text[0] in "=+-@\t\r\n\uff1d" and text not in ("-1.5", "+3e5", "-inf") else text)
    assert numbers == ["1", "-2.5", "True", "", "nan"]
    assert not [path for path in tmp_path.iterdir() if path.name != "x.csv"]
