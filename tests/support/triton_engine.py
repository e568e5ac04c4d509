"""The Triton engine for the tests: one of chosen ways, and what the dense closed form says of its step."""

from __future__ import annotations

from typing import Any

import torch
from support.crosscoders import relative_error
from support.steps import StepResult, loss_and_gradients
from torch import Tensor

from crosscoder.backends.base import StepSettings, StepStatistics
from crosscoder.config import TrainConfig
from crosscoder.kernels.update.reference import BETA1
from crosscoder.model import Crosscoder
from crosscoder.train.engines.asynchronous import AsynchronousEngine

TOLERANCE = 2e-6
SMALL = (9, 3, 5, 6)


def engine_of(model: Crosscoder, share: float = 1.0, **options: Any) -> AsynchronousEngine:
    """An engine that is dense above `share` of the pairs."""
    engine = AsynchronousEngine(
        model, TrainConfig(**{"backend": "triton", "batch_size": 64, "optimizer_mode": "exact", **options})
    )
    engine.dense_above = share
    return engine


def expected_of(model: Crosscoder, x: Tensor, step: StepSettings) -> StepResult:
    return loss_and_gradients(
        model, x.to(model.W_enc.dtype), sparsity_coefficient=step.sparsity_coefficient,
        preactivation_coefficient=step.preactivation_coefficient,
        generator=torch.Generator().manual_seed(step.seed),
    )  # fmt: skip


def gradients_after_a_step(engine: AsynchronousEngine, name: str) -> Tensor:
    """After one step from nothing the first moment is a tenth of the gradient."""
    return engine.state[name]["m"].double() / (1 - BETA1)


def check_statistics(actual: StepStatistics, expected: StepResult) -> None:
    for part in ("total", "reconstruction", "sparsity", "preactivation"):
        assert relative_error(getattr(actual.loss, part), getattr(expected.loss, part)) < TOLERANCE, part
    assert relative_error(actual.residual_BKD, expected.residual_BKD) < TOLERANCE
    assert torch.equal(actual.open_K, expected.open_K)
    assert torch.equal(actual.fired_F, expected.fired_F)
    if expected.smallest_score is None:
        assert actual.smallest_score is None
    else:
        assert actual.smallest_score is not None
        # A difference of larger numbers, near 0.
        torch.testing.assert_close(actual.smallest_score.double(), expected.smallest_score, rtol=1e-5, atol=1e-6)


def to_bf16(model: Crosscoder) -> None:
    """The matrices in bf16, as the low-memory state keeps them."""
    model.W_enc.data, model.W_dec.data = model.W_enc.data.bfloat16(), model.W_dec.data.bfloat16()
