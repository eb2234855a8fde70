"""One kind of file, and what people do with a dictionary that was read from it."""

import random
from pathlib import Path

import torch

from hf_transcoders import TranscoderModel
from hf_transcoders.models.linear_parts import decoder_rows, encoder_rows
from hf_transcoders.models.token_norms import TOKEN_NORMS

from .mutations import damage_file


class Target:
    """One kind of file or folder.

    A case copies one of the samples that `make` has made, damages it, and calls `load` on it and `use` on what that gives.
    What `use` returns is compared with what it gives for the sample itself.
    """

    #: Share of the cases relative to other targets, by the cost of a case and the number of readers it covers.
    weight = 1.0
    #: Whether NaN stands for a missing number, so that more of them are not a fault.
    keeps_nan = False
    #: Patterns of files that reading may leave in the folder, as a run leaves checkpoints.
    writes: tuple[str, ...] = ()

    def make(self, folder: Path) -> None:
        """Make samples, each a folder of its own in `folder`."""
        raise NotImplementedError

    def damage(self, rng: random.Random, sample: Path, outside: Path) -> str:
        """Damage a copy of a sample, and say how."""
        files = sorted(path for path in sample.rglob("*") if path.is_file())
        path = rng.choice(files)
        twins = [other for other in files if other != path and other.suffix == path.suffix]
        if twins and rng.random() < 0.05:
            other = rng.choice(twins)
            first, second = path.read_bytes(), other.read_bytes()
            path.write_bytes(second), other.write_bytes(first)
            return f"{path.relative_to(sample)} exchanged with {other.relative_to(sample)}"
        return f"{path.relative_to(sample)}: {damage_file(rng, path, outside)}"

    def load(self, sample: Path):
        """Read the sample."""
        raise NotImplementedError

    def use(self, loaded, work: Path):
        """Do with it what people do; plain values and tensors."""
        return loaded

    def numbers(self, loaded, used):
        """What has to be finite, if it was in the sample."""
        return used


def used_dictionary(model: TranscoderModel):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, model.config.d_in, generator=generator)
    output = model.eval()(inputs)
    reads = () if model.config.normalization in TOKEN_NORMS else encoder_rows(model)
    return [
        output.reconstruction,
        output.features,
        *reads,
        decoder_rows(model, up_to_scale=True),
        model.config.to_diff_dict() | {"_name_or_path": ""},
    ]


def trusted_numbers(models, used):
    """Weights, and what comes of them where they are no larger than any that was trained: products may overflow."""
    weights = [tensor for model in models for tensor in model.state_dict().values()]
    sizes = [tensor.float().abs().max() for tensor in weights if tensor.numel()]
    return [weights, used if all(size < 1e6 for size in sizes) else []]
