"""Ways of damaging a file."""

from __future__ import annotations

from pathlib import Path


def flips(data: bytes, every: int = 1) -> list[bytes]:
    """`data` with each bit of it flipped, or one in `every`."""
    return [
        data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        for position in range(0, len(data) * 8, every)
        for at, bit in [divmod(position, 8)]
    ]


def put(path: Path, data: bytes) -> None:
    """A new file each time: some file systems wait for the disk when a file is emptied and written again."""
    path.unlink()
    path.write_bytes(data)
