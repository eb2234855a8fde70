"""Save and load the states of optimizer, schedule, gradient scaler and random numbers in a checkpoint."""

import os
import random
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerState

from ..errors import TranscoderError
from ..fingerprint import differences
from ..text.printable import printable
from ..text.strict_json import read_json
from .checkpoint_files import OPTIMIZER, SCHEDULER, TRAINER_STATE
from .sharding import is_sharded, share_out_optimizer_state, whole
from .state_files import check_state, load_state, save_state
from .trainer_part import TrainerPart


_SCALER = "scaler.safetensors"
_RANDOM_STATE = "rng_state_{rank}.safetensors"
# Values of a parameter group that training changes, and the list of its parameters.
_CHANGING = {"lr", "params"}
# States with the shape of their parameter, in the optimizers of torch.
_SHAPED = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum"}
# States that optimizers need in their next step.
_REQUIRED = dict.fromkeys(("Adam", "AdamW"), {"step", "exp_avg", "exp_avg_sq"})


class TrainerStates(TrainerPart):
    """The methods of [`TranscoderTrainer`] that replace the pickles of [`~transformers.Trainer`]."""

    def check_states(self) -> None:
        """Refuse an optimizer or schedule whose state cannot be saved. Called after the first step."""
        if not is_sharded(self.model):
            check_state(self._optimizer_state())
        check_state(self.lr_scheduler.state_dict())

    def _optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        if is_sharded(self.model):
            # One file that any number of processes can resume from. All processes take part in gathering it.
            state = {**state, "state": whole(state["state"], "cpu" if self.args.should_save else "meta")}
        return {"class": type(_inner(self.optimizer)).__name__, "state": state}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = self._optimizer_state()
        if self.args.should_save:
            save_state(state, Path(output_dir, OPTIMIZER))
            scheduler = {"class": type(self.lr_scheduler).__name__, "state": self.lr_scheduler.state_dict()}
            save_state(scheduler, Path(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint, OPTIMIZER)
        with _damaged_if_it_fails(path):
            optimizer = _inner(self.optimizer)
            state = _of_class(load_state(path), optimizer, path)
            _check_optimizer_state(state, optimizer, path)
            if is_sharded(self.model):
                state = share_out_optimizer_state(optimizer, state)
            optimizer.load_state_dict(state)
        path = Path(checkpoint, SCHEDULER)
        with _damaged_if_it_fails(path):
            state = _of_class(load_state(path), self.lr_scheduler, path)
            own = self.lr_scheduler.state_dict()
            if not all(name in own and _fits(value, own[name]) for name, value in state.items()):
                raise ValueError("names or types")
            self.lr_scheduler.load_state_dict(state)

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            save_state(self.accelerator.scaler.state_dict(), Path(output_dir, _SCALER))

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = self.accelerator.scaler
        if checkpoint is None or scaler is None:
            return
        path = Path(checkpoint, _SCALER)
        with _damaged_if_it_fails(path):
            state, own = load_state(path), scaler.state_dict()
            if state.keys() != own.keys() or not all(_is_number(state[name]) for name in own):
                raise ValueError("names or types")
            scaler.load_state_dict(state)

    def _save_rng_state(self, output_dir: str) -> None:
        states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
        if (device := self.args.device).type != "cpu":
            states[device.type] = torch.get_device_module(device).get_rng_state()
        os.makedirs(output_dir, exist_ok=True)
        save_state(states, Path(output_dir, _RANDOM_STATE.format(rank=self.args.process_index)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        path = Path(checkpoint or "", _RANDOM_STATE.format(rank=self.args.process_index))
        # An additional process starts with its seed.
        if checkpoint is None or not path.exists():
            return
        with _damaged_if_it_fails(path):
            states = load_state(path)
            random.setstate(states["python"])
            np.random.set_state(states["numpy"])
            torch.set_rng_state(states["cpu"])
            device = self.args.device
            if device.type != "cpu" and device.type in states:
                torch.get_device_module(device).set_rng_state(states[device.type])


def read_trainer_state(checkpoint: str | os.PathLike) -> TrainerState:
    """
    Read `trainer_state.json` of a checkpoint.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder of the checkpoint.

    Raises:
        [`TranscoderError`]: the file is damaged.
    """
    path = Path(checkpoint, TRAINER_STATE)
    # The log may have losses that are not finite.
    content = read_json(path, allow_nan=True)
    checks: dict[str, Callable[[Any], bool]] = {
        "global_step": _is_count,
        "max_steps": _is_count,
        "num_train_epochs": _is_number,
        "epoch": lambda value: value is None or _is_number(value),
        "log_history": lambda value: isinstance(value, list) and all(map(_is_log, value)),
        "stateful_callbacks": lambda value: isinstance(value, dict),
        "best_model_checkpoint": lambda value: isinstance(value, str | None),
        "best_metric": lambda value: value is None or _is_number(value),
        "best_global_step": lambda value: value is None or _is_count(value),
        "total_flos": _is_number,
        "num_input_tokens_seen": _is_number,
    }
    wrong = [name for name in content if name not in {field.name for field in fields(TrainerState)}]
    wrong += [name for name, check in checks.items() if name in content and not check(content[name])]
    if wrong or "global_step" not in content or "log_history" not in content:
        what = f"its {wrong[0]} is invalid" if wrong else "it is not whole"
        raise TranscoderError(f"{path} is damaged ({what}): take another checkpoint.")
    return TrainerState(**content)


def _check_optimizer_state(state: Any, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Raise a `ValueError` for a damaged state, and a [`TranscoderError`] for a state with other settings."""
    groups, own_groups = state["param_groups"], optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own_groups]:
        raise ValueError("parameters")
    changed = []
    for number, (group, own) in enumerate(zip(groups, own_groups, strict=True)):
        if not all(_fits(group[name], own[name]) for name in group if name in own and name != "params"):
            raise ValueError("types")
        name = "optimizer" if len(groups) == 1 else f"optimizer.group {number}"
        # Keys of only one of them come from another version of the optimizer, or from the schedule.
        shared = sorted(group.keys() & own.keys() - _CHANGING)
        changed += differences({key: group[key] for key in shared}, {key: own[key] for key in shared}, name)
    if changed:
        raise TranscoderError(
            f"{path.parent} was made with {'; '.join(changed)}: resume with the same optimizer, or start again."
        )
    parameters = [parameter for group in own_groups for parameter in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    if numbers != list(range(len(parameters))) or not set(state["state"]) <= set(numbers):
        raise ValueError("parameters")
    if not type(optimizer).__module__.startswith("torch.optim"):
        return
    for number, values in state["state"].items():
        if values and not _REQUIRED.get(type(optimizer).__name__, set()) <= values.keys():  # pyright: ignore[reportCallIssue]
            raise ValueError("names")
        for name, value in values.items():
            if name in _SHAPED and value is not None and value.shape != parameters[number].shape:
                raise ValueError("shapes")


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside the wrapper of accelerate."""
    return getattr(optimizer, "optimizer", optimizer)


def _of_class(saved: Any, stateful: Any, path: Path) -> dict[str, Any]:
    """Reads the state in a file, if it is from an object of the same class."""
    if not isinstance(saved, dict) or not isinstance(saved["state"], dict):
        raise ValueError("types")
    state, name, own = saved["state"], saved["class"], type(stateful).__name__
    if name != own:
        raise TranscoderError(
            f"{path.parent} was made with {printable(name)} and this run has {own}: resume with the same, or start again."
        )
    return state


@contextmanager
def _damaged_if_it_fails(path: Path):
    """Turn errors from an invalid state into one sentence."""
    try:
        yield
    except TranscoderError:
        raise
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise TranscoderError(
            f"{path} does not hold a valid state: take another checkpoint, or start again."
        ) from error


def _fits(saved: Any, own: Any) -> bool:
    """Whether a value can replace another: both are numbers, or both have the same type."""
    if own is None or saved is None:
        return True
    if isinstance(own, torch.Tensor) or isinstance(saved, torch.Tensor):
        return all(_is_number(value) or isinstance(value, torch.Tensor) for value in (own, saved))
    if _is_number(own):
        return _is_number(saved)
    if isinstance(own, list | tuple):
        return isinstance(saved, list | tuple) and len(saved) == len(own) and all(map(_fits, saved, own))
    if isinstance(own, Mapping):
        return isinstance(saved, Mapping) and all(name in own and _fits(saved[name], own[name]) for name in saved)
    return type(saved) is type(own)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_log(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and _is_count(entry.get("step"))
        and all(_is_number(entry[name]) for name in entry if name in ("loss", "epoch", "learning_rate"))
    )
