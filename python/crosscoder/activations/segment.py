"""One file of an activation store: a header, rows, and checksums (docs/store-format.md)."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crosscoder import _core
from crosscoder.errors import DataError
from crosscoder.files import write_bytes

MAGIC = b"XCSEGMNT"
FORMAT_VERSION = 1
ALIGNMENT = 4096
BLOCK_BYTES = 1 << 20

ITEM_TYPES = {"fp32": "<f4", "bf16": "<u2", "fp16": "<u2", "int32": "<i4"}
"""How each dtype is seen by numpy; bf16 and fp16 as their bits."""


@dataclass(frozen=True)
class Segment:
    """A segment on disk, its header and trailer already checked."""

    path: Path
    header: dict[str, Any]
    checksums: np.ndarray
    """(blocks,) uint64."""
    column_sums: np.ndarray
    """(width,) float64: sum of the rows."""

    @property
    def rows(self) -> np.ndarray:
        """(rows, width): the data, memory-mapped and read-only."""
        shape = (self.header["rows"], self.header["width"])
        if 0 in shape:
            return np.empty(shape, ITEM_TYPES[self.header["dtype"]])
        return np.memmap(self.path, ITEM_TYPES[self.header["dtype"]], "r", offset=ALIGNMENT, shape=shape)

    def verify(self) -> None:
        """Read all data and compare every block's checksum. Raises `DataError` naming file and block."""
        data = np.memmap(self.path, np.uint8, "r") if len(self.checksums) else np.empty(0, np.uint8)
        end = ALIGNMENT + _padded(self.header)
        for block, expected in enumerate(self.checksums):
            start = ALIGNMENT + block * BLOCK_BYTES
            if _core.xxh3_64(data[start : min(start + BLOCK_BYTES, end)]) != int(expected):
                raise DataError(f"{self.path}: block {block} of {len(self.checksums)} is damaged; collect it again")


def write_segment(path: Path, rows: np.ndarray, dtype: str, column_sums: np.ndarray, header: dict[str, Any]) -> None:
    """Write `rows` (rows, width), already in the item type of `dtype`, atomically. Raises `StorageError`."""
    data = np.ascontiguousarray(rows, dtype=ITEM_TYPES[dtype])
    raw = np.zeros(-(-data.nbytes // ALIGNMENT) * ALIGNMENT, np.uint8)
    raw[: data.nbytes] = data.reshape(-1).view(np.uint8)
    n_blocks = -(-raw.size // BLOCK_BYTES)
    checksums = [_core.xxh3_64(raw[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]) for block in range(n_blocks)]
    trailer = np.array(checksums, dtype="<u8").tobytes() + np.asarray(column_sums, dtype="<f8").tobytes()
    record = {
        **header,
        "dtype": dtype,
        "rows": rows.shape[0],
        "width": rows.shape[1],
        "block_bytes": BLOCK_BYTES,
    }
    text = json.dumps(record, allow_nan=False).encode()
    head = struct.pack("<8sII", MAGIC, FORMAT_VERSION, len(text)) + text
    if len(head) > ALIGNMENT - 8:
        raise DataError(f"{path}: the header is too long; shorten the snapshot's name")
    head = head.ljust(ALIGNMENT - 8, b"\0")
    write_bytes(path, b"".join([head, _digest(head), raw.tobytes(), trailer, _digest(trailer)]))


def open_segment(path: Path) -> Segment:
    """Check header, size and trailer of a segment. Raises `DataError` naming what is wrong."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(ALIGNMENT)
            if len(head) < ALIGNMENT or head[:8] != MAGIC:
                raise DataError(f"{path} is not a segment of an activation store (or is truncated)")
            version, length = struct.unpack_from("<II", head, 8)
            if version != FORMAT_VERSION:
                raise DataError(f"{path} has format version {version}, this release reads {FORMAT_VERSION}")
            if _digest(head[:-8]) != head[-8:]:
                raise DataError(f"{path}: the header is damaged; collect it again")
            header = json.loads(head[16 : 16 + length])
            n_blocks = -(-_padded(header) // BLOCK_BYTES)
            trailer_at = ALIGNMENT + _padded(header)
            trailer_bytes = 8 * (n_blocks + header["width"])
            if size != trailer_at + trailer_bytes + 8:
                raise DataError(f"{path} is truncated or has bytes appended ({size} bytes); collect it again")
            file.seek(trailer_at)
            trailer = file.read(trailer_bytes + 8)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; run the collection again to complete the store") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: the header is unreadable ({error}); collect it again") from error
    if _digest(trailer[:-8]) != trailer[-8:]:
        raise DataError(f"{path}: the checksums are damaged; collect it again")
    return Segment(
        path=path,
        header=header,
        checksums=np.frombuffer(trailer, "<u8", count=n_blocks),
        column_sums=np.frombuffer(trailer, "<f8", count=header["width"], offset=8 * n_blocks),
    )


def _padded(header: dict[str, Any]) -> int:
    """Bytes of the data, up to a multiple of the alignment."""
    data_bytes = header["rows"] * header["width"] * np.dtype(ITEM_TYPES[header["dtype"]]).itemsize
    return int(-(-data_bytes // ALIGNMENT) * ALIGNMENT)


def _digest(data: bytes) -> bytes:
    return struct.pack("<Q", _core.xxh3_64(np.frombuffer(data, np.uint8)))
