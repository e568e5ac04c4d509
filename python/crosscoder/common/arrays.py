"""Results as named arrays: flattened from dataclasses, saved as `.npz`."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosscoder.errors import DataError
from crosscoder.files import new_file, read_bytes

Arrays = dict[str, np.ndarray]


def flatten(result: Any, prefix: str = "") -> Arrays:
    """Nested dataclasses, mappings and arrays as one mapping, names joined by points."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        arrays: Arrays = {}
        for name, value in result.items():
            arrays.update(flatten(value, f"{prefix}.{name}" if prefix else str(name)))
        return arrays
    value = result.numpy() if isinstance(result, torch.Tensor) else np.asarray(result)
    return {} if value.dtype == object else {prefix: value}


def save_arrays(path: Path, arrays: Arrays, *, compressed: bool = True) -> None:
    """Write a `.npz`, atomically. Raises `StorageError`."""
    with new_file(path) as file:
        (np.savez_compressed if compressed else np.savez)(file, allow_pickle=False, **arrays)


def load_arrays(path: Path) -> Arrays:
    """Read what `save_arrays` wrote. Raises `DataError` naming a file that is missing, or damaged anywhere.

    Each array is read to its end before it is looked at: the archive's checksum of it is compared only there.
    """
    data = read_bytes(path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {
                name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
                for name in archive.namelist()
            }
    except Exception as error:  # whatever damage makes zipfile, zlib and numpy raise
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} is damaged ({reason}); delete it and run the same command again") from error
