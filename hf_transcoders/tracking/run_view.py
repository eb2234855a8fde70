"""The interface of a running [`TranscoderTrainer`] for the tracking callback."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from ..evaluation.evaluation_report import EvaluationReport
from ..models.modeling_transcoder import TranscoderModel


class RunView(Protocol):
    """
    A training run of dictionaries.

    Attributes:
        dictionaries (`Mapping[str, TranscoderModel]`): Dictionaries in training by name.
        monitors (`Mapping[str, Any]`): Running statistics of each dictionary, with the `density` of its features.
        base_model (`torch.nn.Module`): Language model whose activations are learned.
        tokenizer (*optional*): Tokenizer of the language model.
        special_token_ids (`list[int]`): Tokens that are left out.
        eval_dataset (*optional*): Held-out rows, or several datasets of them by name.
        last_evaluation ([`EvaluationReport`], *optional*): The newest evaluation.
        activation_sample (`Mapping[str, torch.Tensor]`, *optional*): Site -> activations of some tokens, `(tokens, width)`.
        is_sharded (`bool`): Whether the weights are split over processes.
    """

    dictionaries: Mapping[str, TranscoderModel]
    monitors: Mapping[str, Any]
    base_model: torch.nn.Module
    tokenizer: Any
    eval_dataset: Iterable[Mapping] | Mapping[str, Iterable[Mapping]] | None
    last_evaluation: EvaluationReport | None
    activation_sample: Mapping[str, torch.Tensor] | None

    @property
    def special_token_ids(self) -> list[int]: ...

    @property
    def is_sharded(self) -> bool: ...
