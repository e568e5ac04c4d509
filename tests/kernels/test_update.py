"""The update: Adam's modes, clipping, the norm limit and the low-memory state, in C++ and in Triton."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from support import triton_device
from support.crosscoders import double, make, relative_error
from support.steps import SHAPE, batches, settings, trained
from support.triton_device import ON_GPU
from support.triton_engine import SMALL, TOLERANCE, engine_of, expected_of, to_bf16
from torch import Tensor

from crosscoder import Crosscoder, TrainConfig, Trainer
from crosscoder.backends.adam_state import MATRICES, dequantize_m, dequantize_v, quantize_m, quantize_v
from crosscoder.backends.triton import TritonBackend
from crosscoder.kernels.update.reference import BETA1, BETA2

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # interpreter


def test_native_lazy_moments_decay_over_the_steps_that_were_skipped() -> None:
    """A feature silent for n steps and back has the moments of an exact Adam that saw zeros, though not its weights."""
    lazy = trained("native", steps=0, gate="topk", optimizer_mode="lazy")
    exact = trained("native", steps=0, gate="topk", optimizer_mode="exact")
    first, other = batches(SHAPE, 2)
    for trainer in (lazy, exact):
        trainer.step(first)
    fired = lazy.state.last_step_F > 0
    assert fired.any() and not fired.all()
    with torch.no_grad():  # both go on from the same weights, with the fired features silenced
        for name, value in lazy.model.named_parameters():
            dict(exact.model.named_parameters())[name].copy_(value)
        bias = lazy.model.b_enc[fired].clone()
        for trainer in (lazy, exact):
            trainer.model.b_enc[fired] = -1e4
    for trainer in (lazy, exact):
        for _ in range(5):
            trainer.step(other)
    assert bool((lazy.state.last_step_F[fired] == 1).all())
    elapsed = 5
    for name in MATRICES:
        m, v = lazy.state[name]["m"][fired], lazy.state[name]["v"][fired]
        torch.testing.assert_close(m * 0.9**elapsed, exact.state[name]["m"][fired], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(v * 0.999**elapsed, exact.state[name]["v"][fired], rtol=1e-4, atol=1e-12)
    assert bias.shape == lazy.model.b_enc[fired].shape


def test_native_clipping_is_torchs() -> None:
    model, x = make(SHAPE)
    config = TrainConfig(
        n_steps=100, batch_size=64, clip_norm=0.01, optimizer_mode="exact", sparsity_coefficient=0.1, whitening="none"
    )
    twin = Crosscoder(model.config)
    twin.load_state_dict(model.state_dict())
    metrics = Trainer(model, config).step(x)
    twin.loss(x, sparsity_coefficient=0.0, backend="reference").total.backward()  # lambda is still 0 at the first step
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    torch.testing.assert_close(torch.as_tensor(metrics["gradient_norm"]).float(), norm, rtol=1e-5, atol=0)


def test_the_native_norm_limit_holds_and_keeps_a_features_profile() -> None:
    limited = trained("native", decoder_norm_limit=0.3, steps=8)
    norms = limited.model.decoder_norms()
    assert float(norms.amax()) <= 0.3 * (1 + 1e-5)
    assert float((norms.amax(dim=1) > 0.29).float().mean()) > 0.1, "the limit never mattered"


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_triton_in_exact_mode_is_torch_adam(share: float, clip: float | None) -> None:
    """Three steps of dense closed form, torch's clipping and torch.optim.Adam in float64."""
    model, x = triton_device.make(SMALL)
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
def test_triton_in_lazy_mode_decays_the_moments_of_skipped_rows(share: float) -> None:
    model, _ = triton_device.make((2, 2, 5, 7))
    with torch.no_grad():
        model.log_threshold += 1.5
    batches = [triton_device.make((2, 2, 5, 7), seed=seed)[1] for seed in range(4)]
    exact = lazily(model, batches)
    engine = engine_of(model, share, optimizer_mode="lazy")
    for number, batch in enumerate(batches):
        engine.step(batch, settings(number))
    engine.settle()
    assert len(set(engine.state.last_step_F.tolist())) > 2, "every row was updated alike: this tests nothing"
    for name, parameter in exact.named_parameters():
        assert float((getattr(model, name) - parameter).detach().abs().max()) < 3e-6, name


def kept_norms(model: Crosscoder) -> Tensor:
    """The decoder norms that the backend keeps."""
    rows = cast(TritonBackend, model.backend("triton")).rows(model.weights())
    return rows.squares.sum(dim=2).sqrt()


@pytest.mark.parametrize("state", ["fp32", "low-memory"])
def test_the_triton_norm_limit(state: str) -> None:
    model, x = triton_device.make(SMALL)
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
    assert relative_error(kept_norms(model), after) < 1e-5


def test_low_memory_bytes_a_parameter() -> None:
    trainer = trained("native", state="low-memory", shape=(16, 2, 300, 400), steps=1)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    held = sum(t.numel() * t.element_size() for t in trainer.model.parameters())
    held += sum(t.numel() * t.element_size() for _, t in trainer.engine.tensors())
    assert trainer.model.W_enc.dtype == trainer.model.W_dec.dtype == torch.bfloat16
    assert held / parameters < 4.2


@pytest.mark.parametrize("width", [1, 20, 256, 300, 513])
def test_quantisation_keeps_size_and_sign(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 2, width, generator=generator) * torch.logspace(-6, 0, 50)[:, None, None]
    m = dequantize_m(*quantize_m(values))
    v = dequantize_v(*quantize_v(values.square()))
    scale = values.abs().amax(dim=2, keepdim=True)  # blocks are at most as large
    assert float(((m - values).abs() / scale).max()) < 1.1 / 127
    assert float(((v.sqrt() - values.abs()).abs() / scale).max()) < 1.1 / 255
    assert bool((v > 0).all()), "a second moment that is not 0 must not become 0"
    zeros = torch.zeros(3, 2, width)
    assert not dequantize_m(*quantize_m(zeros)).any() and not dequantize_v(*quantize_v(zeros)).any()


@pytest.mark.parametrize("shape", [SHAPE, (40, 2, 300, 70)])
def test_low_memory_stays_close_to_float32_without_a_bias(shape: tuple[int, int, int, int]) -> None:
    full = trained("reference", torch.float64, steps=40, shape=shape)
    for backend in ("native", "reference"):
        low = trained(backend, steps=40, shape=shape, state="low-memory")
        for name in MATRICES:
            moved = getattr(full.model, name) - getattr(Crosscoder(full.model.config, seed=1), name)
            difference = getattr(low.model, name).double() - getattr(full.model, name)
            assert float(difference.abs().mean()) < 0.4 * float(moved.abs().mean()), (backend, name)
            assert abs(float(difference.mean())) < 0.01 * float(moved.abs().mean()), (backend, name)


def test_low_memory_in_triton_follows_the_fp32_state() -> None:
    """bf16 weights and 8-bit moments go where float32 goes: rounding costs under a third of four steps' way."""
    model, x = triton_device.make((9, 2, 300, 2))
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
    model, x = triton_device.make((9, 2, 300, 2))
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
