"""What a run was made from, by content: folders move and share names, and what is in one may change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crosscoder.errors import DataError

SAMPLED_ABOVE = 16 << 20
"""Bytes above which a file of weights is sampled: a step of training changes all of them."""
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_CHUNK = 1 << 22
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "architectures")


def snapshot_digest(folder: Path) -> str:
    """SHA-256 (hex) of a local snapshot: its configuration, names and sizes of its files of weights, and their bytes.

    Of a file over `SAMPLED_ABOVE` bytes, 64 pieces of 64 KiB spread evenly, the first and the last among them. Raises
    `DataError` where the snapshot cannot be read.
    """
    try:
        configuration: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in configuration.items() if key not in _NOT_THE_MODEL}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
        files = next((found for pattern in _WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
        for file in files:
            _add_file(digest, file, file.name, SAMPLED_ABOVE)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"cannot read the snapshot {folder}: {error}") from error
    return digest.hexdigest()


def files_digest(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 (hex) of every byte of the files, and of their names under `root`. Raises `DataError`."""
    digest = hashlib.sha256()
    try:
        for path in paths:
            _add_file(digest, path, path.relative_to(root).as_posix(), None)
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    return digest.hexdigest()


def _add_file(digest: Any, path: Path, name: str, sampled_above: int | None) -> None:
    with path.open("rb") as file:
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
