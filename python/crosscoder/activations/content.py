"""What a run was made from, by content: folders move and share names, and what is in one may change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from crosscoder import _core
from crosscoder.errors import DataError
from crosscoder.files import read_bytes, require_file

_CHUNK = 1 << 22
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER = ("*token*.json", "vocab.*", "merges.txt", "*.model")
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "architectures")
_known: dict[Path, tuple[tuple[int, ...], bytes]] = {}
"""Of each file of weights that this process has read: its place, size and times, and the checksums of its chunks."""


def snapshot_digest(folder: Path, advance: Callable[[int], object] = lambda n_bytes: None) -> str:
    """SHA-256 (hex) of a local snapshot: its configuration, and of each file of weights its name, its size and the XXH3
    of every 4 MiB. It tells weights apart that differ in any bit; it is no protection against forgery.

    A file that this process has read before is read again only where its size or times have changed. `advance` is told
    the bytes that are done. Raises `DataError` where the snapshot cannot be read.
    """
    path = folder / "config.json"
    data = read_bytes(path)
    try:
        configuration: dict[str, Any] = json.loads(data.decode())
        kept = {key: value for key, value in configuration.items() if key not in _NOT_THE_MODEL}
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for path in weight_files(folder):
        size, checksums = _checksums(path, advance)
        digest.update(json.dumps([path.name, size]).encode() + checksums)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files of weights of a local snapshot: safetensors, or where there are none torch's own."""
    return next((found for pattern in _WEIGHTS if (found := sorted(folder.glob(pattern)))), [])


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a local snapshot's tokenizer, by name."""
    return sorted({path for pattern in _TOKENIZER for path in folder.glob(pattern)})


def files_digest(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 (hex) of every byte of the files, and of their names under `root`. Raises `DataError`."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with require_file(path).open("rb") as file:
                digest.update(json.dumps([path.relative_to(root).as_posix(), file.seek(0, 2)]).encode())
                file.seek(0)
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _checksums(path: Path, advance: Callable[[int], object]) -> tuple[int, bytes]:
    """Size of a file, and the XXH3 of each chunk of it."""
    try:
        status, place = require_file(path).stat(), path.resolve()
        now = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        before, checksums = _known.get(place, ((), b""))
        if before == now:
            advance(status.st_size)
            return status.st_size, checksums
        checksums, buffer = b"", memoryview(bytearray(_CHUNK))
        with path.open("rb") as file:
            while size := file.readinto(buffer):
                checksums += _core.xxh3_64(buffer[:size]).to_bytes(8, "little")
                advance(size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    _known[place] = now, checksums
    return status.st_size, checksums
