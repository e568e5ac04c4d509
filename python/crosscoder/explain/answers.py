"""Answers on disk: one JSON record a line, only ever appended to, so that what was paid for is not asked again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from crosscoder.errors import DataError
from crosscoder.files import explained_write_errors, make_folder
from crosscoder.progress import warn

Record = dict[str, Any]


def key_of(prompt: str, model: str, version: int) -> str:
    """What an answer is filed under. The endpoint is not in it: the same model may move."""
    return hashlib.sha256(json.dumps([version, model, prompt]).encode()).hexdigest()


class Answers:
    """The records of a file, by key. `add` may be called from several threads."""

    def __init__(self, path: Path) -> None:
        """Read what is there; the torn last line of a killed process is dropped. Raises `DataError`, `StorageError`."""
        self.path = path
        self._lock = threading.Lock()
        self._records: dict[str, Record] = {}
        self._tokens: dict[str, tuple[int, int]] = {}
        if path.exists():
            self._load()

    def _load(self) -> None:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror}); its permissions?") from error
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with explained_write_errors(self.path):
                os.truncate(self.path, whole)
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            try:
                self._keep(json.loads(line))
            except (ValueError, LookupError, TypeError):
                warn(f"{self.path}: line {number} is damaged; what it answered is asked again")

    def __len__(self) -> int:
        return len(self._records)

    def find(self, key: str, max_output: int) -> Record | None:
        """The record, unless it is of a missing answer and a longer one is allowed now."""
        with self._lock:
            record = self._records.get(key)
        if record is not None and record["missing"] is not None and record["max_output"] < max_output:
            return None
        return record

    def add(self, record: Record) -> None:
        """Append, durably. Raises `StorageError`."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._lock, explained_write_errors(self.path):
            make_folder(self.path.parent)
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._keep(record)

    def tokens_of(self, model: str) -> tuple[int, int]:
        """Tokens in and out that all answers of a model took, tries that were no answers included."""
        with self._lock:
            return self._tokens.get(model, (0, 0))

    def _keep(self, record: Record) -> None:
        tokens = self._tokens.get(record["model"], (0, 0))
        self._tokens[record["model"]] = (tokens[0] + record["tokens_in"], tokens[1] + record["tokens_out"])
        self._records[record["key"]] = record
