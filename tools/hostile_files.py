"""Is hostile or absurd content of a run's files refused by name, in bounded time and memory?

    python tools/hostile_files.py --folder /tmp/whole --only 'config/*'

A file of each kind is replaced by what no crosscoder wrote: nothing, deep nesting, huge numbers, another type, a
folder, a fifo, a loop of links; records also by forged ones with a right checksum, arrays by pickles, bombs and other
shapes. Each is read as in tools/bit_flips.py, with the same outcomes, but that a forged record which makes sense may be
taken as it stands, and a link to nothing as no file ("same" here). A read of over `SECONDS`, or of more than `MEMORY`,
is a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bit_flips import FAULTS, Tally, add_options, files_of, outcome_of, print_examples, table, whole_copy
from crosscoder.common.arrays import load_arrays
from crosscoder.common.tables import write_table
from crosscoder.files import read_json
from crosscoder.runs import Run
from crosscoder.seals import CHECKSUM_BYTES, digest, open_json, open_yaml, seal_json, seal_yaml
from run_readers import fingerprint, prepare, reader_of

SECONDS = 5.0
MEMORY = 4 << 30
"""Bytes of address space beyond what is mapped when the readers start."""
ABSURD: dict[str, Any] = {
    "null": None, "a list": [0], "an object": {}, "a text": "x", "negative": -1, "huge": 10**30,
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------- content


def anywhere(data: bytes) -> Iterator[tuple[str, bytes]]:
    """What no file should hold."""
    yield "nothing", b""
    yield "half", data[: len(data) // 2]
    yield "twice", data + data
    yield "zeros", bytes(len(data))
    yield "brackets", b"[" * 200_000
    yield "objects", b'{"a":' * 200_000
    yield "digits", b"9" * 200_000
    yield "a list", b"[]"
    yield "an object", b"{}"
    yield "NaN", b"NaN"
    yield "latin", "é".encode("latin-1") * 1000
    yield "lines", b"\n" * 200_000


def sealed_records(record: dict[str, Any], indent: int | None) -> Iterator[tuple[str, bytes]]:
    """A record with each of its entries missing or of another type; and texts that only a forger seals."""
    for name, value in record.items():
        yield f"{name} = nothing", seal_json({k: v for k, v in record.items() if k != name}, indent)
        for what, absurd in ABSURD.items():
            if type(absurd) is not type(value) or absurd != value:
                yield f"{name} = {what}", seal_json({**record, name: absurd}, indent)
    for what, text in (
        ("deep", b'{"a": ' * 100_000 + b"1" + b"}" * 100_000),
        ("infinite", b'{"a": 1e999, "checksum": "0000000000000000"}'),
        ("long", b'{"a": ' + b"9" * 100_000 + b', "checksum": "0000000000000000"}'),
    ):
        yield f"sealed {what}", text.replace(b"0000000000000000", digest(text).encode())


def sealed_options(text: str) -> Iterator[tuple[str, bytes]]:
    """A record of settings with other values."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        key, colon, _ = line.partition(":")
        if not colon:
            continue
        for value in ("[[[[]]]]", ".nan", "-.inf", "1e400", "9" * 5000, "{a: b}", "2001-99-99", "!!python/object:os.x"):
            yield f"{key.strip()} = {value[:9]}", seal_yaml("\n".join([*lines[:number], f"{key}: {value}", ""]))
    yield "sealed deep", seal_yaml("a: " + "[" * 50_000 + "\n")
    yield "sealed laughs", seal_yaml(_laughs())


def _laughs() -> str:
    """A few lines that stand for 10^9 entries."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    return "\n".join([*lines, ""])


def archives(path: Path) -> Iterator[tuple[str, bytes]]:
    """Arrays of other types and shapes, absent ones, pickles, and more zeros than memory has room for."""
    arrays = load_arrays(path)
    yield "a pickle", _npz({**arrays, next(iter(arrays)): np.array([{}], dtype=object)})
    yield "no arrays", _npz({})
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("a.npy", "b.npy"):
            with archive.open(name, "w") as entry:
                for _ in range(700):
                    entry.write(bytes(1 << 20))
    yield "a bomb", _sealed(bomb.getvalue())
    for name, array in arrays.items():
        yield f"{name} = nothing", _npz({key: value for key, value in arrays.items() if key != name})
        yield f"{name} = text", _npz({**arrays, name: np.full(array.shape, "x")})
        yield f"{name} = more dimensions", _npz({**arrays, name: array[None]})
        if array.ndim:
            yield f"{name} = empty", _npz({**arrays, name: array[:0]})
            yield f"{name} = doubled", _npz({**arrays, name: np.concatenate([array, array])})


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return _sealed(out.getvalue())


def _sealed(archive: bytes) -> bytes:
    """As `crosscoder.common.arrays.save_arrays` seals: the checksum is the archive's comment."""
    head = archive[:-2] + CHECKSUM_BYTES.to_bytes(2, "little")
    return head + digest(head).encode()


