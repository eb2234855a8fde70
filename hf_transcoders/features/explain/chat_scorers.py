"""Score explanations by a chat model that reads them: detection, fuzzing and simulation."""

import random
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ...data.token_texts import token_texts
from ...errors import TranscoderError
from ...text.strict_json import parse_json, to_json
from .chat import BadAnswer, Chat
from .chat_explainer import marked
from .correlation import balanced_accuracy, pearson
from .example_split import ExampleSplit
from .explanation import Explanation
from .predictor_scorers import marks_of


# Texts in one question.
_TEXTS = 5
_DETECTION = """A feature of a language model responds to: {explanation}
For each numbered text, decide whether the feature is active anywhere in it. Answer with a JSON list of {count} numbers alone, 1 for \
active and 0 for not, such as [1, 0, 0, 1, 0]."""
_FUZZING = """A feature of a language model responds to: {explanation}
In each numbered text some tokens are between << and >>. Decide for each text whether these are the tokens on which the feature is \
active. Answer with a JSON list of {count} numbers alone, 1 for right and 0 for wrong, such as [1, 0, 0, 1, 0]."""
_SIMULATION = """A feature of a language model responds to: {explanation}
Below is a JSON list of the {count} tokens of a text. Predict how strongly the feature is active on each of them, from 0 to 10; most \
are 0. Answer with a JSON list of {count} whole numbers alone."""


class ChatDetectionScorer:
    """A chat model decides by the explanation which windows the feature fires in, five at a time. Chance is 0.5.

    Args:
        chat ([`Chat`]): The chat model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the windows.
    """

    name = "detection by chat model"

    def __init__(self, chat: Chat, tokenizer: PreTrainedTokenizerBase):
        self.chat, self.tokenizer = chat, tokenizer

    def score(self, explanation: Explanation, split: ExampleSplit) -> dict[str, float]:
        labelled = [("".join(token_texts(self.tokenizer, window.tokens)), True) for window in split.test_active]
        labelled += [("".join(token_texts(self.tokenizer, window.tokens)), False) for window in split.test_silent]
        return _judged(self.chat, _DETECTION, explanation, labelled, split.feature)


class ChatFuzzingScorer:
    """A chat model decides by the explanation whether the right tokens are marked, five windows at a time. Chance is 0.5.

    Args:
        chat ([`Chat`]): The chat model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the windows.
    """

    name = "fuzzing by chat model"

    def __init__(self, chat: Chat, tokenizer: PreTrainedTokenizerBase):
        self.chat, self.tokenizer = chat, tokenizer

    def score(self, explanation: Explanation, split: ExampleSplit) -> dict[str, float]:
        labelled = []
        for window in split.test_active:
            texts = token_texts(self.tokenizer, window.tokens)
            right, wrong = marks_of(window, split.feature)
            labelled += [
                (marked(texts, marks), is_right) for marks, is_right in ((right, True), (wrong, False)) if marks
            ]
        return _judged(self.chat, _FUZZING, explanation, labelled, split.feature)


class ChatSimulationScorer:
    """A chat model predicts the activation on each token of a window by the explanation; correlation over all tokens together.

    The 2023 paper takes the expectation over the probabilities of ten digits, which few services give: this is the answer
    itself.

    Args:
        chat ([`Chat`]): The chat model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the windows.
    """

    name = "simulation by chat model"

    def __init__(self, chat: Chat, tokenizer: PreTrainedTokenizerBase):
        self.chat, self.tokenizer = chat, tokenizer

    def score(self, explanation: Explanation, split: ExampleSplit) -> dict[str, float]:
        predicted = []
        for window in split.test_active:
            texts = token_texts(self.tokenizer, window.tokens)
            task = _SIMULATION.format(explanation=explanation.text, count=len(texts))
            messages = [{"role": "user", "content": f"{task}\n\n{to_json(texts, indent=None)}"}]
            predicted.append(numbers_of(self.chat.answer(messages), len(texts), 10))
        real = [window.activations for window in split.test_active]
        flat = lambda lists: [value for each in lists for value in each]  # noqa: E731
        top = len(split.test_top)
        return {
            "top_and_random": pearson(flat(real), flat(predicted)),
            "random_only": pearson(flat(real[top:]), flat(predicted[top:])),
        }


def _judged(chat, task, explanation, labelled, seed):
    """Balanced accuracy of the answers of a chat model about texts with labels, in mixed order."""
    random.Random(seed).shuffle(labelled)
    said = []
    for start in range(0, len(labelled), _TEXTS):
        part = labelled[start : start + _TEXTS]
        listed = "\n".join(f"{number}. {text}" for number, (text, _) in enumerate(part, 1))
        question = f"{task.format(explanation=explanation.text, count=len(part))}\n\n{listed}"
        said += numbers_of(chat.answer([{"role": "user", "content": question}]), len(part), 1)
    pairs = list(zip(said, (label for _, label in labelled), strict=True))
    return {
        "balanced_accuracy": balanced_accuracy(
            [value == 1 for value, label in pairs if label], [value == 1 for value, label in pairs if not label]
        )
    }


def numbers_of(answer: str, count: int, most: int) -> Sequence[int]:
    """The last list of numbers in an answer.

    Raises:
        [`BadAnswer`]: there is none, or it does not have `count` whole numbers from 0 to `most`.
    """
    lists = re.findall(r"\[[^\[\]]*\]", answer)
    try:
        numbers = parse_json(lists[-1], "The answer", list) if lists else None
    except TranscoderError:
        numbers = None
    if numbers is None or len(numbers) != count or any(type(n) is not int or not 0 <= n <= most for n in numbers):
        raise BadAnswer(f"the answer of the chat model is not a list of {count} whole numbers from 0 to {most}")
    return numbers
