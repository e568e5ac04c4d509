"""When a run's checkpoints are written. On a GPU, beside the training: tests/ghost/test_run.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.errors import ConfigError
from crosscoder.train import checkpoint_writer
from crosscoder.train.checkpoint_writer import KEPT, CheckpointWriter


def written(tmp_path: Path, minutes_a_step: float, monkeypatch: pytest.MonkeyPatch, **options: object) -> list[int]:
    """After which of 8 steps a checkpoint is due."""
    now = [0.0]
    monkeypatch.setattr(checkpoint_writer.time, "monotonic", lambda: now[0])
    trainer = Trainer(Crosscoder(CrosscoderConfig(2, 4, 6)), TrainConfig(n_steps=9, batch_size=5, **options))  # type: ignore[arg-type]
    found = []
    with CheckpointWriter(trainer, tmp_path, lambda: found.append(trainer.step_number)) as writer:
        for _ in range(8):
            trainer.step(torch.randn(5, 2, 4))
            now[0] += 60 * minutes_a_step
            if writer.is_due():
                writer.write({"step": trainer.step_number})
    kept = sorted(tmp_path.glob("*"))
    assert [path.name for path in kept] == [f"step-{step:08d}" for step in found[-KEPT:]]
    if found:
        assert trainer.last_checkpoint == kept[-1] and trainer.resume(kept[-1]) == {"step": found[-1]}
    return found


def test_checkpoints_come_by_steps_and_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        (0.001, {"checkpoint_every": 3}, [3, 6]),
        (1.0, {"checkpoint_every": None, "checkpoint_minutes": 2.0}, [2, 4, 6, 8]),
        (1.0, {"checkpoint_every": 5, "checkpoint_minutes": 4.0}, [4, 5]),
        (0.001, {"checkpoint_every": None}, []),
    ]
    for number, (minutes, options, expected) in enumerate(cases):
        assert written(tmp_path / str(number), minutes, monkeypatch, **options) == expected


@pytest.mark.parametrize("options", [{"checkpoint_every": 0}, {"checkpoint_minutes": 0.0}])
def test_impossible_intervals_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="checkpoint_"):
        TrainConfig(**options)  # type: ignore[arg-type]
