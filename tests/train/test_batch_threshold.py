"""BatchTopK at inference: one threshold, right for the weights at which training stops or a checkpoint is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import run
from support.triton_device import DEVICE
from torch import Tensor

from crosscoder import ActivationStore, Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.errors import ConfigError
from crosscoder.files import read_json
from crosscoder.train.recent_tokens import TOKENS, RecentTokens

K, D, F, TOP_K = 2, 24, 192, 6


def tokens(n: int, seed: int) -> Tensor:
    """(n, K, D): sums of some of 64 planted directions, the same for every seed; of mean norm sqrt(D) or so."""
    generator = torch.Generator().manual_seed(77)
    directions = torch.nn.functional.normalize(torch.randn(64, K, D, generator=generator), dim=2)
    generator.manual_seed(seed)
    code = 3 * torch.rand(n, 64, generator=generator) * (torch.rand(n, 64, generator=generator) < 0.08)
    x = torch.einsum("nf,fkd->nkd", code, directions) + 0.02 * torch.randn(n, K, D, generator=generator)
    return x * (D / (3 * 64 * 0.08)) ** 0.5


def make(
    n_steps: int, batch_size: int = 128, backend: str = "auto", gate: str = "batchtopk", n_features: int = F
) -> Trainer:
    model = Crosscoder(CrosscoderConfig(K, D, n_features, gate=gate, top_k=TOP_K), seed=1).to(DEVICE)
    options: dict[str, Any] = {"lr": 2e-3, "revival_every": 50, "backend": backend}
    return Trainer(model, TrainConfig(n_steps=n_steps, batch_size=batch_size, **options))


def train(trainer: Trainer, until: int) -> Trainer:
    while trainer.step_number < until:
        trainer.step(tokens(trainer.config.batch_size, trainer.step_number).to(DEVICE))
    return trainer


def scores(model: Crosscoder, x_BKD: Tensor) -> np.ndarray:
    """(B, F) float64: relu(h) times the largest decoder norm, from the definition, in numpy."""
    state = {name: tensor.double().cpu().numpy() for name, tensor in model.unmixed_state().items()}
    h = np.einsum("bkd,fkd->bf", x_BKD.double().numpy(), state["W_enc"]) + state["b_enc"]
    found: np.ndarray = np.maximum(h, 0) * np.linalg.norm(state["W_dec"], axis=2).max(axis=1)
    return found


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("n_steps", [100, 300])
def test_as_many_features_pass_on_held_out_tokens_as_were_asked_for(backend: str, n_steps: int) -> None:
    model = train(make(n_steps, backend=backend), n_steps).model.eval()
    held_out = tokens(16_384, 10_001)
    l0 = model.encode(held_out).n_pairs / len(held_out)
    assert l0 == pytest.approx(TOP_K, rel=0.05)
    assert l0 == pytest.approx((scores(model, held_out) > float(model.batch_threshold)).sum() / len(held_out), abs=1e-3)


def test_as_many_features_pass_with_the_triton_kernels() -> None:
    trainer = train(make(2, batch_size=12, backend="triton", n_features=16), 2)
    x = torch.cat([tokens(12, seed) for seed in range(2)])
    largest = np.sort(scores(trainer.model, x), axis=None)[::-1]
    assert float(trainer.model.batch_threshold) == pytest.approx(largest[TOP_K * len(x) - 1], rel=1e-5)
    found = trainer.model.eval().encode(x.to(DEVICE), backend="triton")
    assert abs(found.n_pairs - TOP_K * len(x)) <= 2


def test_the_threshold_is_that_of_the_last_tokens_and_the_final_weights() -> None:
    trainer = train(make(40, batch_size=300), 40)
    all_of_them = torch.cat([tokens(300, seed) for seed in range(40)])
    largest = np.sort(scores(trainer.model, all_of_them[-TOKENS:]), axis=None)[::-1]
    assert float(trainer.model.batch_threshold) == pytest.approx(largest[TOP_K * TOKENS - 1], rel=1e-5)


@pytest.mark.parametrize("step", [50, 75])
def test_a_checkpoint_has_the_threshold_of_its_own_weights(tmp_path: Path, step: int) -> None:
    """Also just after features were restarted, which a running mean knows nothing of (step 50)."""
    trainer = train(make(150), step)
    running = float(trainer.model.batch_threshold)
    trainer.save(tmp_path / "checkpoint")
    assert float(trainer.model.batch_threshold) == running, "writing a checkpoint changes nothing in the trainer"
    model = Crosscoder.from_pretrained(tmp_path / "checkpoint").eval()
    assert model.encode(tokens(16_384, 10_002)).n_pairs / 16_384 == pytest.approx(TOP_K, rel=0.05)


@pytest.mark.parametrize(("stop", "until"), [(1, 9), (60, 61), (97, 100), (100, 100)])
def test_a_resumed_training_has_the_same_threshold(tmp_path: Path, stop: int, until: int) -> None:
    whole, first = train(make(100), until), train(make(100), stop)
    first.save(tmp_path / "checkpoint")
    second = make(100)
    second.resume(tmp_path / "checkpoint")
    train(second, until)
    for one, other in ((whole, second), (whole, train(first, until))):
        assert torch.equal(one.model.batch_threshold, other.model.batch_threshold)
        a, b = one.state_dict(), other.state_dict()
        for part in ("model", "tensors"):
            for name, tensor in a[part].items():  # type: ignore[literal-required]
                assert torch.equal(tensor, b[part][name]), name  # type: ignore[literal-required]


def test_the_last_tokens_are_kept_from_batches_of_any_size() -> None:
    weights = Crosscoder(CrosscoderConfig(1, 1, 2, gate="batchtopk", top_k=1)).weights()
    recent, given = RecentTokens(weights), []
    assert len(recent.tokens()) == 0
    for size in (1, 512, 511, 3, 0, 200, *[500] * 18, 77):
        given.append(torch.rand(size, 1, 1))
        recent.add(given[-1])
        kept, expected = recent.tokens().flatten().sort().values, torch.cat(given)[-TOKENS:].flatten().sort().values
        assert torch.equal(kept, expected)
    recent.add(torch.arange(2000.0).view(-1, 1, 1) + 10)
    kept = recent.tokens()[recent.tokens() >= 10].sort().values
    assert torch.equal(kept, torch.arange(10.0, 10 + 3 * 512, 3)), "evenly spread"
    recent.add(torch.full((5, 1, 1), torch.nan))
    assert torch.isfinite(recent.tokens()).all() and len(recent.tokens()) == TOKENS - 5


def test_with_too_few_positive_scores_every_positive_one_passes() -> None:
    model = Crosscoder(CrosscoderConfig(K, D, F, gate="batchtopk", top_k=TOP_K))
    with torch.no_grad():
        model.b_enc[4:] = -100
    assert float(model.calibrated_batch_threshold(tokens(50, 1))) == 0
    assert float(model.calibrated_batch_threshold(tokens(0, 1))) == 0


def test_other_gates_have_no_such_threshold() -> None:
    trainer = make(1, gate="topk")
    assert trainer.recent_tokens is None
    with pytest.raises(ConfigError, match='gate "topk" has no threshold for all features'):
        trainer.model.calibrated_batch_threshold(tokens(5, 1))


def test_the_command_tells_and_records_the_threshold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ActivationStore.from_array(tmp_path / "activations" / "train", tokens(3000, 5), "fp32")
    options = ["--n-features", F, "--gate", "batchtopk", "--top-k", TOP_K, "--n-steps", 40, "--batch-size", 100]
    assert run("train", tmp_path, *options, "--lr", 1e-3) == 0
    told = capsys.readouterr().out
    found = read_json(tmp_path / "crosscoder" / "training.json")["trained"]["batch_threshold"]
    assert found["l0_union"] == pytest.approx(TOP_K, abs=0.01) and found["tokens"] == 4000
    assert f"BatchTopK at inference: a feature is on above {found['value']:.4g}, which lets 6.00 features" in told
    model = Crosscoder.from_pretrained(tmp_path / "crosscoder")
    assert found["value"] == float(model.batch_threshold)
