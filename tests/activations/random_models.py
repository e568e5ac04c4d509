"""Random causal language models of many architectures of `transformers`, tiny, from a seed."""

from __future__ import annotations

import random
from typing import Any

import torch

VOCABULARY = 64
CONTEXT = 24

# What each architecture has beyond the common sizes; a list is a choice.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"scale_attn_by_inverse_layer_idx": [False, True], "n_inner": [None, 24]},
    "gpt_neox": {"use_parallel_residual": [True, False], "rotary_pct": [0.25, 1.0]},
    "gpt_neo": {},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_bigcode": {"multi_query": [True, False]},
    "openai-gpt": {},
    "opt": {"do_layer_norm_before": [True, False], "ffn_dim": 24},
    "bloom": {"apply_residual_connection_post_layernorm": [False, True]},
    "falcon": {"new_decoder_architecture": [False, True], "parallel_attn": [True, False], "multi_query": [True, False]},
    "mpt": {},
    "llama": {"attention_bias": [False, True], "mlp_bias": [False, True]},
    "mistral": {"sliding_window": [None, 4]},
    "mixtral": {"num_local_experts": 3},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8, "num_experts_per_tok": 2},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"pad_token_id": 0},
    "olmo": {"clip_qkv": [None, 4.0]},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granite": {"residual_multiplier": [1.0, 0.22, 2.0], "embedding_multiplier": [1.0, 12.0]},
    "granitemoe": {"residual_multiplier": [1.0, 0.22], "num_local_experts": 3},
    "cohere": {"use_qk_norm": [False, True]},
    "cohere2": {},
    "stablelm": {"use_parallel_residual": [False, True], "qk_layernorm": [False, True]},
    "starcoder2": {},
    "persimmon": {},
    "nemotron": {},
    "glm": {"head_dim": 8, "pad_token_id": 0},
    "glm4": {"head_dim": 8, "pad_token_id": 0},
    "helium": {"head_dim": 8},
    "smollm3": {"pad_token_id": 0},
    "exaone4": {"sliding_window": 8},
    "ernie4_5": {"head_dim": 8},
    "arcee": {},
    "biogpt": {},
    "xglm": {"ffn_dim": 24, "num_layers": None},
    "ctrl": {"dff": 24},
    "mamba": {"state_size": 4},
    "rwkv": {"attention_hidden_size": 16},
    "bert": {"is_decoder": [True, False]},
    "gpt_neox_japanese": {},
    "minimax": {"num_local_experts": 2, "head_dim": 8, "block_size": 8},
    "seed_oss": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 4, "moe_intermediate_size": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 4,
    },
    "recurrent_gemma": {"lru_width": 16, "attention_window_size": 8},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
              "mamba_d_state": 4},
}  # fmt: skip


def random_configuration(name: str, seed: int) -> Any:
    """A small configuration of architecture `name`. Raises what `transformers` raises for one it does not take."""
    from transformers import AutoConfig

    draw = random.Random(f"{name} {seed}")
    heads = draw.choice([2, 4])
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": draw.choice([2, 3, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, 2]),
        "intermediate_size": draw.choice([16, 24]),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "tie_word_embeddings": draw.choice([False, True]),
    }
    own = {key: draw.choice(value) if isinstance(value, list) else value for key, value in ARCHITECTURES[name].items()}
    if own.get("num_layers", 0) is None:
        own["num_layers"] = common["num_hidden_layers"]
    if name in ("gpt2", "gptj", "codegen", "gpt_bigcode", "openai-gpt", "ctrl", "mpt", "bloom"):
        common.pop("num_key_value_heads")
        common.pop("intermediate_size")
    if name == "gpt_neo":
        common["attention_types"] = [[["global", "local"], 2]]
        common["num_hidden_layers"] = 4
        common.pop("num_key_value_heads")
    return AutoConfig.for_model(name, **{**common, **own})


def random_model(name: str, seed: int) -> Any:
    """A causal language model of `random_configuration` with random weights, no branch of it near 0."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(random_configuration(name, seed)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
