"""The examples do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_minimal_crosscoder_has_the_loss_of_the_package() -> None:
    from crosscoder import Crosscoder, CrosscoderConfig

    minimal = load("minimal")
    torch.manual_seed(0)
    small, x = minimal.Crosscoder(), minimal.Planted().sample(64)
    with torch.no_grad():
        small.W_dec.mul_(torch.rand(minimal.F, minimal.K, 1) + 0.5)
    config = CrosscoderConfig(
        n_snapshots=minimal.K,
        d_model=minimal.D,
        n_features=minimal.F,
        tanh_scale=minimal.TANH_SCALE,
        frequency_scale=minimal.FREQUENCY_SCALE,
        threshold_window=minimal.WINDOW,
        threshold_mode="exact",
    )
    ours = Crosscoder(config)
    ours.load_state_dict(
        {
            **ours.state_dict(),
            "W_enc": small.W_enc,
            "W_dec": small.W_dec,
            "b_enc": small.b_enc,
            "b_dec": small.b_dec,
            "log_threshold": small.log_theta,
        }
    )
    loss, _ = small.loss(x, 0.1)
    loss.backward()
    total = ours.loss(x, sparsity_coefficient=0.1, backend="reference").total
    total.backward()
    torch.testing.assert_close(loss, total)
    for theirs, name in ((small.W_enc, "W_enc"), (small.W_dec, "W_dec"), (small.log_theta, "log_threshold")):
        gradient = getattr(ours, name).grad
        assert gradient.abs().max() > 0
        torch.testing.assert_close(theirs.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_minimal_crosscoder_finds_what_was_planted(capsys: pytest.CaptureFixture[str]) -> None:
    explained, found, right = load("minimal").main()
    assert explained > 0.99 and found >= 29 and right >= found - 1
    assert "true features found" in capsys.readouterr().out
