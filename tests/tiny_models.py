"""Tiny random base models of every supported family, for unit tests that need no download."""

import functools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


VOCAB_SIZE = 128
HIDDEN_SIZE = 32
NUM_LAYERS = 3

_SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GPT2_SIZES = {"n_embd": HIDDEN_SIZE, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 64}
_GROUPED = {"num_key_value_heads": 2}
_GROUPED_WITH_HEAD_DIM = {**_GROUPED, "head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
# Far from 1, so that one that is forgotten shows.
_GRANITE = {
    "residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_multiplier": 0.3,
}  # fmt: skip


def _make(model_type, sizes=_SIZES, **changes):
    return functools.partial(
        AutoConfig.for_model, model_type, **{"vocab_size": VOCAB_SIZE, **_SPECIAL_TOKENS, **sizes, **changes}
    )


# Family -> a function that makes its config. The sliding windows are shorter than a test's sequences, so they matter.
# Every test that takes all families runs on these: one or two of each build.
TINY_CONFIGS = {
    "gpt2": _make("gpt2", _GPT2_SIZES),
    "gpt_neox": _make("gpt_neox", use_parallel_residual=True),
    "gpt_neox_sequential": _make("gpt_neox", use_parallel_residual=False),
    "llama": _make("llama", **_GROUPED_WITH_HEAD_DIM),
    "mistral": _make("mistral", **_GROUPED_WITH_HEAD_DIM, sliding_window=6),
    "qwen2": _make("qwen2", **_GROUPED),
    "qwen3": _make("qwen3", **_GROUPED_WITH_HEAD_DIM),
    "gemma2": _make("gemma2", **_GROUPED_WITH_HEAD_DIM, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3_text": _make(
        "gemma3_text",
        **_GROUPED_WITH_HEAD_DIM,
        sliding_window=6,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "opt": _make("opt", ffn_dim=48, word_embed_proj_dim=HIDDEN_SIZE),
    "phi": _make("phi"),
    "phi3": _make("phi3", **_GROUPED),
}

# Families that run the tests of `tests/test_families.py`, whose attention is read and changed like that of those above.
OTHER_CONFIGS = {
    "apertus": _make("apertus", **_GROUPED),
    "arcee": _make("arcee", **_GROUPED_WITH_HEAD_DIM),
    "biogpt": _make("biogpt"),
    "cohere": _make("cohere", **_GROUPED, logit_scale=0.25),
    "cohere2": _make("cohere2", **_GROUPED, logit_scale=0.25, sliding_window=6),
    "cwm": _make("cwm", **_GROUPED_WITH_HEAD_DIM),
    "dbrx": _make(
        "dbrx",
        {"d_model": HIDDEN_SIZE, "n_layers": NUM_LAYERS, "n_heads": 4, "max_seq_len": 64},
        attn_config={"kv_n_heads": 2, "clip_qkv": 100.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "ernie4_5": _make("ernie4_5", **_GROUPED_WITH_HEAD_DIM),
    "ernie4_5_moe": _make(
        "ernie4_5_moe", **_GROUPED, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=1
    ),
    "exaone4": _make(
        "exaone4",
        **_GROUPED,
        sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gemma": _make("gemma", **_GROUPED_WITH_HEAD_DIM),
    "gemma3": functools.partial(
        AutoConfig.for_model,
        "gemma3",
        text_config=TINY_CONFIGS["gemma3_text"]().to_dict(),
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 8,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
    ),
    "glm": _make("glm", **_GROUPED_WITH_HEAD_DIM),
    "glm4": _make("glm4", **_GROUPED_WITH_HEAD_DIM),
    "glm4_moe": _make("glm4_moe", **_GROUPED_WITH_HEAD_DIM, **_ROUTED_EXPERTS),
    "gpt_bigcode": _make("gpt_bigcode", _GPT2_SIZES, n_inner=48),
    "gpt_bigcode_multi_head": _make("gpt_bigcode", _GPT2_SIZES, n_inner=48, multi_query=False),
    "gpt_oss": _make(
        "gpt_oss",
        **_GROUPED_WITH_HEAD_DIM,
        **_LOCAL_EXPERTS,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "granite": _make("granite", **_GROUPED, **_GRANITE),
    "granitemoe": _make("granitemoe", **_GROUPED, **_GRANITE, **_LOCAL_EXPERTS),
    "helium": _make("helium", **_GROUPED_WITH_HEAD_DIM),
    "hunyuan_v1_dense": _make("hunyuan_v1_dense", **_GROUPED_WITH_HEAD_DIM),
    "ministral": _make("ministral", **_GROUPED_WITH_HEAD_DIM, sliding_window=6),
    "ministral3": _make("ministral3", **_GROUPED_WITH_HEAD_DIM),
    "mixtral": _make("mixtral", **_GROUPED, **_LOCAL_EXPERTS),
    "nemotron": _make("nemotron", **_GROUPED),
    "olmo": _make("olmo", **_GROUPED),
    "olmo2": _make("olmo2", **_GROUPED),
    "olmo3": _make("olmo3", **_GROUPED, sliding_window=6),
    "olmoe": _make("olmoe", **_GROUPED, num_experts=4, num_experts_per_tok=2),
    "persimmon": _make("persimmon"),
    "phimoe": _make("phimoe", **_GROUPED, **_LOCAL_EXPERTS),
    "qwen2_moe": _make("qwen2_moe", **_GROUPED, **_EXPERTS, shared_expert_intermediate_size=16, mlp_only_layers=[1]),
    "qwen3_moe": _make("qwen3_moe", **_GROUPED_WITH_HEAD_DIM, **_EXPERTS),
    "seed_oss": _make("seed_oss", **_GROUPED_WITH_HEAD_DIM),
    "smollm3": _make("smollm3", **_GROUPED, no_rope_layer_interval=2),
    "stablelm": _make("stablelm", **_GROUPED),
    "stablelm_parallel": _make("stablelm", **_GROUPED, use_parallel_residual=True, qk_layernorm=True),
    "starcoder2": _make("starcoder2", **_GROUPED, sliding_window=6),
    "vaultgemma": _make("vaultgemma", **_GROUPED_WITH_HEAD_DIM, sliding_window=6, query_pre_attn_scalar=8),
}

# Families whose values are no projection of what attention reads: their heads are patched, but no graph is made.
LATENT_CONFIGS = {
    "deepseek_v2": _make("deepseek_v2", **_LATENT, **_ROUTED_EXPERTS, q_lora_rank=None),
    "deepseek_v3": _make("deepseek_v3", **_LATENT, **_ROUTED_EXPERTS, q_lora_rank=16),
}

# Families whose attention does not go through transformers' AttentionInterface: their heads are out of reach.
CLOSED_CONFIGS = {
    "bloom": _make("bloom", {"hidden_size": HIDDEN_SIZE, "n_layer": NUM_LAYERS, "n_head": 4}),
    "codegen": _make("codegen", _GPT2_SIZES, n_ctx=64, rotary_dim=4),
    "falcon": _make("falcon", ffn_hidden_size=48),
    "falcon_grouped": _make("falcon", ffn_hidden_size=48, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_sequential": _make("falcon", ffn_hidden_size=48, parallel_attn=False, multi_query=False, alibi=True),
    "gpt_neo": _make(
        "gpt_neo",
        {
            "hidden_size": HIDDEN_SIZE, "num_layers": NUM_LAYERS, "num_heads": 4, "max_position_embeddings": 64,
            "intermediate_size": 48,
        },
        window_size=6,
        attention_types=[[["global", "local", "global"], 1]],
    ),
    "gptj": _make("gptj", _GPT2_SIZES, rotary_dim=4),
    "mpt": _make("mpt", {"d_model": HIDDEN_SIZE, "n_layers": NUM_LAYERS, "n_heads": 4, "max_seq_len": 64}, expansion_ratio=2),
    "xglm": _make(
        "xglm",
        {"d_model": HIDDEN_SIZE, "ffn_dim": 48, "num_layers": NUM_LAYERS, "attention_heads": 4},
        max_position_embeddings=64,
    ),
}  # fmt: skip

ALL_CONFIGS = {**TINY_CONFIGS, **OTHER_CONFIGS, **LATENT_CONFIGS, **CLOSED_CONFIGS}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A causal language model of `family` in eval mode, fp32, the same for the same seed.

    Norm weights and all biases are random too: at their initial ones and zeros, code that forgets them would pass.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ALL_CONFIGS[family]
        if config.args[0] not in CONFIG_MAPPING_NAMES:
            pytest.skip(f"this version of transformers has no {config.args[0]}")
        model = AutoModelForCausalLM.from_config(config())
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
