"""What kind of thing a feature responds to: four types by rule, their controls, and when each type emerges.

Letters: F features, T types, R = 4 rules, n positions a feature, S random sequences of L tokens, K snapshots.

The paper's (P, arXiv 2509.17196) are the names of the types and the claim that they emerge in an order (single-token,
previous-token, then induction and context-sensitive). Ours are the rules, because the paper has no formal ones. A
feature's activation is one number a token, the same at all snapshots where its gate is open, so a type is one of the
feature, not of a snapshot.

- **single-token**: at least 0.8 of its n strongest positions hold one and the same token.
- **previous-token**: at least 0.8 of them come after one and the same token (positions without a token before them in
  their document and sequence count against it), and under 0.5 hold the same token.
- **induction**: S sequences of 2 L different random tokens are said in four ways, A and B being their halves:

      A A        repeated          A B        unrelated
      A' A       match broken      A' B       unrelated, broken

  A' are the tokens of A in another order, none after the token that it follows in A. Means are over tokens 2 to L of a
  half. Rule: on the second half of A A the mean is at least 3 times that on the first, and at the tokens of the second
  half where the feature is active its mean in A' A is at most half of that in A A. In A' A each token of A has been
  seen as well, but what stood before and after it was another: a feature that only knows a token again does not fall.
  Without copies (the control) the same is asked of A B and A' B.
- **context-sensitive**: none of these, at least 10 active tokens in one passage, and active in under 5 % of the
  passages. A passage is what one sequence holds of one document: what the language model sees of it at once.

A feature has the first of these types whose rule holds. A rule judges a feature only with `MIN_EXAMPLES` examples:
strongest positions, or (induction) active tokens in the second half of A A. "unjudged" is a feature with too few
positions; one that is only too seldom active on random tokens is not of the type induction.

Controls: the share of false calls among the features judged, by the same rule, where no rule can hold. For the first
two the strongest positions of all features are dealt to them at random; for induction see above; for the last each
feature's active tokens fall anywhere in the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crosscoder.activations.tokens import TokenSet
from crosscoder.common.statistics import bootstrap_interval, holm, kruskal_wallis, mann_whitney
from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution.checks import checked_steps
from crosscoder.evolution.positions import Positions, tokens_at
from crosscoder.evolution.reading import Pairs, Read

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TYPE_NAMES = ("single-token", "previous-token", "induction", "context-sensitive", "other", "unjudged")
"""Names of the codes in `FeatureTypes.type`; the first four are the rules, in this order."""
SINGLE_TOKEN, PREVIOUS_TOKEN, INDUCTION, CONTEXT_SENSITIVE, OTHER, UNJUDGED = range(6)

MODAL_SHARE = 0.8
OTHER_SHARE = 0.5
INDUCTION_RATIO = 3.0
INDUCTION_FALL = 0.5
PASSAGE_TOKENS = 10
PASSAGE_SHARE = 0.05
MIN_EXAMPLES = 20
MIN_GROUP = 5
"""A type with fewer features is left out of the comparison of emergence."""
N_SEQUENCES = 64
_CONTROL_FEATURES = 1_000


@dataclass(frozen=True)
class InductionResponse:
    """What features do on random tokens said twice; means over tokens 2 to L of the S halves."""

    first: Floats
    """(F,) mean activation on the first half."""
    second: Floats
    """(F,) on the second half."""
    broken: Floats
    """(F,) the part of `second` that is left, at the tokens that it comes from, when the first half is reordered."""
    active: Ints
    """(F,) active tokens in the second half (tokens 2 to L)."""

    @property
    def judged(self) -> Bools:
        """(F,) active on enough tokens of the second half."""
        return np.asarray(self.active >= MIN_EXAMPLES)

    @property
    def passes(self) -> Bools:
        """(F,) whether the rule holds."""
        rises = self.second >= INDUCTION_RATIO * self.first
        return self.judged & rises & (self.broken <= INDUCTION_FALL * self.second)


@dataclass(frozen=True)
class FeatureTypes:
    """The type of every feature, what it was decided by, and how often the rules err."""

    type: NDArray[np.int8]
    """(F,) index into `TYPE_NAMES`."""
    passes: Bools
    """(F, R) whether each rule holds by itself; context-sensitive includes that no other does."""
    judged: Bools
    """(F, R) whether each rule had enough examples."""
    n_positions: Ints
    """(F,) strongest positions that there are, at most n."""
    token: NDArray[np.int32]
    """(F,) the most frequent token at the strongest positions (the smallest id of equals), -1 if there are none."""
    token_share: NDArray[np.float32]
    """(F,) its share."""
    previous: NDArray[np.int32]
    """(F,) the most frequent token before the strongest positions, -1 if there is none."""
    previous_share: NDArray[np.float32]
    """(F,) its share of all strongest positions."""
    induction: InductionResponse
    unrelated: InductionResponse
    """The same where the second half is unrelated to the first: the control."""
    passage_share: NDArray[np.float32]
    """(F,) share of the passages with an active token."""
    most_in_passage: Ints
    """(F,) the largest number of active tokens in a passage."""
    control: Floats
    """(R,) share of false calls in each rule's control; NaN if no feature was judged."""
    n_control: Ints
    """(R,) features that the control is over."""

    @property
    def n_by_type(self) -> dict[str, int]:
        """How many features are of each type."""
        counts = np.bincount(self.type, minlength=len(TYPE_NAMES))
        return {name: int(count) for name, count in zip(TYPE_NAMES, counts, strict=True)}


