"""Progress bars for long work: what is done, at what rate, how much time is left."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from crosscoder.errors import printable


class Progress:
    """A bar on a terminal, a line every now and then in a log file. Writes to standard error.

    `total`, `done` and `advance` count `unit`s; `done` is what an earlier, interrupted call had finished, so
    that the rate shown is this call's own.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        from tqdm import tqdm

        interactive = sys.stderr.isatty()
        self._bar: Any = tqdm(
            total=total,
            initial=done,
            unit=f" {unit}",
            desc=title,
            unit_scale=total >= 10_000,
            dynamic_ncols=interactive,
            mininterval=0.2 if interactive else 15.0,
            smoothing=0.1,
        )

    def advance(self, amount: int = 1, figures: Mapping[str, str] | None = None) -> None:
        """Count `amount` more units as done; `figures` (short texts) are shown behind the bar."""
        if figures is not None:
            self._bar.set_postfix(figures, refresh=False)
        self._bar.update(amount)

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def warn(message: str) -> None:
    """A line on standard error that does not break a progress bar."""
    from tqdm import tqdm

    tqdm.write(f"warning: {printable(message)}", file=sys.stderr)
