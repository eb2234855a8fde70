"""Run by `torchrun` from test_distributed.py: trains a set and writes what each process ended with."""

import json
import os
import sys
from pathlib import Path

import torch

from hf_transcoders import (
    TranscoderConfig,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
)
from tests.data.test_harvest import token_rows
from tests.tiny_models import tiny_model


def main(output):
    torch.set_num_threads(1)
    base = tiny_model("llama")
    torch.manual_seed(0)
    read, write = "layers.1.mlp.in", "layers.1.mlp.branch"
    size = {"num_features": 64, "k": 4}
    models = {
        "transcoder": TranscoderModel(TranscoderConfig.for_model(base, read, write, **size)),
        "sae": TranscoderModel(TranscoderConfig.for_model(base, write, activation="batchtopk", **size)),
    }
    args = TranscoderTrainingArguments(
        output, max_steps=20, per_device_train_batch_size=32, harvest_batch_size=4, buffer_tokens=128, use_cpu=True,
        learning_rate=3e-3, logging_steps=10, save_steps=20, dead_after_tokens=320, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    trainer = TranscoderTrainer(TranscoderSet(models), base, args, token_rows(128))
    batches = []
    compute_loss = trainer.compute_loss

    def spy(model, inputs, **kwargs):
        batches.append(inputs[read].sum(-1).tolist())
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    result = {
        "weights": {name: value.double().sum().item() for name, value in trainer.model.named_parameters()},
        "target_variance": models["transcoder"].config.target_variance,
        "dead": [m.tokens_since_fired.tolist() for m in trainer.monitors.values()],
        "logs": [{k: v for k, v in log.items() if "second" not in k} for log in trainer.state.log_history[:-1]],
        "epoch": sum(batches[: len(batches) // 2], []),
    }
    Path(output, f"rank{args.process_index}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    # All is written. Taking the interpreter down while gloo's threads still run aborts one time in twelve ("terminate
    # called without an active exception"), which says nothing about training.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
