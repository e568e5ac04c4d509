"""Files that several processes write into one store: who writes which, and how a whole one is taken over."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from crosscoder import _core
from crosscoder.errors import DataError
from crosscoder.files import explained_write_errors, make_folder
from crosscoder.locks import open_lock, same_file, take_lock


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Yields True if the file at `path` is this process's to write, False if it is there or another's.

    The claim is a lock on the temporary file, which the system drops with the process: nothing has to be cleaned
    up after a kill. Works between machines where the file system has locks (NFS 4, Lustre with flock).
    """
    make_folder(path.parent)
    temporary = temporary_file(path)
    with explained_write_errors(path), contextlib.suppress(FileNotFoundError):
        found = temporary.lstat()
        if stat.S_ISLNK(found.st_mode) or found.st_nlink > 1:  # of a killed merge: another store's file
            temporary.unlink()
    descriptor = open_lock(temporary)
    try:
        if not take_lock(descriptor, temporary):
            yield False
            return
        # Between open and lock another process may have finished: then this is its file, under its final name.
        mine = same_file(descriptor, temporary)
        if mine and path.exists():
            temporary.unlink()
            mine = False
        try:
            yield mine
        finally:
            if mine and same_file(descriptor, temporary):
                temporary.unlink()
    finally:
        os.close(descriptor)


def temporary_file(path: Path) -> Path:
    """Where the file at `path` is written until it is complete."""
    return path.with_name(f".tmp-{path.name}")


def take(source: _core.SegmentFile, target: Path) -> int:
    """Link or copy a whole segment; 0 if `target` is there already."""
    if target.exists():
        return 0
    damaged = source.damaged_blocks()
    if damaged:
        raise DataError(f"{source.path}: block {damaged[0]} is damaged; collect it again")
    make_folder(target.parent)
    temporary = temporary_file(target)
    with explained_write_errors(target):
        temporary.unlink(missing_ok=True)
        try:
            os.link(source.path, temporary)
        except OSError:
            shutil.copyfile(source.path, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(target)
    return 1
