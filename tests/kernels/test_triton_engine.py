"""Whole steps of the Triton engine against the dense closed form in float64 and torch.optim.Adam."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from support.crosscoders import double, relative_error
from support.steps import LAMBDA_P, StepResult, loss_and_gradients, settings
from support.triton_device import ON_GPU, make
from torch import Tensor

from crosscoder.backends.adam_state import dequantize_v
from crosscoder.backends.base import StepSettings, StepStatistics
from crosscoder.backends.triton import TritonBackend
from crosscoder.config import TrainConfig
from crosscoder.errors import DataError
from crosscoder.kernels.update.reference import BETA1, BETA2
from crosscoder.model import Crosscoder
from crosscoder.train.engines import asynchronous as engine_module
from crosscoder.train.engines.asynchronous import AsynchronousEngine
from crosscoder.train.trainer import Trainer

TOLERANCE = 2e-6
SMALL = (9, 3, 5, 6)
# The interpreter warns of what hashes and non-finite batches are meant to do.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


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


def _norms(model: Crosscoder) -> Tensor:
    """The decoder norms that the backend keeps."""
    rows = cast(TritonBackend, model.backend("triton")).rows(model.weights())
    return rows.squares.sum(dim=2).sqrt()


def gradients(engine: AsynchronousEngine, name: str) -> Tensor:
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
            assert relative_error(gradients(engine, name), gradient) < TOLERANCE, name
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
        assert relative_error(gradients(engine, name), gradient) < 5 * TOLERANCE, name


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_exact_mode_is_torch_adam(share: float, clip: float | None) -> None:
    """Three steps of dense closed form, torch's clipping and torch.optim.Adam in float64."""
    model, x = make(SMALL)
    exact = double(model)
    optimizer = torch.optim.Adam(
        [
            {"params": [exact.W_enc, exact.W_dec, exact.b_enc, exact.b_dec]},
            {"params": [exact.log_threshold], "lr": 1e-4},
        ],
        lr=1e-3,
    )
    engine = engine_of(model, share, clip_norm=clip)
    for number in range(3):
        batch = x.roll(number, dims=1) * (1 + number)
        step = settings(number)
        actual = engine.step(batch, step)
        expected = expected_of(exact, batch, step)
        for name, gradient in expected.gradients.items():
            getattr(exact, name).grad = gradient
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(exact.parameters(), clip)
            assert actual.gradient_norm is not None and norm > clip
            assert relative_error(actual.gradient_norm, norm) < TOLERANCE
        optimizer.step()
    engine.settle()
    for name, parameter in exact.named_parameters():
        assert float((getattr(model, name) - parameter).detach().abs().max()) < 3e-6, name


def lazily(model: Crosscoder, batches: list[Tensor]) -> Crosscoder:
    """Row-lazy Adam written out in float64: a row moves only when its feature fires, its moments decay meanwhile."""
    exact = double(model)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in exact.named_parameters()}
    last_F = torch.zeros(model.config.n_features)
    for number, batch in enumerate(batches):
        step, t = settings(number), number + 1
        result = expected_of(exact, batch, step)
        for name, gradient in result.gradients.items():
            parameter, (m, v) = getattr(exact, name), moments[name]
            rows = name in ("W_enc", "W_dec", "b_enc")
            touched = result.fired_F > 0 if rows else torch.ones(len(parameter), dtype=torch.bool)
            elapsed = (t - last_F[touched]) if rows else torch.ones(int(touched.sum()))
            elapsed = elapsed.double().view(-1, *[1] * (parameter.ndim - 1))
            g = gradient[touched]
            m[touched] = BETA1**elapsed * m[touched] + (1 - BETA1) * g
            v[touched] = BETA2**elapsed * v[touched] + (1 - BETA2) * g**2
            lr = step.threshold_lr if name == "log_threshold" else step.lr
            root = (v[touched] / (1 - BETA2**t)).sqrt()
            with torch.no_grad():
                parameter[touched] -= lr * m[touched] / (1 - BETA1**t) / (root + 1e-8)
        last_F[result.fired_F > 0] = t
    return exact


