"""Tiny snapshots and tokenizers in the hub's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.language_models import neox

REVISIONS_OF_TEST = ("step0", "step1", "step16")
S, C, D, V = 12, 16, 8, 40


def tiny_model(seed: int, **changes: Any) -> Any:
    return neox(seed, **{"vocab_size": V, "hidden_size": D, "max_position_embeddings": C, "eos_token_id": 2, **changes})


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
