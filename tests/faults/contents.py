"""What a folder holds, for comparison with another that came about otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet

TIMES = ("seconds", "tokens_per_second", "loader_wait_fraction", "checksum")
"""Entries of records that differ from one undisturbed run to the next."""


def contents(folder: Path) -> dict[str, Any]:
    """All files under `folder`, hidden ones too: their bytes, or their values without times."""
    return {str(path.relative_to(folder)): value(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def value(path: Path) -> Any:
    if path.name == "answers.jsonl":
        return sorted(path.read_text().splitlines())
    if path.name == "metrics.jsonl":
        return [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name in ("result.json", "summary.json"):
        return timeless(json.loads(path.read_text()))
    if path.name in ("results.parquet", "frontier.csv"):
        table = pyarrow.parquet.read_table(path.with_name("results.parquet")).to_pydict()
        return timeless(table)
    return path.read_bytes()


def timeless(record: Any) -> Any:
    if isinstance(record, dict):
        return {key: timeless(item) for key, item in record.items() if key not in TIMES}
    return [timeless(item) for item in record] if isinstance(record, list) else record
