"""Answers on disk: a sealed JSON record a line, only ever appended to, so that what was paid for is not asked again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from crosscoder.files import explained_write_errors, make_folder, read_bytes, read_lines
from crosscoder.progress import warn
from crosscoder.seals import seal_json

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
        damaged = []
        for number, record in read_lines(self.path):
            try:
                self._keep(record or {})
            except (LookupError, TypeError):
                damaged.append(number)
        if damaged:
            warn(
                f"{self.path}: {len(damaged)} line(s) damaged, or of an earlier release, the first is line "
                f"{damaged[0]}; what they answered is asked again"
            )
        data = read_bytes(self.path)
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with explained_write_errors(self.path):
                os.truncate(self.path, whole)

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
        line = seal_json(record)
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
