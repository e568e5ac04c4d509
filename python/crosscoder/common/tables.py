"""Tables: columns of equal length, as parquet files and as CSV text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crosscoder.errors import DataError
from crosscoder.files import write_bytes

Table = dict[str, Any]
"""Columns of equal length: arrays or lists."""


def write_table(path: Path, table: Table) -> None:
    """Write columns as parquet, atomically. Raises `StorageError`."""
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(table), buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def read_table(path: Path, remedy: str = "run the command that wrote it again") -> dict[str, np.ndarray]:
    """Columns of a parquet file.

    Raises `DataError` naming a missing or damaged file; `remedy` says what to do.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read ({reason}); {remedy}") from error
    return {name: table[name].to_numpy() for name in table.column_names}


def csv_text(columns: Mapping[str, Sequence[Any]]) -> str:
    """Columns as CSV; None becomes an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return out.getvalue()