def tables(path: Path) -> Iterator[tuple[str, bytes]]:
    """Tables with a right checksum and other columns."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path).to_pydict()
    with tempfile.TemporaryDirectory() as folder:

        def written(columns: dict[str, list[Any]]) -> bytes:
            write_table(Path(folder) / "t", columns)
            return (Path(folder) / "t").read_bytes()

        yield "rows = nothing", written({name: values[:0] for name, values in table.items()})
        for name, values in table.items():
            yield f"{name} = nothing", written({key: other for key, other in table.items() if key != name})
            yield f"{name} = text", written({**table, name: ["x"] * len(values)})


def hostile(path: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """What is put in the place of a file, and how."""
    data = path.read_bytes()
    found = [anywhere(data)]
    if path.suffix == ".json" and data.rstrip().endswith(b"}") and b'"checksum": "' in data[-40:]:
        found.append(sealed_records(read_json(path), 2))
    elif path.suffix == ".jsonl":
        lines = data.splitlines(keepends=True)
        record = open_json(lines[-1])
        found.append((what, b"".join(lines[:-1]) + line) for what, line in sealed_records(record, None))
    elif path.suffix == ".yaml":
        found.append(sealed_options(open_yaml(data).decode()))
    elif path.suffix == ".npz":
        found.append(archives(path))
    elif path.suffix == ".parquet":
        found.append(tables(path))
    for contents in found:
        for what, content in contents:
            yield what, lambda path, content=content: path.write_bytes(content)
    yield "a folder", lambda path: path.mkdir()
    yield "a fifo", os.mkfifo
    yield "a loop", lambda path: path.symlink_to(path)
    yield "a link to nothing", lambda path: path.symlink_to("nothing")
    yield "a device", lambda path: path.symlink_to("/dev/zero")


# ---------------------------------------------------------------------------------------------------- reading


def try_all(folder: Path, files: list[Path], show: Callable[[str], object] = lambda line: None) -> dict[str, Tally]:
    """A file of each pattern with every hostile content. The files are as before in the end."""
    prepare(folder)
    run = Run(folder / "run")
    tallies: dict[str, Tally] = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        pattern, read = reader_of(name) or ("", lambda run, path: None)
        kind = f"{pattern} {path.suffix}"
        if kind in tallies:
            continue
        tally = tallies[kind] = Tally(files=1)
        whole = fingerprint(read(run, path))
        aside = folder / "aside"
        shutil.move(path, aside)
        shutil.copyfile(aside, path)
        for what, put in list(hostile(path)):
            _remove(path)
            put(path)
            with _limited(SECONDS):
                outcome, message = outcome_of(read, run, path, whole)
            if outcome == "silent" and ("=" in what or what in ("a loop", "a link to nothing")):
                outcome = "same"
            told = f"{name}, {what}: {message.replace(f'{folder}/', '')[:300]}"
            tally.add(outcome, told)
            if outcome in FAULTS:
                show(f"{outcome}: {told}")
        _remove(path)
        shutil.move(aside, path)
    return tallies


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Interrupt a read that takes longer with a `TimeoutError`."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"it takes over {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    with whole_copy(options.folder) as copy:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        tallies = try_all(copy, files_of(copy, options.only)[0], lambda line: print(line, file=sys.stderr))
    print(table(tallies))
    print_examples(tallies)
    if options.out:
        record = {kind: {**dict(t.outcomes), "examples": t.examples} for kind, t in sorted(tallies.items())}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if any(tally.outcomes[name] for tally in tallies.values() for name in FAULTS) else 0


if __name__ == "__main__":
    sys.exit(main())
