"""Each task with tokenizers of several kinds: exact texts, positions, answers and corruptions."""

import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_transcoders import TranscoderError, tasks
from hf_transcoders.tasks import (
    TASKS,
    colored_objects,
    docstring_completion,
    gendered_pronoun,
    greater_than,
    indirect_object_identification,
    ioi,
    subject_verb_agreement,
)
from hf_transcoders.tasks.colored_objects import _OBJECTS
from hf_transcoders.tasks.templates import fill
from hf_transcoders.tasks.words import NAMES


def word_at(tokenizer, row, name, which="clean"):
    return tokenizer.decode([row[f"{which}_ids"][row["positions"][name]]]).strip()


def words(tokenizer, ids):
    return [tokenizer.decode([id_]).strip() for id_ in ids]


def changed(row):
    """Names of the positions at which the two prompts of a row differ; an unnamed position is an error."""
    assert len(row["clean_ids"]) == len(row["corrupted_ids"])
    places = {i for i, (a, b) in enumerate(zip(row["clean_ids"], row["corrupted_ids"], strict=True)) if a != b}
    names = {name for name, position in row["positions"].items() if position in places}
    assert places == {row["positions"][name] for name in names}
    return names


def check_encoding(tokenizer, task):
    """Check properties of every row of every task."""
    for row in task.dataset:
        for which in ("clean", "corrupted"):
            assert row[f"{which}_ids"] == tokenizer(row[which])["input_ids"]
        assert row["positions"]["END"] == len(row["clean_ids"]) - 1
        for ids in (row["answer_ids"], row["wrong_ids"]):
            for id_ in ids:
                longer = row["clean"] + tokenizer.decode([id_])
                if tokenizer.decode([id_]).startswith(" "):
                    assert tokenizer(longer)["input_ids"] == row["clean_ids"] + [id_]
        assert not set(row["answer_ids"]) & set(row["wrong_ids"])


def test_ioi_has_thirty_templates():
    assert len(ioi.TEMPLATES) == len(set(ioi.TEMPLATES)) == 30
    words = {"IO": "Mary", "S1": "John", "S2": "John", "place": "store", "object": "drink"}
    texts = [fill(template, words).text for template in ioi.TEMPLATES]
    assert texts[0] == "Then, John and Mary went to the store. John gave a drink to"
    assert texts[4] == "Then, John and Mary had a long argument, and afterwards John said to"
    assert texts[7] == "When John and Mary got a drink at the store, John decided to give the drink to"
    assert texts[13] == "The store John and Mary went to had a drink. John gave it to"
    assert texts[15] == "Then, Mary and John went to the store. John gave a drink to"
    assert texts[29] == "Friends Mary and John found a drink at the store. John gave it to"
    for text, other in zip(texts[:15], texts[15:], strict=True):
        assert other == text.replace("John and Mary", "Mary and John")


@pytest.mark.parametrize("templates, numbers", [("both", range(30)), ("baba", range(15)), ("abba", range(15, 30))])
def test_ioi_uses_its_templates_in_turn(bpe, templates, numbers):
    task = indirect_object_identification(bpe, size=60, templates=templates)
    assert task.dataset["template"][:] == [numbers[n % len(numbers)] for n in range(60)]
    for row in task.dataset:
        positions = row["positions"]
        assert (positions["S1"] < positions["IO"]) == (row["metadata"]["order"] == "BABA") == (row["template"] < 15)


@pytest.mark.parametrize("corruption", ["abc", "s2_io_flip", "s2_random", "io_other"])
def test_ioi(tokenizer, corruption):
    task = indirect_object_identification(tokenizer, size=60, corruption=corruption)
    check_encoding(tokenizer, task)
    assert task.settings["corruption"] == corruption and len(task) == 60
    for row in task.dataset:
        io, s = row["metadata"]["io"], row["metadata"]["s"]
        assert [word_at(tokenizer, row, name) for name in ("IO", "S1", "S2")] == [io, s, s]
        assert row["clean"].split(f"{s}", 1)[1].split()[0] == word_at(tokenizer, row, "S1+1")
        assert row["positions"]["S1"] < row["positions"]["S2"] and row["clean"].count(s) == 2
        assert words(tokenizer, row["answer_ids"]) == [io] and words(tokenizer, row["wrong_ids"]) == [s]
        assert row["candidate_ids"] == row["answer_ids"] + row["wrong_ids"]
        new = {name: word_at(tokenizer, row, name, "corrupted") for name in ("IO", "S1", "S2")}
        if corruption == "abc":
            assert changed(row) == {"IO", "S1", "S2"} and len({io, s, *new.values()}) == 5
        elif corruption == "s2_io_flip":
            assert changed(row) == {"S2"} and new["S2"] == io
        elif corruption == "s2_random":
            assert changed(row) == {"S2"} and new["S2"] not in (io, s)
        else:
            assert changed(row) == {"IO"} and new["IO"] not in (io, s)