@dataclass(frozen=True)
class EmergenceByType:
    """When features of each type emerge, and whether types differ in it."""

    counts: Ints
    """(T, K) features of each type that emerge at each snapshot (0: there from the start)."""
    n: Ints
    """(T,) features of each type that emerge at all."""
    median: Floats
    """(T,) median training step of emergence; NaN without features."""
    median_low: Floats
    """(T,) lower end of its 95 % bootstrap interval."""
    median_high: Floats
    """(T,) upper end."""
    compared: Bools
    """(T,) types in the tests: `MIN_GROUP` features or more, and not unjudged."""
    statistic: float
    """Kruskal-Wallis H over the types compared; NaN if there are fewer than two, or all emergence is the same."""
    p: float
    effect: float
    """Epsilon squared: 0 types do not differ, 1 they do not overlap."""
    pairs: Ints
    """(P, 2) indices of the types in each pair compared."""
    pair_p: Floats
    """(P,) Mann-Whitney p, two-sided."""
    pair_holm: Floats
    """(P,) the same after Holm's correction over the pairs."""
    pair_effect: Floats
    """(P,) Cliff's delta: above 0 if the first type emerges later than the second."""


def feature_types(
    positions: Positions, tokens: TokenSet, induction: InductionResponse, unrelated: InductionResponse, *, seed: int = 0
) -> FeatureTypes:
    """Types of features from where they are active and from `induction_responses`. `seed` draws the controls.

    Raises `DataError` if the positions are of another TokenSet, or the responses of another number of features.
    """
    n_features = positions.fired.size
    if induction.active.size != n_features or unrelated.active.size != n_features:
        raise DataError(f"the responses are of {induction.active.size} features, the positions of {n_features}")
    here, before = tokens_at(tokens, positions.strongest), tokens_at(tokens, positions.strongest, back=1)
    n_positions = (positions.strongest.sequence >= 0).sum(axis=1)
    token, share = modal(here, n_positions)
    previous, previous_share = modal(before, n_positions)

    n_passages = positions.passage_sizes.size
    passage_share = positions.passages / max(n_passages, 1)
    enough = n_positions >= MIN_EXAMPLES
    judged = np.stack([enough, enough, induction.judged & enough, enough & _judges_passages(n_passages)], axis=1)
    passes = np.stack(
        [
            *_token_rules(share, previous_share),
            induction.passes,
            _passage_rule(positions.most_in_passage, passage_share),
        ],
        axis=1,
    )
    passes &= judged
    passes[:, CONTEXT_SENSITIVE] &= ~passes[:, :CONTEXT_SENSITIVE].any(axis=1)
    kind = np.where(passes.any(axis=1), passes.argmax(axis=1), OTHER)
    kind[~enough] = UNJUDGED

    control, n_control = np.full(len(passes.T), np.nan), np.zeros(len(passes.T), dtype=np.int64)
    rng = np.random.default_rng(seed)
    checks = {
        **dict(enumerate(_dealt_calls(here, before, n_positions, enough, rng))),
        INDUCTION: unrelated.passes[unrelated.judged & enough],
        CONTEXT_SENSITIVE: _scattered_calls(positions, judged[:, CONTEXT_SENSITIVE], rng),
    }
    for rule, calls in checks.items():
        n_control[rule] = calls.size
        control[rule] = calls.mean() if calls.size else np.nan
    return FeatureTypes(
        type=kind.astype(np.int8),
        passes=passes,
        judged=judged,
        n_positions=n_positions,
        token=token,
        token_share=share.astype(np.float32),
        previous=previous,
        previous_share=previous_share.astype(np.float32),
        induction=induction,
        unrelated=unrelated,
        passage_share=passage_share.astype(np.float32),
        most_in_passage=positions.most_in_passage,
        control=control,
        n_control=n_control,
    )


