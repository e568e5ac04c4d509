"""Whole steps of the Triton engine against the dense closed form in float64."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from support.crosscoders import double, relative_error
from support.steps import LAMBDA_P, settings
from support.triton_device import ON_GPU, make
from support.triton_engine import (
    SMALL,
    TOLERANCE,
    check_statistics,
    engine_of,
    expected_of,
    gradients_after_a_step,
    to_bf16,
)

from crosscoder.config import TrainConfig
from crosscoder.errors import DataError
from crosscoder.train.engines import asynchronous as engine_module
from crosscoder.train.engines.asynchronous import AsynchronousEngine
from crosscoder.train.trainer import Trainer

# The interpreter warns of what hashes and non-finite batches are meant to do.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


CASES = [
    ("snapshot", "tanh-quad", "exact", 0.0, SMALL),
    ("snapshot", "tanh", "sampled", LAMBDA_P, (9, 3, 300, 3)),
    ("snapshot", "l1", "narrow", LAMBDA_P, SMALL),
    ("shared", "tanh-quad", "narrow", 0.0, (13, 1, 4, 9)),
    ("shared", "tanh", "exact", LAMBDA_P, SMALL),
    ("shared", "l1", "sampled", 0.0, (9, 33, 3, 2)),
    ("topk", "tanh-quad", "exact", 0.0, SMALL),
    ("batchtopk", "l1", "exact", 0.0, SMALL),
]


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize(("gate", "penalty", "mode", "lambda_p", "shape"), CASES)
def test_a_step_gives_each_gradient(
    gate: str, penalty: str, mode: str, lambda_p: float, shape: tuple[int, int, int, int], share: float
) -> None:
    window = 0.1 if mode == "narrow" else 2.0
    model, x = make(shape, gate=gate, penalty=penalty, threshold_mode=mode, threshold_window=window)
    step = settings(preactivation_coefficient=lambda_p)
    expected = expected_of(double(model), x, step)
    engine = engine_of(model, share)
    actual = engine.step(x, step)
    engine.settle()
    assert (engine.capacity == 0) == (share == 0.0)
    check_statistics(actual, expected)
    for name, gradient in expected.gradients.items():
        if name != "log_threshold" or model.weights().gate.learned:
            # The thresholds' products: split into bf16 numbers, or on a sample rounded to them.
            looser = {"exact": 10, "sampled": 10_000}.get(mode, 1) if name == "log_threshold" and share else 1
            assert relative_error(gradients_after_a_step(engine, name), gradient) < looser * TOLERANCE, name
    if gate not in ("topk", "batchtopk") and mode != "narrow":
        assert expected.gradients.log_threshold.abs().max() > 0


@examples(max_examples=60 if ON_GPU else 4, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 20), st.integers(1, 10), st.sampled_from([-4, 0, 2]))
def test_a_step_of_any_shape_and_density(B: int, K: int, D: int, F: int, threshold: int) -> None:
    model, x = make((B, K, D, F), seed=D)
    with torch.no_grad():
        model.log_threshold += threshold
    step = settings()
    expected = expected_of(double(model), x, step)
    engine = engine_of(model)
    check_statistics(engine.step(x, step), expected)
    for name, gradient in expected.gradients.items():
        assert relative_error(gradients_after_a_step(engine, name), gradient) < 5 * TOLERANCE, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_in_16_bits(dtype: torch.dtype) -> None:
    model, x = make(SMALL)
    x = x.to(dtype)
    expected = expected_of(double(model), x, settings())
    engine = engine_of(model)
    check_statistics(engine.step(x, settings()), expected)
    for name, gradient in expected.gradients.items():
        assert relative_error(gradients_after_a_step(engine, name), gradient) < TOLERANCE, name


@pytest.mark.parametrize("state", ["fp32", "low-memory"])
def test_same_seed_same_bits(state: str) -> None:
    outcomes = []
    for _ in range(2):
        model, x = make(SMALL, threshold_mode="sampled")
        if state == "low-memory":
            to_bf16(model)
        engine = engine_of(model, state=state, optimizer_mode="lazy")
        for number in range(2):
            engine.step(x, settings(number))
        engine.settle()
        outcomes.append([p.detach().clone() for p in model.parameters()] + [t for _, t in engine.state.tensors()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_too_many_pairs_are_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that outgrows the buffers changes nothing at first; then it is done again, with its statistics."""
    monkeypatch.setattr(engine_module, "LEAST_CAPACITY", 4)
    model, x = make((12, 2, 5, 9))
    sparse_batch = torch.zeros_like(x)
    with torch.no_grad():
        model.b_enc.fill_(-0.05)
    engine = engine_of(model)
    engine.step(sparse_batch, settings(0))
    engine.settle()
    assert engine.capacity == 4
    exact = double(model)
    actual = engine.step(x, settings(1))
    expected = expected_of(exact, x, settings(1))
    if engine._sent is not None:  # not known yet
        engine.settle()
    assert engine.capacity > 4
    check_statistics(actual, expected)
    m = 0.1 * expected.gradients.W_dec
    assert relative_error(engine.state["W_dec"]["m"], m) < 10 * TOLERANCE


