"""A text and features that are rules over its tokens, so that their types are known; nothing is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from crosscoder.activations.tokens import TokenSet
from crosscoder.code import SparseCode
from crosscoder.evolution.reading import Pairs

S, C, V = 200, 40, 100
RARE, THEME = 98, 99
THEME_ROWS = (10, 50, 90)
Ints = NDArray[np.int64]


def text() -> TokenSet:
    """Random tokens; RARE stands in five places, THEME begins three rows, some rows repeat themselves; each row is a
    document."""
    ids = np.random.default_rng(0).integers(1, RARE, (S, C)).astype(np.int32)
    ids[:, 0] = 0
    ids[100:105, 20] = RARE
    ids[list(THEME_ROWS), 1] = THEME
    ids[120:130, 21:] = ids[120:130, 2:21]
    document = np.arange(S, dtype=np.int32).repeat(C).reshape(S, C)
    return TokenSet(ids, document, [f"document {s}" for s in range(S)], "none")


def _earlier(ids: Ints) -> NDArray[np.bool_]:
    """(S, C, C) whether the token at the last axis stands before that at the middle one and is the same."""
    return (ids[:, :, None] == ids[:, None, :]) & np.tri(ids.shape[1], k=-1, dtype=bool)


def before(ids: Ints) -> Ints:
    return np.insert(ids[:, :-1], 0, -1, axis=1)


def foretells(ids: Ints) -> NDArray[np.bool_]:
    """The token stood here before, and an even token followed it: what an induction head writes."""
    following = np.append(ids[:, 1:], np.full((len(ids), 1), -1), axis=1)
    return (_earlier(ids) & (following % 2 == 0)[:, None, :]).any(axis=2)


def pair_again(ids: Ints) -> NDArray[np.bool_]:
    """The token stood here before, after the same token."""
    return (_earlier(ids) & _earlier(before(ids))).any(axis=2)


def theme(ids: Ints) -> NDArray[np.bool_]:
    return (ids == THEME).cumsum(axis=1) > 0


def checksum(ids: Ints) -> NDArray[np.bool_]:
    """Depends on all of the text before, and is as often active in the first half as in the second."""
    return (ids * (np.arange(ids.shape[1]) + 3) ** 2).cumsum(axis=1) % 7 == 0


RULES: dict[str, tuple[Callable[[Ints], NDArray[np.bool_]], str]] = {
    "token 7": (lambda ids: ids == 7, "single-token"),
    "after 9": (lambda ids: before(ids) == 9, "previous-token"),
    "7 after 9 or anything": (lambda ids: (ids == 7) & (before(ids) > 0), "single-token"),
    "an even token followed": (foretells, "induction"),
    "pair again": (pair_again, "induction"),
    "token again": (lambda ids: _earlier(ids).any(axis=2), "other"),
    "late": (lambda ids: np.broadcast_to(np.arange(ids.shape[1]) >= ids.shape[1] // 2, ids.shape), "other"),
    "checksum": (checksum, "other"),
    "theme": (theme, "context-sensitive"),
    "one of five": (lambda ids: ids % 20 == 3, "other"),
    "rare": (lambda ids: ids == RARE, "unjudged"),
    "never": (lambda ids: ids < 0, "unjudged"),
}
F = len(RULES)


def activations(ids: Ints) -> NDArray[np.float32]:
    """(S, C, F): 1 where the rule holds, and a little more for some tokens."""
    on = np.stack([rule(ids) for rule, _ in RULES.values()], axis=2)
    return (on * (1 + ids[:, :, None] % 5 / 50)).astype(np.float32)


def read(ids: Sequence[Ints], kept: int) -> list[Pairs]:
    """A `Read` whose features are the rules."""
    found = []
    for ids_SC in ids:
        h_BF = activations(ids_SC)[:, -kept:].reshape(-1, F)
        row, feature = np.nonzero(h_BF)
        found.append(Pairs(row, feature, h_BF[row, feature]))
    return found


def batches(h_SCF: NDArray[np.float32], ids: NDArray[np.int32], size: int) -> Iterator[tuple[SparseCode, Ints, Ints]]:
    """The code of `size` sequences at a time, without end-of-text tokens; all gates open at one snapshot."""
    for start in range(0, len(ids), size):
        sequence, position = np.nonzero(ids[start : start + size])
        h_BF = torch.from_numpy(h_SCF[start + sequence, position])
        row, feature = h_BF.nonzero(as_tuple=True)
        gates = torch.ones(len(row), 1, dtype=torch.bool)
        yield SparseCode.from_pairs(row, feature, h_BF[row, feature], gates, h_BF.shape), sequence + start, position
