"""Tables: columns of equal length, as parquet files and as CSV text."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crosscoder.errors import DataError
from crosscoder.files import read_bytes, write_bytes

Table = dict[str, Any]
"""Columns of equal length: arrays or lists."""
_CHECKSUM = b"crosscoder.checksum"


def write_table(path: Path, table: Table) -> None:
    """Write columns as parquet, atomically, with a checksum of what they hold. Raises `StorageError`."""
    import pyarrow
    import pyarrow.parquet

    columns = pyarrow.table(table)
    columns = columns.replace_schema_metadata({**(columns.schema.metadata or {}), _CHECKSUM: _checksum(columns)})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(columns, buffer, compression="zstd", write_page_checksum=True)
    write_bytes(path, buffer.getvalue())


def read_table(path: Path, remedy: str = "run the command that wrote it again") -> dict[str, np.ndarray]:
    """Columns of a parquet file that `write_table` wrote.

    Raises `DataError` naming a missing or damaged file; `remedy` says what to do.
    """
    import pyarrow.parquet

    data = read_bytes(path)
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data), page_checksum_verification=True)
        whole = (table.schema.metadata or {}).get(_CHECKSUM, b"") == _checksum(table).encode()
    except Exception as error:  # whatever a damaged file makes the reader raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} cannot be read ({reason}); {remedy}") from error
    if not whole:
        raise DataError(f"{path} is damaged, or of an earlier release (its checksum differs); {remedy}")
    return {name: table[name].to_numpy() for name in table.column_names}


def _checksum(table: Any) -> str:
    """SHA-256 of the names, types and values of a pyarrow table's columns."""
    digest = hashlib.sha256()
    for name in table.column_names:
        values = table[name].to_numpy()
        digest.update(f"{name} {table[name].type} {len(values)} ".encode())
        plain = values.dtype.kind in "biuf"
        digest.update(values.tobytes() if plain else json.dumps(table[name].to_pylist(), default=str).encode())
    return digest.hexdigest()


def csv_text(columns: Mapping[str, Sequence[Any]]) -> str:
    """Columns as CSV; None becomes an empty field. Text that a spreadsheet would run as a formula gets a ' in front."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_cell, columns))
    writer.writerows(map(_cell, row) for row in zip(*columns.values(), strict=True))
    return out.getvalue()


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
