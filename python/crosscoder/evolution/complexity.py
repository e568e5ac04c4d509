"""How complex a feature is, without a language model's opinion: the variety of its tokens and the context it needs.

Letters: F features, n positions a feature, M features measured, m examples of each, C context lengths.

All of it is ours (the paper has a language model give marks from 1 to 5). Two measures:

- **entropy** of the token at a feature's active positions, and of the token before them, over a uniform sample of n of
  its active positions; in nats, by the estimator of Chao and Shen (2003), which allows for tokens that the sample
  missed. A plain estimate from 64 positions could not exceed 4.2 and would fall with the number of positions. Only
  features with `MIN_EXAMPLES` positions are judged.
- **context needed**: at each of the m strongest positions of a feature the language models read the last c tokens up
  to and with that position, after an end-of-text token, and nothing before it, c = 1, 2, 4, ... The measure is the
  smallest c from which on the median over the examples of activation / activation with all of the sequence before it
  is at least 0.5. Where c reaches to the beginning of the sequence the text is the one that the activation was measured
  on, and the ratio is 1.

The end-of-text token stands where a text begins, so the model reads the c tokens as a text that begins there.
Correlations are with the emergence of the feature: Pearson's with log10(1 + step), Spearman's with its rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crosscoder.activations.tokens import TokenSet
from crosscoder.common.statistics import Correlation, correlate
from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution.checks import checked_steps
from crosscoder.evolution.positions import Places, Positions, tokens_at
from crosscoder.evolution.reading import Read
from crosscoder.evolution.types import MIN_EXAMPLES

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

N_EXAMPLES = 8
LONGEST = 128
"""The longest context tried, in tokens."""
STAYS = 0.5


@dataclass(frozen=True)
class TokenEntropy:
    """Entropy of tokens at active positions, in nats; NaN where a feature has too few positions."""

    here: NDArray[np.float32]
    """(F,) of the token."""
    before: NDArray[np.float32]
    """(F,) of the token before it."""
    n_here: Ints
    """(F,) sampled positions."""
    n_before: Ints
    """(F,) sampled positions with a token before them in their document and sequence."""


@dataclass(frozen=True)
class ContextNeeded:
    """How far back the input must be kept for M features."""

    feature: Ints
    """(M,)"""
    lengths: Ints
    """(C,) context lengths tried, in tokens."""
    ratio: NDArray[np.float32]
    """(M, m, C) activation with the last c tokens / activation with all; NaN where there are fewer examples."""
    median: NDArray[np.float32]
    """(M, C) median over examples."""
    needed: Ints
    """(M,) tokens needed; twice the longest length tried where that is not enough."""


def token_entropy(positions: Positions, tokens: TokenSet) -> TokenEntropy:
    """Entropies of all features. Raises `DataError` if the positions are of another TokenSet."""
    here, before = tokens_at(tokens, positions.sampled), tokens_at(tokens, positions.sampled, back=1)
    n_here, n_before = (here >= 0).sum(axis=1), (before >= 0).sum(axis=1)
    return TokenEntropy(
        here=np.where(n_here >= MIN_EXAMPLES, chao_shen(here), np.nan).astype(np.float32),
        before=np.where(n_before >= MIN_EXAMPLES, chao_shen(before), np.nan).astype(np.float32),
        n_here=n_here,
        n_before=n_before,
    )


def chao_shen(ids_Fn: NDArray[np.int32]) -> Floats:
    """(F,) entropy in nats of each row's tokens by Chao and Shen (2003), entries of -1 left out; 0 for empty rows.

    With coverage C = 1 - (tokens seen once) / n, a token of share p counts with C p, and is weighted by the inverse of
    the chance to be seen at all, 1 - (1 - C p)^n. Where every token was seen once, one of them is taken to be no
    singleton: C = 1 / n.
    """
    n_rows, width = ids_Fn.shape
    ordered = np.sort(ids_Fn, axis=1)
    begins = np.ones(ordered.shape, dtype=bool)
    begins[:, 1:] = np.diff(ordered, axis=1) != 0
    run = begins.ravel().cumsum() - 1
    row = np.repeat(np.arange(n_rows), width)[begins.ravel()]
    token, count = ordered[begins], np.bincount(run).astype(np.float64)
    row, count = row[token >= 0], count[token >= 0]

    n = np.bincount(row, count, minlength=n_rows)
    once = np.minimum(np.bincount(row[count == 1], minlength=n_rows), n - 1)
    coverage = 1 - once / np.maximum(n, 1)
    p = coverage[row] * count / n[row]
    # -expm1(n log1p(-p)) is 1 - (1 - p)^n, which for p = 1 is 1.
    with np.errstate(divide="ignore"):
        seen = -np.expm1(n[row] * np.log1p(-p))
    return np.asarray(np.bincount(row, -p * np.log(p) / seen, minlength=n_rows), dtype=np.float64)


def choose_features(emergence_F: ArrayLike, eligible_F: ArrayLike, n: int, *, seed: int = 0) -> Ints:
    """At most `n` eligible features, ascending, as evenly over the snapshots of emergence as there are features.

    Features without emergence (-1) are left out. Raises `ConfigError` if `n` is negative, `DataError` for shapes that
    do not match.
    """
    emergence, eligible = np.asarray(emergence_F), np.asarray(eligible_F, dtype=bool)
    if n < 0:
        raise ConfigError(f"the number of features to measure must be 0 or more, got {n}")
    if emergence.shape != eligible.shape or emergence.ndim != 1:
        raise DataError(f"emergence of shape {emergence.shape} does not match eligibility of shape {eligible.shape}")
    candidates = np.random.default_rng(seed).permutation(np.flatnonzero(eligible & (emergence >= 0)))
    by_birth = candidates[np.argsort(emergence[candidates], kind="stable")]
    births = emergence[by_birth]
    turn = np.arange(births.size) - np.searchsorted(births, births)  # the first of every snapshot, then the second
    return np.sort(by_birth[np.argsort(turn, kind="stable")[:n]])


def context_needed(
    read: Read,
    tokens: TokenSet,
    strongest: Places,
    features: ArrayLike,
    *,
    n_examples: int = N_EXAMPLES,
    longest: int = LONGEST,
) -> ContextNeeded:
    """The context that `features` (M,) need at their `n_examples` strongest positions (`read`:
    crosscoder.evolution.reading).

    Raises `ConfigError` if a size is under 1, `DataError` for features that are not there.
    """
    if n_examples < 1 or longest < 1:
        raise ConfigError(
            f"context_needed takes 1 example and 1 token of context or more, got {n_examples} and {longest}"
        )
    chosen = np.asarray(features).astype(np.int64)
    if chosen.size and (chosen.min() < 0 or chosen.max() >= len(strongest.sequence)):
        raise DataError(f"features must lie in 0 to {len(strongest.sequence) - 1}")
    lengths = context_lengths(tokens.context, longest)
    value = strongest.value[chosen, :n_examples]
    sequence, position = (a[chosen, :n_examples].astype(np.int64) for a in (strongest.sequence, strongest.position))
    there = sequence >= 0
    ratio = np.where(there[:, :, None], np.float32(1), np.float32(np.nan)).repeat(lengths.size, axis=2)

    cut = [np.nonzero(there & (position + 1 > c)) for c in lengths]
    windows = []
    for c, where in zip(lengths.tolist(), cut, strict=True):
        columns = position[where][:, None] + np.arange(-c + 1, 1)
        text = tokens.ids[sequence[where][:, None], columns]
        windows.append(np.insert(text, 0, tokens.end_of_text, axis=1).astype(np.int64))
    for number, (where, pairs) in enumerate(zip(cut, read(windows, 1), strict=True)):
        ratio[where[0], where[1], number] = 0
        mine = pairs.feature == chosen[where[0][pairs.row]]
        row, column = where[0][pairs.row[mine]], where[1][pairs.row[mine]]
        ratio[row, column, number] = pairs.value[mine] / value[row, column]

    median = np.full((chosen.size, lengths.size), np.nan, dtype=np.float32)
    some = there.any(axis=1)
    median[some] = np.nanmedian(ratio[some], axis=1)
    stays = np.logical_and.accumulate((median >= STAYS)[:, ::-1], axis=1).sum(axis=1)
    ladder = np.append(lengths, 2 * lengths[-1])
    return ContextNeeded(chosen, lengths, ratio, median, ladder[lengths.size - stays])


def context_lengths(context: int, longest: int = LONGEST) -> Ints:
    """1, 2, 4, ... up to `longest` and to the first that covers sequences of `context` tokens."""
    lengths = [1]
    while 2 * lengths[-1] <= longest and lengths[-1] < context:
        lengths.append(2 * lengths[-1])
    return np.array(lengths)


def correlations(
    measures: Mapping[str, ArrayLike], emergence_F: ArrayLike, steps_K: ArrayLike, *, seed: int = 0
) -> dict[str, Correlation]:
    """Each measure (F,) against emergence (F,), an index of a snapshot or -1; NaN and -1 are left out.

    Raises `DataError` for shapes that do not match.
    """
    steps, emergence = checked_steps(steps_K), np.asarray(emergence_F).astype(np.int64)
    when = np.where(emergence >= 0, np.log10(1.0 + steps)[emergence], np.nan)
    return {name: correlate(measure, when, seed=seed) for name, measure in measures.items()}