COLORED_OBJECTS = re.compile(
    r"Q: On the (table|desk|floor), (there is|you see|I see) an? (\w+) (\w+), an? (\w+) (\w+), and an? (\w+) (\w+)\. "
    r"What color is the (\w+)\?\nA: (\w+)\n"
    r"Q: On the (table|desk|floor), (there is|you see|I see) an? (\w+) (\w+), an? (\w+) (\w+), and an? (\w+) (\w+)\. "
    r"What color is the (\w+)\?\nA:"
)


def test_colored_objects(tokenizer):
    task = colored_objects(tokenizer, size=60)
    check_encoding(tokenizer, task)
    asked_places = set()
    for row in task.dataset:
        parts = COLORED_OBJECTS.fullmatch(row["clean"]).groups()
        shot, asked_shot, shot_answer, query, asked = parts[2:8], parts[8], parts[9], parts[12:18], parts[18]
        assert len({*shot, *query}) == 12
        assert shot[shot.index(asked_shot) - 1].title() == shot_answer
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", row["clean"])
        place = query.index(asked) // 2
        asked_places.add(place)
        colors, objects = query[::2], query[1::2]
        for k in range(3):
            assert word_at(tokenizer, row, f"colour_{k + 1}") == colors[k]
            assert word_at(tokenizer, row, f"object_{k + 1}") == objects[k]
        assert word_at(tokenizer, row, "question_object") == asked == word_at(tokenizer, row, "answer_object")
        assert row["positions"]["question_object"] > row["positions"]["answer_object"]
        assert word_at(tokenizer, row, "shot_answer") == shot_answer
        assert word_at(tokenizer, row, "answer_colour") == colors[place]
        wrong = {word_at(tokenizer, row, f"wrong_colour_{n}") for n in (1, 2)}
        assert wrong == set(colors) - {colors[place]}
        assert words(tokenizer, row["answer_ids"]) == [colors[place].title()]
        assert words(tokenizer, row["candidate_ids"]) == [color.title() for color in colors]
        # The pair differs in the object in question, and the answer of the corrupted prompt is the wrong answer.
        assert changed(row) == {"question_object"}
        other = query.index(word_at(tokenizer, row, "question_object", "corrupted")) // 2
        assert words(tokenizer, row["wrong_ids"]) == [colors[other].title()]
        assert row["metadata"] == {"asked": place + 1, "corrupted_asked": other + 1}
    assert asked_places == {0, 1, 2}


@pytest.mark.real_model
def test_colored_objects_has_the_published_layout(tokenizers):
    """62 tokens without a beginning-of-sequence token, colors at 41, 45 and 50, the shot's answer at 30."""
    for row in colored_objects(tokenizers("smollm2"), size=20).dataset:
        assert len(row["clean_ids"]) == 62
        assert [row["positions"][f"colour_{k}"] for k in (1, 2, 3)] == [41, 45, 50]
        assert row["positions"]["shot_answer"] == 30 and row["positions"]["END"] == 61


def test_greater_than(tokenizer, bpe):
    task = greater_than(tokenizer, size=40)
    check_encoding(tokenizer, task)
    variant = "two_token" if tokenizer is bpe else "single_digit"
    assert task.settings["variant"] == variant and task.metric == "probability_difference"
    digits = 2 if variant == "two_token" else 1
    for row in task.dataset:
        noun, year, stem = re.fullmatch(
            r"The (\w+) lasted from the year (\d{4}) to the year (\d+)", row["clean"]
        ).groups()
        assert year == stem + year[-digits:] == str(row["metadata"]["year"]) and noun == row["metadata"]["noun"]
        assert word_at(tokenizer, row, "YY") == year[-digits:]
        assert changed(row) == {"YY"} and word_at(tokenizer, row, "YY", "corrupted") == {1: "0", 2: "01"}[digits]
        endings = {f"{n:0{digits}d}" for n in range(10**digits)}
        later = {ending for ending in endings if ending > year[-digits:]}
        assert set(words(tokenizer, row["answer_ids"])) == later
        assert set(words(tokenizer, row["wrong_ids"])) == endings - later


