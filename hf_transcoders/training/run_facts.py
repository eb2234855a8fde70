"""Record the inputs that determine a run's results in a checkpoint, and compare them when the run is resumed."""

import json
from typing import Any

from ..fingerprint import differences
from ..models.modeling_transcoder import TranscoderModel


# Arguments that determine the results, in addition to those of the harvester and of the stream of activations. The split of
# a step's tokens over devices and accumulated batches may change.
_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "data_seed",
    "tf32", "torch_compile", "sparsity_warmup", "dead_after_tokens", "initialization_tokens", "skip_special_tokens",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
)  # fmt: skip
# Fields of a dictionary's configuration that are names or results.
_RESULTS = {
    "base_model_name_or_path", "base_model_revision", "base_model_type", "base_model_weights", "evaluation", "format_version", "target_variance",
    "training_summary",
}  # fmt: skip
# Name in the record -> name of the user's argument.
_ARGUMENT_NAMES = {"rows_per_chunk": "harvest_batch_size", "autocast": "autocast of the base model"}


def run_facts(trainer) -> dict[str, Any]:
    """
    Records the inputs of a run: base model, data, dictionaries and arguments.

    Args:
        trainer ([`TranscoderTrainer`]): Trainer, before its dictionaries are sharded.

    Returns:
        `dict[str, Any]`: JSON data for [`changes`].
    """
    arguments = trainer.args.to_dict()
    facts = {
        "format_version": 1,
        **trainer.get_train_dataloader().harvester.facts,
        "dictionaries": {name: _dictionary_facts(dictionary) for name, dictionary in trainer.dictionaries.items()},
        "arguments": {
            **{name: arguments.get(name) for name in _ARGUMENTS},
            "mixed_precision": trainer.accelerator.mixed_precision,
        },
        "tokens_per_step": trainer.args.tokens_per_step,
        "max_steps": trainer.args.max_steps,
    }
    return json.loads(json.dumps(facts, default=str))


def _dictionary_facts(dictionary: TranscoderModel) -> dict[str, Any]:
    config = dictionary.config.to_dict()
    return {
        **{name: config.get(name) for name in dictionary.config.own_fields() if name not in _RESULTS},
        "dtype": str(dictionary.W_enc.dtype),
        "frozen": [name for name, parameter in dictionary.named_parameters() if not parameter.requires_grad],
    }


def changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """
    Lists the differences that keep a run from continuing a checkpoint exactly.

    Args:
        saved (`dict[str, Any]`): [`run_facts`] of the checkpoint.
        now (`dict[str, Any]`): [`run_facts`] of this run. The length of the run is not compared.

    Returns:
        `list[str]`: differences, such as `learning_rate 0.001 and this run has 0.01`.
    """
    found = []
    for part in ("base_model", "data", "harvest", "dictionaries", "arguments"):
        before, after = saved.get(part), now[part]
        if part == "base_model" and _of(before, "model_type") != after["model_type"]:
            # Models of different families differ in everything.
            before, after = {"model_type": _of(before, "model_type")}, {"model_type": after["model_type"]}
        if part == "dictionaries" and isinstance(before, dict) and before.keys() != after.keys():
            before, after = ", ".join(before), ", ".join(after)
        found += differences(before, after, "" if part in ("harvest", "arguments") else part)
    for name, label in _ARGUMENT_NAMES.items():
        found = [label + text.removeprefix(name) if text.startswith(f"{name} ") else text for text in found]
    if saved.get("tokens_per_step") != now["tokens_per_step"]:
        found.append(f"{saved.get('tokens_per_step')} tokens per step and this run has {now['tokens_per_step']}")
    return list(dict.fromkeys(found))


def _of(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None
