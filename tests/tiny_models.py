"""Tiny random base models of every supported family, for unit tests that need no download."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)


VOCAB_SIZE = 128
HIDDEN_SIZE = 32
NUM_LAYERS = 3

_SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _config(config_class, **changes):
    return config_class(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 48,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            **_SPECIAL_TOKENS,
            **changes,
        }
    )


def _grouped(config_class, **changes):
    return _config(config_class, num_key_value_heads=2, head_dim=8, **changes)


# Family -> a function that makes its config. The sliding windows are shorter than a test's sequences, so they matter.
TINY_CONFIGS = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=HIDDEN_SIZE, n_layer=NUM_LAYERS, n_head=4, n_positions=64, **_SPECIAL_TOKENS
    ),
    "gpt_neox": lambda: _config(GPTNeoXConfig, use_parallel_residual=True),
    "gpt_neox_sequential": lambda: _config(GPTNeoXConfig, use_parallel_residual=False),
    "llama": lambda: _grouped(LlamaConfig),
    "mistral": lambda: _grouped(MistralConfig, sliding_window=6),
    "qwen2": lambda: _config(Qwen2Config, num_key_value_heads=2),
    "qwen3": lambda: _grouped(Qwen3Config),
    "gemma2": lambda: _grouped(Gemma2Config, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3_text": lambda: _grouped(
        Gemma3TextConfig,
        sliding_window=6,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        ffn_dim=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=HIDDEN_SIZE,
        **_SPECIAL_TOKENS,
    ),
    "phi": lambda: _config(PhiConfig),
    "phi3": lambda: _config(Phi3Config, num_key_value_heads=2),
}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A causal language model of `family` in eval mode, fp32, the same for the same seed.

    Norm weights and all biases are random too: at their initial ones and zeros, code that forgets them would pass.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(TINY_CONFIGS[family]())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                else:
                    # Large enough that the blocks matter beside the embeddings and attention is far from uniform.
                    parameter.normal_(std=0.3)
    return model.eval()


def tiny_tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids `(batch, length)` without the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)
