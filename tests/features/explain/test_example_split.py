"""Training and test windows have no document in common, and the ranks are those of the 2023 paper."""

import pytest

from hf_transcoders.features.explain import TooFewExamples, split_examples

from .conftest import CAPITAL, INSIDE, PAIR, RARE, SHUFFLED, SILENT, TOKEN, WINDOW, planted_examples


def tokens_of(examples, window):
    """Places of the tokens of a window in the text."""
    row = (examples.text.rows == window.row).nonzero().item()
    start = int(examples.text.offsets[row]) + window.start
    return set(range(start, start + len(window.tokens)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_document_is_in_training_and_test(base, seed):
    examples = planted_examples(base, seed)
    for feature in (TOKEN, SHUFFLED, PAIR, CAPITAL, INSIDE):
        split = split_examples(examples, feature)
        test = split.test_top + split.test_random + split.test_silent
        train = split.train + split.train_top
        places = {name: set().union(*(tokens_of(examples, w) for w in ws)) for name, ws in (("a", train), ("b", test))}
        documents = {name: {int(examples.text.documents[at]) for at in its} for name, its in places.items()}
        # Read off the text itself, not off the numbers that the windows carry.
        assert documents["a"] and documents["b"] and not documents["a"] & documents["b"]
        assert len(split.test_top) == len(split.test_random) == 5
        assert len({(w.row, w.start) for w in split.train}) == len(split.train) > 20
        assert not any(any(w.activations) for w in split.test_silent)
        assert all(any(w.activations) for w in split.test_active)
        assert all(len(w.tokens) == WINDOW for w in test)


def test_ranks_are_those_of_the_paper(examples):
    split = split_examples(examples, TOKEN)
    top = examples.windows(TOKEN, "top")
    assert [top.index(window) + 1 for window in split.train_top] == [1, 5, 9, 13, 17]
    seen = {document for window in split.train_top for document in window.documents}
    fit = lambda ranks: [r for r in ranks if not seen & set(top[r - 1].documents)]  # noqa: E731
    expected = [*fit([3, 7, 11, 15, 19]), *fit([4, 8, 12, 16, 20])][:5]
    assert [top.index(window) + 1 for window in split.test_top] == expected and expected[0] == 3
    drawn = examples.windows(TOKEN, "random_windows", as_drawn=True)
    left = [w for w in drawn if not seen & set(w.documents)]
    left = [w for w in left if (w.row, w.position) not in {(t.row, t.position) for t in split.test_top}]
    assert split.test_random == [left[i] for i in (1, 4, 7, 10, 13)]


def test_too_few_examples_are_named(examples):
    with pytest.raises(
        TooFewExamples, match="feature 5 fires in [0-9]+ windows of different documents, and a score needs 20"
    ):
        split_examples(examples, RARE)
    with pytest.raises(TooFewExamples, match="feature 6 fires in 0 windows"):
        split_examples(examples, SILENT)
