"""What a store says about itself: its manifest, the checked JSON file that ties its segments together.

The format is in docs/store-format.md.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from crosscoder import _core
from crosscoder.errors import ConfigError, DataError
from crosscoder.files import read_json, write_json

FORMAT = "crosscoder-activations"
FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
BITS_PER_VALUE = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}
"""Size of a stored activation; int8 and int4 have their scales beside it."""
SCALE_GROUP = {"int8": 256, "int4": 32}
"""Neighbouring channels of one (token, snapshot) that share a scale (docs/performance.md says why)."""

_MUST_BE = {
    "d_model": "a whole number from 1 to 4,194,304",
    "shard_rows": "whole numbers of at least 1, one a shard",
    "snapshots": "1 to 999 names, each of 1 to 948 bytes in UTF-8",
}

_KEYS = ("format", "format_version", "byte_order", "d_model", "dtype", "scale_group", "shard_rows", "snapshots")


def scale_group(dtype: str, d_model: int) -> int:
    """Channels that share a scale in a new store; 0 for the dtypes without scales."""
    return min(SCALE_GROUP[dtype], d_model) if dtype in SCALE_GROUP else 0


def new_manifest(
    names: Sequence[str],
    d_model: int,
    dtype: str,
    shard_rows: Sequence[int],
    source: dict[str, Any] | None = None,
    contents: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The manifest of a new store. Raises `ConfigError` for what no store can have."""
    if dtype not in BITS_PER_VALUE:
        raise ConfigError(f"dtype must be one of {', '.join(BITS_PER_VALUE)}, not {dtype!r}")
    if len(set(names)) != len(names):
        raise ConfigError(f"a snapshot is named twice in {', '.join(map(str, names))}; each needs a name of its own")
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "byte_order": "little",
        "d_model": d_model,
        "dtype": dtype,
        "scale_group": scale_group(dtype, d_model),
        "shard_rows": [int(rows) if int(rows) == rows else rows for rows in shard_rows],
        "snapshots": list(names),
        **({"contents": dict(contents)} if contents else {}),
        "source": source or {},
    }
    for key in _problems(manifest):
        wanted = _MUST_BE.get(key, "as docs/store-format.md says")
        raise ConfigError(f"{key} must be {wanted}, not {manifest[key]!r:.200}")
    return manifest


def reconciled(path: Path, existing: dict[str, Any], wanted: dict[str, Any], begun: Collection[str]) -> dict[str, Any]:
    """The manifest of the store in `path` with the snapshots of `wanted` that it has not yet added at the end.

    `begun`: the snapshots of which the store has activations; what these were made from is not changed any more. A
    model that shares such a snapshot, with the same content, is the same, whatever its folder is called now.
    What an older store's source does not say counts as equal. Raises `ConfigError` naming each thing that differs, with
    both values, if it is a store of something else.
    """
    there, now = existing.get("contents", {}), wanted.get("contents", {})
    known = [name for name in begun if name in there and name in now]
    other = [name for name in known if there[name] != now[name]]
    if known and not other and "model" in wanted["source"]:
        model = existing["source"].get("model", wanted["source"]["model"])
        wanted = {**wanted, "source": {**wanted["source"], "model": model}}
    old, new = ({**m, **{f"source {key}": value for key, value in m["source"].items()}} for m in (existing, wanted))
    different = [
        f"{key.removeprefix('source ')}: {_shown(old[key])} there, {_shown(new[key])} now"
        for key in old
        if key not in ("snapshots", "contents", "source", "scale_group") and key in new and old[key] != new[key]
    ]
    if other:
        different.append(f"other weights or another configuration under the names {', '.join(other)}")
    gone = [key for key in existing["source"] if key not in wanted["source"]]
    if different or gone:
        raise ConfigError(
            f"{path} already holds other activations ({'; '.join(different + [f'{key} there' for key in gone])}); "
            "choose another folder or delete that one"
        )
    added = [name for name in wanted["snapshots"] if name not in existing["snapshots"]]
    # Of activations that an older release stored it is not known, and not made up here.
    contents = {**there, **{name: content for name, content in now.items() if name not in begun}}
    changed = {"snapshots": existing["snapshots"] + added, **({"contents": contents} if contents else {})}
    return {**existing, **changed}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def row_bytes(dtype: str, d_model: int, group: int) -> int:
    """Bytes of one token's activation in one snapshot, scales included."""
    return -(-d_model * BITS_PER_VALUE[dtype] // 8) + (2 * -(-d_model // group) if group else 0)


def identity(manifest: dict[str, Any]) -> int:
    """What ties segments to a store: a hash of all that its segments have in common."""
    fixed = {key: manifest[key] for key in ("d_model", "dtype", "scale_group", "shard_rows", "source")}
    return _core.xxh3_64(json.dumps(fixed, sort_keys=True).encode())


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of the store in folder `path`, with its checksum, atomically. Raises `StorageError`."""
    write_json(path / MANIFEST_FILE, manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """The checked manifest, without its checksum. Raises `DataError` naming the file and what is wrong in it."""
    file = path / MANIFEST_FILE
    if not file.exists():
        raise DataError(f"{path} is not an activation store: it has no {MANIFEST_FILE}")
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise DataError(f"{file} is not the manifest of an activation store")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise DataError(
            f"{file} has format version {version!r}, this release reads {FORMAT_VERSION}; "
            f"{'collect the activations again' if version == 1 else 'upgrade crosscoder, or collect again'}"
        )
    problems = _problems(manifest)
    if problems:
        raise DataError(f"{file} is malformed: bad {', '.join(problems)}; restore it or collect again")
    return manifest


def _is_name(value: Any) -> bool:
    try:
        return isinstance(value, str) and 0 < len(value.encode()) <= 948
    except UnicodeEncodeError:
        return False


def _is_group(group: Any, dtype: Any, d_model: Any) -> bool:
    if not isinstance(group, int) or isinstance(group, bool):
        return False
    if not isinstance(dtype, str) or dtype not in SCALE_GROUP:
        return group == 0
    whole_bytes = dtype != "int4" or group % 2 == 0 or (isinstance(d_model, int) and group >= d_model)
    return 0 < group <= 1 << 22 and whole_bytes


def _are_contents(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(content, str) for content in value.values())


def _problems(manifest: dict[str, Any]) -> list[str]:
    def counts(value: Any, most: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most

    dtype, group = manifest.get("dtype"), manifest.get("scale_group")
    rows, names = manifest.get("shard_rows"), manifest.get("snapshots")
    fine = {
        "byte_order": manifest.get("byte_order") == "little",
        "d_model": counts(manifest.get("d_model"), 1 << 22),
        "dtype": isinstance(dtype, str) and dtype in BITS_PER_VALUE,
        "scale_group": _is_group(group, dtype, manifest.get("d_model")),
        "shard_rows": isinstance(rows, list) and bool(rows) and all(counts(count, 1 << 40) for count in rows),
        "snapshots": isinstance(names, list)
        and 0 < len(names) < 1000
        and all(_is_name(name) for name in names)
        and len(set(names)) == len(names),
        "contents": "contents" not in manifest or _are_contents(manifest["contents"]),
        "source": isinstance(manifest.get("source"), dict),
    }
    unknown = sorted(set(manifest) - {*_KEYS, "contents", "source"})
    return [key for key, good in fine.items() if not good] + [f"key {key!r}" for key in unknown]
