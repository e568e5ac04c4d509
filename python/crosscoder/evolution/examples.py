"""Where features are active: for each feature its strongest contexts, and how often it fires at each
snapshot.

Letters: F features, K snapshots, B tokens in a batch, N pairs in a batch, n examples a feature, L tokens in a
window.

All of it is ours. Examples of a feature are distinct contexts: at most one a sequence, its strongest token
there. One pass over the tokens in order, in batches of whole sequences; what is kept are the arrays of
`Examples` (F = 98,304, n = 10, L = 24: 110 MB), whatever the number of tokens. Windows are filled from the
batch at hand, so no second pass is needed. The result does not depend on how the sequences are divided into
batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crosscoder.errors import ConfigError, DataError, NonFiniteError

if TYPE_CHECKING:
    from crosscoder.activations.tokens import TokenSet
    from crosscoder.code import SparseCode

N_EXAMPLES, BEFORE, AFTER = 10, 16, 7


@dataclass(frozen=True)
class Examples:
    """What one pass over the tokens keeps."""

    n_tokens: int
    """Tokens seen."""
    fired: NDArray[np.int64]
    """(F, K) tokens with the feature's gate open at each snapshot."""
    fired_any: NDArray[np.int64]
    """(F,) tokens with a gate open at one snapshot or more."""
    max_activation: NDArray[np.float32]
    """(F,) the largest activation, 0 if it never fired."""
    sum_activation: NDArray[np.float64]
    """(F,) sum of the activations over the `fired_any` tokens."""
    value: NDArray[np.float32]
    """(F, n) activation of each example, the strongest first (equal ones in order of the text); 0 where
    fewer."""
    sequence: NDArray[np.int32]
    """(F, n) sequence of each example, an index into the TokenSet; -1 where there are fewer."""
    position: NDArray[np.int32]
    """(F, n) its position in the sequence; -1 where there are fewer."""
    activations: NDArray[np.float32]
    """(F, n, L) the feature's activation at each token of the window; 0 outside the sequence."""
    before: int
    """Tokens of a window before the example's own, which stands at this index."""

    @property
    def firing_rate(self) -> NDArray[np.float32]:
        """(F, K) share of tokens with the gate open."""
        return (self.fired / max(self.n_tokens, 1)).astype(np.float32)

    @property
    def mean_activation(self) -> NDArray[np.float32]:
        """(F,) mean over the tokens where it fires at all, 0 if it never does."""
        return (self.sum_activation / np.maximum(self.fired_any, 1)).astype(np.float32)


@dataclass(frozen=True)
class ContextWindows:
    """Token windows around examples, by feature, within a feature the strongest first. M windows."""

    feature: NDArray[np.int32]
    """(M,)"""
    tokens: NDArray[np.int32]
    """(M, L) token ids; -1 outside the document of the example's token, or outside its sequence."""
    activations: NDArray[np.float32]
    """(M, L) the feature's activation, 0 where tokens is -1."""
    document: NDArray[np.int32]
    """(M,) index into `TokenSet.names`."""
    position: NDArray[np.int64]
    """(M,) position in its document of the window's first token that is not -1, the end-of-text token before
    the document being its token 0."""


