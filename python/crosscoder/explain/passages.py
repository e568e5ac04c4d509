"""Passages for chosen features, in windows of 50 tokens: the strongest, some where they fire, some where they do not.

Letters: N chosen features, C context length, L tokens in a window, P windows of the pool.

The strongest come from the analysis `examples`; their windows are longer here, so their sequences are read again. The
others come from a random sample of the sequences, in the same pass: for each feature a uniform sample of its active
tokens, at most one a sequence, and one pool of random windows, common to all features, in some of which a feature is
silent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crosscoder.activations.tokens import TokenSet
from crosscoder.evolution.examples import BEFORE as EXAMPLE_AT
from crosscoder.evolution.examples import ContextWindows
from crosscoder.model import Crosscoder
from crosscoder.progress import Progress

TOP, ACTIVE, POOL = 7, 10, 8192
"""Windows a feature to explain it, windows a feature to score the explanation, random windows in all."""
LENGTH, AT = 50, 34
"""Tokens in a window, and which of them is the one that the window is about."""
SCANNED_TOKENS = 1 << 20
"""Size of the random sample of sequences."""


@dataclass(frozen=True)
class FeatureContexts:
    """Windows of tokens (-1 outside the document or the sequence) and the feature's activations there."""

    features: NDArray[np.int32]
    """(N,)"""
    top_tokens: NDArray[np.int32]
    """(N, TOP, L) around the strongest token of each of the strongest sequences, the strongest first."""
    top_activations: NDArray[np.float32]
    """(N, TOP, L)"""
    active_tokens: NDArray[np.int32]
    """(N, ACTIVE, L) around tokens at random from those where the feature is active, in order of the text; in none of
    the sequences of `top_tokens`. All -1 where there are fewer."""
    active_activations: NDArray[np.float32]
    """(N, ACTIVE, L)"""
    n_active: NDArray[np.int32]
    """(N,) how many there are."""
    pool_tokens: NDArray[np.int32]
    """(P, L) around random tokens."""
    pool_silent: NDArray[np.bool_]
    """(N, P) whether the feature is silent in the whole window."""


@dataclass(frozen=True)
class Places:
    """Where a feature's strongest tokens are."""

    sequence: NDArray[np.int64]
    """(N, TOP) index into the TokenSet."""
    position: NDArray[np.int64]
    """(N, TOP)"""


def features_with_contexts(examples: ContextWindows) -> NDArray[np.int64]:
    """Features with TOP examples or more, ascending."""
    return np.flatnonzero(np.bincount(examples.feature) >= TOP)


