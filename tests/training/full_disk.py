"""Run by test_resume.py: a run that may write small files only once its first checkpoint is there."""

import resource
import sys

from transformers import TrainerCallback

from hf_transcoders import TranscoderError
from tests.tiny_models import tiny_model
from tests.training.test_trainer import make_trainer


class FillDisk(TrainerCallback):
    def __init__(self, limit: int):
        self.limit = limit

    def on_save(self, args, state, control, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


def main(output_dir: str, limit: str) -> None:
    trainer = make_trainer(tiny_model("llama"), output_dir, save_strategy="steps", save_steps=5, max_steps=20)
    trainer.add_callback(FillDisk(int(limit)))
    try:
        trainer.train()
    except TranscoderError as error:
        print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
