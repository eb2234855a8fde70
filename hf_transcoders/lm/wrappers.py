"""Unwrap PEFT, data parallelism, Accelerate and torch.compile, for every function that takes a language model."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from ..errors import TranscoderError
from .devices import input_device
from .hooks import wrap_forward, wrap_method
from .modes import in_eval_mode


# Parameter names of the language model.
NAMES = ("model", "base_model")


def language_model(model: nn.Module) -> PreTrainedModel:
    """
    The Transformers model inside the wrappers of data parallelism, `torch.compile`, Accelerate and PEFT. Adapters that sit
    in its layers (LoRA and its kin) stay at work.

    Args:
        model (`torch.nn.Module`): The model, plain or wrapped.

    Returns:
        [`~transformers.PreTrainedModel`]

    Raises:
        [`TranscoderError`]: there is none inside, or what is being learned is a prompt in front of it.
    """
    return _layers(model)[-1]


def takes_model(function: Callable) -> Callable:
    """Unwrap the language model that a function takes as `model` or `base_model`.

    The model runs in the mode it is in, training or evaluation.
    """
    unwrapped = _Unwrapped(function)

    @functools.wraps(function)
    def taking(*args, **kwargs):
        _, args, kwargs = unwrapped(args, kwargs)
        return function(*args, **kwargs)

    return taking


def measures_model(function: Callable) -> Callable:
    """As [`takes_model`], for a function that measures: the model is in evaluation mode during the call."""
    unwrapped = _Unwrapped(function)

    @functools.wraps(function)
    def measuring(*args, **kwargs):
        layers, args, kwargs = unwrapped(args, kwargs)
        with in_eval_mode(*layers[-1:]):
            return function(*args, **kwargs)

    return measuring


def opens_on_model(function: Callable) -> Callable:
    """As [`takes_model`], for a context manager: inside its block, the model may be called wrapped or not."""
    unwrapped = _Unwrapped(function)

    @functools.wraps(function)
    @contextmanager
    def opening(*args, **kwargs):
        layers, args, kwargs = unwrapped(args, kwargs)
        with ExitStack() as stack:
            for layer in layers[:-1]:
                _lead_to(stack, layers[-1], layer)
            yield stack.enter_context(function(*args, **kwargs))

    return opening


@contextmanager
def in_own_precision(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` in the precision of its weights, also where a Trainer has put autocast around its forward pass."""
    with ExitStack() as stack:
        # accelerate keeps the forward pass that it wraps.
        if (forward := model.__dict__.get("_original_forward")) is not None:
            wrap_forward(stack, model, lambda inner, *args, **kwargs: forward(*args, **kwargs))
        stack.enter_context(torch.autocast(input_device(model).type, enabled=False))
        yield


class _Unwrapped:
    """Replaces the language model among the arguments of a function by the unwrapped one."""

    def __init__(self, function):
        names = list(inspect.signature(function).parameters)
        self.name = next(name for name in names if name in NAMES)
        self.position = names.index(self.name)

    def __call__(self, args, kwargs):
        """The wrappers from outside in and the model itself, and the new arguments; no layers if the model is missing."""
        if len(args) > self.position:
            layers = _layers(args[self.position])
            return layers, (*args[: self.position], layers[-1], *args[self.position + 1 :]), kwargs
        if self.name in kwargs:
            layers = _layers(kwargs[self.name])
            return layers, args, {**kwargs, self.name: layers[-1]}
        return [], args, kwargs


def _layers(model) -> list[nn.Module]:
    """All wrappers from outside in, in any order of wrapping, and the Transformers model as the last."""
    if isinstance(model, PreTrainedModel) and not _is_compiled_copy(model):
        return [model]
    inner = _inner(model) if isinstance(model, nn.Module) else model
    if inner is model:
        raise TranscoderError(
            f"{type(model).__name__} is not a Transformers model: give a causal language model, plain or wrapped by PEFT, "
            "torch.compile or data parallelism."
        )
    return [model, *_layers(inner)]


def _inner(model):
    """The model inside one or more wrappers."""
    if is_peft_available():
        from peft import PeftMixedModel, PeftModel
        from peft.tuners.tuners_utils import BaseTuner

        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise TranscoderError(
                "A learned prompt changes no layer of the model, so there is nothing to read inside it: use LoRA, "
                "another adapter that sits in the layers, or full fine-tuning."
            )
        if isinstance(model, PeftModel | PeftMixedModel):
            return model.base_model
        if isinstance(model, BaseTuner):
            return model.model
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _is_compiled_copy(model):
    """Whether Accelerate has compiled the blocks of another model, to which this one belongs."""
    return "_orig_mod" in model.__dict__


def _lead_to(stack, model, wrapper):
    """Make a wrapper that holds copies of `model` run `model` itself, which has the hooks."""
    if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) > 1:

        def forward(inner, *args, **kwargs):
            (args,), (kwargs,) = wrapper.scatter(args, kwargs, wrapper.device_ids[:1])
            return wrapper.module(*args, **kwargs)

        wrap_forward(stack, wrapper, forward)
    elif isinstance(wrapper, PreTrainedModel):
        wrap_forward(stack, wrapper, lambda inner, *args, **kwargs: model(*args, **kwargs))
        wrap_method(stack, wrapper, "generate", lambda inner, *args, **kwargs: model.generate(*args, **kwargs))
