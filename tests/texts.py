"""Texts of several lengths, and the rows that datasets, tokenizers and collators make of them."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from tests.tiny_models import TINY_CONFIGS, VOCAB_SIZE, tiny_model


#: Families, and models whose rotary embedding depends on the length: their context ends, or changes, between 6 and 12 tokens.
MODELS = [*TINY_CONFIGS, "longrope", "dynamic"]
SWITCH = 8


def make_model(name: str):
    """One of `MODELS`."""
    if name in TINY_CONFIGS:
        return tiny_model(name)
    sizes = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if name == "longrope":
        rope = {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [3.0, 2.0, 4.0, 5.0],
        }
        rope |= {"original_max_position_embeddings": SWITCH, "partial_rotary_factor": 1.0}
        config = Phi3Config(
            **sizes, max_position_embeddings=64, original_max_position_embeddings=SWITCH, rope_parameters=rope
        )
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        config = LlamaConfig(**sizes, max_position_embeddings=SWITCH, rope_parameters=rope)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = {"longrope": Phi3ForCausalLM, "dynamic": LlamaForCausalLM}[name](config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    return model


def make_texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def padded(texts: list[list[int]], how: str, seed: int = 0) -> list[dict]:
    """
    Rows of texts.

    Args:
        texts (`list[list[int]]`): The texts.
        how (`str`): `"ragged"`, without padding and masks; `"right"`, `"left"` or `"both"`; `"holes"`, with padding anywhere;
            or `"mixed"`, a little of each, as lists, arrays and tensors.
    """
    rng = np.random.default_rng(seed)
    width = max(map(len, texts)) + 2
    rows = []
    for number, text in enumerate(texts):
        kind = ("ragged", "right", "left", "both", "holes")[number % 5] if how == "mixed" else how
        if kind == "ragged":
            row = {"input_ids": text} if number % 2 else {"input_ids": text, "attention_mask": None}
        else:
            spare = width - len(text)
            before = {"right": 0, "left": spare, "both": spare // 2}.get(kind)
            places = rng.permutation(width)[: len(text)] if before is None else np.arange(before, before + len(text))
            ids = rng.integers(0, VOCAB_SIZE, width)  # Tokens under the mask must not matter.
            ids[np.sort(places)] = text
            mask = np.zeros(width, dtype=int)
            mask[places] = 1
            row = {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
        if how == "mixed":
            form = (list, np.array, torch.tensor)[number % 3]
            row = {name: value if value is None else form(value) for name, value in row.items()}
        rows.append(row)
    return rows


PADDINGS = ["ragged", "right", "left", "both", "holes", "mixed"]


@torch.no_grad()
def alone(model, text: list[int], *sites: str) -> tuple[torch.Tensor, ...]:
    """What a text gives in a forward pass of its own, on a model fresh from loading: logits, and activations at sites."""
    from contextlib import ExitStack

    from hf_transcoders.lm import locate
    from hf_transcoders.lm.hooks import read_at

    model = make_model(model) if isinstance(model, str) else model
    seen = {}
    with ExitStack() as stack:
        for site in sites:
            read_at(stack, locate(model, site), lambda value, site=site: seen.__setitem__(site, value[0].clone()))
        logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    return (logits, *(seen[site] for site in sites))
