"""What functions of decoders take: the crosscoder or its W_dec, with the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from crosscoder import Crosscoder, CrosscoderConfig
from crosscoder.common.arrays import flatten
from crosscoder.errors import DataError
from crosscoder.evolution import (
    compare_dictionaries,
    decoder_cosines,
    decoder_norms,
    feature_dimensionality,
    kind_dimensionality,
    life_cycles,
    match_features,
    nearest_neighbours,
    threshold_sweep,
)

K, D, F = 3, 8, 20
STEPS = [0, 1, 10]
EVERYWHERE = np.ones((F, K), dtype=bool)
EMERGENCE = np.zeros(F, dtype=np.int64)
ODD = {"odd": np.arange(F) % 2 == 1}
OF_DECODERS: dict[str, Callable[[Any, Any], object]] = {
    "norms": lambda one, other: decoder_norms(one),
    "cosines": lambda one, other: decoder_cosines(one, EVERYWHERE, n_groups=4),
    "dimensionality": lambda one, other: feature_dimensionality(one),
    "kind_dimensionality": lambda one, other: kind_dimensionality(one, ODD),
    "neighbours": lambda one, other: nearest_neighbours(one, n_neighbours=2),
    "matching": match_features,
    "stability": lambda one, other: compare_dictionaries(one, other, EMERGENCE, EMERGENCE),
}
OF_NORMS: dict[str, Callable[[Any], object]] = {
    "life": lambda norms: life_cycles(norms, STEPS),
    "sweep": lambda norms: threshold_sweep(norms, STEPS),
}


def crosscoder(seed: int) -> Crosscoder:
    model = Crosscoder(CrosscoderConfig(K, D, F))
    with torch.no_grad():
        model.W_dec.copy_(torch.randn(F, K, D, generator=torch.Generator().manual_seed(seed)))
    return model


def same(first: object, second: object) -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)  # type: ignore[arg-type]
        return
    found, expected = flatten(first), flatten(second)
    assert found and found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


@pytest.mark.parametrize("name", OF_DECODERS)
def test_a_crosscoder_or_its_decoders(name: str) -> None:
    one, other = crosscoder(0), crosscoder(1)
    analysis = OF_DECODERS[name]
    same(analysis(one, other), analysis(one.W_dec.detach(), other.W_dec.detach()))


@pytest.mark.parametrize("name", OF_NORMS)
def test_a_crosscoder_or_its_norms(name: str) -> None:
    model = crosscoder(0)
    same(OF_NORMS[name](model), OF_NORMS[name](model.decoder_norms().detach().numpy()))


@pytest.mark.parametrize("steps", [[0, 1.5, 10], [0, float("nan"), 10], [False, True, True], None, ["0", "1", "2"]])
def test_steps_are_whole_numbers(steps: Any) -> None:
    norms = crosscoder(0).decoder_norms().detach()
    with pytest.raises(DataError, match="training steps must be whole numbers"):
        life_cycles(norms, steps)
    assert life_cycles(norms, np.array([0.0, 1.0, 10.0])).steps.tolist() == STEPS
