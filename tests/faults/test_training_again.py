"""A training that is begun again from nothing, or from the older of two checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.contents import contents
from support.command_line import error, run

from crosscoder import ActivationStore
from crosscoder.train.trainer import Trainer

OPTIONS = ["--n-features", 32, "--n-steps", 60, "--batch-size", 64, "--lr", 3e-3, "--checkpoint-every", 20]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with activations."""
    x = torch.randn(900, 2, 8, generator=torch.Generator().manual_seed(0))
    ActivationStore.from_array(tmp_path / "run" / "activations" / "train", x, rows_per_shard=500)
    return tmp_path / "run"


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, reason: type[BaseException] = KeyboardInterrupt) -> None:
    """Training raises `reason` after `at` steps."""
    step = Trainer.step

    def interrupted(self: Trainer, *arguments: Any, **options: Any) -> Any:
        if self.step_number == at:
            raise reason
        return step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "step", interrupted)


def interrupted(folder: Path, at: int, *options: object, code: int = 130) -> None:
    """`crosscoder train`, interrupted after `at` steps."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, at)
        assert run("train", folder, *OPTIONS, *options) == code


# --------------------------------------------------------------------------------------------- --no-resume


def test_a_training_that_cannot_begin_again_keeps_the_old_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", folder, *OPTIONS) == 0
    before = contents(folder)
    segment = ActivationStore.open(folder / "activations" / "train").segment_path(0, 1)
    segment.rename(folder.parent / "elsewhere")
    assert run("train", folder, *OPTIONS, "--no-resume") == 3
    (folder.parent / "elsewhere").rename(segment)
    assert run("train", folder, *OPTIONS, "--no-resume", "--gate", "topk") == 2
    capsys.readouterr()
    assert run("train", folder, *OPTIONS, "--seed", 4) == 2
    assert "was trained with other settings, says training.json (seed 0 there, 4 now)" in error(capsys)
    assert contents(folder) == before


@pytest.mark.parametrize("finished", [True, False], ids=["a finished one", "an interrupted one"])
def test_the_old_training_is_kept_until_the_first_checkpoint(folder: Path, finished: bool) -> None:
    if finished:
        assert run("train", folder, *OPTIONS) == 0
    else:
        interrupted(folder, 50)
    before = contents(folder)
    interrupted(folder, 15, "--no-resume", "--seed", 1)
    assert contents(folder) == before
    interrupted(folder, 25, "--no-resume", "--seed", 1)
    assert not (folder / "crosscoder").exists()
    assert [path.name for path in (folder / "training" / "checkpoints").iterdir()] == ["step-00000020"]
    assert run("train", folder, *OPTIONS, "--seed", 1) == 0
    again = contents(folder)
    assert run("train", folder, *OPTIONS, "--seed", 1, "--no-resume") == 0
    for name, data in contents(folder).items():
        assert data == again[name] or name == "config/train.yaml"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_kill_while_the_old_training_is_put_aside(folder: Path, moved: int) -> None:
    """Whatever was moved when it was killed: the next call has the old training, whole."""
    assert run("train", folder, *OPTIONS) == 0
    before = contents(folder)
    aside = folder / ".replacing"
    for part in ("crosscoder", "training", "config/train.yaml")[:moved]:
        (aside / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).rename(aside / part)
    assert run("train", folder, *OPTIONS) == 0
    assert contents(folder) == before


# ------------------------------------------------------------------------------------- a damaged checkpoint


def flip(name: str, share: float) -> Callable[[Path], None]:
    """Flip a bit of the file `name` at this share of its length."""

    def damage(checkpoint: Path) -> None:
        data = bytearray((checkpoint / name).read_bytes())
        data[int(share * (len(data) - 1))] ^= 4
        (checkpoint / name).write_bytes(data)

    return damage


def cut(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        data = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(data[: len(data) // 2])

    return damage


def without(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


FILES = ("trainer.json", "trainer.safetensors", "config.json", "model.safetensors")
DAMAGES = {
    **{f"a bit of {name} at {share:.0%}": flip(name, share) for name in FILES for share in (0, 0.1, 0.5, 0.9, 1)},
    **{f"half of {name}": cut(name) for name in FILES},
    **{f"no {name}": without(name) for name in FILES},
    "an empty folder": lambda checkpoint: [path.unlink() for path in checkpoint.iterdir()] and None,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A training that was interrupted with two checkpoints, and what the same ends with undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    x = torch.randn(900, 2, 8, generator=torch.Generator().manual_seed(0))
    ActivationStore.from_array(folder / "activations" / "train", x, rows_per_shard=500)
    shutil.copytree(folder, folder.with_name("undisturbed"))
    interrupted(folder, 50)
    assert run("train", folder.with_name("undisturbed"), *OPTIONS) == 0
    return folder, contents(folder.with_name("undisturbed"))


@pytest.mark.parametrize("name", DAMAGES)
def test_training_goes_on_from_the_older_checkpoint(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    interrupted_run, wanted = whole
    folder = tmp_path / "run"
    shutil.copytree(interrupted_run, folder)
    newest = folder / "training" / "checkpoints" / "step-00000040"
    DAMAGES[name](newest)
    assert run("train", folder, *OPTIONS) == 0
    told = capsys.readouterr()
    assert f"skipping a damaged checkpoint: {newest}" in told.err
    assert "going on from step 20" in told.out + told.err
    found = contents(folder)
    found["config/train.yaml"] = wanted["config/train.yaml"] = b""
    assert found.keys() == wanted.keys()
    assert [path for path in wanted if found[path] != wanted[path]] == []


def test_training_begins_anew_where_no_checkpoint_is_whole(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_run, wanted = whole
    folder = tmp_path / "run"
    shutil.copytree(interrupted_run, folder)
    for checkpoint in (folder / "training" / "checkpoints").iterdir():
        cut("trainer.json")(checkpoint)
    assert run("train", folder, *OPTIONS) == 0
    assert "no checkpoint can be used: training begins anew" in capsys.readouterr().err
    found = contents(folder)
    assert found.keys() == wanted.keys()
    assert [path for path in wanted if found[path] != wanted[path] and path != "config/train.yaml"] == []


def test_a_checkpoint_of_other_settings_is_refused(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    before = contents(folder)
    assert run("train", folder, *OPTIONS, "--seed", 5) == 2
    assert "seed 0 there, 5 now" in error(capsys)
    assert contents(folder) == before
