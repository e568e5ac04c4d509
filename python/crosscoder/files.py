"""Files that a reader sees whole or not at all, whenever the writer is killed; and sealed records.

Names that this module makes itself (temporary files, locks) are never followed through a link: what a link points to
is another's file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from crosscoder.errors import CrosscoderError, DataError, StorageError
from crosscoder.seals import BrokenSealError, open_json, seal_json

_TEMPORARY = ".tmp-"
MOST_RECORD_BYTES = 1 << 28
"""The largest JSON file that is read: text in memory takes several times its size."""


def _explain(error: OSError, path: Path) -> StorageError:
    reasons = {
        errno.ENOSPC: "the disk is full; free some space and run the same command again",
        errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
        errno.EROFS: "the file system is read-only; choose another folder with --out",
        errno.EACCES: "permission denied; choose a folder that you can write to with --out",
        errno.EPERM: "permission denied; choose a folder that you can write to with --out",
        errno.EEXIST: "a file of that name is there; choose another name",
        errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder with --out",
        errno.ELOOP: "it is a symbolic link, which is not followed; remove it",
    }
    reason = reasons.get(error.errno or 0, error.strerror or str(error))
    return StorageError(f"cannot write {path}: {reason}")


@contextlib.contextmanager
def explained_write_errors(path: Path) -> Iterator[None]:
    """Turn the `OSError` of a failed write into a `StorageError` that names `path` and the remedy."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise _explain(error, path) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> Path:
    """Create `path` and its parents. Raises `StorageError` where that is not possible."""
    with explained_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file, open for writing, that appears at `path` complete, or not at all (temporary name, fsync, rename)."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    with explained_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # What a killed process left there, or a link that somebody put there: never written through.
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, atomically and durably."""
    with new_file(path) as file:
        file.write(data)


def remove_file(path: Path) -> None:
    """Delete a file that may be there, and what a killed `new_file` left of it."""
    with explained_write_errors(path):
        path.unlink(missing_ok=True)
        path.with_name(f"{_TEMPORARY}{path.name}").unlink(missing_ok=True)


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """A whole file. Raises `DataError` naming it where it is missing, unreadable, no file, or has over `most` bytes."""
    try:
        # Without O_NONBLOCK a fifo would be waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise DataError(f"{path} is not a file but a folder, a fifo or a device; remove it")
            if most is not None and found.st_size > most:
                raise DataError(f"{path} has {found.st_size:,} bytes, more than the {most:,} that one may have")
            return file.read()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error


def require_file(path: Path) -> Path:
    """`path`, for readers that open it themselves. Raises `DataError` where it is missing, or no file."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path} does not exist or cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is not a file but a folder, a fifo or a device; remove it")
    return path


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what malformed content of `path` makes Python raise, a missing entry or another type, into a `DataError`
    that names the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, DataError) and str(path) in str(error):
            raise
        reason = str(error) if isinstance(error, CrosscoderError) else repr(error)
        raise DataError(f"{path} is malformed ({reason}); restore it or make it anew") from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as indented JSON, atomically, sealed. NaN and infinity are refused with `ValueError`."""
    write_bytes(path, seal_json(record, indent=2))


def read_json(path: Path, **kinds: type) -> dict[str, Any]:
    """Read what `write_json` wrote, without the checksum.

    `kinds` names entries that must be there, and their types. Raises `DataError` naming the file where it is missing,
    malformed or damaged, or lacks one of them.
    """
    try:
        record = open_json(read_bytes(path, MOST_RECORD_BYTES))
    except BrokenSealError as error:
        raise DataError(f"{path} {error}; restore it or make it anew") from error
    for name, kind in kinds.items():
        value = record.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise DataError(f"{path}: {name!r} is missing or not {_KINDS.get(kind, kind.__name__)}; make it anew")
    return record


_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and record of each line of a file of sealed JSON lines; None for a damaged one.

    A last line that does not end is passed over: a process was killed while it wrote that. Raises as `read_bytes`.
    """
    *lines, rest = read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, start=1):
        yield number, _opened(line)
    if (
        not b'{"'.startswith(rest[:2]) or _opened(rest[:-1]) is not None
    ):  # not cut off: damaged from its start, or its end
        yield len(lines) + 1, None


def _opened(line: bytes) -> dict[str, Any] | None:
    try:
        return open_json(line + b"\n")
    except BrokenSealError:
        return None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` complete, or not at all.

    Yields a temporary sibling to write into; on success everything in it is synced and it is renamed to
    `path` (which is replaced if it exists). After an exception the temporary folder is removed; after a kill
    it is left under a `.tmp-` name and overwritten by the next attempt.
    """
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    with explained_write_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists():
                old = path.with_name(f"{_TEMPORARY}old-{path.name}")
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
                temporary.rename(path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                temporary.rename(path)
            _sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def clear_left_overs(folder: Path) -> None:
    """Delete what killed processes left of temporary files and folders right in `folder`, where no other writes."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        with explained_write_errors(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def remove_folder(path: Path) -> None:
    """Delete a folder so that it is never seen half-deleted: renamed first."""
    old = path.with_name(f"{_TEMPORARY}old-{path.name}")
    with explained_write_errors(path):
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        shutil.rmtree(old, ignore_errors=True)