def test_gendered_pronoun(tokenizer):
    task = gendered_pronoun(tokenizer, size=48)
    check_encoding(tokenizer, task)
    answers = set()
    for row in task.dataset:
        assert changed(row) == {"name"} and word_at(tokenizer, row, "name") == row["metadata"]["name"]
        assert word_at(tokenizer, row, "name", "corrupted") == row["metadata"]["corrupted_name"]
        answers.add((*words(tokenizer, row["answer_ids"]), *words(tokenizer, row["wrong_ids"]), row["template"]))
    assert answers == {(*pair, n) for pair in (("he", "she"), ("she", "he")) for n in range(6)}


@pytest.mark.parametrize("structure", ["simple", "prepositional", "relative", "within_relative"])
def test_subject_verb_agreement(tokenizer, structure):
    task = subject_verb_agreement(tokenizer, size=30, structure=structure)
    check_encoding(tokenizer, task)
    singular = ["is", "was", "has", "does"]
    plural = ["are", "were", "have", "do"]
    for number, row in enumerate(task.dataset):
        right, wrong = (plural, singular) if number % 2 else (singular, plural)
        assert words(tokenizer, row["answer_ids"]) == right and words(tokenizer, row["wrong_ids"]) == wrong
        assert changed(row) == ({"subject", "END"} if structure in ("simple", "within_relative") else {"subject"})
        assert word_at(tokenizer, row, "subject").endswith("s") == bool(number % 2)
        assert word_at(tokenizer, row, "subject").rstrip("s") == word_at(
            tokenizer, row, "subject", "corrupted"
        ).rstrip("s")
        if structure != "simple":
            assert word_at(tokenizer, row, "attractor").endswith("s") != bool(number % 2)
    assert word_at(tokenizer, row, "END") == row["clean"].split()[-1]


@pytest.mark.parametrize("corruption", ["random_random", "random_doc", "random_answer"])
def test_docstring_completion(tokenizer, corruption):
    task = docstring_completion(tokenizer, size=20, corruption=corruption)
    check_encoding(tokenizer, task)
    defined = [f"def_{k}" for k in range(1, 7)]
    expected = {"random_random": {*defined, "doc_3", "doc_4"}, "random_doc": {"doc_3", "doc_4"}}
    for row in task.dataset:
        arguments = re.search(r"\(self, (.*)\):", row["clean"]).group(1).split(", ")
        described = re.findall(r":param (\w+): \w+ \w+\n", row["clean"])
        assert described == arguments[2:4] and row["clean"].endswith("\n    :param")
        assert [word_at(tokenizer, row, name) for name in defined] == arguments and len(set(arguments)) == 6
        assert [word_at(tokenizer, row, name) for name in ("doc_3", "doc_4")] == described
        assert words(tokenizer, row["answer_ids"]) == [arguments[4]]
        assert words(tokenizer, row["wrong_ids"]) == arguments[:4] + arguments[5:]
        assert changed(row) == expected.get(corruption, {"def_5"})
        fresh = {word_at(tokenizer, row, name, "corrupted") for name in changed(row)}
        assert not fresh & set(arguments) and len(fresh) == len(changed(row))


def test_the_same_seed_gives_the_same_task(bpe):
    for name in TASKS.values():
        make = getattr(tasks, name)
        one, same, other = make(bpe, size=20, seed=3), make(bpe, size=20, seed=3), make(bpe, size=20, seed=4)
        assert one.dataset[:] == same.dataset[:]
        assert one.dataset["clean"][:] != other.dataset["clean"][:]
        assert len(set(one.dataset["clean"])) == 20


