"""Entropy and needed context of features where both are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosscoder.activations.tokens import TokenSet
from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution.complexity import (
    chao_shen,
    choose_features,
    context_lengths,
    context_needed,
    correlations,
    token_entropy,
)
from crosscoder.evolution.positions import Places, Positions
from crosscoder.evolution.reading import Pairs

C = 40


@given(st.lists(st.integers(-1, 6), max_size=15))
def test_chao_shen_by_its_formula(tokens: list[int]) -> None:
    counts = [tokens.count(token) for token in set(tokens) - {-1}]
    n = sum(counts)
    coverage = 1 - min(counts.count(1), n - 1) / max(n, 1)
    shares = [coverage * count / max(n, 1) for count in counts]
    expected = -sum(p * np.log(p) / (1 - (1 - p) ** n) for p in shares)
    assert chao_shen(np.array([tokens, tokens], dtype=np.int32)) == pytest.approx([expected] * 2)


def test_chao_shen_sees_beyond_the_sample() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 10, 200):
        drawn = rng.integers(0, size, (300, 64)).astype(np.int32)
        assert chao_shen(drawn).mean() == pytest.approx(np.log(size), abs=0.1)


def places(sequence: Sequence[Sequence[int]], position: Sequence[Sequence[int]], value: float = 2.0) -> Places:
    at = np.array(sequence, dtype=np.int32)
    return Places(np.where(at >= 0, value, 0).astype(np.float32), at, np.array(position, dtype=np.int32))


def test_token_entropy_needs_enough_positions() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 5, (30, C)).astype(np.int32)
    ids[:, 10] = 7
    tokens = TokenSet(ids, np.zeros_like(ids), ["one"], "none")
    n = 30
    sequence = [list(range(n)), list(range(19)) + [-1] * (n - 19), list(range(n))]
    position = [[10] * n, [10] * 19 + [-1] * (n - 19), [0] * 15 + [11] * 15]
    at = places(sequence, position)
    nothing = np.zeros(3, dtype=np.int64)
    found = token_entropy(Positions(ids.size, nothing, at, at, nothing, nothing, np.array([C] * 30)), tokens)
    assert found.n_here.tolist() == [30, 19, 30] and found.n_before.tolist() == [30, 19, 15]
    assert found.here[0] == 0 and found.before[0] == pytest.approx(np.log(4), abs=0.15)
    assert np.isnan(found.here[1]) and np.isnan(found.before[1])
    assert found.here[2] == pytest.approx(np.log(4), abs=0.15) and np.isnan(found.before[2])


NEEDS = (1, 2, 4, 11, 30)
"""Feature f is active at half strength or more once this many tokens are read."""


def read(ids: Sequence[np.ndarray], kept: int) -> list[Pairs]:
    """Features 0 to 4 see a mark NEEDS - 1 tokens back; 5 is active in every text; 6 at 1 token and from 8 on; 7 only
    in the collection's text; 8 at 0.49 of its strength until 8 tokens are read."""
    assert kept == 1
    found = []
    for text in ids:
        n, length = text.shape
        assert (text[:, 0] == 0).all(), "a text begins with the end-of-text token"
        h = np.zeros((n, 9), dtype=np.float32)
        for feature, needed in enumerate(NEEDS):
            if length > needed:
                h[:, feature] = 2 * (text[:, -needed] == 100 + feature)
        h[:, 5] = 2
        h[:, 6] = 2 * (length - 1 not in (2, 4))
        h[:, 8] = 2 if length - 1 >= 8 else 0.98
        row, feature = np.nonzero(h)
        found.append(Pairs(row, feature, h[row, feature]))
    return found


@pytest.fixture
def marked() -> tuple[TokenSet, Places]:
    """Nine features at three positions each (the last has one, and the fifth is at the end of its row)."""
    ids = np.full((9, C), 50, dtype=np.int32)
    position = [[36, 37, 38]] * 9
    for feature, needed in enumerate(NEEDS):
        ids[feature, [p - needed + 1 for p in position[feature]]] = 100 + feature
    sequence = [[feature] * 3 for feature in range(9)]
    sequence[8] = [8, -1, -1]
    return TokenSet(ids, np.zeros_like(ids), ["one"], "none"), places(sequence, [*position[:8], [36, -1, -1]])


