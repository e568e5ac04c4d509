"""From a text to the tokens of a run: what is read, what is dropped, what is left out; nothing of it silently."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crosscoder.activations.collect import load_trunk
from crosscoder.activations.norms import token_norms
from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.text import Document, read_documents, require_text, split_documents, text_identity
from crosscoder.activations.tokens import TokenSet, count_tokens, pack
from crosscoder.activations.trunk import Trunks
from crosscoder.errors import ConfigError, DataError

SPLITS = ("train", "heldout")
DEFAULT_CONTEXT = 128
DEFAULT_HELDOUT = 0.2
_BATCH = 512


@dataclass(frozen=True)
class CorpusSettings:
    """How the tokens of a run are made. None: not asked for, so the default, or what a run with tokens has."""

    text: str | None = None
    context: int | None = None
    by_document: bool | None = None
    heldout_fraction: float | None = None
    tokens: int | None = None
    seed: int = 0
    leave_out_ids: tuple[int, ...] = ()
    leave_out_positions: int = 0
    leave_out_norm: float | None = None

    def __post_init__(self) -> None:
        """Raises `ConfigError` for what cannot work."""
        fraction, norm = self.heldout_fraction, self.leave_out_norm
        if fraction is not None and not 0 < fraction < 1:
            raise ConfigError(f"--heldout-fraction is {fraction}; it must be above 0 and under 1")
        if self.context is not None and self.context < 2:
            raise ConfigError(f"--context is {self.context} tokens; it must be at least 2")
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"--tokens is {self.tokens}; it must be at least 1")
        if norm is not None and not (math.isfinite(norm) and norm > 1):
            raise ConfigError(f"--leave-out-norm is {norm:g} median norms; it must be above 1")
        for name, least in (("--leave-out-positions", self.leave_out_positions), ("--seed", self.seed)):
            if least < 0:
                raise ConfigError(f"{name} is {least}; it must be 0 or more")
        if any(number < 0 for number in self.leave_out_ids):
            raise ConfigError(f"--leave-out-ids has {min(self.leave_out_ids)}; ids of tokens are 0 or more")

    def source(self) -> dict[str, Any]:
        """What a set of tokens says of itself. Raises `DataError` if there is no such text."""
        if self.text is None:
            raise DataError("name a text with --text")
        return {
            "text": self.text,
            "content": text_identity(self.text),
            "context": self.context or DEFAULT_CONTEXT,
            "by_document": bool(self.by_document),
            "heldout_fraction": DEFAULT_HELDOUT if self.heldout_fraction is None else self.heldout_fraction,
            "tokens": self.tokens,
            "seed": self.seed,
            "left_out": self.left_out(),
        }

    def left_out(self) -> dict[str, Any]:
        """What `--leave-out-...` asks for, in JSON."""
        asked = {"ids": sorted(self.leave_out_ids), "positions": self.leave_out_positions, "norm": self.leave_out_norm}
        return {name: value for name, value in asked.items() if value}

    def differences(self, source: dict[str, Any], context: int) -> list[str]:
        """What is asked for and is not what the tokens were made with, in words; empty: all as asked."""
        wanted: dict[str, Any] = {
            "context": self.context,
            "by_document": self.by_document,
            "heldout_fraction": self.heldout_fraction,
            "tokens": self.tokens,
            "left_out": self.left_out() or None,
        }
        have = {"context": context, **source}
        if "seed" in source:
            wanted["seed"] = self.seed
        found = [
            f"{name.replace('_', '-')}: {have.get(name, 'not recorded')} there, {value} now"
            for name, value in wanted.items()
            if value is not None and have.get(name, "not recorded") != value
        ]
        if self.text is not None and source.get("content") != text_identity(self.text):
            same = source.get("text") == self.text
            now = "the same file or folder with another content" if same else self.text
            found.insert(0, f"text: {source.get('text', 'not recorded')} there, {now} now")
        return found


@dataclass
class _Read:
    """Documents of a text, and what was dropped of it."""

    documents: list[Document] = field(default_factory=list)
    n_empty: int = 0
    n_repeated: int = 0
    n_tokens: int = 0
    stopped: bool = False


def make_tokens(settings: CorpusSettings, snapshots: SnapshotSet) -> dict[str, TokenSet]:
    """Tokens of both parts of the text, split by whole documents; prints one line that says what became of the text.

    Raises `DataError` for a text that cannot be read or is too short, `ConfigError` for settings that cannot work.
    """
    source, tokenizer = settings.source(), snapshots.load_tokenizer()
    if settings.leave_out_positions >= source["context"]:
        raise ConfigError(
            f"--leave-out-positions {settings.leave_out_positions} leaves nothing of sequences of {source['context']} "
            "tokens; it must be less than --context"
        )
    read = _read(str(settings.text), settings.tokens, tokenizer)
    fraction = source["heldout_fraction"]
    rest = (1 - fraction) / 2
    split = split_documents(read.documents, settings.seed, (rest, rest, fraction))
    parts = {"train": split.language_model + split.train, "heldout": split.heldout}
    made = {
        name: pack(part, tokenizer, source["context"], snapshots.model, by_document=source["by_document"])
        for name, part in parts.items()
    }
    print(_account(read, made, settings))
    return {name: _without(dataclasses.replace(tokens, source=source), settings) for name, tokens in made.items()}


def leave_out_by_norm(
    tokens: dict[str, TokenSet], settings: CorpusSettings, snapshots: SnapshotSet, model_dtype: str, device: str
) -> dict[str, TokenSet]:
    """`tokens` without those whose norm at the last snapshot is `leave_out_norm` times the median or more.

    The last one, because norms like these grow in training; the same tokens are left out of all snapshots.
    """
    if settings.leave_out_norm is None:
        return tokens
    last = snapshots.n_snapshots - 1
    model = load_trunk(snapshots, last, model_dtype, device)
    trunks = Trunks([model], snapshots.layer, snapshots.site, snapshots.module)
    norms = {name: token_norms(trunks, part, 64, device) for name, part in tokens.items()}
    median = float(np.median(norms["train"][tokens["train"].stored_SC]))
    made = {}
    for name, part in tokens.items():
        huge_SC = norms[name] >= settings.leave_out_norm * median
        made[name] = _with_left_out(part, huge_SC & (part.ids != part.end_of_text))
        n = int((huge_SC & part.stored_SC).sum())
        print(
            f"{name}: {n:,} tokens left out, of a norm of {settings.leave_out_norm * median:.4g} or more at "
            f"{snapshots.revisions[last]}"
        )
    return made


def _read(text: str, most: int | None, tokenizer: Any) -> _Read:
    read, seen = _Read(), set()
    characters = 0
    for batch in _batches(read_documents(text)):
        kept: list[Document] = []
        for document in batch:
            if not document.text.strip():
                read.n_empty += 1
            elif document.text in seen:
                read.n_repeated += 1
            else:
                seen.add(document.text)
                kept.append(document)
        if most is None:
            read.documents += kept
            characters += sum(len(document.text) for document in kept)
            continue
        for document, n in zip(kept, count_tokens([document.text for document in kept], tokenizer), strict=True):
            read.documents.append(document)
            characters += len(document.text)
            read.n_tokens += n
            if read.n_tokens >= most:
                read.stopped = True
                break
        if read.stopped:
            break
    require_text(text, characters)
    return read


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _account(read: _Read, made: dict[str, TokenSet], settings: CorpusSettings) -> str:
    sizes = ", ".join(f"{name} {tokens.n_tokens:,}" for name, tokens in made.items())
    dropped = [
        f"{count:,} {what}"
        for count, what in ((read.n_empty, "empty documents"), (read.n_repeated, "that occur before"))
        if count
    ]
    tails = sum(tokens.n_dropped for tokens in made.values())
    if tails:
        dropped.append(f"{tails:,} tokens at the ends, too few for a sequence")
    limit = f"; reading stopped at --tokens {settings.tokens:,}, there may be more" if read.stopped else ""
    return (
        f"text: {len(read.documents):,} documents, {sum(t.n_tokens for t in made.values()):,} tokens ({sizes}) in "
        f"sequences of {made['train'].context}; dropped: {', '.join(dropped) or 'nothing'}{limit}"
    )


def _without(tokens: TokenSet, settings: CorpusSettings) -> TokenSet:
    """`tokens` without the ids and positions that are to be left out."""
    left_out = np.zeros(tokens.ids.shape, dtype=np.bool_)
    if settings.leave_out_ids:
        left_out |= np.isin(tokens.ids, settings.leave_out_ids)
    left_out[:, : settings.leave_out_positions] = True
    left_out &= tokens.ids != tokens.end_of_text
    return _with_left_out(tokens, left_out) if settings.left_out() else tokens


def _with_left_out(tokens: TokenSet, left_out: np.ndarray) -> TokenSet:
    before = tokens.left_out
    return dataclasses.replace(tokens, left_out=left_out if before is None else before | left_out)
