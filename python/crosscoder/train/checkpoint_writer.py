"""The checkpoints of a run: when one is due, and writing it while training goes on.

From a GPU the state is copied to pinned memory on the host, in the order of the device's work, and a thread writes that
copy; training waits neither for the copies nor for the disk. On a CPU the training's own tensors are written, at once:
the next step would change them. One checkpoint at a time: where the disk is slower than they come, some are left out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoder.devices import current
from crosscoder.files import remove_folder
from crosscoder.progress import warn
from crosscoder.train import checkpoint
from crosscoder.train.checkpoint import TrainerState
from crosscoder.train.trainer import Trainer

KEPT = 2
"""Checkpoints that a run has."""


class CheckpointWriter:
    """Writes checkpoints of `trainer` to `root`; `saved` is called after each, when it is complete.

    Used in a `with`, at whose end nothing is being written any more.
    """

    def __init__(self, trainer: Trainer, root: Path, saved: Callable[[], None] = lambda: None) -> None:
        self._trainer, self._root, self._saved = trainer, root, saved
        self._last = time.monotonic()
        self._staging: dict[str, Tensor] = {}
        """Pinned memory on the host by name, kept from one checkpoint to the next."""
        self._thread: threading.Thread | None = None
        self._failed: list[BaseException] = []
        self._under_way: Path | None = None
        self._told = False

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self.finish()
        elif self._thread is not None:  # what went wrong here is told, not what went wrong there
            self._thread.join()

    def is_due(self) -> bool:
        """Is it time, by steps or by the clock, and the last one written?"""
        self.look()
        config = self._trainer.config
        by_steps = config.checkpoint_every is not None and self._trainer.step_number % config.checkpoint_every == 0
        by_time = time.monotonic() - self._last >= 60 * config.checkpoint_minutes
        return (by_steps or by_time) and self._thread is None

    def write(self, extra: dict[str, Any]) -> None:
        """A checkpoint of the state now, with `extra` as in `Trainer.save`. Raises `StorageError`, also of the one
        before."""
        self.finish()
        trainer = self._trainer
        self._last = time.monotonic()
        folder = checkpoint.folder_of(self._root, trainer.step_number)
        if trainer.model.W_enc.device.type != "cuda":
            trainer.save(folder, extra)
            self._clear()
            return
        with current(trainer.model.W_enc.device):
            state = self._staged(trainer.state_dict())
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._under_way = folder

        def work() -> None:
            try:
                copied.synchronize()
                checkpoint.save(folder, trainer.model.config, trainer.config, state, extra)
            except BaseException as error:  # told to the training, which raises it
                self._failed.append(error)

        self._thread = threading.Thread(target=work, name="checkpoint")  # not a daemon: Python waits for it at its end
        self._thread.start()

    def look(self) -> None:
        """Settle what is done. Raises what went wrong there."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one. Raises what went wrong there."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._failed:
            raise self._failed.pop()
        self._trainer.last_checkpoint = self._under_way
        self._clear()

    def _clear(self) -> None:
        self._saved()
        for old in checkpoint.existing(self._root)[KEPT:]:
            remove_folder(old)

    def _staged(self, state: TrainerState) -> TrainerState:
        """Copies on the host, which the device makes when it is through with what it was asked before."""

        def staged(part: str, tensors: Any) -> dict[str, Tensor]:
            return {name: self._copy(f"{part}.{name}", tensor) for name, tensor in tensors.items()}

        scale_K = state["scale_K"]
        return TrainerState(
            model=staged("model", state["model"]),
            scale_K=None if scale_K is None else scale_K.detach().cpu().clone(),
            tensors=staged("tensors", state["tensors"]),
            numbers=dict(state["numbers"]),
        )

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.device.type != "cuda":
            return tensor.clone()
        there = self._staging.get(name)
        if there is None or there.shape != tensor.shape or there.dtype != tensor.dtype:
            there = self._staging[name] = self._pinned(tensor)
        there.copy_(tensor, non_blocking=True)
        return there

    def _pinned(self, tensor: Tensor) -> Tensor:
        empty = partial(torch.empty, tensor.shape, dtype=tensor.dtype)
        try:
            return empty(pin_memory=True)
        except RuntimeError as error:
            if not self._told:
                warn(f"no pinned memory for checkpoints ({error}): training waits while they are copied to the host")
                self._told = True
            return empty()
