"""Linear maps of modules, including wrapped, adapted, quantized and offloaded ones."""

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from ..errors import TranscoderError
from .devices import module_device


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Elements of the outputs of one run of a module that is probed.
_MAX_ELEMENTS = 2**25
# Unit vectors are multiplied with it, a power of 2, so that a bias takes fewer of a sum's digits.
_STEP = 64.0
# How far a module may be from its linear map, relative to its outputs: rounding, in 8 bits also that of activations.
_TOLERANCE = 1e-4
_HALF_TOLERANCE = 0.02
_QUANTIZED_TOLERANCE = 0.05
# Kernels of some quantizations have no backward, and that of some adapters is none of their forward (C3A in PEFT 0.21).
_NO_GRADIENT = (TranscoderError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class LinearMap:
    """`x -> weight @ x + bias`.

    Args:
        weight (`torch.Tensor` of shape `(outputs, inputs)`): The matrix.
        bias (`torch.Tensor` of shape `(outputs,)`, *optional*): The constant.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


def linear_map(module: nn.Module, name: str) -> LinearMap:
    """The linear map that a module computes now, including active adapters that are not merged.

    Of a plain `nn.Linear` or `Conv1D` it is the parameters themselves, offloaded or not. Everything else is run on unit
    vectors, in evaluation mode and without hooks, so that it does not matter which adapter or quantization it is. Weights
    quantized to 8 or 4 bits are those that the codes stand for; that LLM.int8 rounds activations too is left out.

    Args:
        module (`torch.nn.Module`): A projection of the model, or its head.
        name (`str`): Name of the module in errors.

    Returns:
        [`LinearMap`], in fp32 at least where the module had to be run.

    Raises:
        [`TranscoderError`]: the module is not linear, or cannot be run on its own.
    """
    module = acting_module(module)
    read = _read(module)
    if read is not None:
        return read
    outputs, inputs = map_size(module)
    with _alone(module, name) as run, torch.no_grad():
        bias = run(torch.zeros(1, inputs))[0]
        columns = []
        for part in torch.arange(inputs).split(max(1, _MAX_ELEMENTS // outputs)):
            units = torch.zeros(len(part), inputs)
            units[torch.arange(len(part)), part] = _STEP
            columns.append((run(units) - bias) / _STEP)
        weight = torch.cat(columns).T
        _check(module, name, run, lambda rows: linear(rows, weight, bias), lambda outputs: outputs)
    return LinearMap(weight, bias if bias.any() else None)


def linear_rows(module: nn.Module, outputs: torch.Tensor, name: str) -> LinearMap:
    """Rows of [`linear_map`] for some outputs `(k,)`; the other rows, of a large vocabulary for example, are never computed."""
    module = acting_module(module)
    read = _read(module)
    if read is not None:
        outputs = outputs.to(read.weight.device)
        return LinearMap(read.weight[outputs], None if read.bias is None else read.bias[outputs])
    size = max(1, _MAX_ELEMENTS // map_size(module)[0])
    try:
        parts = [_pulled(module, name, len(part), _Pick(part)) for part in outputs.split(size)]
    except _NO_GRADIENT:
        whole = linear_map(module, name)
        return LinearMap(whole.weight[outputs], None if whole.bias is None else whole.bias[outputs])
    return LinearMap(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))


def mean_row(module: nn.Module, name: str) -> LinearMap:
    """The mean over the rows of [`linear_map`]: a map with one output, in fp32."""
    module = acting_module(module)
    read = _read(module)
    if read is not None:
        return LinearMap(
            read.weight.float().mean(0, keepdim=True),
            None if read.bias is None else read.bias.float().mean(0, keepdim=True),
        )
    try:
        return _pulled(module, name, 1, lambda values: values.mean(-1))
    except _NO_GRADIENT:
        whole = linear_map(module, name)
        bias = None if whole.bias is None else whole.bias.mean(0, keepdim=True)
        return LinearMap(whole.weight.mean(0, keepdim=True), bias)


def apply_weight(module: nn.Module, rows: torch.Tensor, name: str) -> torch.Tensor:
    """`rows @ weight.T` of [`linear_map`], `(..., inputs)` to `(..., outputs)` in the dtype of `rows`; the bias is left out.

    Costs no more than running the module, also where its weight would have to be found first.
    """
    module = acting_module(module)
    read = _read(module)
    if read is not None:
        # A part at a time, so that a copy in another precision stays small.
        parts = read.weight.detach().split(2**14)
        return torch.cat([rows @ part.to(rows.device, rows.dtype).T for part in parts], dim=-1)
    outputs, inputs = map_size(module)
    with _alone(module, name) as run, torch.no_grad():
        flat = rows.reshape(-1, inputs)
        bias = run(torch.zeros(1, inputs))
        _check_sums(module, name, run, inputs)
        found = torch.cat([run(part) - bias for part in flat.split(max(1, _MAX_ELEMENTS // outputs))])
    return found.to(rows.device, rows.dtype).view(*rows.shape[:-1], outputs)


def outputs_at(module: nn.Module, outputs: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that computes some outputs `(k,)` of a module as its forward method does, even if that is replaced later."""
    acting = acting_module(module)
    read = _read(acting)
    if read is not None:
        weight, bias = read.weight[outputs], None if read.bias is None else read.bias[outputs]
        return lambda states: linear(states, weight, bias)
    forward = module.forward
    return lambda states: forward(states)[..., outputs.to(states.device)]


def is_plain(module: nn.Module) -> bool:
    """Whether the weight of a module is a plain parameter in memory, which costs nothing to read."""
    module = acting_module(module)
    return _is_read(module) and not any(parameter.is_meta for parameter in module.parameters(recurse=False))


def is_quantized(module: nn.Module) -> bool:
    """Whether a module has quantized weights. Such a module may also round its inputs, and equals its map only up to that."""
    parameters = acting_module(module).parameters()
    return any(type(each) not in (nn.Parameter, torch.Tensor) or each.dtype not in _FLOATS for each in parameters)


def map_size(module: nn.Module) -> tuple[int, int]:
    """Number of outputs and of inputs of a linear module.

    Raises:
        [`TranscoderError`]: it is no module of this kind.
    """
    base: Any = _base_module(module)
    for outputs, inputs in (("out_features", "in_features"), ("nf", "nx"), ("outfeatures", "infeatures")):
        if isinstance(getattr(base, outputs, None), int):
            width = getattr(base, inputs, None)
            return getattr(base, outputs), base.weight.shape[0] if width is None else width
    raise TranscoderError(
        f"{type(module).__name__} does not say how wide it is, so its weights cannot be found: load the model without what "
        "put it in the place of a linear layer."
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or one with an adapter around it."""
    base = _base_module(module)
    return isinstance(base, nn.Linear | Conv1D) or (hasattr(base, "in_features") and hasattr(base, "out_features"))


def linear_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The linear layers in a module, in order, each with the adapter around it, if any; never the parts of an adapter."""
    if is_linear(module):
        yield module
        return
    for child in module.children():
        yield from linear_modules(child)


def is_embedding(module: nn.Module) -> bool:
    """Whether a module is an embedding, or one with an adapter around it."""
    return isinstance(_base_module(module), nn.Embedding)


def num_embeddings(embedding: nn.Module) -> int:
    """Number of tokens of an embedding."""
    return _base_module(acting_module(embedding)).num_embeddings


def embedding_width(embedding: nn.Module) -> int:
    """Width of an embedding."""
    return _base_module(acting_module(embedding)).embedding_dim


def adapters_at_work(model: nn.Module) -> tuple:
    """State of the PEFT adapters of each module (active, merged, scales): equal as long as no adapter is switched."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return tuple(
        (
            tuple(module.active_adapters),
            module.disable_adapters,
            tuple(module.merged_adapters),
            tuple(sorted(getattr(module, "scaling", {}).items())),
        )
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    )


def acting_module(module: nn.Module) -> nn.Module:
    """The module that acts for a PEFT wrapper that only passes on its inputs.

    So it is with copies that were trained in place of a module (`modules_to_save`, LN tuning), with adapters that are
    switched off and with merged ones.
    """
    if "peft" not in sys.modules:
        return module
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    while True:
        inner = None
        if isinstance(module, ModulesToSaveWrapper):
            off = module.disable_adapters or not module.active_adapters
            inner = module.original_module if off else module.modules_to_save[module.active_adapters[0]]
        elif isinstance(module, BaseTunerLayer) and module.disable_adapters != module.merged:
            inner = module.base_layer
        elif isinstance(module, LNTuningLayer) and not module.disable_adapters and len(module.active_adapters) == 1:
            inner = module.ln_tuning_layers[module.active_adapters[0]]
        if inner is None:
            return module
        module = inner


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Keep the weights of a module that accelerate offloaded in memory inside the `with` block."""
    if not is_offloaded(module):
        yield
        return
    hook: Any = module._hf_hook
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads the module's own weights for each forward pass and they are elsewhere now."""
    return hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters(recurse=False))


def runs_own_forward(module: nn.Module, forward: Callable) -> bool:
    """Whether calling a module runs `forward`, a function of its class, with nothing in between but accelerate's hooks."""
    if type(module).forward is not forward:
        return False
    instead = vars(module).get("forward")
    return instead is None or (isinstance(instead, functools.partial) and hasattr(module, "_hf_hook"))


def _base_module(module):
    """The module inside all wrappers, active or not."""
    while True:
        inner = [module._modules.get(name) for name in ("base_layer", "original_module", "token_adapter")]
        inner = [each for each in inner if each is not None]
        if not inner:
            return module
        module = inner[0]


def _is_read(module):
    own = any(runs_own_forward(module, kind.forward) for kind in (nn.Linear, Conv1D))
    return own and type(module.weight) in (nn.Parameter, torch.Tensor) and module.weight.dtype in _FLOATS


def _read(module) -> LinearMap | None:
    """The map of a module that multiplies by a tensor it holds; `None` for any other module."""
    if not _is_read(module):
        return None
    with loaded(module):
        _refresh(module)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        if weight.is_meta:
            raise _not_loaded(module)
        return LinearMap(weight, module.bias)


def _not_loaded(module):
    return TranscoderError(
        f"The weights of a {type(module).__name__} are offloaded together with a module around it, so they cannot be read "
        "alone: give the model another `device_map`, without `preload_module_classes`."
    )


def _refresh(module):
    """Run the hooks of `torch.nn.utils` (weight and spectral norm, pruning), which compute the weight before each forward pass."""
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(module, None)


@contextmanager
def _alone(module, name) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Yields a function that runs a module alone on rows `(n, inputs)`, and returns `(n, outputs)` in fp32 at least."""
    device, dtype = module_device(module), _input_dtype(module)
    if device.type == "meta":
        raise _not_loaded(module)

    def run(rows):
        try:
            outputs = module.forward(rows.to(device, dtype)[None])[0]
        except Exception as error:  # Whatever an adapter needs that it only gets in a whole forward pass.
            raise TranscoderError(
                f"The weights of {name} cannot be found: its {type(module).__name__} does not run on its own "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); merge the adapter into the model, "
                "or load the model without it."
            ) from error
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    with ExitStack() as stack:
        for part in module.modules():
            _refresh(part)
            stack.callback(setattr, part, "training", part.training)
            part.training = False
            for hooks in ("_forward_hooks", "_forward_pre_hooks"):
                stack.callback(setattr, part, hooks, getattr(part, hooks))
                setattr(part, hooks, OrderedDict())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield run


def _input_dtype(module) -> torch.dtype:
    """Dtype of a module's inputs: that of its weights, or fp32 if these are not floating-point numbers."""
    weight = getattr(_base_module(module), "weight", None)
    return weight.dtype if weight is not None and weight.dtype in _FLOATS else torch.float32


@dataclass(frozen=True)
class _Pick:
    """One output of each row, `(n, outputs)` to `(n,)`."""

    outputs: torch.Tensor

    def __call__(self, values):
        chosen = self.outputs[: len(values)].to(values.device)
        return values.gather(1, chosen[:, None])[:, 0]


def _pulled(module, name, count, functional) -> LinearMap:
    """Functions of the outputs, `(n, outputs) -> (n,)`, one for each of `count` rows, as rows of the map, by autograd."""
    _, inputs = map_size(module)
    with _alone(module, name) as run:
        with torch.enable_grad():
            rows = torch.zeros(count, inputs, requires_grad=True)
            bias = functional(run(rows))
            weight = torch.autograd.grad(bias.sum(), rows)[0].to(bias.device, bias.dtype)
        bias = bias.detach()
        with torch.no_grad():
            own = lambda inputs: (inputs * weight[: len(inputs)]).sum(-1) + bias[: len(inputs)]  # noqa: E731
            _check(module, name, run, own, functional, min(count, 8))
    return LinearMap(weight, bias)


def _check(module, name, run, expected, functional, count=4):
    """Refuse a module that differs from its map on random rows, small and large."""
    _, inputs = map_size(module)
    for size in (1.0, 30.0):
        rows = size * torch.randn(count, inputs, generator=torch.Generator().manual_seed(0))
        outputs = run(rows)
        _compare(module, name, functional(outputs), expected(rows.to(outputs)), outputs)


def _check_sums(module, name, run, inputs):
    """Refuse a module whose output for a sum is not the sum of its outputs."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(4, inputs, generator=generator), 30 * torch.randn(4, inputs, generator=generator)
    outputs = run(one + other)
    _compare(module, name, outputs, run(one) + run(other) - run(torch.zeros(1, inputs)), outputs)


def _compare(module, name, found, wanted, outputs):
    tolerance = _tolerance(module)
    # A few outputs of many are as exact as a typical one of them.
    size = outputs.norm() * (found.numel() / outputs.numel()) ** 0.5
    if not (found - wanted).norm() <= tolerance * size:
        raise TranscoderError(
            f"{name} is not a linear map ({type(module).__name__}: its outputs are {float((found - wanted).norm() / size):.2g} "
            "of their size away from one), so there are no weights to read: switch this adapter off, or merge it into the "
            "model."
        )


def _tolerance(module):
    if is_quantized(module):
        return _QUANTIZED_TOLERANCE
    half = any(parameter.dtype.itemsize == 2 for parameter in module.parameters())
    half = half or torch.get_float32_matmul_precision() != "highest"
    return _HALF_TOLERANCE if half else _TOLERANCE