class ExampleCollector:
    """Keeps the strongest contexts of every feature while batches go by."""

    def __init__(
        self,
        n_features: int,
        n_snapshots: int,
        *,
        n_examples: int = N_EXAMPLES,
        before: int = BEFORE,
        after: int = AFTER,
    ) -> None:
        """A window is `before` tokens, the example's own, and `after` tokens. Raises `ConfigError` if one of
        these is negative or `n_examples` is 0."""
        if n_examples < 1 or before < 0 or after < 0:
            raise ConfigError(f"cannot keep {n_examples} examples of {before} + 1 + {after} tokens")
        self._n_features, self._n_snapshots = n_features, n_snapshots
        self._before, self._length = before, before + 1 + after
        self._n_tokens = 0
        self._last_sequence = -1
        self._fired = np.zeros((n_snapshots, n_features), dtype=np.int64)
        self._fired_any = np.zeros(n_features, dtype=np.int64)
        self._sum = np.zeros(n_features)
        self._value = np.zeros((n_features, n_examples), dtype=np.float32)
        self._sequence = np.full((n_features, n_examples), -1, dtype=np.int32)
        self._position = self._sequence.copy()
        self._activations = np.zeros((n_features, n_examples, self._length), dtype=np.float32)

    def add(self, code: SparseCode, sequence_B: ArrayLike, position_B: ArrayLike) -> None:
        """A batch of whole sequences: its code, and for each of its B tokens the sequence and the position in
        it.

        Tokens come in order (by sequence, then position); positions may be left out (end-of-text tokens are).
        Raises `DataError` for another crosscoder's code, tokens out of order or a sequence that continues an
        earlier batch, `NonFiniteError` for activations that are not finite.
        """
        sequence = np.asarray(sequence_B).astype(np.int64)
        position = np.asarray(position_B).astype(np.int64)
        self._check(code, sequence, position)
        place = (sequence << 32) + position
        if not place.size:
            return
        if (np.diff(place) <= 0).any():
            raise DataError("tokens must come in order of the text: by sequence, then by position")
        if sequence[0] <= self._last_sequence:
            raise DataError(f"sequence {sequence[0]} continues an earlier batch; batches hold whole sequences")
        row = code.rows().cpu().numpy()
        feature = code.features.cpu().numpy().astype(np.int64)
        value = code.values.detach().float().cpu().numpy()
        gates = code.gates.cpu().numpy()
        if not np.isfinite(value).all():
            raise NonFiniteError(f"an activation in sequence {sequence[row[~np.isfinite(value)][0]]} is not finite")

        self._last_sequence = int(sequence[-1])
        self._n_tokens += place.size
        self._fired_any += np.bincount(feature, minlength=self._n_features)
        self._sum += np.bincount(feature, value, minlength=self._n_features)
        for k in range(self._n_snapshots):
            self._fired[k] += np.bincount(feature[(gates >> k) & 1 != 0], minlength=self._n_features)

        # The weakest example kept is a bar that only rises: after a while few pairs pass it. Later tokens
        # lose ties.
        passing = np.flatnonzero(value > self._value[feature, -1])
        best = passing[_first_of_groups(feature[passing], sequence[row[passing]], value[passing])]
        if best.size:
            self._merge(feature[best], value[best], row[best], sequence, position, (place, row, feature, value))

    def _check(self, code: SparseCode, sequence: NDArray[Any], position: NDArray[Any]) -> None:
        if (code.n_features, code.n_snapshots) != (self._n_features, self._n_snapshots):
            raise DataError(
                f"a code of {code.n_features} features and {code.n_snapshots} snapshots does not fit a "
                f"collector of {self._n_features} and {self._n_snapshots}"
            )
        if sequence.shape != (code.n_tokens,) or position.shape != (code.n_tokens,):
            raise DataError(f"{sequence.shape} sequences, {position.shape} positions for {code.n_tokens} tokens")

    def _merge(
        self,
        feature: NDArray[np.int64],
        value: NDArray[np.float32],
        row: NDArray[np.int64],
        sequence: NDArray[np.int64],
        position: NDArray[np.int64],
        batch: tuple[NDArray[Any], ...],
    ) -> None:
        """Rank new candidates (one a feature and sequence) among the examples kept, and fill the winners'
        windows."""
        touched, owner = np.unique(feature, return_inverse=True)
        n_examples = self._value.shape[1]
        old = np.arange(touched.size).repeat(n_examples)
        all_owner = np.concatenate([old, owner])
        all_value = np.concatenate([self._value[touched].ravel(), value])
        # Old examples stand first and new ones in order of the text, so a stable sort settles ties; empty
        # ones, of value 0, sink to the end.
        order = np.lexsort((-all_value, all_owner))
        rank = np.arange(order.size) - np.searchsorted(all_owner[order], all_owner[order])
        order, rank = order[rank < n_examples], rank[rank < n_examples]

        is_new = order >= old.size
        source = order[is_new] - old.size
        kept_sequence = self._sequence[touched].ravel()
        kept_position = self._position[touched].ravel()
        kept_windows = self._activations[touched].reshape(-1, self._length)
        target = (touched[all_owner[order]], rank)
        old_target = (target[0][~is_new], target[1][~is_new])
        new_target = (target[0][is_new], target[1][is_new])
        self._value[target] = all_value[order]
        for kept, array, fresh in (
            (kept_sequence, self._sequence, sequence[row[source]]),
            (kept_position, self._position, position[row[source]]),
            (kept_windows, self._activations, self._windows(feature[source], row[source], batch)),
        ):
            array[old_target] = kept[order[~is_new]]
            array[new_target] = fresh

    def _windows(
        self, feature: NDArray[np.int64], row: NDArray[np.int64], batch: tuple[NDArray[Any], ...]
    ) -> NDArray[np.float32]:
        """(M, L) activations of `feature` around the tokens `row`, found by binary search in the batch's
        pairs."""
        place, pair_row, pair_feature, pair_value = batch
        offsets = np.arange(self._length) - self._before
        wanted = place[row][:, None] + offsets
        at = np.searchsorted(place, wanted).clip(0, place.size - 1)
        # `place` holds the position in its low 32 bits: an offset that leaves the sequence meets no token's
        # place.
        key = at * self._n_features + feature[:, None]
        pair_key = pair_row * self._n_features + pair_feature
        pair = np.searchsorted(pair_key, key).clip(0, pair_key.size - 1)
        return np.where((place[at] == wanted) & (pair_key[pair] == key), pair_value[pair], 0)

    def result(self) -> Examples:
        """Everything kept so far."""
        return Examples(
            n_tokens=self._n_tokens,
            fired=self._fired.T.copy(),
            fired_any=self._fired_any.copy(),
            max_activation=self._value[:, 0].copy(),
            sum_activation=self._sum.copy(),
            value=self._value.copy(),
            sequence=self._sequence.copy(),
            position=self._position.copy(),
            activations=self._activations.copy(),
            before=self._before,
        )