def test_splits_share_nothing(bpe):
    def used(make, of_row):
        return [
            {item for row in make(split).dataset for item in of_row(row)} for split in ("train", "validation", "test")
        ]

    def names(row):
        return set(re.findall(r"[A-Z]\w+", row["clean"] + row["corrupted"])) & set(NAMES)

    def pairs(row):
        return re.findall(r"an? (\w+ \w+)", row["clean"])

    groups = [
        used(lambda split: indirect_object_identification(bpe, 60, split=split), names),
        used(lambda split: gendered_pronoun(bpe, 40, split=split), names),
        used(lambda split: colored_objects(bpe, 60, split=split), pairs),
        used(lambda split: greater_than(bpe, 60, split=split), lambda row: [row["metadata"]["noun"]]),
        used(
            lambda split: subject_verb_agreement(bpe, 40, split=split),
            lambda row: [word_at(bpe, row, "subject").rstrip("s"), word_at(bpe, row, "attractor").rstrip("s")],
        ),
        used(
            lambda split: docstring_completion(bpe, 20, "random_doc", split=split),
            lambda row: re.search(r"self, (.*)\)", row["clean"]).group(1).split(", "),
        ),
    ]
    for train, validation, test in groups:
        assert min(len(train), len(validation), len(test)) >= 4
        assert not train & validation and not train & test and not validation & test


def test_beginning_of_sequence_token(tokenizers):
    tokenizer = tokenizers("unigram_with_bos")
    with_bos = indirect_object_identification(tokenizer, size=10)
    without = indirect_object_identification(tokenizer, size=10, add_bos=False)
    assert with_bos.settings["add_bos"] and not without.settings["add_bos"]
    for row, bare in zip(with_bos.dataset, without.dataset, strict=True):
        assert row["clean_ids"] == [tokenizer.bos_token_id, *bare["clean_ids"]]
        assert row["positions"] == {name: place + 1 for name, place in bare["positions"].items()}
    with pytest.raises(TranscoderError, match="no beginning-of-sequence token"):
        indirect_object_identification(tokenizers("byte_level_bpe"), size=10, add_bos=True)


@pytest.mark.parametrize(
    "name, left_out",
    [
        ("byte_level_bpe", set()),
        pytest.param("smollm2", {"mug", "leash", "bracelet"}, marks=pytest.mark.real_model),
    ],
)
def test_words_of_several_tokens_are_left_out(tokenizers, name, left_out):
    task = colored_objects(tokenizers(name), size=100)
    found = set(re.findall(r"\w+", " ".join(task.dataset["clean"])))
    assert set(_OBJECTS) - found == left_out


def test_what_a_tokenizer_cannot_express_is_said(tokenizers):
    tokenizer = tokenizers("word_level")
    task = indirect_object_identification(tokenizer, size=30, corruption="s2_io_flip")
    assert all(word_at(tokenizer, row, "S2") == row["metadata"]["s"] for row in task.dataset)
    with pytest.raises(TranscoderError, match="neither of the last two digits of a year nor of the last one"):
        greater_than(tokenizer, size=10)
    letters = PreTrainedTokenizerFast(tokenizer_object=_letters(), unk_token="<unk>")
    for make, message in [
        (indirect_object_identification, "writes 0 of 100 first names as single tokens, but the task needs 5"),
        (colored_objects, "writes 0 of 17 objects as single tokens"),
        (gendered_pronoun, "writes 0 of 2 pronouns"),
        (subject_verb_agreement, "nouns as single tokens in singular and plural"),
        (docstring_completion, "argument names as single tokens, but the task needs 15"),
    ]:
        with pytest.raises(TranscoderError, match=message):
            make(letters, size=10)


def _letters():
    """Each letter is a token."""
    tokenizer = Tokenizer(
        models.WordLevel({"<unk>": 0, **{chr(code): code - 31 for code in range(32, 127)}}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return tokenizer


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda t: indirect_object_identification(t, corruption="flip"), "no corruption 'flip': choose from abc"),
        (lambda t: indirect_object_identification(t, templates="aabb"), "no order of templates 'aabb'"),
        (lambda t: indirect_object_identification(t, split="dev"), "no split 'dev': choose from train"),
        (lambda t: indirect_object_identification(t, size=0), "size is 0"),
        (lambda t: subject_verb_agreement(t, structure="rc"), "no structure 'rc'"),
        (lambda t: docstring_completion(t, corruption="abc"), "no corruption 'abc'"),
        (lambda t: subject_verb_agreement(t, size=500, structure="simple"), "Only 72 different prompts were found"),
    ],
)
def test_wrong_arguments(bpe, make, message):
    with pytest.raises(TranscoderError, match=message):
        make(bpe)
