"""Induction: how much better a language model predicts random tokens when it sees them a second time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from crosscoder.errors import ConfigError

_BATCH = 32
N_SEQUENCES = 64
"""Random sequences that the gap is measured on."""


def induction_gap(model: Any, vocab_size: int, length: int = 64, n: int = N_SEQUENCES, seed: int = 0) -> float:
    """Mean loss on first halves minus mean loss on second halves of random sequences said twice, in nats.

    Each of the `n` sequences is `length` independent, uniformly drawn tokens, then the same again, so the
    second half can be predicted by induction alone (as in Olsson et al. 2022, arXiv:2209.11895). The first
    token of either half is left out: nothing predicts it. A model without induction gives 0 but for noise of
    order `1 / sqrt(n * length)`; token 0 (end of text) is never drawn.

    A model may also copy from a fixed distance. Such a gap stands at one `length` and is gone at others, so
    measure at a length that does not occur as a distance in training, or at several.

    `model` is a causal language model of `transformers`, on any device; left in the mode (train or eval) it
    was in. `vocab_size` is the number of token ids in use, which may be less than the model's padded
    vocabulary. The same seed draws the same tokens everywhere.

    Raises `ConfigError` where `2 * length` exceeds the model's context or a size is too small or too large.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and 2 * length > limit:
        raise ConfigError(
            f"the induction gap at length {length} needs a context of {2 * length} tokens, the model has "
            f"{limit}; use a length of at most {limit // 2}"
        )
    if length < 2 or n < 1:
        raise ConfigError(f"the induction gap needs length >= 2 and n >= 1; they are {length} and {n}")
    if not 2 <= vocab_size <= model.config.vocab_size:
        raise ConfigError(
            f"vocab_size is {vocab_size}; it must be from 2 to {model.config.vocab_size}, the model's own"
        )
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(1, vocab_size, (n, length), generator=generator)
    ids = torch.cat([half, half], dim=1).to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    first = second = 0.0
    try:
        with torch.no_grad():
            for batch in torch.split(ids, _BATCH):
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
                loss = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
                first += float(loss[:, : length - 1].double().sum())
                second += float(loss[:, length:].double().sum())
    finally:
        model.train(was_training)
    return (first - second) / (n * (length - 1))
