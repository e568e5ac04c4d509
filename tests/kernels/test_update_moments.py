"""The 8-bit moments of the low-memory state: their rounding is right on average, whatever the size of a moment."""

from __future__ import annotations

import math

import pytest
import torch
from support import triton_device
from support.steps import settings
from torch import Tensor

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.backends.base import Update
from crosscoder.backends.closed_form import Gradients

WIDTH = 300
"""One whole block of 256 and a part of another."""
LEVELS = {"m": 127, "v": 255}
SEEDS = 4


def start(seed: int = 0) -> dict[str, Tensor]:
    """Codes and scales of the moments before the step, and the gradient: one row (1, WIDTH), or its two blocks."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-5, 0, WIDTH)[torch.randperm(WIDTH, generator=generator)]
    return {
        "m": torch.randint(-127, 128, (1, WIDTH), generator=generator, dtype=torch.int8),
        "m_scale": torch.tensor([[1e-4, 1e-3]]),
        "v": torch.randint(0, 30, (1, WIDTH), generator=generator, dtype=torch.uint8),
        "v_scale": torch.tensor([[1e-2, 1e-3]]),
        "gradient": (sizes * torch.randn(WIDTH, generator=generator).sign())[None],
    }


def exact(before: dict[str, Tensor]) -> dict[str, Tensor]:
    """m and sqrt(v) after the step, in float64 and by the formulas, not by the code under test."""
    block = torch.arange(WIDTH) // 256
    q_m, q_v = before["m"].double(), before["v"].double()
    m = before["m_scale"].double()[:, block] * q_m * q_m.abs() / 127**2
    root = before["v_scale"].double()[:, block] * q_v**2 / 255**2
    g = before["gradient"].double()
    return {"m": 0.9 * m + 0.1 * g, "v": (0.999 * root**2 + 0.001 * g**2).sqrt()}


def codes_after_a_step(backend: str, before: dict[str, Tensor], rows: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes (n, WIDTH) and scales (n, 2) of n = SEEDS `rows` features that start alike and have the same gradient."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"m": [], "v": []}
    for seed in range(SEEDS):
        model = Crosscoder(CrosscoderConfig(1, WIDTH, rows)).to(triton_device.DEVICE if backend == "triton" else "cpu")
        engine = Trainer(model, TrainConfig(backend=backend, state="low-memory")).engine
        moments = engine.state["W_enc"]
        for key in ("m", "m_scale", "v", "v_scale"):
            moments[key][:] = before[key]
        on = model.W_enc.device
        gradient = before["gradient"].expand(rows, 1, WIDTH).contiguous().to(on)
        zero_F = torch.zeros(rows, device=on)
        gradients = Gradients(gradient, gradient, zero_F, model.b_dec.detach(), zero_F)
        engine._training.input(model.weights(), torch.zeros(1, 1, WIDTH))  # a step's first call
        update = Update(
            settings(seed=1000 + seed), lazy=True, norm_limit=None, allowed=torch.ones(1, dtype=torch.int32, device=on)
        )
        fired_F = torch.ones(rows, dtype=torch.int64, device=on)
        with torch.no_grad():
            engine._training.update_tile(model.weights(), slice(0, rows), gradients, fired_F, update)
        for key in ("m", "v"):
            found[key].append((moments[key].flatten(1).cpu().clone(), moments[f"{key}_scale"].flatten(1).cpu().clone()))
    return {key: tuple(torch.cat(parts) for parts in zip(*pairs, strict=True)) for key, pairs in found.items()}  # type: ignore[misc]


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_the_mean_of_rounded_moments_is_the_exact_one(backend: str) -> None:
    """Of m and of sqrt(v), within 4 standard deviations: of each element, and of all those of about one size."""
    before = start()
    expected = exact(before)
    rows = 100 if backend == "triton" and not triton_device.ON_GPU else 3000  # the interpreter is slow
    N = SEEDS * rows
    found = codes_after_a_step(backend, before, rows)
    block = torch.arange(WIDTH) // 256
    for key, levels in LEVELS.items():
        codes, scales = found[key]
        top = torch.stack([expected[key][0, block == b].abs().max() for b in (0, 1)])
        torch.testing.assert_close(scales.double(), top.expand(N, 2), rtol=1e-6, atol=0)
        # In units of scale / levels^2 codes stand for whole squares.
        wanted = expected[key][0] / top[block] * levels**2
        values = codes.double() * codes.double().abs()
        below = wanted.abs().sqrt().floor().clamp_max(levels - 1)
        variance = ((below + 1).square() - wanted.abs()).clamp_min(0) * (wanted.abs() - below.square()).clamp_min(0)
        rounding = 3e-6 * wanted.abs() + 2**-15 * (2 * below + 1)  # float32, and noise of 16 bits
        raised = (wanted < 1) if key == "v" else torch.zeros(WIDTH, dtype=torch.bool)
        assert bool((values[:, raised] == 1).all()), "a second moment that is not 0 stays so"
        error = values.mean(dim=0) - wanted
        allowed = 4 * (variance / N).sqrt() + rounding
        assert bool((error.abs() <= allowed)[~raised].all()), (key, (error / allowed)[~raised].abs().max())
        away = error * wanted.sign()  # rounding that is wrong makes all of one size larger, or smaller
        for low, high in ((0, 2), (2, 8), (8, 32), (32, levels + 1)):
            group = (below >= low) & (below < high) & ~raised
            spread = 4 * math.sqrt(float(variance[group].sum()) / N) + float(rounding[group].sum())
            assert int(group.sum()) >= 5 and abs(float(away[group].sum())) <= spread, (key, low, high)
