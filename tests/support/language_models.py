"""Small language models of random weights in the form of the hub."""

from __future__ import annotations

from typing import Any

import torch


def neox_config(**changes: Any) -> Any:
    """A tiny GPT-NeoX, Pythia's architecture; `changes` are options of `GPTNeoXConfig`."""
    from transformers import GPTNeoXConfig

    width = changes.get("hidden_size", 16)
    options = {
        "vocab_size": 40, "hidden_size": width, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 2 * width, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return GPTNeoXConfig(**{**options, **changes})


def neox(seed: int, **changes: Any) -> Any:
    """The same with random weights, ready to be asked."""
    from transformers import GPTNeoXForCausalLM

    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(neox_config(**changes)).eval()
