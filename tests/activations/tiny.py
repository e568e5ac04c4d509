"""Tiny snapshots and tokenizers in the hub's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

REVISIONS_OF_TEST = ("step0", "step1", "step16")
S, C, D, V = 12, 16, 8, 40


def tiny_model(seed: int, **changes: Any) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    options = {
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": C,
        "use_parallel_residual": True,
        **changes,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(**options)).eval()


def break_with_nan(models: Path, revision: str) -> None:
    broken = tiny_model(1)
    with torch.no_grad():
        broken.gpt_neox.layers[0].mlp.dense_4h_to_h.bias[0] = float("nan")
    broken.save_pretrained(models / revision)


def tokenizer_of(text: str) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.train_from_iterator([text], BpeTrainer(vocab_size=V, special_tokens=["<|endoftext|>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
