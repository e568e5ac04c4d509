"""Starting again from nothing: the old training is kept until the new one has something to go on from."""

from __future__ import annotations

from pathlib import Path

from crosscoder.files import clear_left_overs, explained_write_errors, make_folder, remove_folder
from crosscoder.train import checkpoint

PARTS = ("crosscoder", "training", "config/train.yaml")
"""Of a run's folder, what a training leaves."""


class OldTraining:
    """The training that a folder held before, put aside in it.

    However a command ends, `settle` makes of the folder one training or the other, whole: the new one from its first
    checkpoint on, before that the old one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._aside = folder / ".replaced"
        self._moving = folder / ".replacing"
        """While not all of it is there: either on the way out or on the way back."""

    def put_aside(self) -> None:
        """Move it out of the way, if there is one. Raises `StorageError`."""
        for part in PARTS:
            self._move(self._folder / part, self._moving / part)
        if self._moving.exists():
            self._rename(self._moving, self._aside)

    def settle(self) -> None:
        """Put it back, or remove it where the new one can go on. Raises `StorageError`."""
        clear_left_overs(self._folder)
        if self._aside.exists():
            if (self._folder / "crosscoder").exists() or checkpoint.existing(self._folder / "training" / "checkpoints"):
                self.remove()
            else:
                self._rename(self._aside, self._moving)
        if self._moving.exists():
            for part in PARTS:
                self._move(self._moving / part, self._folder / part)
            remove_folder(self._moving)

    def remove(self) -> None:
        """The new one has something to go on from."""
        if self._aside.exists():
            remove_folder(self._aside)

    def _move(self, path: Path, target: Path) -> None:
        if path.exists():
            make_folder(target.parent)
            if target.is_dir():
                remove_folder(target)
            self._rename(path, target)

    @staticmethod
    def _rename(path: Path, target: Path) -> None:
        with explained_write_errors(target):
            path.replace(target)