def strongest_places(examples: ContextWindows, tokens: TokenSet, features: NDArray[np.integer]) -> Places:
    """Of each feature's TOP strongest examples, from the contexts of the analysis `examples`."""
    rows = np.searchsorted(examples.feature, features)[:, None] + np.arange(TOP)
    # `position` counts from the start of the document to the window's first token that is in it.
    first = (examples.tokens[rows] >= 0).argmax(axis=2)
    document = examples.document[rows]
    flat = np.searchsorted(tokens.document.ravel(), document) + examples.position[rows]
    flat = flat + EXAMPLE_AT - first
    return Places(flat // tokens.context, flat % tokens.context)


def scanned_sequences(n_sequences: int, context: int, seed: int) -> NDArray[np.int64]:
    """The random sample of sequences, ascending."""
    count = min(n_sequences, max(1, SCANNED_TOKENS // context))
    return np.sort(np.random.default_rng([seed, 1]).choice(n_sequences, count, replace=False))


class ChosenEncoder:
    """The codes of chosen features alone: where each has its own threshold, the others need not be computed."""

    def __init__(self, model: Crosscoder, features: NDArray[np.integer]) -> None:
        self.features = np.asarray(features, dtype=np.int64)
        self.n_features = model.config.n_features
        self._column_of = np.full(self.n_features, -1)
        self._column_of[self.features] = np.arange(len(self.features))
        self._model = model
        if not model.eval().weights().gate.ranked:  # BatchTopK has a threshold at inference
            self._model = _only(model, torch.from_numpy(self.features))
            self._column_of = np.arange(len(self.features))

    def __call__(self, x_BKD: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Row, index into the chosen features and activation of each pair, in order of the rows."""
        code = self._model.encode(x_BKD)
        column = self._column_of[code.features.cpu().numpy()]
        chosen = column >= 0
        row, value = code.rows().cpu().numpy(), code.values.detach().float().cpu().numpy()
        return row[chosen], column[chosen], value[chosen]


def _only(model: Crosscoder, features: Tensor) -> Crosscoder:
    """The crosscoder of some of the features. Not for gates that compare features with each other."""
    config = model.config
    top_k = None if config.top_k is None else min(config.top_k, len(features))
    part = Crosscoder(dataclasses.replace(config, n_features=len(features), top_k=top_k)).to(model.W_enc.dtype)
    by_feature = ("W_enc", "W_dec", "b_enc", "log_threshold")
    state = model.state_dict()
    part.load_state_dict({name: value[features] if name in by_feature else value for name, value in state.items()})
    return part.to(model.W_enc.device).eval()


def collect_contexts(
    batches: Iterable[tuple[Tensor, np.ndarray, np.ndarray]],
    tokens: TokenSet,
    encoder: ChosenEncoder,
    places: Places,
    scanned: NDArray[np.int64],
    seed: int,
    progress: Progress,
) -> FeatureContexts:
    """One pass over activations (B, K, D), sequence (B,), position (B,), in batches of whole sequences: those of
    `places` and `scanned`.

    The result does not depend on how the sequences are divided into batches. Counts sequences on `progress`.
    """
    collector = _Collector(tokens, encoder, places, scanned, seed)
    for x_BKD, sequence_B, position_B in batches:
        row, column, value = encoder(x_BKD)
        names, starts = np.unique(sequence_B, return_index=True)
        bounds = np.searchsorted(row, np.append(starts, len(sequence_B)))
        for name, begin, end in zip(names.tolist(), bounds[:-1], bounds[1:], strict=True):
            dense_CN = np.zeros((tokens.context, len(encoder.features)), dtype=np.float32)
            dense_CN[position_B[row[begin:end]], column[begin:end]] = value[begin:end]
            collector.add(name, dense_CN)
        progress.advance(len(names))
    return collector.result()


class _Collector:
    def __init__(
        self, tokens: TokenSet, encoder: ChosenEncoder, places: Places, scanned: NDArray[np.int64], seed: int
    ) -> None:
        self._tokens, self._places, self._seed = tokens, places, seed
        self._features, self._n_features = encoder.features, encoder.n_features
        n = len(self._features)
        self._scanned = set(scanned.tolist())
        rng = np.random.default_rng([seed, 2])
        pool = np.sort(rng.choice(scanned, min(POOL, len(scanned)), replace=False))
        self._pool = {int(sequence): index for index, sequence in enumerate(pool)}
        # From 1: the first token of a row is the end of a text, at which nothing is stored.
        self._pool_position = rng.integers(1, tokens.context, len(pool))
        self._top = np.zeros((n, TOP, LENGTH), dtype=np.float32)
        self._key = np.full((n, ACTIVE), np.inf)
        self._active = np.zeros((n, ACTIVE, LENGTH), dtype=np.float32)
        self._active_place = np.full((n, ACTIVE, 2), -1, dtype=np.int64)
        self._silent = np.zeros((n, len(pool)), dtype=bool)

    def add(self, sequence: int, dense_CN: NDArray[np.float32]) -> None:
        """The activations of a whole sequence."""
        for n, rank in np.argwhere(self._places.sequence == sequence):
            self._top[n, rank] = self._window(sequence, self._places.position[n, rank], dense_CN[:, n])
        if sequence not in self._scanned:
            return
        if (p := self._pool.get(sequence)) is not None:
            inside, columns = self._columns(sequence, self._pool_position[p])
            self._silent[:, p] = ~(dense_CN[columns[inside]] > 0).any(axis=0)
        # A sample without replacement in which a sequence weighs as much as it has active tokens (Efraimidis and
        # Spirakis 2006): the smallest keys, exponentially distributed with that rate.
        count_N = (dense_CN > 0).sum(axis=0)
        # Drawn for all features, so that what a feature gets does not depend on which others are chosen.
        draws = np.random.default_rng([self._seed, 3, sequence]).random((2, self._n_features))
        key_N, pick_N = draws[:, self._features]
        key_N = np.divide(-np.log1p(-key_N), count_N, out=np.full(len(key_N), np.inf), where=count_N > 0)
        key_N[(self._places.sequence == sequence).any(axis=1)] = np.inf
        for n in np.flatnonzero(key_N < self._key.max(axis=1)):
            slot = int(self._key[n].argmax())
            position = int(np.flatnonzero(dense_CN[:, n])[int(pick_N[n] * count_N[n])])
            self._key[n, slot] = key_N[n]
            self._active[n, slot] = self._window(sequence, position, dense_CN[:, n])
            self._active_place[n, slot] = sequence, position

    def _columns(self, sequence: int, position: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which tokens of a window are in the sequence and in the document of its own token, and where."""
        columns = position + np.arange(LENGTH) - AT
        inside = (columns >= 0) & (columns < self._tokens.context)
        columns = columns.clip(0, self._tokens.context - 1)
        document = self._tokens.document[sequence]
        return inside & (document[columns] == document[position]), columns

    def _window(self, sequence: int, position: int, activation_C: NDArray[np.float32]) -> NDArray[np.float32]:
        inside, columns = self._columns(sequence, position)
        return np.where(inside, activation_C[columns], 0)

    def _ids(self, sequence: int, position: int) -> NDArray[np.int32]:
        if sequence < 0:
            return np.full(LENGTH, -1, dtype=np.int32)
        inside, columns = self._columns(sequence, position)
        return np.where(inside, self._tokens.ids[sequence, columns], -1).astype(np.int32)

    def _all_ids(self, places: NDArray[np.int64]) -> NDArray[np.int32]:
        flat = [self._ids(sequence, position) for sequence, position in places.reshape(-1, 2).tolist()]
        return np.array(flat, dtype=np.int32).reshape(*places.shape[:-1], LENGTH)

    def result(self) -> FeatureContexts:
        # In order of the text, so that the order says nothing of how strong or how random.
        order = np.lexsort((self._active_place[..., 0], self._key == np.inf), axis=1)[..., None]
        places = np.take_along_axis(self._active_place, order, axis=1)
        pool = np.stack([np.array(list(self._pool), dtype=np.int64), self._pool_position], axis=1)
        return FeatureContexts(
            features=self._features.astype(np.int32),
            top_tokens=self._all_ids(np.stack([self._places.sequence, self._places.position], axis=2)),
            top_activations=self._top,
            active_tokens=self._all_ids(places),
            active_activations=np.take_along_axis(self._active, order, axis=1),
            n_active=(self._key < np.inf).sum(axis=1).astype(np.int32),
            pool_tokens=self._all_ids(pool),
            pool_silent=self._silent,
        )
