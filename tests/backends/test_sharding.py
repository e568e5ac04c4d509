"""The seam between processes: two halves of the features, summed by hand, give the whole's loss and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.crosscoders import make, relative_error
from torch import Tensor

from crosscoder import Crosscoder, CrosscoderConfig
from crosscoder.backends.closed_form import DensePass
from crosscoder.backends.native import NativeBackend
from crosscoder.parameters import PARAMETERS
from crosscoder.penalty import LossSettings, LossTerms
from crosscoder.sharding import ONE_PROCESS, Sharding

SHAPE = (23, 3, 5, 40)
F = SHAPE[3]
CASES: list[dict[str, Any]] = [
    {},
    {"gate": "shared", "penalty": "l1"},
    {"threshold_mode": "narrow", "threshold_window": 0.1},
    {"threshold_mode": "sampled"},
]
Found = tuple[LossTerms, Tensor, dict[str, Tensor]]


class Part:
    """One process of two. The first time it notes what it has to add; the second time it is given the sum."""

    alone = False

    def __init__(self, first: bool) -> None:
        self.first = first
        self.own: Tensor | None = None
        self.total: Tensor | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        if self.total is not None:
            return self.total
        self.own = tensor.clone()
        return tensor


class OneOfOne(Part):
    """All features, but by the way of several processes."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


def settings() -> LossSettings:
    """Both penalties; every call draws the same tokens."""
    return LossSettings(0.3, 0.05, torch.Generator().manual_seed(3))


def closed_form(model: Crosscoder, x: Tensor, sharding: Sharding) -> Found:
    weights = model.weights()
    dense = DensePass(weights, weights.input(x), settings(), 7, sharding)
    tiles = [dict(gradients.items()) for _, gradients in dense.gradients()]
    gradients = {name: torch.cat([tile[name] for tile in tiles]) for name in PARAMETERS if name != "b_dec"}
    return dense.loss, dense.residual_BKD, {**gradients, "b_dec": tiles[0]["b_dec"]}


def native(model: Crosscoder, x: Tensor, sharding: Sharding) -> Found:
    weights, backend = model.weights(), NativeBackend()
    batch = backend.sparse_pass(weights, weights.input(x), settings(), sharding=sharding)
    matrices = backend.gradients(weights, batch)
    found = (*matrices, batch.db_enc_F, batch.db_dec_KD, batch.dlog_threshold_F)
    return batch.statistics.loss, batch.statistics.residual_BKD, dict(zip(PARAMETERS, found, strict=True))


def some_features(model: Crosscoder, features: slice) -> Crosscoder:
    """A crosscoder of these features alone."""
    n = len(range(*features.indices(model.config.n_features)))
    part = Crosscoder(CrosscoderConfig(**{**vars(model.config), "n_features": n})).to(model.W_enc.dtype)
    with torch.no_grad():
        for name in PARAMETERS:
            value = getattr(model, name)
            getattr(part, name).copy_(value if name == "b_dec" else value[features])
    return part


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize(
    ("compute", "dtype", "tolerance"), [(closed_form, torch.float64, 1e-12), (native, torch.float32, 1e-5)]
)
def test_two_halves_are_the_whole(
    compute: Callable[[Crosscoder, Tensor, Sharding], Found],
    dtype: torch.dtype,
    tolerance: float,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CROSSCODER_GEMM_DTYPE", "float32")
    model, x = make(SHAPE, dtype=dtype, shift=0.3, **options)
    loss, residual, gradients = compute(model, x, ONE_PROCESS)
    halves = [some_features(model, slice(0, 15)), some_features(model, slice(15, F))]
    parts = [Part(first=True), Part(first=False)]
    for half, part in zip(halves, parts, strict=True):
        compute(half, x, part)
    assert parts[0].own is not None and parts[1].own is not None
    total = parts[0].own + parts[1].own
    assert relative_error(parts[0].own, total) > 0.1, "the other half adds nothing: this compares nothing"
    for part in parts:
        part.total = total
    found = [compute(half, x, part) for half, part in zip(halves, parts, strict=True)]
    assert float(loss.sparsity) > 0 and float(loss.preactivation) > 0
    for own_loss, own_residual, own_gradients in found:
        assert relative_error(own_residual, residual) < tolerance
        assert relative_error(own_loss.reconstruction, loss.reconstruction) < tolerance
        assert relative_error(own_gradients["b_dec"], gradients["b_dec"]) < tolerance
    for term in ("sparsity", "preactivation"):
        assert relative_error(sum(getattr(own[0], term) for own in found), getattr(loss, term)) < tolerance, term
    for name in PARAMETERS:
        if name != "b_dec":
            joined = torch.cat([own[2][name] for own in found])
            assert relative_error(joined, gradients[name]) < tolerance, name


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_native_halves_of_a_step_are_the_fused_one(options: dict[str, Any]) -> None:
    """`pair_gradients` reading a residual, against the one that makes it."""
    model, x = make(SHAPE, shift=0.3, **options)
    fused, apart = native(model, x, ONE_PROCESS), native(model, x, OneOfOne(first=True))
    assert relative_error(apart[1], fused[1]) < 1e-6
    for term in ("total", "reconstruction", "sparsity", "preactivation"):
        assert relative_error(getattr(apart[0], term), getattr(fused[0], term)) < 1e-6, term
    for name in PARAMETERS:
        assert relative_error(apart[2][name], fused[2][name]) < 1e-6, name
