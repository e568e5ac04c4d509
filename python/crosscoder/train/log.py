"""What a training reports on its way: `metrics.jsonl`, a sealed line of JSON every few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crosscoder.errors import DataError
from crosscoder.files import read_lines, write_bytes
from crosscoder.progress import warn
from crosscoder.seals import seal_json

LOG_FILE = "metrics.jsonl"


def read_metrics(log: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, in the order of steps. Raises `DataError` naming a damaged line."""
    rows = []
    for number, row in read_lines(log):
        if row is None:
            raise DataError(f"{log}: line {number} is damaged, or of an earlier release (its checksum differs)")
        rows.append(row)
    return rows


def logged_seconds(log: Path, *, finished: bool = False) -> float:
    """Seconds that the steps so far took, of the last line; 0 for a log without lines, which is damage where the
    training has `finished`. Raises `DataError`."""
    rows = list(read_lines(log))
    if not rows and not finished:
        return 0.0
    number, last = rows[-1] if rows else (1, None)
    seconds = None if last is None else last.get("seconds")
    if not isinstance(seconds, (int, float)):
        raise DataError(f"{log}: line {number}, the last, is damaged; delete {log.parent} and train again")
    return float(seconds)


def forget_after(log: Path, step: int) -> None:
    """Drop what an interrupted training wrote after its last checkpoint, a line cut in the middle, and (with a warning)
    damaged ones."""
    if not log.exists():
        return
    kept, damaged = [], []
    for number, row in read_lines(log):
        if row is None or not isinstance(row.get("step"), int):
            damaged.append(number)
        elif row["step"] <= step:
            kept.append(seal_json(row))
    if damaged:
        warn(f"{log}: {len(damaged)} damaged line(s) left out, the first is line {damaged[0]}")
    write_bytes(log, b"".join(kept))
