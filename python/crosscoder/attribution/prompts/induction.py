"""Induction: a sequence is said twice, and at the last token only the first saying tells how to go on.

    clean      ... A B ... C D ...  ... A    -> B, not D
    corrupted  ... C B ... A D ...  ... A    -> D, not B

The corrupted prompt has A and C changed over in the first saying, and nothing else: tokens, last token and both answers
are the same, so no statistics of single tokens or of pairs of neighbours in text prefer one of the answers. What
differs is what stood before B and before D. Sequences differ in length, so that copying from a fixed distance fails.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crosscoder.activations.tokens import END_OF_TEXT
from crosscoder.attribution.task import Example
from crosscoder.errors import DataError

SHORTEST, LONGEST = 8, 24
"""Tokens in a sequence."""


def induction(pool: Sequence[int], n: int, seed: int, context: int) -> list[Example]:
    """`n` pairs of sequences of different tokens of `pool`. Raises `DataError` for a pool or context too small."""
    longest = _longest(context, len(pool))
    rng = np.random.default_rng([seed, 31])
    tokens = np.asarray(pool)
    lengths = rng.integers(SHORTEST, longest + 1, n).tolist()
    pairs = (_pair(rng.choice(tokens, length, replace=False), rng) for length in lengths)
    return [pair for pair in pairs if pair is not None]


def induction_in_text(ids_SC: np.ndarray, n: int, seed: int, context: int) -> list[Example]:
    """`n` pairs of windows of natural text, rows of `ids_SC`, said twice. Raises `DataError` if the text has too few.

    A, B, C and D occur once in the window. In text B is likelier after A than D is; so that this answers no question,
    the window and the changed window take turns as the clean prompt.
    """
    longest = min(_longest(context, ids_SC.size), ids_SC.shape[1])
    rng = np.random.default_rng([seed, 32])
    found: dict[Example, None] = {}
    for _ in range(50 * n):
        length = int(rng.integers(SHORTEST, longest + 1))
        row, start = int(rng.integers(len(ids_SC))), int(rng.integers(ids_SC.shape[1] - length + 1))
        window = ids_SC[row, start : start + length]
        if END_OF_TEXT in window:
            continue
        pair = _pair(window, rng)
        if pair is not None:
            found[_reversed(pair) if len(found) % 2 else pair] = None
        if len(found) == n:
            return list(found)
    raise DataError(f"the text gives {len(found)} windows for induction, {n} were asked for; lower --n-prompts")


def _longest(context: int, size: int) -> int:
    longest = min(LONGEST, (context - 1) // 2, size)
    if longest < SHORTEST:
        raise DataError(
            f"induction repeats a sequence of {SHORTEST} different tokens or more; a context of {context} tokens and "
            f"{size} tokens to choose from are too few for it"
        )
    return longest


def _pair(first: np.ndarray, rng: np.random.Generator) -> Example | None:
    """The pair of one sequence; None if no four tokens of it occur once."""
    once = np.flatnonzero((first[:, None] == first).sum(axis=1) == 1)
    starts = [at for at in once.tolist() if at + 1 < len(first) and at + 1 in once]
    pairs = [(i, j) for i in starts for j in starts if abs(i - j) > 1]
    if not pairs:
        return None
    i, j = pairs[rng.integers(len(pairs))]
    changed = first.copy()
    changed[[i, j]] = first[[j, i]]
    second = first[: i + 1]
    return Example(
        (END_OF_TEXT, *first.tolist(), *second.tolist()),
        (END_OF_TEXT, *changed.tolist(), *second.tolist()),
        int(first[i + 1]),
        int(first[j + 1]),
    )


def _reversed(pair: Example) -> Example:
    return Example(pair.corrupted, pair.clean, pair.wrong, pair.right)
