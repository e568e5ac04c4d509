"""Tensors in the safetensors format, written one after the other: no copy of them all in memory.

The bytes are those of `safetensors.torch.save`; reading is left to that package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crosscoder.files import new_file
from crosscoder.seals import digest

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_RANK = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
"""The format's order of dtypes; the last come first, so that every tensor is aligned."""
_WRITTEN_AT_ONCE = 1 << 26


def checksum(tensor: Tensor) -> str:
    """XXH3 of a tensor's bytes in row-major order, 16 hexadecimal digits."""
    return digest(_bytes(tensor))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Write tensors of any device to `path`, complete or not at all; returns their checksums by name.

    One tensor at a time is on the host, where it is not there already. Raises `StorageError`.
    """
    order = sorted(tensors, key=lambda name: (-_RANK.index(_NAMES[tensors[name].dtype]), name))
    with new_file(path) as file:
        file.write(_header({name: tensors[name] for name in order}, metadata))
        found = {name: _write(file, tensors[name]) for name in order}
    return {name: found[name] for name in tensors}


def _write(file: BinaryIO, tensor: Tensor) -> str:
    data = _bytes(tensor)
    for first in range(0, len(data), _WRITTEN_AT_ONCE):
        file.write(data[first : first + _WRITTEN_AT_ONCE].data)
    return digest(data)


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """(n,) the bytes of a tensor, not copied where it lies on the CPU, contiguous."""
    host = tensor.detach().cpu().contiguous().reshape(-1)
    data: NDArray[np.uint8] = host.view(torch.uint8).numpy()
    return data


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
