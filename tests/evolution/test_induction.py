"""The induction gap, on models whose gap is known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crosscoder.errors import ConfigError
from crosscoder.evolution.induction import induction_gap

V = 100


class ByHand(nn.Module):
    """Predicts by rule; `config` is what `induction_gap` reads of a transformers model."""

    def __init__(self, rule: Any, context: int | None = 128) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.rule = rule
        self.config = SimpleNamespace(vocab_size=V, max_position_embeddings=context)
        self.seen: list[Tensor] = []

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not self.training and not torch.is_grad_enabled()
        self.seen.append(input_ids)
        return SimpleNamespace(logits=self.rule(input_ids))


def uniform(ids: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, V)


def induction(ids: Tensor) -> Tensor:
    """`ln 9` logits more for each token that has followed the present one before."""
    n, length = ids.shape
    logits = torch.zeros(n, length, V)
    for row in range(n):
        for here in range(length):
            for before in range(here):
                if ids[row, before] == ids[row, here]:
                    logits[row, here, ids[row, before + 1]] = math.log(9)
    return logits


def test_a_uniform_model_has_none() -> None:
    assert induction_gap(ByHand(uniform), V, length=10) == pytest.approx(0, abs=1e-6)


def test_a_model_that_looks_up_what_followed_has_the_gap_of_its_logits() -> None:
    # Among 99 tokens a window of 6 seldom repeats one, so the right token alone has the higher logit.
    model = ByHand(induction)
    expected = math.log(V) - (math.log(V + 8) - math.log(9))
    assert induction_gap(model, V, length=6, n=40) == pytest.approx(expected, abs=0.12)


def test_the_sequences_are_random_tokens_twice_without_end_of_text() -> None:
    model = ByHand(uniform)
    model.train()
    induction_gap(model, 5, length=8, n=100, seed=1)
    assert model.training
    ids = torch.cat(model.seen)
    assert ids.shape == (100, 16) and torch.equal(ids[:, :8], ids[:, 8:])
    assert ids.unique().tolist() == [1, 2, 3, 4]
    again, other = ByHand(uniform), ByHand(uniform)
    induction_gap(again, 5, length=8, n=100, seed=1)
    induction_gap(other, 5, length=8, n=100, seed=2)
    assert torch.equal(torch.cat(again.seen), ids) and not torch.equal(torch.cat(other.seen), ids)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs a context of 130 tokens, the model has 128; .*at most 64"):
        induction_gap(ByHand(uniform), V, length=65)
    induction_gap(ByHand(uniform, context=None), V, length=65, n=1)
    with pytest.raises(ConfigError, match="length >= 2"):
        induction_gap(ByHand(uniform), V, length=1)
    for size in (1, V + 1):
        with pytest.raises(ConfigError, match="vocab_size"):
            induction_gap(ByHand(uniform), size, length=4)
