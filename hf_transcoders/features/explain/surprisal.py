"""Score explanations in words by a local language model: is text less surprising after the explanation?"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.batches import text_batches
from ...lm.modes import in_eval_mode
from ...lm.wrappers import language_model
from .correlation import area_under_roc
from .example_split import ExampleSplit
from .explanation import Explanation


_GENERIC = "This is a text from the web."
_BATCH_SIZE = 8


class SurprisalScorer:
    """
    Whether an explanation makes windows in which a feature fires more likely, against silent ones.

    The gain of a window is the mean loss of its tokens after a generic sentence, less that after the explanation. Scores do
    not need a model that follows instructions, and are weak ones: they show whether the explanation is about the text, not
    about the token.

    Args:
        model ([`~transformers.PreTrainedModel`]): Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, which must be that of the windows.
    """

    name = "surprisal"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = language_model(model), tokenizer

    def score(self, explanation: Explanation, split: ExampleSplit) -> dict[str, float]:
        windows = split.test_active + split.test_silent
        losses = [self._losses(text, [w.tokens for w in windows]) for text in (_GENERIC, explanation.text)]
        gains = [generic - own for generic, own in zip(*losses, strict=True)]
        active = len(split.test_active)
        return {"auroc": area_under_roc(gains[:active], gains[active:])}

    @torch.no_grad()
    def _losses(self, text: str, windows: Sequence[Sequence[int]]) -> list[float]:
        """Mean loss of the tokens of each window after a text."""
        before = self.tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
        texts = [torch.tensor([*before, *window]) for window in windows]
        found = [0.0] * len(texts)
        with in_eval_mode(self.model):
            for batch in text_batches(self.model, texts, _BATCH_SIZE):
                logits = self.model(**batch.inputs).logits[:, :-1].float()
                losses = torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), batch.input_ids[:, 1:], reduction="none"
                )
                for row, (number, length) in enumerate(zip(batch.numbers, batch.lengths, strict=True)):
                    found[number] = losses[row, len(before) - 1 : length - 1].mean().item()
        return found
