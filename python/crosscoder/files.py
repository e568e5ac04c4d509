"""Writing files so that a reader sees the whole of them or nothing, whenever the writer is killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from crosscoder.errors import DataError, StorageError

_TEMPORARY = ".tmp-"


def _explain(error: OSError, path: Path) -> StorageError:
    reasons = {
        errno.ENOSPC: "the disk is full; free some space and run the same command again",
        errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
        errno.EROFS: "the file system is read-only; choose another folder with --out",
        errno.EACCES: "permission denied; choose a folder that you can write to with --out",
        errno.EPERM: "permission denied; choose a folder that you can write to with --out",
        errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder with --out",
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
        with temporary.open("wb") as file:
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


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on the file at `path` (made if need be); waits for it. The system drops it with the process."""
    with explained_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `DataError` naming the file where it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON ({error}); restore or delete it") from error


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


def remove_folder(path: Path) -> None:
    """Delete a folder so that it is never seen half-deleted: renamed first."""
    old = path.with_name(f"{_TEMPORARY}old-{path.name}")
    with explained_write_errors(path):
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        shutil.rmtree(old, ignore_errors=True)
