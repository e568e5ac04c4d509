"""Locks: who works on a folder or writes a file. There is this one kind for all commands and functions.

A lock is the system's (`flock`) on a small file, so it ends with the process, however that ends. Who holds one can take
it again (a verb calls another's function). The file is removed with the lock; what a killed process left of it holds
nobody up. Links are never followed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from crosscoder.errors import BusyError, StorageError, printable
from crosscoder.files import explained_write_errors
from crosscoder.progress import warn

LOCK_FILE = ".lock"
"""In a folder that is worked on."""

_PATIENCE_SECONDS = 0.1

_held: dict[tuple[int, int, str], int] = {}
"""(process, thread, folder) of what is worked on here, and how many calls deep."""
_told: set[int] = set()
"""Devices whose file system has no locks, and of which that was told."""


@contextlib.contextmanager
def working_on(folder: Path, verb: str, *, together: bool = False) -> Iterator[None]:
    """Hold a folder that exists for `verb`, which writes into it. Raises `BusyError` where another command does.

    `together`: commands that share their work (ranks of `collect`), or that only read, hold it beside each other. A
    folder that is not there yet is not held.
    """
    me = (os.getpid(), threading.get_ident(), str(folder.resolve()))
    if me in _held or not folder.is_dir():
        with _counted(me):
            yield
        return
    path = folder / LOCK_FILE
    descriptor, holder = _acquire(path, (fcntl.LOCK_SH if together else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    if descriptor is None:
        raise BusyError(f"{holder} works on {folder}; wait for it to end, or stop it")
    try:
        # Of several that hold it together, one that has ended must not be named.
        process = "one process or several" if together else f"process {os.getpid()}"
        with explained_write_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"crosscoder {verb} ({process})\n".encode(), 0)
        with _counted(me):
            yield
    finally:
        _release(descriptor, path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on the file at `path` (made if need be); waits for it."""
    descriptor, _ = _acquire(path, fcntl.LOCK_EX)
    assert descriptor is not None
    try:
        yield
    finally:
        _release(descriptor, path)


def open_lock(path: Path) -> int:
    """A descriptor of the lock file at `path`, made if need be, its contents left alone.

    Raises `StorageError` where the name is taken by a link or by something else than a file.
    """
    with explained_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            os.close(descriptor)
            raise StorageError(f"{path} should be a lock file of crosscoder's own, and is a link or no file; remove it")
    return descriptor


def take_lock(descriptor: int, path: Path, operation: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> bool:
    """Whether the lock on the open file at `path` could be had; a warning where the file system has no locks."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        device = os.fstat(descriptor).st_dev
        if device not in _told:
            _told.add(device)
            warn(
                f"{path} cannot be locked ({error.strerror}): let only one command at a time work on {path.parent} and "
                "whatever else is on this file system"
            )
    return True


def same_file(descriptor: int, path: Path) -> bool:
    """Whether the open file still has the name `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _acquire(path: Path, operation: int) -> tuple[int | None, str]:
    """The descriptor of the locked file; or None, and who has it."""
    patience = 1
    while True:
        descriptor = open_lock(path)
        try:
            mine = take_lock(descriptor, path, operation)
            holder = "" if mine else printable(os.pread(descriptor, 200, 0).decode(errors="replace").strip())
            if mine and same_file(descriptor, path):
                kept, descriptor = descriptor, -1
                return kept, ""
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        # If it is ours, who had it removed the file between our opening and our locking it: then another file has the
        # name now, or none. If it is not, who has it may be about to remove it.
        if not mine and not patience:
            return None, holder or "another command"
        if not mine:
            patience -= 1
            time.sleep(_PATIENCE_SECONDS)


def _release(descriptor: int, path: Path) -> None:
    """Give the lock back, and remove its file unless others hold it together with us."""
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if same_file(descriptor, path):
                path.unlink()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _counted(me: tuple[int, int, str]) -> Iterator[None]:
    _held[me] = _held.get(me, 0) + 1
    try:
        yield
    finally:
        _held[me] -= 1
        if not _held[me]:
            del _held[me]
