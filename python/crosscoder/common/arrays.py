"""Results as named arrays: flattened from dataclasses, saved as `.npz`, and made dataclasses again; mapped arrays."""

from __future__ import annotations

import dataclasses
import io
import types
import typing
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from crosscoder.errors import DataError
from crosscoder.files import new_file, read_bytes, read_json, reading, require_file, write_bytes, write_json
from crosscoder.seals import CHECKSUM_BYTES, digest

Arrays = dict[str, np.ndarray]
R = TypeVar("R")
ALWAYS_UNPACKED = 1 << 30
MOST_UNPACKED = 100
"""How many times its own size an archive may have unpacked, beyond `ALWAYS_UNPACKED` bytes."""


def flatten(result: Any, prefix: str = "") -> Arrays:
    """Nested dataclasses, mappings and arrays as one mapping, names joined by points; what is None is left out.

    Raises `TypeError` for what `restore` could not give back: other objects, and keys with a point.
    """
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        arrays: Arrays = {}
        for name, value in result.items():
            if "." in name:
                raise TypeError(f"{prefix}: the name {name!r} has a point in it")
            arrays.update(flatten(value, f"{prefix}.{name}" if prefix else name))
        return arrays
    if result is None:
        return {}
    value = result.numpy() if isinstance(result, torch.Tensor) else np.asarray(result)
    if value.dtype == object:
        raise TypeError(f"{prefix}: cannot save {type(result).__name__} as an array")
    return {prefix: value}


def restore(kind: type[R], arrays: Mapping[str, np.ndarray], prefix: str = "") -> R:
    """The dataclass that `flatten` made the arrays from. Raises `DataError` naming an array that is missing."""
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], arrays, f"{prefix}{name}") for name in _fields(kind)})


def layout(kind: type) -> list[str]:
    """The names of the arrays of a dataclass, "*" for the keys of a mapping: what changes when its fields do."""
    hints = typing.get_type_hints(kind)
    return [f"{name}{inner}" for name in _fields(kind) for inner in _inside(hints[name])]


def _fields(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _inside(hint: Any) -> list[str]:
    """What `layout` adds to a name of this type."""
    inner = _not_none(hint)
    if dataclasses.is_dataclass(inner):
        return [f".{name}" for name in layout(typing.cast(type, inner))]
    if _is_mapping(inner):
        return [f".*{name}" for name in _inside(typing.get_args(inner)[1])]
    return [""]


def _value(hint: Any, arrays: Mapping[str, np.ndarray], name: str) -> Any:
    inner = _not_none(hint)
    below = f"{name}."
    if inner is not hint and name not in arrays and not any(known.startswith(below) for known in arrays):
        return None
    if dataclasses.is_dataclass(inner):
        return restore(typing.cast(type, inner), arrays, below)
    if _is_mapping(inner):
        keys = dict.fromkeys(known[len(below) :].split(".")[0] for known in arrays if known.startswith(below))
        return {key: _value(typing.get_args(inner)[1], arrays, below + key) for key in keys}
    if name not in arrays:
        raise DataError(f"results lack {name}; delete them and run the same command again")
    value = arrays[name]
    if typing.get_origin(inner) is tuple:
        return tuple(value.tolist())
    return inner(value.item()) if inner in (bool, int, float, str) else value


def _is_mapping(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _not_none(hint: Any) -> Any:
    """T of T | None, any other type as it is."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    (inner,) = (option for option in typing.get_args(hint) if option is not type(None))
    return inner


def save_arrays(path: Path, arrays: Arrays, *, compressed: bool = True) -> None:
    """Write a `.npz`, atomically, with a checksum as the archive's comment. Raises `StorageError`."""
    with new_file(path) as file:
        (np.savez_compressed if compressed else np.savez)(file, allow_pickle=False, **arrays)
        file.seek(-2, 2)  # the length of the comment ends an archive
        file.write(CHECKSUM_BYTES.to_bytes(2, "little"))
        file.flush()
        file.write(digest(np.memmap(file.name, np.uint8, "r")).encode())


def save_described(path: Path, result: Any, record: Mapping[str, Any]) -> None:
    """Write a dataclass as `.npz`, and `record` as JSON beside it. Raises `StorageError`."""
    arrays, described = flatten(result), path.with_suffix(".json")
    # Without its record first: a kill between the two writes must not leave new arrays under an old description.
    described.unlink(missing_ok=True)
    save_arrays(path, arrays)
    write_json(described, dict(record))


def record_beside(path: Path) -> dict[str, Any]:
    """The JSON beside results; empty where it or they are not there. Raises `DataError` naming a damaged file."""
    described = path.with_suffix(".json")
    return read_json(described) if path.exists() and described.exists() else {}


def load_arrays(path: Path) -> Arrays:
    """Read what `save_arrays` wrote. Raises `DataError` naming a file that is missing, or damaged anywhere.

    The checksum is compared before anything is unpacked.
    """
    data = read_bytes(path)
    try:
        if digest(data[:-CHECKSUM_BYTES]).encode() != data[-CHECKSUM_BYTES:]:
            raise ValueError("its checksum differs")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MOST_UNPACKED * len(data) + ALWAYS_UNPACKED:
                raise ValueError("it unpacks to far more than arrays of results do")
            return {
                name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
                for name in archive.namelist()
            }
    except Exception as error:  # whatever an archive makes zipfile, zlib and numpy raise
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} is damaged ({reason}); delete it and run the same command again") from error


def load_result(kind: type[R], path: Path) -> R:
    """The dataclass that was flattened and saved as `path`. Raises `DataError` naming the file."""
    arrays = load_arrays(path)
    with reading(path):
        return restore(kind, arrays)


def save_mapped(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` that `load_mapped` reads: its checksum stands behind the values. Raises `StorageError`."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    data = buffer.getvalue()
    write_bytes(path, data + digest(data).encode())


def load_mapped(path: Path) -> np.ndarray:
    """The array that `save_mapped` wrote, on disk, after one pass over it. Raises `DataError` naming a damaged file."""
    try:
        whole = np.memmap(require_file(path), np.uint8, "r")
        if len(whole) < CHECKSUM_BYTES or digest(whole[:-CHECKSUM_BYTES]) != whole[-CHECKSUM_BYTES:].tobytes().decode():
            raise ValueError("its checksum differs")
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({error}); delete it and run the same command again") from error
    return array
