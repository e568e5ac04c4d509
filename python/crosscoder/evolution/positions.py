"""Which tokens each feature is active on: its strongest positions, a uniform sample of all, and how they cluster.

Letters: F features, B tokens in a batch, N pairs in a batch, n positions kept a feature, P passages.

All of it is ours. A feature is active on a token if one of its gates is open there. A passage is what the tokens of one
document that stand in one sequence are: the part of a document that the language model sees at once. One pass over the
tokens, in batches of whole sequences. What is kept does not grow with their number (but for 4 bytes a
passage): at most 4 n F entries of 20 or 24 bytes, and less than that again while they are sorted (F = 98,304, n = 64:
1.0 GB measured at the peak; the result has 24 n F bytes, 150 MB).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.evolution.examples import Ints, tokens_in_order

if TYPE_CHECKING:
    from crosscoder.activations.tokens import TokenSet
    from crosscoder.code import SparseCode

N_POSITIONS = 64
_LEAST_PENDING = 1 << 20


@dataclass(frozen=True)
class Places:
    """Up to n positions of every feature; where a feature has fewer, sequence and position are -1 and value 0."""

    value: NDArray[np.float32]
    """(F, n) activation."""
    sequence: NDArray[np.int32]
    """(F, n) index into the TokenSet."""
    position: NDArray[np.int32]
    """(F, n) position in the sequence."""


@dataclass(frozen=True)
class Positions:
    """What one pass over the tokens keeps."""

    n_tokens: int
    """Tokens seen."""
    fired: Ints
    """(F,) tokens on which each feature is active."""
    strongest: Places
    """The strongest positions, the strongest first, of equal ones the earlier in the text."""
    sampled: Places
    """A uniform sample without replacement of the active positions, in random order."""
    passages: Ints
    """(F,) passages with at least one active token."""
    most_in_passage: Ints
    """(F,) the largest number of active tokens in a passage."""
    passage_sizes: NDArray[np.int32]
    """(P,) tokens in each passage."""


class PositionCollector:
    """Keeps positions of every feature while batches go by."""

    def __init__(self, n_features: int, tokens: TokenSet, *, n_positions: int = N_POSITIONS, seed: int = 0) -> None:
        """`seed` draws the uniform sample. Raises `ConfigError` unless `n_positions` is at least 1."""
        if n_positions < 1:
            raise ConfigError(f"cannot keep {n_positions} positions a feature; keep 1 or more")
        self._n_features, self._tokens, self._seed = n_features, tokens, np.uint64(seed)
        self._strongest = _Largest(n_features, n_positions, np.float32)
        self._sampled = _Largest(n_features, n_positions, np.float64)
        self._seen = np.zeros(tokens.n_sequences, dtype=bool)
        self._fired = np.zeros(n_features, dtype=np.int64)
        self._passages = self._fired.copy()
        self._most = self._fired.copy()
        self._sizes: list[NDArray[np.int32]] = []

    def add(self, code: SparseCode, sequence_B: ArrayLike, position_B: ArrayLike) -> None:
        """A batch of whole sequences: its code, and for each of its B tokens the sequence and the position in it.

        Raises `DataError` for another crosscoder's code, tokens that are not the TokenSet's, out of order, or of a
        sequence that continues an earlier batch; `NonFiniteError` for activations that are not finite.
        """
        sequence, position = tokens_in_order(code, sequence_B, position_B)
        self._check(code, sequence, position)
        if not sequence.size:
            return
        row = code.rows().cpu().numpy()
        feature = code.features.cpu().numpy().astype(np.int64)
        value = code.values.detach().float().cpu().numpy()
        if not np.isfinite(value).all():
            raise NonFiniteError(f"an activation in sequence {sequence[row[~np.isfinite(value)][0]]} is not finite")
        self._seen[sequence] = True
        self._fired += np.bincount(feature, minlength=self._n_features)

        place = (sequence << 32) + position
        self._strongest.offer(feature, value, place[row], value)
        self._sampled.offer(feature, _priority(feature, place[row], self._seed), place[row], value)

        document = self._tokens.document[sequence, position]
        starts = np.insert((np.diff(sequence) != 0) | (np.diff(document) != 0), 0, True)
        passage = starts.cumsum() - 1
        self._sizes.append(np.bincount(passage).astype(np.int32))
        keys, counts = np.unique(feature * (passage[-1] + 1) + passage[row], return_counts=True)
        owner = keys // (passage[-1] + 1)
        self._passages += np.bincount(owner, minlength=self._n_features)
        np.maximum.at(self._most, owner, counts)

    def _check(self, code: SparseCode, sequence: Ints, position: Ints) -> None:
        if code.n_features != self._n_features:
            raise DataError(f"a code of {code.n_features} features does not fit a collector of {self._n_features}")
        if not sequence.size:
            return
        rows, context = self._tokens.ids.shape
        if min(sequence.min(), position.min()) < 0 or sequence.max() >= rows or position.max() >= context:
            raise DataError(
                f"the positions are of another TokenSet than this one of {rows} sequences of {context} tokens"
            )
        again = sequence[self._seen[sequence]]
        if again.size:
            raise DataError(f"sequence {again[0]} continues an earlier batch; batches hold whole sequences")

    def result(self) -> Positions:
        """Everything kept so far."""
        sizes = np.concatenate(self._sizes) if self._sizes else np.zeros(0, dtype=np.int32)
        return Positions(
            n_tokens=int(sizes.sum()),
            fired=self._fired.copy(),
            strongest=self._strongest.places(),
            sampled=self._sampled.places(),
            passages=self._passages.copy(),
            most_in_passage=self._most.copy(),
            passage_sizes=sizes,
        )


def collect_positions(
    batches: Iterable[tuple[SparseCode, ArrayLike, ArrayLike]], n_features: int, tokens: TokenSet, **options: int
) -> Positions:
    """`PositionCollector`, with its options, over batches of (code, sequence (B,), position (B,))."""
    collector = PositionCollector(n_features, tokens, **options)
    for code, sequence_B, position_B in batches:
        collector.add(code, sequence_B, position_B)
    return collector.result()


def tokens_at(tokens: TokenSet, places: Places, back: int = 0) -> NDArray[np.int32]:
    """(F, n) the token `back` tokens before each place; -1 where there is no place, or no such token of its document
    in the sequence.

    A document's end-of-text token, which begins it, is the token before its first one. Raises `DataError` if the places
    are of another TokenSet.
    """
    rows, context = tokens.ids.shape
    if places.sequence.size and (places.sequence.max() >= rows or places.position.max() >= context):
        raise DataError(f"the positions are of another TokenSet than this one of {rows} sequences of {context} tokens")
    known = (places.sequence >= 0) & (places.position >= back)
    sequence, position = np.where(known, places.sequence, 0), np.where(known, places.position, back)
    known &= tokens.document[sequence, position] == tokens.document[sequence, position - back]
    return np.where(known, tokens.ids[sequence, position - back], np.int32(-1)).astype(np.int32)


class _Largest:
    """The n entries with the largest keys of each feature, of equal keys the earlier places; keys are above 0."""

    def __init__(self, n_features: int, n: int, dtype: type[np.floating[Any]]) -> None:
        self._n_features, self._n = n_features, n
        self._bar = np.zeros(n_features, dtype=dtype)
        self._most_pending = max(_LEAST_PENDING, n_features * n)
        self._pending = 0
        nothing = np.zeros(0, dtype=np.int64)
        self._parts = [(nothing.astype(np.int32), self._bar[:0], nothing, nothing.astype(np.float32))]

    def offer(self, feature: Ints, key: NDArray[Any], place: Ints, value: NDArray[np.float32]) -> None:
        # The smallest key kept is a bar that only rises: after a while few pass it.
        passing = np.flatnonzero(key >= self._bar[feature])
        self._parts.append((feature[passing].astype(np.int32), key[passing], place[passing], value[passing]))
        self._pending += passing.size
        if self._pending > self._most_pending:
            self._compact()

    def _compact(self) -> tuple[Ints, Ints]:
        """Forget what is not among the n largest; the (feature, rank) of each entry left, which are in that order."""
        feature, key, place, value = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.lexsort((place, -key, feature))
        ordered = feature[order]
        rank = np.arange(order.size) - np.searchsorted(ordered, ordered)
        kept = order[rank < self._n]
        self._parts = [(feature[kept], key[kept], place[kept], value[kept])]
        last = order[rank == self._n - 1]
        self._bar[feature[last]] = key[last]
        self._pending = 0
        return feature[kept].astype(np.int64), rank[rank < self._n]

    def places(self) -> Places:
        where = self._compact()
        ((_, _, place, value),) = self._parts
        shape = (self._n_features, self._n)
        values = np.zeros(shape, dtype=np.float32)
        sequence, position = np.full(shape, -1, dtype=np.int32), np.full(shape, -1, dtype=np.int32)
        values[where], sequence[where], position[where] = value, place >> 32, place & 0xFFFFFFFF
        return Places(values, sequence, position)


def _priority(feature: Ints, place: Ints, seed: np.uint64) -> NDArray[np.float64]:
    """Random numbers in (0, 1) from feature, place and seed alone (splitmix64): order and batches do not matter."""
    x = place.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for salt in (feature.astype(np.uint64), np.full(1, seed)):
        x = x + (salt + np.uint64(1)) * np.uint64(0xD1342543DE82EF95)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return np.asarray(((x >> np.uint64(11)) + 0.5) / 2.0**53)
