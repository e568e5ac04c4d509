"""What an interrupted analysis goes on from: its state on disk, written every now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from crosscoder.common.arrays import Arrays, load_arrays, save_arrays
from crosscoder.files import remove_file

SECONDS = 30.0
"""Time between two writes, at least."""
MOST_SHARE = 0.05
"""Writes take no larger share of the time."""

_OF = "of"


class Partial:
    """The state (arrays) of an analysis while it runs, in one file. `of` says of which result it is a part."""

    def __init__(self, path: Path, of: str) -> None:
        self.path = path
        self._of = of
        self._due = time.monotonic() + SECONDS

    def load(self) -> Arrays | None:
        """What an earlier call of the same analysis had got to; None if there is nothing, or it was another's.

        Raises `DataError` for a damaged file.
        """
        if not self.path.exists():
            return None
        state = load_arrays(self.path)
        return state if str(state.pop(_OF, "")) == self._of else None

    def offer(self, state: Callable[[], Arrays]) -> None:
        """Write `state()`, atomically, if it is time to. Raises `StorageError`."""
        start = time.monotonic()
        if start < self._due:
            return
        save_arrays(self.path, {**state(), _OF: np.array(self._of)}, compressed=False)
        end = time.monotonic()
        self._due = end + max(SECONDS, (end - start) / MOST_SHARE)

    def remove(self) -> None:
        """The result is there: nothing to go on from any more."""
        remove_file(self.path)
