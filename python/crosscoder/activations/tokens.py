"""The tokens that all snapshots read: documents packed into rows of one length.

Shapes: S rows (sequences), C context length in tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crosscoder import files
from crosscoder.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = 0
"""Id of Pythia's end-of-text token: beginning, end and padding in one."""

_FORMAT = "crosscoder-tokens"
_VERSION = 1
_BATCH_CHARACTERS = 4_000_000
_ARRAYS = ("ids", "document")


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Packed tokens, and which document each comes from. `pack` makes one.

    Raises `DataError` where the arrays are not two `(S, C)` int32 arrays of one shape, or where an entry of
    `document` has no name.
    """

    ids: np.ndarray
    """Token ids, `(S, C)` int32."""
    document: np.ndarray
    """Index into `names` of the document that each token belongs to, `(S, C)` int32."""
    names: list[str]
    """Document names, in the order of packing (a document that fell into the dropped tail keeps its name)."""
    tokenizer: str
    """Folder or hub name of the tokenizer; for readers, not part of the fingerprint (folders may move)."""
    end_of_text: int = END_OF_TEXT
    """Id that begins each document and fills rows up. Crosscoders never see activations at its positions."""
    left_out: np.ndarray | None = None
    """(S, C) bool: further tokens whose activations are not stored (the model reads them all the same)."""
    source: dict[str, Any] = field(default_factory=dict)
    """What the tokens were made of and how (JSON); not part of the fingerprint."""
    n_dropped: int = 0
    """Tokens at the end of the text that did not fill a row, of the call of `pack` that made this."""

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            array = getattr(self, name)
            if array.dtype != np.int32 or array.ndim != 2 or array.shape != self.ids.shape:
                raise DataError(
                    f"TokenSet.{name} must be int32 of shape (sequences, context) like ids; "
                    f"it is {array.dtype} {array.shape}, ids {self.ids.shape}"
                )
        if self.left_out is not None and (self.left_out.dtype != np.bool_ or self.left_out.shape != self.ids.shape):
            raise DataError(f"TokenSet.left_out must be bool of shape {self.ids.shape}")
        if self.ids.size == 0:
            raise DataError("a TokenSet needs at least one full row of tokens")
        if self.document.min() < 0 or self.document.max() >= len(self.names):
            raise DataError(f"TokenSet.document points outside the {len(self.names)} document names")

    @property
    def n_sequences(self) -> int:
        """S."""
        return int(self.ids.shape[0])

    @property
    def context(self) -> int:
        """C, in tokens."""
        return int(self.ids.shape[1])

    @property
    def n_tokens(self) -> int:
        """S * C, end-of-text tokens included."""
        return int(self.ids.size)

    @property
    def stored_SC(self) -> np.ndarray:
        """(S, C) bool: tokens whose activations are stored: all but end-of-text and those left out."""
        stored: np.ndarray = self.ids != self.end_of_text
        return stored if self.left_out is None else stored & ~self.left_out

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over token ids, document indices, shape and document names.

        Two sets agree in it exactly when they hold the same tokens of the same documents in the same rows:
        another corpus, tokenizer, split or context gives another fingerprint.
        """
        digest = hashlib.sha256()
        settings: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "shape": self.ids.shape,
            "names": self.names,
        }
        if self.end_of_text != END_OF_TEXT:
            settings["end_of_text"] = self.end_of_text
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for name in _ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name), dtype="<i4").tobytes())
        if self.left_out is not None:
            digest.update(b"left out" + np.packbits(self.left_out).tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write `ids.npy`, `document.npy` and `tokens.json` into `folder`, which appears whole or not at all.

        Raises `StorageError` where writing fails.
        """
        with files.new_folder(folder) as temporary:
            checksums = {}
            arrays = {name: getattr(self, name).astype("<i4", copy=False) for name in _ARRAYS}
            if self.left_out is not None:
                arrays["left_out"] = self.left_out
            for name, array in arrays.items():
                path = temporary / f"{name}.npy"
                np.save(path, array, allow_pickle=False)
                checksums[path.name] = _sha256(path)
            files.write_json(
                temporary / "tokens.json",
                {
                    "format": _FORMAT,
                    "version": _VERSION,
                    "n_sequences": self.n_sequences,
                    "context": self.context,
                    "tokenizer": self.tokenizer,
                    "end_of_text": self.end_of_text,
                    "fingerprint": self.fingerprint,
                    "sha256": checksums,
                    "source": self.source,
                    "names": self.names,
                },
            )

    @classmethod
    def load(cls, folder: Path) -> TokenSet:
        """Read what `save` wrote.

        Raises `DataError`, naming the file, where the folder is absent, damaged, of another kind or of a
        newer version.
        """
        remedy = f"delete {folder} and make it again"
        path = folder / "tokens.json"
        header = files.read_json(path)
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise DataError(f"{path} does not describe a set of tokens ({_FORMAT}); name another folder")
        if header.get("version") != _VERSION:
            raise DataError(
                f"{path} has format version {header.get('version')}, this crosscoder reads {_VERSION}; "
                "upgrade crosscoder"
            )
        arrays: dict[str, np.ndarray] = {}
        known = header.get("sha256")
        if not isinstance(known, dict) or not {f"{name}.npy" for name in _ARRAYS} <= known.keys():
            raise DataError(f"{path} is damaged (sha256 does not name the arrays); {remedy}")
        left_out = ("left_out",) if "left_out.npy" in known else ()
        for name in (*_ARRAYS, *left_out):
            file = files.require_file(folder / f"{name}.npy")
            try:
                if _sha256(file) != known[file.name]:
                    raise DataError(f"{file} is damaged (its checksum differs); {remedy}")
                arrays[name] = np.load(file, allow_pickle=False)
            except (OSError, ValueError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"{file} cannot be read ({error}); {remedy}") from error
        names, tokenizer, end = header.get("names"), header.get("tokenizer"), header.get("end_of_text", END_OF_TEXT)
        if not isinstance(tokenizer, str) or not isinstance(names, list) or not isinstance(end, int):
            raise DataError(f"{path} is damaged (names, tokenizer or end_of_text is missing); {remedy}")
        source = header.get("source", {})
        if not isinstance(source, dict):
            raise DataError(f"{path} is damaged (source is not an object); {remedy}")
        names = [str(name) for name in names]
        tokens = cls(arrays["ids"], arrays["document"], names, tokenizer, end, arrays.get("left_out"), source)
        if tokens.fingerprint != header.get("fingerprint"):
            raise DataError(f"{path} is damaged (its fingerprint is not that of the arrays); {remedy}")
        return tokens


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Groups of documents of a few million characters, so that memory does not grow with the corpus."""
    batch: list[tuple[str, str]] = []
    characters = 0
    for name, text in documents:
        batch.append((name, text))
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def pack(
    documents: Iterable[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    tokenizer_name: str | None = None,
    *,
    by_document: bool = False,
) -> TokenSet:
    """Tokenize `(name, text)` pairs and cut them into rows of `context` tokens.

    The stream is `[EOS] document 0 [EOS] document 1 …`; rows are cut from it without regard to documents, as
    Pythia's data are, and the tail that is shorter than a row is dropped. With `by_document` each document starts
    a row of its own, goes on in as many as it needs, and the last is filled up with end-of-text. Where the
    tokenizer has a token for the beginning of a text (Llama), that is the one. `tokenizer_name` is what
    `TokenSet.tokenizer` says (default: where the tokenizer was loaded from).

    Raises `ConfigError` for a context under 2 or a tokenizer without such a token, and `DataError` where the text
    does not fill one row.
    """
    if context < 2:
        raise ConfigError(f"context is {context} tokens; it must be at least 2")
    end = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if end is None:
        raise ConfigError("the tokenizer has neither a token for the beginning nor one for the end of a text")
    backend = copy_of_backend(tokenizer)
    names: list[str] = []
    ids: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    for batch in _batches(documents):
        encoded = backend.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
        for (name, _), tokens in zip(batch, encoded, strict=True):
            row = np.array([end, *tokens.ids], dtype=np.int32)
            if by_document:
                row = np.concatenate([row, np.full(-len(row) % context, end, dtype=np.int32)])
            ids.append(row)
            owners.append(np.full(len(row), len(names), dtype=np.int32))
            names.append(name)
    total = sum(len(row) for row in ids)
    rows = total // context
    if rows == 0:
        raise DataError(f"the text has {total} tokens, less than one row of {context}; give more text")
    kept = rows * context
    return TokenSet(
        ids=np.concatenate(ids)[:kept].reshape(rows, context),
        document=np.concatenate(owners)[:kept].reshape(rows, context),
        names=names,
        tokenizer=tokenizer_name if tokenizer_name is not None else str(tokenizer.name_or_path),
        end_of_text=int(end),
        n_dropped=total - kept,
    )


def count_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each text, with the one that begins it."""
    encoded = copy_of_backend(tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)
    return [len(tokens.ids) + 1 for tokens in encoded]


def copy_of_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer's Rust core, without padding and truncation, `<|endoftext|>` in a text left as text.

    A copy, because these are settings of the object; the core alone, because the wrapper is far slower.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"{type(tokenizer).__name__} is not a fast tokenizer; use one with a tokenizer.json")
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    copy.encode_special_tokens = True
    return copy
