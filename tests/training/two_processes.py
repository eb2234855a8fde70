"""Run by `torchrun` or `accelerate launch` from test_distributed.py: trains and writes what each process ended with."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from hf_transcoders import (
    CrossLayerTranscoder,
    CrossLayerTranscoderConfig,
    TranscoderConfig,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
)
from hf_transcoders.training.sharding import whole
from tests.data.test_harvest import token_rows
from tests.tiny_models import tiny_model


READ, WRITE = "layers.1.mlp.in", "layers.1.mlp.branch"
KINDS = {
    "topk": {"k": 4},
    "relu": {"activation": "relu", "l1_coefficient": 1e-2},
    "jumprelu": {"activation": "jumprelu", "l0_coefficient": 1e-2, "threshold_init": 0.01},
    "target": {"activation": "jumprelu", "l0_coefficient": 1e-2, "target_l0": 6.0, "threshold_init": 0.01},
    "gated": {"activation": "gated", "l1_coefficient": 1e-2, "num_features": 33},
    "unit": {"k": 4, "decoder_norm": "unit", "skip_connection": True, "normalization": "standardize"},
    "nested": {"k": 4, "matryoshka_sizes": [16, 64], "pre_bias": True},
    "tied": {"k": 4, "tied": True, "sae": True},
    "batchtopk": {"k": 4, "activation": "batchtopk", "sae": True},
}
# BatchTopK chooses among the tokens of a process.
EQUAL_KINDS = [kind for kind in KINDS if kind != "batchtopk"]


def make_trainer(output, kinds, alone=False, cross_layer=False, **changes):
    """A run of 64 tokens a step on all processes, from two data shards, in which AuxK takes part."""
    base = tiny_model("llama")
    torch.manual_seed(0)
    models = {}
    for kind in kinds:
        options = {"num_features": 64, **KINDS[kind]}
        read = WRITE if options.pop("sae", False) else READ
        models[kind] = TranscoderModel(TranscoderConfig.for_model(base, read, WRITE, **options))
        with torch.no_grad():
            models[kind].W_enc[48:] *= 1e-2  # Some never fire.
    processes = int(os.environ.get("WORLD_SIZE", 1))
    arguments = {
        "per_device_train_batch_size": 64 // processes, "data_shards": 2, "max_steps": 40, "harvest_batch_size": 4,
        "buffer_tokens": 128, "use_cpu": True, "learning_rate": 3e-3, "logging_steps": 10, "save_steps": 25,
        "dead_after_tokens": 640, "disable_tqdm": True, "report_to": "none", **changes,
    }  # fmt: skip
    args = TranscoderTrainingArguments(str(output), **arguments)
    if not cross_layer:
        model = models[kinds[0]] if alone else TranscoderSet(models)
    else:
        torch.manual_seed(0)
        config = CrossLayerTranscoderConfig.for_model(base, num_features=64, k=4)
        model = CrossLayerTranscoder(config)
        with torch.no_grad():
            for source in model.sources:
                source.W_enc[48:] *= 1e-2
    return TranscoderTrainer(model, base, args, token_rows(128), eval_dataset=token_rows(16, seed=5))


def train(output, kinds, resume=None, **changes):
    """Trains; gives weights, and everything else that two runs can be compared by."""
    trainer = make_trainer(output, kinds, **changes)
    batches = []
    compute_loss = trainer.compute_loss

    def spy(model, inputs, **kwargs):
        batches.append(inputs[WRITE].sum(-1).tolist())
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = spy
    trainer.train(resume_from_checkpoint=resume and str(resume))
    trainer.save_model()
    facts = {
        "target_variance": [d.config.target_variance for d in trainer.dictionaries.values()],
        "dead": {name: m.tokens_since_fired.tolist() for name, m in trainer.monitors.items()},
        "logs": [{k: v for k, v in log.items() if "second" not in k} for log in trainer.state.log_history[:-1]],
        "batches": batches,
        "eval_fvu": trainer.evaluate()["eval_loss"],
        "local_rows": {name: len(_local(d.W_enc)) for name, d in trainer.dictionaries.items()},
    }
    weights = {name: value.contiguous().clone() for name, value in whole(trainer.model.state_dict()).items()}
    return weights, facts


def _local(parameter):
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def main(output, scenarios):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for name, options in json.loads(scenarios).items():
        folder = Path(output, name)
        weights, facts = train(folder, **options)
        save_file(weights, folder / f"weights_{rank}.safetensors")
        (folder / f"facts_{rank}.json").write_text(json.dumps(facts))
    torch.distributed.barrier()
    # All is written. Taking the interpreter down while gloo's threads still run aborts one time in twelve ("terminate
    # called without an active exception"), which says nothing about training.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