def induction_responses(
    read: Read,
    n_features: int,
    vocabulary: int,
    *,
    length: int = 50,
    n_sequences: int = N_SEQUENCES,
    end_of_text: int = 0,
    seed: int = 0,
) -> tuple[InductionResponse, InductionResponse]:
    """Responses to repeated and to unrelated halves of `length` tokens (`read`: crosscoder.evolution.reading).

    Tokens are drawn from 0 to `vocabulary` - 1 without `end_of_text`, the same for the same seed. Raises `ConfigError`
    for a length under 3, no sequence, or a vocabulary too small for 2 * length different tokens.
    """
    if length < 3 or n_sequences < 1:
        raise ConfigError(
            f"induction needs sequences of at least 3 tokens, at least one; got {n_sequences} of {length} tokens"
        )
    if vocabulary - 1 < 2 * length:
        raise ConfigError(
            f"induction at length {length} needs {2 * length} different tokens, the vocabulary has {vocabulary - 1}; "
            f"use a length of at most {(vocabulary - 1) // 2}"
        )
    rng = np.random.default_rng([seed, length])
    drawn = np.stack([rng.choice(vocabulary - 1, 2 * length, replace=False) for _ in range(n_sequences)])
    drawn += drawn >= end_of_text
    a, b = drawn[:, :length], drawn[:, length:]
    reordered = np.stack([half[_reordering(length, rng)] for half in a])
    said = [np.concatenate(halves, axis=1) for halves in ((a, a), (reordered, a), (a, b), (reordered, b))]
    repeated, broken, other, other_broken = read(said, 2 * length)
    size = n_sequences * (length - 1)
    return (
        _response(repeated, broken, n_features, length, size),
        _response(other, other_broken, n_features, length, size),
    )


def emergence_by_type(
    type_F: ArrayLike, emergence_F: ArrayLike, steps_K: ArrayLike, *, seed: int = 0
) -> EmergenceByType:
    """Compare emergence (F,), an index of a snapshot or -1 (left out), between types (F,).

    Raises `DataError` for shapes that do not match or values out of range.
    """
    steps = checked_steps(steps_K)
    kind, emergence = np.asarray(type_F).astype(np.int64), np.asarray(emergence_F).astype(np.int64)
    if kind.ndim != 1 or kind.shape != emergence.shape:
        raise DataError(f"types of shape {kind.shape} do not match emergence of shape {emergence.shape}")
    if kind.size and (kind.min() < 0 or kind.max() >= len(TYPE_NAMES)):
        raise DataError(f"types must be 0 to {len(TYPE_NAMES) - 1}")
    if emergence.size and emergence.max() >= steps.size:
        raise DataError(f"emergence {emergence.max()} is outside the {steps.size} snapshots")
    groups = [emergence[(kind == code) & (emergence >= 0)] for code in range(len(TYPE_NAMES))]
    n = np.array([group.size for group in groups])
    compared = n >= MIN_GROUP
    compared[UNJUDGED] = False
    intervals = [bootstrap_interval(lambda values: float(np.median(values)), steps[g], seed=seed) for g in groups]

    chosen = np.flatnonzero(compared)
    overall = kruskal_wallis([groups[code] for code in chosen]) if chosen.size > 1 else None
    pairs = list(combinations(chosen.tolist(), 2))
    tests = [mann_whitney(groups[i], groups[j]) for i, j in pairs]
    pair_p = np.array([test.p for test in tests], dtype=np.float64)
    return EmergenceByType(
        counts=np.stack([np.bincount(group, minlength=steps.size) for group in groups]),
        n=n,
        median=np.array([np.median(steps[group]) if group.size else np.nan for group in groups]),
        median_low=np.array([low for low, _ in intervals]),
        median_high=np.array([high for _, high in intervals]),
        compared=compared,
        statistic=overall.statistic if overall else np.nan,
        p=overall.p if overall else np.nan,
        effect=overall.effect if overall else np.nan,
        pairs=np.array(pairs, dtype=np.int64).reshape(-1, 2),
        pair_p=pair_p,
        pair_holm=holm(pair_p),
        pair_effect=np.array([test.effect for test in tests], dtype=np.float64),
    )


