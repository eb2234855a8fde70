"""Compute whether patched runs give the right answer, with the logits of the whole vocabulary only where they decide."""

import torch
from transformers import PreTrainedModel

from ...tasks.answer_metrics import accuracy
from ...tasks.task import Task
from .readout import Readout, numbers_among


class RightAnswers(Readout):
    """Computes whether the answer is right in the full vocabulary, and whether it is right among the candidates.

    An answer is wrong as soon as one token has a higher logit, so few tokens are compared first: the candidates, and all
    tokens that were the most likely ones before. Only runs whose right answer beats all of these need the logits of the
    whole vocabulary. The result is the same as with all logits.

    Values are 0 if both are wrong, 1 if the answer is right in the full vocabulary only (which takes equal logits), 2 if it
    is right among the candidates only, and 3 if both are right; see [`split_right`].

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        task ([`Task`]): The task with the answers.
    """

    def __init__(self, model: PreTrainedModel, task: Task):
        super().__init__(model, task, _right)
        self.name = "right answers"
        ids = torch.cat([self._answers.right.flatten(), self._answers.candidates.flatten()])
        self._compared = ids[ids >= 0].unique()

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor, prompts: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the values of some patched runs; see [`Readout`].

        Returns:
            `torch.Tensor` of shape `(prompts, rows)` in fp32.
        """
        count, rows, width = hidden.shape
        flat = hidden.reshape(-1, width)
        of_row = prompts.to(flat.device).repeat_interleave(rows)
        answers = self._answers.map(lambda ids: ids[of_row])
        logits = self.logits(flat, self._compared).float()
        numbered = answers.map(lambda ids: numbers_among(ids, self._compared))
        among = accuracy(logits, numbered.right, numbered.candidates)
        right = numbered.right >= 0
        best = logits.gather(1, numbered.right.clamp(min=0)).masked_fill(~right, -torch.inf).amax(1)
        undecided = (logits.amax(1) <= best).nonzero()[:, 0]
        whole = torch.zeros_like(among)
        for part in undecided.split(self._rows_at_once()) if len(undecided) else ():
            everything = self.logits(flat[part])
            whole[part] = accuracy(everything, answers.right[part])
            self._compared = torch.cat([self._compared, everything.argmax(-1)]).unique()
        return (whole + 2 * among).view(count, rows)


def split_right(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split values of [`RightAnswers`]: whether answers are right in the full vocabulary, and among the candidates."""
    values = values.long()
    return values % 2 == 1, values >= 2


def _right(logits, answers):
    return accuracy(logits, answers.right) + 2 * accuracy(logits, answers.right, answers.candidates)
