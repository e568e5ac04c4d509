"""Seals: a checksum inside a record, over all the rest of it, so that no damage to a text goes unnoticed.

The checksum is XXH3 (64 bits), as 16 hexadecimal digits. A JSON object has it as its last entry, `"checksum"`, taken
over the text with zeros in its place; a line of a `.jsonl` file is such an object. A YAML file has it as a comment in
its last line, `# checksum: ...`, taken over all lines before. An archive of arrays (`.npz`) has it as the archive's
comment, over all bytes before. Nothing here touches the disk; `crosscoder.files` does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from numpy.typing import NDArray

from crosscoder import _core

CHECKSUM_BYTES = 16
_UNSIGNED = "0" * CHECKSUM_BYTES
_JSON_END = re.compile(rb'"checksum": "([0-9a-f]{16})"\s*\}\s*')
_YAML_END = re.compile(rb"# checksum: ([0-9a-f]{16})\n")
_LONGEST_END = 64


class BrokenSealError(ValueError):
    """A text that is not as it was sealed; the message says in what, as the end of "FILE ..."."""


def digest(data: bytes | NDArray[Any]) -> str:
    """XXH3 of bytes, or of an array's in row-major order, 16 hexadecimal digits."""
    return f"{_core.xxh3_64(data):016x}"


def seal_json(record: Mapping[str, Any], indent: int | None = None) -> bytes:
    """A record as JSON, one line without `indent`, with its checksum. Raises `ValueError` for NaN and infinity."""
    unsigned = json.dumps({**record, "checksum": _UNSIGNED}, indent=indent, allow_nan=False).encode() + b"\n"
    head, _, tail = unsigned.rpartition(_UNSIGNED.encode())
    return head + digest(unsigned).encode() + tail


def open_json(data: bytes) -> dict[str, Any]:
    """What `seal_json` was given. The checksum is compared first: nothing else than what was sealed is parsed.

    Raises `BrokenSealError`, also for what is sealed and no JSON object: of numbers beyond double precision, say.
    """
    found = _end(_JSON_END, data)
    if found is None:
        raise BrokenSealError("has no checksum at its end: it is cut off, damaged, or of an earlier release")
    if digest(data[: found[0]] + _UNSIGNED.encode() + data[found[1] :]) != data[slice(*found)].decode():
        raise BrokenSealError("is damaged, or was changed by hand (its checksum differs)")
    try:
        record = json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise BrokenSealError(f"is not readable JSON ({error})") from error
    if not isinstance(record, dict):
        raise BrokenSealError("holds no JSON object")
    record.pop("checksum", None)
    return record


def seal_yaml(text: str) -> bytes:
    """A YAML text whose last line ends, with its checksum below."""
    data = text.encode()
    return data + f"# checksum: {digest(data)}\n".encode()


def is_sealed_yaml(data: bytes) -> bool:
    """Whether a YAML file has a checksum in its last line."""
    return _end(_YAML_END, data) is not None


def open_yaml(data: bytes) -> bytes:
    """What `seal_yaml` was given. Raises `BrokenSealError`."""
    found = _end(_YAML_END, data)
    if found is None:
        raise BrokenSealError("has no checksum in its last line: it is cut off, damaged, or of an earlier release")
    text = data[: found[0] - len("# checksum: ")]
    if digest(text) != data[slice(*found)].decode():
        raise BrokenSealError("is damaged, or was changed by hand (the checksum in its last line differs)")
    return text


def _end(pattern: re.Pattern[bytes], data: bytes) -> tuple[int, int] | None:
    """Where the checksum stands, if the text ends as `pattern`."""
    start = max(0, len(data) - _LONGEST_END)
    found = re.search(pattern.pattern + rb"\Z", data[start:])
    return None if found is None else (start + found.start(1), start + found.end(1))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value
