"""What a run was made from, by content: folders move and share names, and what is in one may change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crosscoder.errors import DataError
from crosscoder.files import read_bytes, require_file

SAMPLED_ABOVE = 16 << 20
"""Bytes above which a file of weights is sampled: a step of training changes all of them."""
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_CHUNK = 1 << 22
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER = ("*token*.json", "vocab.*", "merges.txt", "*.model")
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "architectures")


def snapshot_digest(folder: Path) -> str:
    """SHA-256 (hex) of a local snapshot: its configuration, names and sizes of its files of weights, and their bytes.

    Of a file over `SAMPLED_ABOVE` bytes, 64 pieces of 64 KiB spread evenly, the first and the last among them. Raises
    `DataError` where the snapshot cannot be read.
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
        _add_file(digest, path, path.name, SAMPLED_ABOVE)
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
        _add_file(digest, path, path.relative_to(root).as_posix(), None)
    return digest.hexdigest()


def _add_file(digest: Any, path: Path, name: str, sampled_above: int | None) -> None:
    try:
        with require_file(path).open("rb") as file:
            size = file.seek(0, 2)
            digest.update(json.dumps([name, size]).encode())
            if sampled_above is not None and size > sampled_above:
                for sample in range(_SAMPLES):
                    file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
                return
            file.seek(0)
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