def modal(ids_Fn: NDArray[np.int32], total_F: Ints) -> tuple[NDArray[np.int32], Floats]:
    """(F,) the most frequent token of each row, -1 entries left out (the smallest of equals; -1 if there is none), and
    its count over `total_F`."""
    if not ids_Fn.shape[1]:
        return np.full(len(ids_Fn), -1, dtype=np.int32), np.zeros(len(ids_Fn))
    ordered = np.sort(ids_Fn, axis=1)
    column = np.arange(ordered.shape[1])
    starts = np.zeros(ordered.shape, dtype=np.int64)
    starts[:, 1:] = np.where(np.diff(ordered, axis=1) != 0, column[1:], 0)
    length = column + 1 - np.maximum.accumulate(starts, axis=1)
    length[ordered < 0] = 0
    end = length.argmax(axis=1)
    rows = np.arange(len(ordered))
    found = length[rows, end]
    token = np.where(found > 0, ordered[rows, end], -1)
    return token.astype(np.int32), found / np.maximum(total_F, 1)


def _token_rules(share: Floats, previous_share: Floats) -> tuple[Bools, Bools]:
    return share >= MODAL_SHARE, (previous_share >= MODAL_SHARE) & (share < OTHER_SHARE)


def _passage_rule(most: Ints, passage_share: Floats) -> Bools:
    return np.asarray((most >= PASSAGE_TOKENS) & (passage_share < PASSAGE_SHARE))


def _judges_passages(n_passages: int) -> bool:
    """Whether a feature that is active in one passage could pass."""
    return n_passages * PASSAGE_SHARE > 1


def _dealt_calls(
    here: NDArray[np.int32], before: NDArray[np.int32], n_positions: Ints, enough: Bools, rng: np.random.Generator
) -> tuple[Bools, Bools]:
    """Calls by the first two rules for the features judged, with all strongest positions dealt to them at random."""
    there = np.arange(here.shape[1]) < n_positions[:, None]
    order = rng.permutation(int(there.sum()))
    shuffled = []
    for ids in (here, before):
        dealt = np.full(ids.shape, -1, dtype=np.int32)
        dealt[there] = ids[there][order]
        shuffled.append(modal(dealt, n_positions)[1][enough])
    return _token_rules(*shuffled)


def _scattered_calls(positions: Positions, judged: Bools, rng: np.random.Generator) -> Bools:
    """Calls by the passage rule, active tokens anywhere in the text, for some of the features judged."""
    chosen = np.flatnonzero(judged)
    chosen = rng.permutation(chosen)[:_CONTROL_FEATURES]
    odds = positions.passage_sizes / max(positions.n_tokens, 1)
    most, share = np.zeros(chosen.size, dtype=np.int64), np.zeros(chosen.size)
    for i, fired in enumerate(positions.fired[chosen].tolist()):
        counts = rng.multinomial(fired, odds)
        most[i], share[i] = counts.max(), (counts > 0).mean()
    return _passage_rule(most, share)


def _reordering(length: int, rng: np.random.Generator) -> Ints:
    """A permutation in which no number comes after the one that it is 1 more than."""
    while True:  # about one in e is
        order = rng.permutation(length)
        if not (np.diff(order) == 1).any():
            return order


def _response(intact: Pairs, broken: Pairs, n_features: int, length: int, size: int) -> InductionResponse:
    place = intact.row % (2 * length)
    in_first, in_second = (place > 0) & (place < length), place > length
    key = intact.row * n_features + intact.feature
    left = np.isin(broken.row * n_features + broken.feature, key[in_second])

    def mean(pairs: Pairs, chosen: Bools) -> Floats:
        sums = np.bincount(pairs.feature[chosen], pairs.value[chosen].astype(np.float64), minlength=n_features)
        return np.asarray(sums / size)

    return InductionResponse(
        first=mean(intact, in_first),
        second=mean(intact, in_second),
        broken=mean(broken, left),
        active=np.bincount(intact.feature[in_second], minlength=n_features),
    )
