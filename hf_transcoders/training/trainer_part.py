"""The type of the trainer for type checkers of its mixin classes; empty at run time."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import Trainer

    from ..data.activation_stream import ShardedStream
    from ..evaluation.evaluation_report import EvaluationReport
    from ..models.modeling_transcoder import TranscoderModel
    from .arguments import TranscoderTrainingArguments
    from .interruption import Interruption
    from .monitor import DictionaryMonitor

    class TrainerPart(Trainer):
        """Attributes of [`TranscoderTrainer`] that its parts use."""

        args: TranscoderTrainingArguments
        dictionaries: dict[str, TranscoderModel]
        monitors: dict[str, DictionaryMonitor]
        lr_scheduler: Any
        optimizer: Any
        push_in_progress: Any
        last_evaluation: EvaluationReport | None
        _stream_state: dict | None
        _interruption: Interruption

        @property
        def _shows_progress(self) -> bool: ...
        def get_train_dataloader(self) -> ShardedStream: ...
        def evaluation_report(self, eval_dataset=None) -> EvaluationReport: ...

else:
    TrainerPart = object
