"""Keep models in evaluation mode during a measurement."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


# Module -> the blocks that hold it in evaluation mode, the oldest first, each with the mode that it found.
_held: dict[nn.Module, list["_Found"]] = {}
_holding = threading.RLock()


class _Found:
    def __init__(self, training: bool):
        self.training = training


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode, and afterwards as they were, each module for itself.

    The mode belongs to the model and not to a thread: where several blocks hold one model, in one thread or in many, it
    stays in evaluation mode until the last of them ends, and is then as the first one found it.
    """
    found = {}
    with _holding:
        for module in dict.fromkeys(module for model in models for module in model.modules()):
            found[module] = _Found(module.training)
            _held.setdefault(module, []).append(found[module])
            if module.training:
                module.training = False
    try:
        yield
    finally:
        with _holding:
            for module, mine in found.items():
                _let_go(module, mine)


def _let_go(module, mine):
    blocks = _held[module]
    later = blocks.index(mine) + 1
    if later < len(blocks):
        # A later block found what this one had set, and restores for both.
        blocks[later].training |= mine.training
    elif mine.training != module.training:
        module.training = mine.training
    blocks.remove(mine)
    if not blocks:
        del _held[module]