def collect_examples(
    batches: Iterable[tuple[SparseCode, ArrayLike, ArrayLike]],
    n_features: int,
    n_snapshots: int,
    *,
    n_examples: int = N_EXAMPLES,
    before: int = BEFORE,
    after: int = AFTER,
) -> Examples:
    """`ExampleCollector` over batches of (code, sequence (B,), position (B,))."""
    collector = ExampleCollector(n_features, n_snapshots, n_examples=n_examples, before=before, after=after)
    for code, sequence_B, position_B in batches:
        collector.add(code, sequence_B, position_B)
    return collector.result()


def contexts(examples: Examples, tokens: TokenSet, *, max_examples: int | None = None) -> ContextWindows:
    """The text of the examples, at most `max_examples` a feature. Raises `DataError` if they are of another
    TokenSet.

    A window ends where the example's document does: what stands before belongs to other text.
    """
    n_sequences, context = tokens.ids.shape
    sequence, position = examples.sequence[:, :max_examples], examples.position[:, :max_examples]
    if sequence.size and (sequence.max() >= n_sequences or position.max() >= context):
        raise DataError(f"the examples do not fit a token set of {n_sequences} sequences of {context}")
    feature, rank = np.nonzero(sequence >= 0)
    row, column = sequence[feature, rank].astype(np.int64), position[feature, rank].astype(np.int64)
    columns = column[:, None] + np.arange(examples.activations.shape[2]) - examples.before
    inside = (columns >= 0) & (columns < context)
    columns = columns.clip(0, context - 1)
    document = tokens.document[row, column]
    inside &= tokens.document[row[:, None], columns] == document[:, None]
    flat = row * context + columns[np.arange(row.size), inside.argmax(axis=1)]
    starts = np.searchsorted(tokens.document.ravel(), document)
    return ContextWindows(
        feature=feature.astype(np.int32),
        tokens=np.where(inside, tokens.ids[row[:, None], columns], -1).astype(np.int32),
        activations=np.where(inside, examples.activations[feature, rank], 0).astype(np.float32),
        document=document.astype(np.int32),
        position=flat - starts,
    )


def density_histogram(
    firing_rate: ArrayLike, *, bins_per_decade: int = 5, lowest: float = 1e-7
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Histogram of firing rates on a logarithmic axis: edges (n + 1,) as rates, counts (n,).

    Rates of 0 are not counted; those under `lowest` fall into the first bin.
    """
    rates = np.asarray(firing_rate, dtype=np.float64).ravel()
    n_bins = round(-np.log10(lowest) * bins_per_decade)
    edges = np.logspace(np.log10(lowest), 0, n_bins + 1)
    counts, _ = np.histogram(np.clip(rates[rates > 0], edges[0], edges[-1]), bins=edges)
    return edges, counts


def _first_of_groups(
    feature: NDArray[np.int64], sequence: NDArray[np.int64], value: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Indices of the largest value of each (feature, sequence), the earlier of ties, in order of both.

    The input is in order of the text, and the sort is stable.
    """
    order = np.lexsort((-value, sequence, feature))
    same = (np.diff(feature[order]) == 0) & (np.diff(sequence[order]) == 0)
    return order[np.insert(~same, 0, True)] if order.size else order
