"""Small language models of random weights in the form of the hub."""

from __future__ import annotations

from pathlib import Path
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


def text_and_snapshots(folder: Path, size: tuple[int, int], **changes: Any) -> Any:
    """`text.txt` of so many paragraphs and words in each, a tokenizer of 300 tokens and, in `models/`, three snapshots
    of `neox`. Returns the tokenizer."""
    from crosscoder.activations.text import Document
    from crosscoder.quickstart.tokenizer import train_tokenizer

    words = [f"{a}{b}{c}" for a in "bcdfgh" for b in "aeiou" for c in "klmnp"]
    picked = torch.randint(len(words), size, generator=torch.Generator().manual_seed(0)).tolist()
    text = "\n\n".join(" ".join(words[i] for i in row) for row in picked)
    (folder / "text.txt").write_text(text)
    tokenizer = train_tokenizer([Document("text", text)], folder / "tokenizer", 300)
    for step in (0, 1, 8):
        neox(step, **changes).save_pretrained(folder / "models" / f"step{step}")
        tokenizer.save_pretrained(folder / "models" / f"step{step}")
    return tokenizer
