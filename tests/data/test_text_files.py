"""Text files, whole or damaged, are found and read, or refused in one sentence."""

import bz2
import gzip
import json
import lzma
import time

import datasets
import pytest
from datasets import Dataset

from hf_transcoders.data.text import load_texts
from hf_transcoders.data.text_files import kind_of
from hf_transcoders.data.wikitext import is_wikitext
from hf_transcoders.errors import TranscoderError
from tests.data.test_text import own_cache_and_no_network, texts_of  # noqa: F401


datasets.disable_progress_bars()
ROWS = [{"text": "One."}, {"text": "Two."}]
LINES = "\n".join(map(json.dumps, ROWS))


def refused(source, match=".", **kwargs):
    for streaming in (False, True):
        with pytest.raises(TranscoderError, match=match) as refusal:
            list(load_texts(source, streaming=streaming, **kwargs))
        assert str(refusal.value).isprintable(), ascii(str(refusal.value))


NAMES = (
    "plain.txt", "with space.txt", "notes [v1].txt", "data[1]/notes.txt", "st*r.txt", "wh?t.txt", "[!x].txt", "a[.txt",
    "{a,b}.txt", "A.TXT", "per%20cent.txt", "hash#.txt", "é.txt", "back\\slash.txt",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for neighbour in ("star.txt", "what.txt", "notes v.txt", "x.txt", "a.txt"):
        (path.parent / neighbour).write_text("A neighbour.")
    path.write_text("One.\n\nTwo.")
    for streaming in (False, True):
        assert texts_of(load_texts(path, streaming=streaming)) == ["One.", "Two."]


@pytest.mark.parametrize("name", ["plain", "brackets [1]", "st*r", "wh?t"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_a_folder_is_a_folder(tmp_path, name, suffix):
    for folder in (tmp_path / name, tmp_path / "star", tmp_path / "brackets 1"):
        folder.mkdir()
        for file in (f"train.{suffix}", f"test.{suffix}"):
            if suffix == "txt":
                (folder / file).write_text("One.\n\nTwo.")
            elif suffix == "jsonl":
                (folder / file).write_text(LINES)
            else:
                getattr(Dataset.from_list(ROWS), f"to_{suffix}")(folder / file)
    (tmp_path / name / "notes.md").write_text("Not data.")
    (tmp_path / name / ".hidden").mkdir()
    (tmp_path / name / ".hidden" / f"train.{suffix}").write_text("nonsense")
    assert texts_of(load_texts(tmp_path / name)) == ["One.", "Two."]
    assert texts_of(load_texts(tmp_path / name, split="test", streaming=True)) == ["One.", "Two."]
    assert texts_of(load_texts(tmp_path / name, split="test[:1]")) == ["One."]
    with pytest.raises(TranscoderError, match="split"):
        load_texts(tmp_path / name, split="validation")


def test_splits_by_folders_and_shards(tmp_path):
    for name in ("a/train/x.txt", "a/dev/x.txt", "b/data/fold-00000-of-00002.txt", "b/data/fold-00001-of-00002.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(load_texts(tmp_path / "a", split="validation")) == ["a/dev/x.txt"]
    assert len(load_texts(tmp_path / "b", split="fold")) == 2


def test_a_folder_of_several_kinds(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("One.")
    (tmp_path / "b.jsonl").write_text(LINES)
    refused(tmp_path, "several kinds.*name the files")
    (tmp_path / "c.jsonl").write_text(LINES)
    assert len(load_texts(tmp_path)) == 4
    assert "only the json files are read" in caplog.text


def test_a_folder_that_describes_itself(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n- config_name: two\n"
        "  data_files: two.jsonl\n---\n"
    )
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    assert texts_of(load_texts(tmp_path, name="two")) == ["two"]
    with pytest.raises(TranscoderError, match="one.*two|config"):
        load_texts(tmp_path)
    (tmp_path / "one.jsonl").write_text("null\n")
    with pytest.raises(TranscoderError, match="not an object"):
        load_texts(tmp_path, name="two")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("kind", ["txt", "JSONL", "json", "csv"])
def test_compressed_files(tmp_path, compress, kind):
    suffix = {gzip.compress: ".gz", bz2.compress: ".BZ2", lzma.compress: ".xz"}[compress]
    content = {"txt": "One.\n\nTwo.", "JSONL": LINES, "json": json.dumps(ROWS), "csv": "text\nOne.\nTwo.\n"}[kind]
    path = tmp_path / f"rows.{kind}{suffix}"
    path.write_bytes(compress(content.encode()))
    for streaming in (False, True):
        assert texts_of(load_texts(path, streaming=streaming)) == ["One.", "Two."]
    path.write_bytes(compress(content.encode())[:-9])
    refused(path, "rows")
    path.write_bytes(b"not compressed at all")
    refused(path, "rows")


def test_a_small_file_that_fills_the_disk(tmp_path):
    bomb = gzip.compress(b"\x20" * (1 << 26))
    for name in ("x.txt.gz", "x.jsonl.gz"):
        (tmp_path / name).write_bytes(bomb)
        refused(tmp_path / name, "times its size")
    (tmp_path / "fine.txt.gz").write_bytes(gzip.compress(b"The same words. " * 50_000))
    assert len(load_texts(tmp_path / "fine.txt.gz")) == 1


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    content = {"txt": "One.\n\nTwo.", "jsonl": LINES, "json": json.dumps(ROWS), "csv": "text\nOne.\nTwo.\n"}[suffix]
    for name in (f"a.{suffix}", f"b.{suffix}"):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
    for streaming in (False, True):
        assert texts_of(load_texts(tmp_path / f"a.{suffix}", streaming=streaming)) == ["One.", "Two."]
        assert texts_of(load_texts(f"{tmp_path}/*.{suffix}", streaming=streaming)) == ["One.", "Two."] * 2


@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.json", "x.jsonl", "x.parquet"])
def test_what_is_no_text(tmp_path, name):
    path = tmp_path / name
    for content in (
        b"", b"\x00\x01\x02\x03" * 100, b"\xff\xd8\xff\xe0" * 100, "One.".encode("utf-16"), b"text\n\xe9\xe8\n",
        b"PAR1" + b"\x00" * 50 + b"PAR1", b"PK\x03\x04" + b"\x99" * 60,
    ):  # fmt: skip
        path.write_bytes(content)
        refused(path, name)


@pytest.mark.parametrize(
    "content",
    [
        "null", "1", '"x"', "true", "[1]", "[null]", "[[1]]", "[]", "{}", "[{}]", "NaN", "{", "[", '[{"text": "a"}',
        '[{"text": "a"},]', '[{"text": "a"}] 1', '[{"text": "a"}, null]', '[null, {"text": "a"}]', '[{"text": "a"}, 1]',
        'null\n{"text": "a"}', '{"text": "a"}\nnull', '{"text": "a"}\n3\n{"text": "b"}', '{"text": "a"}\n["x"]',
        '{"text": "a"}\n{"text": 1}', '{"text": "a"}\n{"text": ["b"]}', '{"text": null}', '{"text": ["a", "b"]}',
        '{"a": {"text": "x"}}', '{"text": "a", "text": "b"}', '{"text": "\\ud800"}', "[" * 100_000, '{"a":' * 5_000,
        '{"text": "a"}\n{"text": "b"', '[{"text": "a", "n": 1' + "0" * 5_000 + "}]", " \n \n", '{"input_ids": [1, true]}',
        '{"input_ids": [1, 2]}\n{"input_ids": [0.5]}', '{"input_ids": [-1]}', '{"input_ids": "ab"}',
        '{"input_ids": [1180591620717411303424]}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_odd_json(tmp_path, content, suffix):
    (tmp_path / f"x.{suffix}").write_text(content)
    refused(tmp_path / f"x.{suffix}", "x.json")


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('["One.", "Two."]', ["One.", "Two."]),
        (json.dumps(ROWS, indent=2), ["One.", "Two."]),
        (json.dumps(ROWS[0], indent=2), ["One."]),
        ("\n\n" + LINES + "\n\n", ["One.", "Two."]),
        (LINES.replace("\n", "\r\n"), ["One.", "Two."]),
        ('{"text": "a", "n": 1}\n{"text": "b", "n": "x"}\n{"text": "c", "n": [{"deep": null}]}', ["a", "b", "c"]),
        ('{"n": 1}\n{"text": "b"}', [None, "b"]),
        ('{"title": "t", "text": "a\\u0000é💥"}', ["a\x00é💥"]),
        ('[\n{"text": "a", "n": [\nnull\n]}\n]', ["a"]),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_in_every_form(tmp_path, content, texts, suffix):
    (tmp_path / f"x.{suffix}").write_text(content)
    for streaming in (False, True):
        assert texts_of(load_texts(tmp_path / f"x.{suffix}", streaming=streaming)) == texts


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_many_columns_take_no_more_than_their_share(tmp_path, suffix):
    row = {"text": "hello", **{f"column {i}": i for i in range(1500)}}
    path = tmp_path / f"wide.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(row))
    else:
        path.write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    start = time.process_time()
    assert texts_of(load_texts(path)) == ["hello"]
    # It was 40 s.
    assert time.process_time() - start < 8
    with pytest.raises(TranscoderError, match="and 1489 more") as refusal:
        load_texts(path, text_column="absent")
    assert len(str(refusal.value)) < 2000


def test_long_gaps_take_no_time():
    start = time.process_time()
    assert not is_wikitext("One." + "\n " * 200_000 + "Two.")
    assert not is_wikitext("\n" * 200_000)
    assert time.process_time() - start < 2


def test_damaged_parquet_files(tmp_path):
    path = tmp_path / "x.parquet"
    Dataset.from_list([{"text": f"Text {i}."} for i in range(50)]).to_parquet(path)
    whole = path.read_bytes()
    for at in [*range(0, len(whole), max(1, len(whole) // 25)), len(whole) - 5]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            texts_of(load_texts(path))
        except TranscoderError as error:
            assert str(error).isprintable()
    path.write_bytes(whole[:-1])
    refused(path, "not a whole Parquet file")


def test_kinds_by_name():
    kinds = {
        "a.txt": "text", "A.TXT": "text", "a.jsonl.gz": "json", "A.JSON.Xz": "json", "a.csv.bz2": "csv", "a.parquet": "parquet",
        "a.parquet.gz": None, "a.gz": None, "txt": None, "a.md": None, ".txt": None, "dir.txt/a": None,
    }  # fmt: skip
    assert {name: kind_of(name) for name in kinds} == kinds


def test_names_that_cannot_be_read(tmp_path):
    (tmp_path / "a::b.txt").write_text("One.")
    refused(tmp_path / "a::b.txt", "rename it")
    refused("~nobody-of-this-name/x.txt", "There is no file")
    refused("x\x00y.txt", "There is no file")


def test_more_values_than_columns_move_nothing(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,n\nhello,1" + "," * 3000 + "\nworld,2\n")
    start = time.process_time()
    assert texts_of(load_texts(path)) == ["hello", "world"]
    assert time.process_time() - start < 8
