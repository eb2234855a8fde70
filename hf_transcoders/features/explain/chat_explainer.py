"""Explain a feature by asking a chat model."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ...data.token_texts import token_texts
from ..examples import ExampleWindow
from .chat import BadAnswer, Chat
from .example_split import ExampleSplit
from .explanation import Explanation
from .predictor_scorers import MARKED


_LAST_LINE = "EXPLANATION:"
_LONGEST = 500
_TASK = f"""You read texts in which one feature of a language model is active, and say in one short phrase what the feature responds \
to. Tokens on which it is active are between << and >>. After each text, these tokens are listed with the strength of the activation \
from 1 to 10. Look for what the marked tokens and their surroundings have in common in all texts. Do not mention the marks or the \
strengths. End with one line of the form:
{_LAST_LINE} <the phrase>"""


class ChatExplainer:
    """Asks a chat model what the texts with large activations have in common, as in the 2023 paper: five of them.

    Args:
        chat ([`Chat`]): The chat model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the windows.
    """

    def __init__(self, chat: Chat, tokenizer: PreTrainedTokenizerBase):
        self.chat, self.tokenizer = chat, tokenizer
        self.name = "chat model"

    def fit(self, split: ExampleSplit) -> Explanation:
        largest = max(max(window.activations) for window in split.train_top)
        shown = [self._shown(number, window, largest) for number, window in enumerate(split.train_top, 1)]
        messages = [{"role": "system", "content": _TASK}, {"role": "user", "content": "\n\n".join(shown)}]
        return Explanation(self.name, phrase_of(self.chat.answer(messages)))

    def _shown(self, number: int, window: ExampleWindow, largest: float) -> str:
        texts = token_texts(self.tokenizer, window.tokens)
        least = MARKED * max(window.activations)
        listed = [
            f"{text!r} {max(1, min(10, round(10 * activation / largest)))}"
            for text, activation in zip(texts, window.activations, strict=True)
            if activation >= least and activation > 0
        ]
        marks = [
            place for place, activation in enumerate(window.activations) if activation >= least and activation > 0
        ]
        return f"Text {number}: {marked(texts, marks)}\nActive tokens: {', '.join(listed)}"


def marked(texts: Sequence[str], marks: Sequence[int]) -> str:
    """A text with some of its tokens between `<<` and `>>`, neighbors together."""
    found = "".join(f"<<{text}>>" if place in set(marks) else text for place, text in enumerate(texts))
    return found.replace(">><<", "")


def phrase_of(answer: str) -> str:
    """The explanation in an answer.

    Raises:
        [`BadAnswer`]: the answer has none, an empty one or a very long one.
    """
    lines = [line.strip().strip("*").strip() for line in answer.splitlines()]
    phrases = [line[len(_LAST_LINE) :].strip(" *") for line in lines if line.upper().startswith(_LAST_LINE)]
    if not phrases or not phrases[-1] or len(phrases[-1]) > _LONGEST:
        raise BadAnswer(f"the answer of the chat model has no line '{_LAST_LINE} ...' with 1 to {_LONGEST} characters")
    return phrases[-1]