@pytest.mark.skipif(ON_GPU, reason="the written-out optimiser is for the CPU")
@pytest.mark.parametrize("share", [1.0, 0.0], ids=["sparse", "dense"])
def test_lazy_mode_decays_the_moments_of_skipped_rows(share: float) -> None:
    model, _ = make((2, 2, 5, 7))
    with torch.no_grad():
        model.log_threshold += 1.5
    batches = [make((2, 2, 5, 7), seed=seed)[1] for seed in range(4)]
    exact = lazily(model, batches)
    engine = engine_of(model, share, optimizer_mode="lazy")
    for number, batch in enumerate(batches):
        engine.step(batch, settings(number))
    engine.settle()
    assert len(set(engine.state.last_step_F.tolist())) > 2, "every row was updated alike: this tests nothing"
    for name, parameter in exact.named_parameters():
        assert float((getattr(model, name) - parameter).detach().abs().max()) < 3e-6, name


@pytest.mark.parametrize("state", ["fp32", "low-memory"])
def test_decoder_norm_limit(state: str) -> None:
    model, x = make(SMALL)
    if state == "low-memory":
        to_bf16(model)
    before = model.decoder_norms().detach().float()
    limit = float(before.amax(dim=1).median())
    engine = engine_of(model, state=state, decoder_norm_limit=limit)
    engine.step(x, settings(lr=1e-9))
    engine.settle()
    after = model.W_dec.detach().float().norm(dim=2)
    over = before.amax(dim=1) > limit * 1.001
    assert over.any() and (~over).any()
    slack = 0.01 if state == "low-memory" else 1e-5
    factor = (limit / before.amax(dim=1)).clamp_max(1)
    assert relative_error(after, before * factor[:, None]) < slack  # all snapshots of a feature by one factor
    assert relative_error(_norms(model), after) < 1e-5


def to_bf16(model: Crosscoder) -> None:
    model.W_enc.data, model.W_dec.data = model.W_enc.data.bfloat16(), model.W_dec.data.bfloat16()


def test_low_memory_state_follows_the_fp32_state() -> None:
    """bf16 weights and 8-bit moments go where float32 goes: rounding costs under a third of four steps' way."""
    model, x = make((9, 2, 300, 2))
    small = double(model).float()
    to_bf16(small)
    model.W_enc.data, model.W_dec.data = small.W_enc.data.float(), small.W_dec.data.float()
    start = {name: getattr(model, name).detach().clone() for name in ("W_enc", "W_dec")}
    engines = engine_of(model), engine_of(small, state="low-memory")
    for number in range(4):
        for engine in engines:
            engine.step(x, settings(number, lr=2e-2))
    for engine in engines:
        engine.settle()
    for name, before in start.items():
        exact, rounded = getattr(model, name).detach(), getattr(small, name).detach().float()
        assert float((exact - rounded).norm()) < 0.33 * float((exact - before).norm()), name
        v, exact_v = engines[1].state[name], engines[0].state[name]["v"]
        assert relative_error(dequantize_v(v["v"], v["v_scale"]), exact_v) < 0.1
    small_state = engines[1].state["W_enc"].values()
    assert 2 + sum(t.numel() * t.element_size() for t in small_state) / model.W_enc.numel() < 4.1


def test_stochastic_rounding_moves_weights_by_steps_that_rounding_would_lose() -> None:
    """Steps of a small part of bf16's spacing: rounded to nearest no weight would move; the mean moves as it should."""
    model, x = make((9, 2, 300, 2))
    to_bf16(model)
    before = model.W_dec.detach().float()
    engine = engine_of(model, state="low-memory")
    lr = 5e-5
    engine.step(x, settings(lr=lr))
    engine.settle()
    moved = model.W_dec.detach().float() - before
    share = float((moved != 0).float().mean())
    assert 0.001 < share < 0.5
    sign = -engine.state["W_dec"]["m"].float().sign()
    assert abs(float((moved * sign).mean()) / lr - 1) < 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_in_16_bits(dtype: torch.dtype) -> None:
    model, x = make(SMALL)
    x = x.to(dtype)
    expected = expected_of(double(model), x, settings())
    engine = engine_of(model)
    check_statistics(engine.step(x, settings()), expected)
    for name, gradient in expected.gradients.items():
        assert relative_error(gradients(engine, name), gradient) < TOLERANCE, name


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
            assert relative_error(gradients(engine, name), gradient) < 10 * TOLERANCE, name


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
        assert relative_error(gradients(engine, name), gradient) < TOLERANCE, name


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
            assert relative_error(gradients(engine, name), gradient) < 1e-5, name


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
