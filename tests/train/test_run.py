"""A whole training run in a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from crosscoder import ActivationStore, CrosscoderConfig, TrainConfig
from crosscoder.train.run import train


def test_what_a_kill_after_the_export_leaves_is_removed_by_the_next_call(tmp_path: Path) -> None:
    x = torch.randn(200, 2, 4, generator=torch.Generator().manual_seed(0))
    store = ActivationStore.from_array(tmp_path / "activations", x, "fp32")
    settings = CrosscoderConfig(2, 4, 8), TrainConfig(n_steps=5, batch_size=20, lr=1e-3)
    first = train(store, *settings, tmp_path / "run")
    checkpoints = tmp_path / "run" / "training" / "checkpoints"
    for name in ("step-00000004", ".tmp-step-00000003"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "trainer.json").write_text("{}")
    again = train(store, *settings, tmp_path / "run")
    assert torch.equal(first.W_dec, again.W_dec)
    assert not list(checkpoints.iterdir())
