"""Starts of training: calibrated thresholds give the density that was asked for, at every gate and in every state."""

from __future__ import annotations

import pytest
import torch

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.errors import ConfigError, DataError
from crosscoder.train.initialization import calibrate, initialize, search_decoder_norm

K, D, F = 4, 24, 300


def activations(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 1, D, generator=generator)
    return common + 0.5 * torch.randn(n, K, D, generator=generator)


@pytest.mark.parametrize("gate", ["snapshot", "shared"])
@pytest.mark.parametrize("l0", [3.0, 20.0])
def test_about_so_many_features_are_active(gate: str, l0: float) -> None:
    model = Crosscoder(CrosscoderConfig(K, D, F, gate=gate))
    calibrate(model, activations(512), l0)
    assert torch.equal(model.W_enc, model.W_dec)
    fresh = activations(2000, seed=1)
    code = model.encode(fresh)
    assert code.n_pairs / 2000 == pytest.approx(l0, rel=0.25)
    rates = torch.bincount(code.features, minlength=F) / 2000
    assert float((rates > 0).float().mean()) > 0.95, "every feature must have its share"


def test_the_norm_is_the_best_for_these_gates() -> None:
    x = activations(512)
    model = Crosscoder(CrosscoderConfig(K, D, F))
    norm = calibrate(model, x, 20.0)

    def loss(factor: float) -> float:
        other = Crosscoder(model.config).double()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            other.W_dec *= factor
            other.W_enc *= factor
            other.log_threshold += 2 * torch.tensor(factor).log()  # the same gates
        return float((other(x.double()) - x.double()).square().mean().detach())

    assert norm > 0
    assert loss(1.0) < min(loss(0.9), loss(1.1))


def test_half_of_all_features_fire_at_the_papers_start_and_few_at_a_calibrated_one() -> None:
    x = activations(512)
    found = {}
    for start in ("search", "calibrated"):
        model = Crosscoder(CrosscoderConfig(K, D, F))
        initialize(model, x, TrainConfig(start=start, start_l0=10.0))
        found[start] = model.encode(x).n_pairs / 512
    assert found["search"] > 0.2 * F
    assert found["calibrated"] == pytest.approx(10.0, rel=0.1)


def test_gates_by_rank_and_low_memory_weights_start_too() -> None:
    x = activations(512)
    ranked = Crosscoder(CrosscoderConfig(K, D, F, gate="topk", top_k=8))
    initialize(ranked, x, TrainConfig(start="calibrated"))
    assert float((ranked(x) - x).square().mean()) < float(x.square().mean())
    config = TrainConfig(state="low-memory", start="calibrated", start_l0=10.0)
    trainer = Trainer(Crosscoder(CrosscoderConfig(K, D, F)), config)
    initialize(trainer.model, x, config)
    assert trainer.model.W_enc.dtype == torch.bfloat16
    assert trainer.model.encode(x).n_pairs / 512 == pytest.approx(10.0, rel=0.2)
    assert float(torch.as_tensor(trainer.step(x)["l0_union"])) == pytest.approx(10.0, rel=0.2)


def test_samples_that_cannot_serve_are_refused() -> None:
    model = Crosscoder(CrosscoderConfig(K, D, F))
    with pytest.raises(DataError, match="this one is empty"):
        calibrate(model, activations(0), 10.0)
    with pytest.raises(DataError, match="look constant"):
        calibrate(model, torch.zeros(100, K, D), 10.0)
    with pytest.raises(ConfigError, match="start must be one of"):
        TrainConfig(start="best")  # type: ignore[arg-type]
    assert search_decoder_norm(model, activations(64)) > 0
