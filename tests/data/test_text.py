import json

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, IterableDataset

from hf_transcoders.data.text import load_texts
from hf_transcoders.data.wikitext import detokenize, is_wikitext, wikitext_articles
from hf_transcoders.errors import TranscoderError


# Written for this test in the layout of the word-level WikiText files, trailing spaces included.
WIKITEXT = (
    " \n = Paper boats = \n \n"
    " A paper boat is a hand @-@ made toy , folded from one sheet ( or two ) . \n"
    " It floats for 3 @.@ 5 minutes ; the record is 1 @,@ 200 . \n \n"
    " = = History = = \n \n \n"
    " = = = Early days = = = \n \n"
    " The word \" boat \" wasn 't used before 1900 – 1910 , and sailors ' children didn 't care . \n"
    " <unk> <unk> folded <unk> . \n \n"
    " = = Lost section = = \n \n"
    " <unk> <unk> and <unk> \n"
    " = y + z = \n"
    " <unk> <unk> . \n \n"
    " = = Races = = \n \n"
    " They are held every summer . \n \n"
    " = The <unk> = \n \n"
    " It was the boat 's first journey to <unk> , and everyone in the town came to see it leave . \n \n"
)
ARTICLES = [
    "Paper boats\n\n"
    "A paper boat is a hand-made toy, folded from one sheet (or two).\n\n"
    "It floats for 3.5 minutes; the record is 1,200.\n\n"
    "History\n\nEarly days\n\n"
    "The word \"boat\" wasn't used before 1900–1910, and sailors' children didn't care.\n\n"
    "Races\n\nThey are held every summer.",
    "It was the boat's first journey to <unk>, and everyone in the town came to see it leave.",
]


@pytest.fixture(autouse=True)
def own_cache_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def texts_of(dataset):
    assert dataset.column_names in (["text"], None)
    return [row["text"] for row in dataset]


def test_wikitext_becomes_articles():
    assert is_wikitext(WIKITEXT)
    assert wikitext_articles(WIKITEXT) == ARTICLES


def test_text_with_equations_is_not_wikitext():
    assert not is_wikitext("Let x be\n\n = y + z =\n\nand so on.\n\n= Title =\n\nText.\n")
    assert not is_wikitext("")


@pytest.mark.parametrize(
    "words, text",
    [
        ("the cost was $ 5 @,@ 000 ( 40 % )", "the cost was $5,000 (40%)"),
        ("they 're sure I 'll go , he said : no !", "they're sure I'll go, he said: no!"),
        ('" yes " , she said , " no " .', '"yes", she said, "no".'),
        ("1 @-@ 2 @-@ 3", "1-2-3"),
    ],
)
def test_detokenize(words, text):
    assert detokenize(words.split()) == text


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_of_text_files(tmp_path, streaming):
    (tmp_path / "b.txt").write_text("One line\nand its second.\n\n\n \nAnother paragraph.\n")
    (tmp_path / "a.txt").write_text(WIKITEXT)
    plain = ["One line\nand its second.", "Another paragraph."]
    kind = IterableDataset if streaming else Dataset
    dataset = load_texts(tmp_path / "b.txt", streaming=streaming)
    assert isinstance(dataset, kind)
    assert texts_of(dataset) == plain
    assert texts_of(load_texts(f"{tmp_path}/*.txt", streaming=streaming)) == ARTICLES + plain
    assert texts_of(load_texts(tmp_path / "a.txt", streaming=streaming)) == ARTICLES
    assert texts_of(load_texts(tmp_path / "b.txt", streaming=streaming, limit=1)) == plain[:1]
    assert texts_of(load_texts(tmp_path / "b.txt", streaming=streaming, limit=9)) == plain


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_column_of_text_is_found(tmp_path, suffix, streaming):
    rows = {"label": [0, 1, 2], "content": ["a b", "c", "d e f"]}
    file = tmp_path / f"rows.{suffix}"
    dataset = Dataset.from_dict(rows)
    if suffix == "parquet":
        dataset.to_parquet(file)
    elif suffix == "csv":
        dataset.to_csv(file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in dataset))
    assert texts_of(load_texts(file, streaming=streaming)) == rows["content"]
    assert texts_of(load_texts(file, streaming=streaming, text_column="content", limit=2)) == rows["content"][:2]
    with pytest.raises(TranscoderError, match="no column 'label' of strings"):
        load_texts(file, streaming=streaming, text_column="label")


@pytest.mark.parametrize("streaming", [False, True])
def test_column_of_text_must_be_clear(tmp_path, streaming):
    def write(**columns):
        Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
        return tmp_path / "rows.parquet"

    with pytest.raises(TranscoderError, match=r"\['title', 'body'\] hold strings: name the one with the text"):
        load_texts(write(title=["x"], body=["y"]), streaming=streaming)
    assert texts_of(load_texts(write(title=["x"], body=["z"]), text_column="body", streaming=streaming)) == ["z"]
    assert texts_of(load_texts(write(url=["x"], text=["w"]), streaming=streaming)) == ["w"]
    with pytest.raises(TranscoderError, match="none hold strings"):
        load_texts(write(label=[1]), streaming=streaming)
    tokenized = load_texts(write(input_ids=[[1, 2]], note=["x"]), streaming=streaming)
    assert list(tokenized) == [{"input_ids": [1, 2]}]


def test_folder_knows_its_splits(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.txt").write_text("Training text.\n\nMore of it.")
    (folder / "test.txt").write_text("Held out.")
    (folder / "notes.md").write_text("Not data.")
    assert texts_of(load_texts(folder)) == ["Training text.", "More of it."]
    assert texts_of(load_texts(folder, split="test")) == ["Held out."]
    assert texts_of(load_texts(folder, split="test", streaming=True)) == ["Held out."]


def test_changed_file_is_read_again(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("First version.")
    assert texts_of(load_texts(file)) == ["First version."]
    file.write_text("Second version, longer.")
    assert texts_of(load_texts(file)) == ["Second version, longer."]


@pytest.mark.parametrize("streaming", [False, True])
def test_unusable_sources_are_refused(tmp_path, streaming):
    def refused(source, match, **kwargs):
        with pytest.raises(TranscoderError, match=match) as refusal:
            load_texts(source, streaming=streaming, **kwargs)
        assert "\n" not in str(refusal.value)

    def file(name, content):
        (tmp_path / name).write_text(content)
        return tmp_path / name

    refused("no/such-dataset", "There is no file or folder no/such-dataset.*offline.*needs no network")
    refused(tmp_path / "missing.txt", "There is no file")
    refused("missing.jsonl", "There is no file")
    refused(f"{tmp_path}/*.csv", "There is no file")
    refused("what is this", "There is no file or folder what is this")
    refused(file("empty.txt", ""), "is empty")
    refused(file("empty.jsonl", ""), "is empty")
    refused(file("blank.txt", " \n\n \n"), "no documents")
    refused(file("header.csv", "text\n"), "no documents|no data")
    # The reason is in the words of the reader, which differ between versions of datasets.
    refused(file("broken.jsonl", '{"text": '), r"Could not load text from '.*broken.jsonl' \(.+\)")
    refused(file("image.png", "x"), "not one kind of text file")
    refused(f"{tmp_path}/*", "not one kind of text file")
    refused(file("good.txt", "Text."), "Could not load text.*split", split="validation")
    refused(tmp_path / "good.txt", "limit is 0", limit=0)
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", r"holds no \.txt")
    refused("docstrings", "no split 'test'", split="test")
