"""Small damages to files that still have their form: other values in JSON, other numbers in tensors."""

import copy
import random

import torch


VALUES = (
    None, True, False, 0, -1, 7, 0.5, -3.25, 1e300, 10**30, "", "x", "\x1b[31m", [], [None], [[1]], {}, {"a": 1}, "1",
)  # fmt: skip


def mutate_json(value, seed):
    """A copy of a JSON value in which one to three places hold something else, are missing, or are there twice."""
    draw = random.Random(seed)
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = draw.choice(places)
        change = draw.random()
        if change < 0.15:
            del holder[key]
        elif change < 0.25 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif change < 0.35 and type(holder[key]) in (int, float):
            holder[key] = -holder[key] * draw.choice((1, 2, 1000))
        else:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
    return value


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def mutate_tensors(tensors, seed):
    """A copy of named tensors of which one has other numbers, another shape or another type, or is missing."""
    draw = random.Random(seed)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    change = draw.randrange(8)
    if change == 0:
        del tensors[name]
    elif change == 1:
        dtypes = (torch.uint8, torch.bool, torch.float64, torch.int32, torch.float8_e4m3fn, torch.complex64)
        tensors[name] = tensor.nan_to_num().to(draw.choice(dtypes))
    elif change == 2:
        tensors[name] = tensor[:-1].clone() if tensor.dim() else tensor[None]
    elif change == 3:
        tensors[name] = tensor[None].clone()
    elif tensor.numel():
        at = draw.randrange(tensor.numel())
        flat = tensor.view(-1)
        if tensor.is_floating_point():
            flat[at] = draw.choice((float("nan"), float("inf"), -1.0, 1e30, 0.0, 3.0))
        else:
            flat[at] = draw.choice((-1, 0, 1, 10**6, -(2**62), 2**62))
        if change == 4:
            tensors[name] = tensor.flip(0).contiguous()
    return tensors
