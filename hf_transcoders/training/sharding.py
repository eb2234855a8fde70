"""Shard parameters, gradients and optimizer state of dictionaries over processes (FSDP 2).

A module gathers its parameters while it computes, so `forward` has plain tensors. Everywhere else (clipping, the constraint
on decoder rows, the optimizer) a parameter is a `DTensor`, of which each process holds some rows. Files are not sharded:
they are those of a run on one process.
"""

import warnings
from collections.abc import Mapping

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..models.modeling_transcoder import TranscoderModel
from ..models.transcoder_set import TranscoderSet


def shard_(model: TranscoderModel | TranscoderSet, device_type: str, world_size: int, **options) -> None:
    """
    Shards the parameters of a dictionary, or of each dictionary of a set, over all processes, in place. Parameters must be
    the same in all processes.

    Args:
        model ([`TranscoderModel`] or [`TranscoderSet`]): Dictionary or set in training.
        device_type (`str`): Type of the devices: `"cuda"`, `"cpu"` ...
        world_size (`int`): Number of processes.
        options: Arguments of [`~torch.distributed.fsdp.fully_shard`], such as `reshard_after_forward`.
    """
    # The warning is about changing outputs in place, which training does not do. It comes in every forward pass.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    mesh = init_device_mesh(device_type, (world_size,))
    if isinstance(model, TranscoderSet):
        for dictionary in model.values():
            fully_shard(dictionary, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def is_sharded(model: torch.nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(value, device: str | torch.device | None = None):
    """
    Gathers a sharded tensor, or a `dict` of them, as plain tensors in every process.

    Args:
        value: Tensor or `dict`; other values are returned as they are.
        device (`str` or `torch.device`, *optional*):
            Device of the gathered tensors, which are moved one by one: `"meta"` if only other processes need them.
    """
    if isinstance(value, DTensor):
        value = value.full_tensor()
        return value if device is None else value.to(device)
    if isinstance(value, Mapping):
        return {key: whole(part, device) for key, part in value.items()}
    return value


def like(value: torch.Tensor, shaped: torch.Tensor) -> torch.Tensor:
    """Shards a plain tensor, the same in every process, like the tensor `shaped`."""
    if not isinstance(shaped, DTensor) or value.shape != shaped.shape:
        return value
    return distribute_tensor(value.to(shaped.device), shaped.device_mesh, shaped.placements)


def gathered(dictionary: TranscoderModel, device: str | torch.device | None = None) -> TranscoderModel:
    """The dictionary itself or, if it is sharded, a plain copy in every process (for `device` see [`whole`])."""
    if not is_sharded(dictionary):
        return dictionary
    state = whole(dictionary.state_dict(), device)
    with torch.device("meta"):
        copy = TranscoderModel(dictionary.config)
    copy.load_state_dict(state, assign=True)
    return copy.eval()


def load_state_(dictionary: TranscoderModel, state: Mapping[str, torch.Tensor]) -> None:
    """Loads plain tensors into a dictionary, which may be sharded."""
    own = dictionary.state_dict()
    dictionary.load_state_dict(
        {name: like(value, own[name]) if name in own else value for name, value in state.items()}
    )


def share_out_optimizer_state(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    """Converts the state of an optimizer of plain parameters for `optimizer`, whose parameters are sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {
            name: like(value, parameters[number]) if isinstance(value, torch.Tensor) else value
            for name, value in values.items()
        }
        for number, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}
