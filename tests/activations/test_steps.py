"""The training step in a snapshot's name, and snapshots that carry none."""

from __future__ import annotations

from pathlib import Path

import pytest
from activations.tiny import tiny_model

from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.steps import step_of, steps_of
from crosscoder.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step1000", 1000),
        ("stage1-step1000-tokens3B", 1000),
        ("checkpoint-500", 500),
        ("global_step8", 8),
        ("iter_0005000", 5000),
        ("ckpt_10k", 10_000),
        ("100", 100),
        ("pythia-seed3", 3),
        ("main", None),
        ("v1.2", None),
        ("tokens3B", None),
        ("step10-step20", None),
    ],
)
def test_the_step_in_a_name(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_steps_that_are_unknown_or_do_not_increase_are_refused() -> None:
    assert steps_of(["main"], [143_000]) == [143_000]
    assert steps_of(["step0", "step8"]) == [0, 8]
    with pytest.raises(ConfigError, match="'main' does not carry its training step .* --steps"):
        steps_of(["step0", "main"])
    with pytest.raises(ConfigError, match=r"step1 \(step 1\) does not come after step8 \(step 8\)"):
        steps_of(["step8", "step1"])
    with pytest.raises(ConfigError, match="1 steps for 2 snapshots"):
        steps_of(["a", "b"], [1])


def test_a_trainers_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`checkpoint-500` before `checkpoint-1000`; what carries no step is left out, and that is said."""
    for name in ("checkpoint-1000", "checkpoint-500", "best"):
        tiny_model(0).save_pretrained(tmp_path / name)
    found = SnapshotSet.open(str(tmp_path), 1)
    assert found.revisions == ("checkpoint-500", "checkpoint-1000") and found.steps.tolist() == [500, 1000]
    assert "left out: best" in capsys.readouterr().err
    named = SnapshotSet.open(str(tmp_path), 1, ("checkpoint-500", "best"), steps=(500, 700))
    assert named.steps.tolist() == [500, 700]
    (tmp_path / "only" / "x").mkdir(parents=True)
    tiny_model(0).save_pretrained(tmp_path / "only" / "best")
    with pytest.raises(DataError, match="has no snapshots: .* it has best: name them with --revisions and --steps"):
        SnapshotSet.open(str(tmp_path / "only"), 1)
