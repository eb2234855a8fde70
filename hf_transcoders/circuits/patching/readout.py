"""Compute the metric of a task from the residual stream after the last block, with only the logits that it needs."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from ...errors import TranscoderError
from ...lm.architectures import decoder_blocks
from ...lm.devices import input_device
from ...lm.forwards import check_head, forward_logits
from ...lm.hooks import wrap_forward
from ...lm.linear_maps import is_plain, map_size, outputs_at
from ...tasks.answer_metrics import accuracy, kl_divergence, logit_difference, probability_difference, rank
from ...tasks.task import Task


# Functions of logits, answers and the logits of the base run.
_METRICS = {
    "logit_difference": lambda logits, answers, _: logit_difference(logits, answers.right, answers.wrong),
    "probability_difference": lambda logits, answers, _: probability_difference(logits, answers.right, answers.wrong),
    "accuracy": lambda logits, answers, _: accuracy(logits, answers.right),
    "candidate_accuracy": lambda logits, answers, _: accuracy(logits, answers.right, answers.candidates),
    "rank": lambda logits, answers, _: rank(logits, answers.right),
    "kl_divergence": lambda logits, _, base: kl_divergence(logits, base),
}
# Metrics that read only the logits of a few tokens.
_TOKENS_READ = {"logit_difference": ("right", "wrong"), "candidate_accuracy": ("right", "candidates")}
_MOST_LOGITS = 64_000_000


class Readout:
    """Computes a metric from residual streams.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model.
        task ([`Task`]):
            The task with the answers.
        metric (`str` or `Callable`, *optional*):
            `"logit_difference"`, `"probability_difference"`, `"accuracy"`, `"candidate_accuracy"`, `"rank"`,
            `"kl_divergence"` (from the base run, in nats), or a function of logits `(rows, vocab)` and their
            [`AnswerBatch`] that returns `(rows,)`. By default the metric of the task.
    """

    def __init__(self, model: PreTrainedModel, task: Task, metric: str | Callable | None = None):
        check_head(model)
        metric = task.metric if metric is None else metric
        if isinstance(metric, str) and metric not in _METRICS:
            raise TranscoderError(f"There is no metric '{metric}': choose from {', '.join(_METRICS)}, or a function.")
        self.model = model
        named = isinstance(metric, str)
        self.name = metric if named else metric.__name__
        self._metric = _METRICS[metric] if named else lambda logits, answers, _: metric(logits, answers)  # pyright: ignore[reportCallIssue]
        self._needs_base = metric == "kl_divergence"
        self._answers = task.answers(device=input_device(model))
        self._columns = None
        if named and metric in _TOKENS_READ:
            ids = torch.cat([getattr(self._answers, name).flatten() for name in _TOKENS_READ[metric]])
            columns = self._columns = ids[ids >= 0].unique()
            self._answers = self._answers.map(lambda ids: numbers_among(ids, columns))

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor, prompts: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the metric of some patched runs.

        Args:
            hidden (`torch.Tensor` of shape `(prompts, rows, hidden)`): Residual streams after the last block.
            prompts (`torch.LongTensor` of shape `(prompts,)`): Indices of the prompts in the task.
            base (`torch.Tensor` of shape `(prompts, hidden)`, *optional*): Residual streams of the base run.

        Returns:
            `torch.Tensor` of shape `(prompts, rows)` in fp32.
        """
        count, rows, width = hidden.shape
        prompt = torch.arange(count, device=hidden.device).repeat_interleave(rows)
        reference = self.logits(base, self._columns) if self._needs_base else None
        size = self._rows_at_once(self._columns)
        values = []
        for flat, chosen in zip(hidden.reshape(-1, width).split(size), prompt.split(size), strict=True):
            rows_of = prompts.to(chosen.device)[chosen]
            answers = self._answers.map(lambda ids, rows_of=rows_of: ids[rows_of])
            base_logits = None if reference is None else reference[chosen]
            values.append(self._metric(self.logits(flat, self._columns), answers, base_logits).float())
        return torch.cat(values).view(count, rows)

    def logits(self, hidden: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the logits of residual streams after the last block.

        The forward pass of the model computes them, including final norm, soft-caps and scales, without running its blocks.

        Args:
            hidden (`torch.Tensor` of shape `(rows, hidden)`): Residual streams after the last block.
            columns (`torch.LongTensor` of shape `(columns,)`, *optional*): Ids of the tokens. By default the whole vocabulary.

        Returns:
            `torch.Tensor` of shape `(rows, columns)`.
        """
        rows = hidden[:, None]
        with ExitStack() as stack:
            for block in decoder_blocks(self.model):
                wrap_forward(stack, block, lambda inner, *args, **kwargs: rows)
            head = self.model.get_output_embeddings()
            if columns is not None:
                outputs = outputs_at(head, columns)
                wrap_forward(stack, head, lambda inner, states: outputs(states))
            return forward_logits(self.model, inputs_embeds=torch.zeros_like(rows), use_cache=False)[:, 0]

    def _rows_at_once(self, columns=None):
        """Number of residual streams whose logits are computed at once."""
        head = self.model.get_output_embeddings()
        few = columns is not None and is_plain(head)
        return max(1, _MOST_LOGITS // (len(columns) if few else map_size(head)[0]))


def numbers_among(ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Find the places of token ids in sorted `columns`, -1 for padding and for tokens that are not there."""
    places = torch.searchsorted(columns, ids.clamp(min=0)).clamp(max=len(columns) - 1)
    return torch.where((ids >= 0) & (columns[places] == ids), places, -1)
