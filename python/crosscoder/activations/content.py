"""What a run was made from, by content: folders move and share names, and what is in one may change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from crosscoder import _core
from crosscoder.errors import DataError

_CHUNK = 1 << 22
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "architectures")
_known: dict[Path, tuple[tuple[int, ...], bytes]] = {}
"""Of each file of weights that this process has read: its place, size and times, and the checksums of its chunks."""


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a local snapshot, by name."""
    return next((found for pattern in _WEIGHTS if (found := sorted(folder.glob(pattern)))), [])


def snapshot_digest(folder: Path, advance: Callable[[int], object] = lambda n_bytes: None) -> str:
    """SHA-256 (hex) of a local snapshot: its configuration, and of each file of weights its name, its size and the XXH3
    of every 4 MiB. It tells weights apart that differ in any bit; it is no protection against forgery.

    A file that this process has read before is read again only where its size or times have changed. `advance` is told
    the bytes that are done. Raises `DataError` where the snapshot cannot be read.
    """
    try:
        configuration: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in configuration.items() if key not in _NOT_THE_MODEL}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
        for file in weight_files(folder):
            digest.update(json.dumps([file.name, file.stat().st_size]).encode())
            digest.update(_checksums(file, advance))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"cannot read the snapshot {folder}: {error}") from error
    return digest.hexdigest()


def _checksums(path: Path, advance: Callable[[int], object]) -> bytes:
    status = path.stat()
    now = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    before, checksums = _known.get(path.resolve(), ((), b""))
    if before == now:
        advance(status.st_size)
        return checksums
    checksums, buffer = b"", memoryview(bytearray(_CHUNK))
    with path.open("rb") as file:
        while size := file.readinto(buffer):
            checksums += _core.xxh3_64(buffer[:size]).to_bytes(8, "little")
            advance(size)
    _known[path.resolve()] = now, checksums
    return checksums


def files_digest(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 (hex) of every byte of the files, and of their names under `root`. Raises `DataError`."""
    digest = hashlib.sha256()
    try:
        for path in paths:
            with path.open("rb") as file:
                digest.update(json.dumps([path.relative_to(root).as_posix(), file.seek(0, 2)]).encode())
                file.seek(0)
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    return digest.hexdigest()