def test_the_way_does_not_depend_on_the_past() -> None:
    """After a sparse batch a dense one, and the other way round, give the bits of a fresh engine."""
    model, x = make(SMALL)
    with torch.no_grad():
        model.b_enc.fill_(-0.05)
    quiet = torch.zeros_like(x)
    for first, second in ((quiet, x), (x, quiet)):
        used, fresh = double(model).float(), double(model).float()
        engine = engine_of(used, 0.2)
        engine.step(first, settings(0, lr=0.0, threshold_lr=0.0))
        a = engine.step(second, settings(1, lr=0.0, threshold_lr=0.0))
        engine.settle()
        b = engine_of(fresh, 0.2).step(second, settings(1, lr=0.0, threshold_lr=0.0))
        assert torch.equal(a.residual_BKD, b.residual_BKD) and torch.equal(a.loss.total, b.loss.total)


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(share: float, poison: float) -> None:
    model, x = make(SMALL)
    engine = engine_of(model, share)
    engine.step(x, settings(0))
    assert engine.pending_error(wait=True) is None
    before = [t.detach().clone() for t in (*model.parameters(), *(t for _, t in engine.state.tensors()))]
    bad = x.clone()
    bad[1, 2, 0] = poison
    assert not torch.isfinite(engine.step(bad, settings(1)).loss.total)
    engine.step(x, settings(2))  # launched before anybody looked
    assert engine.pending_error(wait=True) == 1
    after = [*model.parameters(), *(t for _, t in engine.state.tensors())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    engine.clear_error()
    engine.step(x, settings(1))
    engine.settle()
    assert engine.pending_error(wait=True) is None
    assert not torch.equal(before[0], next(model.parameters()))


def test_empty_batch_nothing_active_everything_active() -> None:
    for threshold, n_tokens in ((None, 0), (30.0, 4), (-30.0, 4)):
        model, x = make((4, 2, 5, 6), gate="shared", threshold_window=1e-3)
        with torch.no_grad():
            if threshold is not None:
                model.log_threshold.fill_(threshold)
                model.b_enc.fill_(50.0 if threshold < 0 else 0.0)
        expected = expected_of(double(model), x[:n_tokens], settings())
        engine = engine_of(model)
        actual = engine.step(x[:n_tokens], settings())
        engine.settle()
        assert int(actual.fired_F.sum()) == (n_tokens * 6 if threshold == -30.0 else 0)
        check_statistics(actual, expected)
        for name, gradient in expected.gradients.items():
            assert relative_error(gradients_after_a_step(engine, name), gradient) < 10 * TOLERANCE, name


def test_features_of_norm_zero_stay_finite() -> None:
    model, x = make(SMALL)
    with torch.no_grad():
        model.W_dec[0] = 0
        model.W_dec[1, 1] = 0
    step = settings(preactivation_coefficient=LAMBDA_P)
    expected = expected_of(double(model), x, step)
    engine = engine_of(model)
    engine.step(x, step)
    engine.settle()
    for name, gradient in expected.gradients.items():
        assert relative_error(gradients_after_a_step(engine, name), gradient) < TOLERANCE, name


def test_parameters_written_by_somebody_else() -> None:
    model, x = make(SMALL)
    engine = engine_of(model)
    with torch.no_grad():
        model.W_enc *= 1.5
        model.W_dec *= 0.5
    expected = expected_of(double(model), x, settings())
    check_statistics(engine.step(x, settings()), expected)


def test_wrong_shape() -> None:
    model, x = make(SMALL)
    with pytest.raises(DataError, match="3 snapshots, width 5"):
        engine_of(model).step(x[:, :2], settings())


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "decoder_norm_limit": 1.0}])
def test_a_step_does_not_wait_for_the_device(options: dict[str, Any]) -> None:
    """Once the number of pairs is known, nothing in a step synchronises."""
    model, x = make((256, 4, 64, 2048), threshold_mode="sampled")
    engine = engine_of(model, optimizer_mode="lazy", batch_size=256, **options)
    for number in range(2):
        engine.step(x, settings(number))
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics = [engine.step(x, settings(number)) for number in range(2, 5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(torch.isfinite(s.loss.total)) for s in statistics)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("state", ["fp32", "low-memory"])
def test_a_larger_step_on_the_device(state: str) -> None:
    """A size at which every kernel has many programs, against float64."""
    model, x = make((512, 8, 256, 4096))
    if state == "low-memory":
        to_bf16(model)
    exact = double(model)
    step = dataclasses.replace(settings(), sparsity_coefficient=0.1)
    expected = expected_of(exact, x.double(), step)
    engine = engine_of(model, state=state, batch_size=512)
    actual = engine.step(x, step)
    engine.settle()
    check_statistics(actual, expected)
    if state == "fp32":
        for name, gradient in expected.gradients.items():
            assert relative_error(gradients_after_a_step(engine, name), gradient) < 1e-5, name


def test_the_trainer_counts_a_batch_that_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fired is counted once, from the step as it was done in the end, whether or not anybody asked for metrics."""
    monkeypatch.setattr(engine_module, "LEAST_CAPACITY", 4)
    counted = []
    for measured in (True, False):
        model, x = make((12, 2, 5, 9))
        with torch.no_grad():
            model.b_enc.fill_(-0.05)
        trainer = Trainer(
            model, TrainConfig(n_steps=9, backend="triton", batch_size=12, whitening="none", revival="none")
        )
        trainer.engine.dense_above = 1.0
        for batch in (torch.zeros_like(x), x):  # the second has more pairs than the first left room for
            metrics = trainer.step(batch, measured=measured)
            assert bool(metrics) == measured
        assert (cast(AsynchronousEngine, trainer.engine).capacity == 4) != measured, "nothing is done again yet"
        numbers = trainer.state_dict()["numbers"]
        counted.append((numbers, trainer.firing.average_F, trainer.silent_tokens_F))
    assert counted[0][0] == counted[1][0]
    assert torch.equal(counted[0][1], counted[1][1]) and bool((counted[0][1] > 0).any())
    assert torch.equal(counted[0][2], counted[1][2]) and bool((counted[0][2] == 0).any())