def test_the_context_that_features_need(marked: tuple[TokenSet, Places]) -> None:
    tokens, strongest = marked
    found = context_needed(read, tokens, strongest, [8, 0, 1, 2, 3, 4, 5, 6, 7])
    assert found.lengths.tolist() == [1, 2, 4, 8, 16, 32, 64]
    assert found.needed.tolist() == [8, 1, 2, 4, 16, 32, 1, 8, 64]
    assert found.ratio.shape == (9, 3, 7) and np.isnan(found.ratio[0, 1:]).all()
    assert found.median[0].tolist() == pytest.approx([0.49, 0.49, 0.49, 1, 1, 1, 1])
    assert (found.ratio[1:, :, -1] == 1).all(), "64 tokens are the whole row"
    few = context_needed(read, tokens, strongest, [0, 4, 7], longest=16)
    assert few.lengths.tolist() == [1, 2, 4, 8, 16] and few.needed.tolist() == [1, 32, 32]
    assert context_needed(read, tokens, strongest, []).needed.size == 0


def test_the_median_example_decides(marked: tuple[TokenSet, Places]) -> None:
    tokens, strongest = marked
    ids = tokens.ids.copy()
    ids[0, 36] = 50
    assert context_needed(read, TokenSet(ids, tokens.document, ["one"], "none"), strongest, [0]).needed.tolist() == [1]
    ids[0, 37] = 50
    assert context_needed(read, TokenSet(ids, tokens.document, ["one"], "none"), strongest, [0]).needed.tolist() == [64]
    alone = context_needed(read, TokenSet(ids, tokens.document, ["one"], "none"), strongest, [0], n_examples=1)
    assert alone.ratio.shape == (1, 1, 7) and alone.needed.tolist() == [64]


def test_context_lengths() -> None:
    assert context_lengths(128).tolist() == [1, 2, 4, 8, 16, 32, 64, 128]
    assert context_lengths(2048).tolist() == [1, 2, 4, 8, 16, 32, 64, 128]
    assert context_lengths(5).tolist() == [1, 2, 4, 8] and context_lengths(1).tolist() == [1]


def test_features_are_chosen_evenly_over_emergence() -> None:
    emergence = np.repeat([0, 2, 5, -1], [1000, 30, 4, 100])
    eligible = np.ones(1134, dtype=bool)
    eligible[1000:1010] = False
    chosen = choose_features(emergence, eligible, 60)
    assert np.bincount(emergence[chosen]).tolist() == [36, 0, 20, 0, 0, 4] and eligible[chosen].all()
    assert (np.diff(chosen) > 0).all() and (choose_features(emergence, eligible, 60) == chosen).all()
    assert (choose_features(emergence, eligible, 60, seed=1) != chosen).any()
    assert [choose_features(emergence, eligible, n).size for n in (0, 10**6)] == [0, 1024]
    with pytest.raises(ConfigError, match="must be 0 or more, got -1"):
        choose_features(emergence, eligible, -1)
    with pytest.raises(DataError, match="does not match eligibility"):
        choose_features(emergence, eligible[1:], 1)


def test_correlations_with_emergence() -> None:
    rng = np.random.default_rng(0)
    emergence = rng.integers(-1, 5, 300)
    steps = [0, 1, 10, 100, 1000]
    when = np.log10(1 + np.array(steps))[emergence]
    found = correlations({"grows": when * 2, "noise": rng.normal(size=300)}, emergence, steps)
    assert found["grows"].n == (emergence >= 0).sum()
    assert found["grows"].pearson == pytest.approx(1) and found["grows"].spearman == pytest.approx(1)
    assert abs(found["noise"].spearman) < 0.15 and found["noise"].spearman_p > 0.05


def test_malformed_input_is_refused(marked: tuple[TokenSet, Places]) -> None:
    tokens, strongest = marked
    with pytest.raises(DataError, match="0 to 8"):
        context_needed(read, tokens, strongest, [9])
    for options in ({"n_examples": 0}, {"longest": 0}):
        with pytest.raises(ConfigError, match="1 example and 1 token of context or more"):
            context_needed(read, tokens, strongest, [0], **options)
    with pytest.raises(DataError, match="cannot pair"):
        correlations({"short": [1.0]}, [0, 1], [0, 1])
