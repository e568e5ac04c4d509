"""A whole training run on a ghost of a GPU: loader, checkpoints beside the training, resuming, the export."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.crosscoders import relative_error
from support.ghost import Machine, ghost_machine

from crosscoder import ActivationStore, Crosscoder, CrosscoderConfig, TrainConfig
from crosscoder.activations.loader import ActivationLoader
from crosscoder.errors import StorageError
from crosscoder.evaluation import evaluate
from crosscoder.train import checkpoint, checkpoint_writer
from crosscoder.train.run import train

CONFIG = CrosscoderConfig(2, 5, 9)
OPTIONS: dict[str, Any] = {
    "n_steps": 6, "batch_size": 6, "lr": 1e-3, "log_every": 3, "checkpoint_every": 2, "revival": "none",
}  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


@pytest.fixture
def machine() -> Iterator[Machine]:
    with ghost_machine() as machine:
        yield machine


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    x = torch.randn(60, 2, 5, generator=torch.Generator().manual_seed(0))
    return ActivationStore.from_array(tmp_path / "activations", x, "fp32")


def test_a_run_on_the_device_is_the_hosts(machine: Machine, store: ActivationStore, tmp_path: Path) -> None:
    """The crosscoder comes back on the CPU; evaluated on the device it is what it is on the CPU."""
    settings = CONFIG, TrainConfig(**OPTIONS)
    found = train(store, *settings, tmp_path / "device", device="cuda")
    assert machine.watch.launches["update_rows"] >= 6
    expected = train(store, *settings, tmp_path / "host", device="cpu")
    for name, tensor in expected.state_dict().items():
        assert relative_error(found.state_dict()[name], tensor) < 1e-3, name
    first, second = evaluate(found.to("cuda"), store, 16), evaluate(found.cpu(), store, 16)
    assert first.n_tokens == second.n_tokens == 60
    for value, other in ((first.explained_variance, second.explained_variance), (first.l0, second.l0)):
        assert value == pytest.approx(other, rel=1e-4)
    assert torch.equal(first.firing_rate_F, second.firing_rate_F)


@pytest.mark.parametrize("state", ["fp32", "low-memory"])
def test_a_run_goes_on_with_the_same_bits(
    machine: Machine, store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Interrupted after the second checkpoint; what is written beside the training is the state of its own step."""
    settings = CONFIG, TrainConfig(**OPTIONS, state=state)  # type: ignore[arg-type]
    whole = train(store, *settings, tmp_path / "whole", device="cuda")
    threads, save = [], checkpoint.save

    def noted(*args: Any) -> None:
        threads.append(threading.current_thread())
        save(*args)

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", noted)
    with pytest.raises(KeyboardInterrupt):
        train(store, *settings, tmp_path / "cut", device="cuda", begin=lambda: monkeypatch.setattr(
            checkpoint_writer.CheckpointWriter, "_clear", lambda self: stop() if len(threads) == 2 else None
        ))  # fmt: skip
    monkeypatch.undo()
    assert len(threads) == 2 and threading.main_thread() not in threads
    assert checkpoint.existing(tmp_path / "cut/training/checkpoints")[0].name == "step-00000004"
    again = train(store, *settings, tmp_path / "cut", device="cuda")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_checkpoint_that_cannot_be_written_stops_the_training(
    machine: Machine, store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(StorageError, match="the disk is full"):
        train(store, CONFIG, TrainConfig(**OPTIONS), tmp_path / "run", device="cuda")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_batches_on_the_device_are_the_hosts(machine: Machine, store: ActivationStore, dtype: Any) -> None:
    """Through pinned memory, a batch ahead, without a wait."""
    ours = ActivationLoader(store, 16, seed=1, dtype=dtype, device="cuda")
    theirs = ActivationLoader(store, 16, seed=1, dtype=dtype)
    pairs = list(zip(ours, theirs, strict=True))
    assert len(pairs) == 3 and not machine.watch.waits
    for x, y in pairs:
        assert x.device.type == "cuda" and torch.equal(x.cpu(), y)


def test_a_saved_crosscoder_on_the_device(machine: Machine, tmp_path: Path) -> None:
    model = Crosscoder(CONFIG, device="cuda")
    model.set_snapshot_mix(torch.tensor([[2.0, 1.0], [1.0, 3.0]], device="cuda"))
    model.save_pretrained(tmp_path / "model")
    back = Crosscoder.from_pretrained(tmp_path / "model", map_location="cuda")
    assert back.W_enc.device.type == "cuda"
    x = torch.randn(4, 2, 5)
    assert relative_error(back(x).detach().cpu(), model.eval()(x).detach().cpu()) < 1e-5
