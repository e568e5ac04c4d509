"""Files that hold text: plain, JSON lines, JSON, parquet; also compressed by gzip, bzip2 or xz.

What a file is, is told by what is in it: by its first bytes, not by its name alone.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from crosscoder.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
"""Of the files that are read from a folder; each may be followed by one of `COMPRESSED`."""
COMPRESSED: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    ".gz": (b"\x1f\x8b", gzip.decompress),
    ".bz2": (b"BZh", bz2.decompress),
    ".xz": (b"\xfd7zXZ\x00", lzma.decompress),
}
_NOT_TEXT = {
    b"\x28\xb5\x2f\xfd": "is compressed by zstandard; unpack it first: zstd -d",
    b"PK\x03\x04": "is a zip archive; unpack it first and name the folder",
    b"%PDF": "is a PDF; extract its text first, for example with pdftotext",
    b"ARROW1": "is an Arrow file; give the saved dataset's folder as dataset:FOLDER, or write it as parquet",
}
COLUMN = "text"


def is_text_file(path: Path) -> bool:
    """Whether a file of a folder is one to read, by its name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in SUFFIXES


def stem(path: Path) -> str:
    """The file's name without the suffixes that say what it is."""
    name = path.name
    for known in (COMPRESSED, SUFFIXES):
        if Path(name).suffix.lower() in known:
            name = Path(name).stem
    return name


def read_texts(path: Path) -> tuple[bool, Iterator[str | None]]:
    """(whether each is a document, the texts of a file): rows of JSON lines, JSON or parquet, or one plain text.

    A row's text is its column `text`; None where that is null. Raises `DataError` naming the file, the line or row and
    what to do, at once or while the texts are read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
        for magic, remedy in _NOT_TEXT.items():
            if start.startswith(magic):
                raise DataError(f"{path} {remedy}")
        if start.startswith(b"PAR1"):
            return True, _parquet(path)
        if path.suffix.lower() == ".parquet":
            raise DataError(f"{path} is not a parquet file, or is damaged; write it again")
        data = path.read_bytes()
        for magic, unpack in COMPRESSED.values():
            data = unpack(data) if start.startswith(magic) else data
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it, for example with iconv") from error
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    rows = _json_rows(path, text)
    return (False, iter([text])) if rows is None else (True, rows)


def _json_rows(path: Path, text: str) -> Iterator[str | None] | None:
    """The rows of JSON lines or of a JSON array; None where the file is plain text."""
    kinds = {suffix.lower() for suffix in path.suffixes}
    first = next((line for line in text.split("\n") if line.strip()), "")
    if ".json" in kinds:
        value = _parsed(text, f"{path}")
        if not isinstance(value, list):
            value = [value]
        return (_text_of(row, f"{path}: entry {number}") for number, row in enumerate(value, start=1))
    if not kinds & {".jsonl", ".ndjson"}:
        try:
            if not isinstance(json.loads(first), dict):
                return None
        except ValueError:
            return None
    lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    return (_text_of(_parsed(line, f"{path}: line {number}"), f"{path}: line {number}") for number, line in lines)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); mend it, or give plain text") from error


def _text_of(row: Any, where: str) -> str | None:
    value = row.get(COLUMN, row) if isinstance(row, dict) else row
    if value is not None and not isinstance(value, str):
        keys = f" (its keys: {', '.join(map(str, row))})" if isinstance(row, dict) else ""
        raise DataError(f"{where} has no text: need a string, or an object with a string {COLUMN!r}{keys}")
    return value


def _parquet(path: Path) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow
            if COLUMN not in columns.names or not (
                pa.types.is_string(kind := columns.field(COLUMN).type) or pa.types.is_large_string(kind)
            ):
                raise DataError(
                    f"{path} has no column {COLUMN!r} of strings (its columns: {', '.join(columns.names)}); rename one"
                )
            for batch in file.iter_batches(columns=[COLUMN], batch_size=1024):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:300]}; write it again") from error
