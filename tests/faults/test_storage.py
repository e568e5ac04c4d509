"""A disk that is full: a clear error, and nothing that was there is lost."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch
from faults.killing import crosscoder, files_of, run
from faults.test_kill import collection

from crosscoder import ActivationStore, Crosscoder, CrosscoderConfig, TrainConfig, Trainer, cli
from crosscoder.errors import StorageError
from crosscoder.files import new_folder, write_bytes


def fail_with(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EIO, "Input/output error")],
)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    write_bytes(tmp_path / "file", b"old")
    fail_with(monkeypatch, code)
    with pytest.raises(StorageError, match=rf"cannot write .*/file: .*{message}"):
        write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    with new_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert (tmp_path / "folder" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failed_checkpoint_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(Crosscoder(CrosscoderConfig(2, 4, 8)), TrainConfig(n_steps=5, batch_size=8))
    trainer.step(torch.randn(8, 2, 4))
    trainer.save(tmp_path / "step-1")
    trainer.step(torch.randn(8, 2, 4))
    fail_with(monkeypatch, errno.ENOSPC)
    with pytest.raises(StorageError, match="disk is full"):
        trainer.save(tmp_path / "step-2")
    assert not (tmp_path / "step-2").exists() and trainer.last_checkpoint == tmp_path / "step-1"
    Trainer(Crosscoder(CrosscoderConfig(2, 4, 8)), trainer.config).resume(tmp_path / "step-1")


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 2 MB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder  # type: ignore[misc]
    subprocess.run(["umount", str(folder)], check=True)


def test_training_on_a_disk_that_fills_up(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ActivationStore.from_array(small_disk / "run" / "activations" / "train", torch.randn(600, 3, 8))
    options = ["--n-features", "6000", "--n-steps", "40", "--batch-size", "64", "--checkpoint-every", "10"]
    assert cli.main(["train", str(small_disk / "run"), *options, "--lr", "1e-3"]) == 5
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "cannot write" in error[0] and "free some space" in error[0]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert cli.main(["train", str(small_disk / "run"), *options, "--lr", "1e-3"]) == 0


@pytest.mark.slow
def test_collection_on_a_disk_that_fills_up(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was collected stays; with more room the same command ends, to the same bytes."""
    command = collection(tmp_path)
    run(crosscoder(*command), tmp_path)
    arguments = ["--model", str(tmp_path / "models"), "--text", str(tmp_path / "text.txt")]
    rest = list(map(str, command[command.index("--layer") : command.index("--text")]))
    rest += map(str, command[command.index("--context") :])
    assert cli.main(["collect", str(small_disk / "run"), *arguments, *rest]) == 5
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "cannot write" in error[0] and "free some space" in error[0]
    kept = files_of(small_disk / "run", "activations/*/shard-*/snapshot*.seg")
    assert kept, "some were complete"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert cli.main(["collect", str(small_disk / "run"), *arguments, *rest]) == 0
    whole = files_of(tmp_path / "run", "activations/*/shard-*/*.seg")
    assert files_of(small_disk / "run", "activations/*/shard-*/*.seg") == whole
    assert not list(small_disk.rglob(".tmp-*"))
