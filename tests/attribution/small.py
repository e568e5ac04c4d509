"""Small language models and crosscoders with random weights, and a task of random tokens for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from support import language_models

from crosscoder import Crosscoder, CrosscoderConfig
from crosscoder.attribution.task import Example, Task

WIDTH, VOCABULARY, CONTEXT = 16, 50, 24


def neox(seed: int, layers: int = 3, width: int = WIDTH) -> Any:
    return language_models.neox(
        seed, vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )  # fmt: skip


def gpt2(seed: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=3, n_head=2, n_positions=CONTEXT, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def llama(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=CONTEXT, initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class InMemory:
    """Snapshots that are not on disk."""

    models: tuple[Any, ...]
    layer: int = 1

    @property
    def revisions(self) -> tuple[str, ...]:
        return tuple(f"step{k}" for k in range(len(self.models)))

    def load(self, k: int, dtype: torch.dtype | None = None) -> Any:
        return self.models[k].to(dtype or torch.float32)


def task(n: int = 12, seed: int = 0, lengths: tuple[int, int] = (3, 20)) -> Task:
    """Random prompts of different length; the corrupted one differs in a token or two."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(n):
        clean = rng.integers(1, VOCABULARY, rng.integers(*lengths))
        other = clean.copy()
        other[rng.integers(0, len(clean), 2)] = rng.integers(1, VOCABULARY, 2)
        right, wrong = rng.choice(np.arange(1, VOCABULARY), 2, replace=False).tolist()
        examples.append(Example((0, *clean.tolist()), (0, *other.tolist()), right, wrong))
    return Task.of("random", examples, seed=seed)


def crosscoder(K: int, F: int = 64, D: int = WIDTH, seed: int = 0) -> Crosscoder:
    """About a quarter of the features fire on activations of unit size, and not all of them at all snapshots."""
    model = Crosscoder(CrosscoderConfig(n_snapshots=K, d_model=D, n_features=F), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        strength_FK = torch.rand(F, K, generator=generator)
        model.W_dec.mul_(strength_FK[:, :, None])
        model.W_enc.add_(0.1 * torch.randn(model.W_enc.shape, generator=generator))
        model.b_dec.add_(0.1 * torch.randn(model.b_dec.shape, generator=generator))
        model.log_threshold.fill_(-1.5)
    return model.eval()
