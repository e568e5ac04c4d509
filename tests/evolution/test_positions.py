"""Positions kept in one pass against a plain version that holds everything."""

from __future__ import annotations

import numpy as np
import pytest
from evolution.planted_types import batches
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscoder.activations.tokens import TokenSet
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.evolution import positions as module
from crosscoder.evolution.positions import Places, PositionCollector, collect_positions, tokens_at

F, C = 5, 9


def text(n_sequences: int, seed: int) -> TokenSet:
    """Documents of about 6 tokens, each begun by an end-of-text token, packed over rows."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 50, (n_sequences, C)).astype(np.int32)
    ids[rng.random(ids.shape) < 1 / 6] = 0
    document = (ids == 0).ravel().cumsum().reshape(ids.shape).astype(np.int32)
    return TokenSet(ids, document, [str(i) for i in range(int(document.max()) + 1)], "none")


def activity(tokens: TokenSet, seed: int) -> np.ndarray:
    """(S, C, F) with many ties; feature 4 is silent."""
    rng = np.random.default_rng(seed)
    h = rng.integers(1, 5, (*tokens.ids.shape, F)) * (rng.random((*tokens.ids.shape, F)) < 0.3)
    h[:, :, 4] = 0
    return h.astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 7), st.integers(0, 1000))
def test_equals_the_plain_version(n_sequences: int, size: int, n: int, seed: int) -> None:
    tokens = text(n_sequences, seed)
    h = activity(tokens, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LEAST_PENDING", 10)  # sort often
        found = collect_positions(batches(h, tokens.ids, size), F, tokens, n_positions=n, seed=3)
    h = h * (tokens.ids != 0)[:, :, None]
    passage = tokens.document + np.arange(n_sequences)[:, None] * (tokens.document.max() + 1)
    kept = np.unique(passage[tokens.ids != 0], return_counts=True)[1]
    assert found.passage_sizes.tolist() == kept.tolist() and found.n_tokens == kept.sum()
    for f in range(F):
        active = [(s, c) for s in range(n_sequences) for c in range(C) if h[s, c, f] > 0]
        assert found.fired[f] == len(active)
        counts = np.unique([passage[place] for place in active], return_counts=True)[1]
        assert found.passages[f] == len(counts) and found.most_in_passage[f] == max(counts, default=0)
        expected = sorted((-h[s, c, f], s, c) for s, c in active)[:n]
        strongest = list(zip(*(a[f].tolist() for a in vars(found.strongest).values()), strict=True))
        assert strongest == [(-v, s, c) for v, s, c in expected] + [(0, -1, -1)] * (n - len(expected))
        sampled = list(zip(found.sampled.sequence[f].tolist(), found.sampled.position[f].tolist(), strict=True))
        m = min(n, len(active))
        assert len(set(sampled[:m])) == m and set(sampled[:m]) <= set(active) and sampled[m:] == [(-1, -1)] * (n - m)
        assert [h[s, c, f] for s, c in sampled[:m]] == found.sampled.value[f, :m].tolist()


def test_the_sample_is_uniform_and_no_matter_of_batches() -> None:
    rows, n_features, n = 50, 400, 45
    ids = np.ones((rows, C), dtype=np.int32)
    tokens = TokenSet(ids, np.zeros_like(ids), ["one"], "none")
    h = np.broadcast_to(np.linspace(1, 2, rows * C, dtype=np.float32).reshape(rows, C, 1), (rows, C, n_features))
    runs = [
        collect_positions(batches(h, ids, size), n_features, tokens, n_positions=n, seed=seed).sampled
        for size, seed in ((50, 0), (7, 0), (50, 1))
    ]
    places = [(run.sequence * C + run.position) for run in runs]
    assert (places[0] == places[1]).all() and (places[0] != places[2]).any(axis=1).all()
    # Each of 450 places is drawn by 400 features with chance 1/10: 40 times, standard deviation 6.
    drawn = np.bincount(places[0].ravel(), minlength=rows * C)
    assert drawn.min() > 15 and drawn.max() < 70 and drawn.std() == pytest.approx(6, abs=0.8)
    assert (places[0][0] != places[0][1]).any(), "features draw independently"
    assert np.corrcoef(np.arange(n), runs[0].value.mean(axis=0))[0, 1] < 0.6, "the order is no order of strength"


def test_tokens_before_end_with_the_document_and_the_row() -> None:
    ids = np.array([[0, 5, 6, 0, 7], [8, 9, 0, 10, 11]], dtype=np.int32)
    document = np.array([[0, 0, 0, 1, 1], [1, 1, 2, 2, 2]], dtype=np.int32)
    tokens = TokenSet(ids, document, ["a", "b", "c"], "none")
    places = Places(
        value=np.ones((1, 5), dtype=np.float32),
        sequence=np.array([[0, 0, 1, 1, -1]], dtype=np.int32),
        position=np.array([[1, 4, 0, 4, -1]], dtype=np.int32),
    )
    assert tokens_at(tokens, places).tolist() == [[5, 7, 8, 11, -1]]
    assert tokens_at(tokens, places, back=1).tolist() == [[0, 0, -1, 10, -1]]
    assert tokens_at(tokens, places, back=3).tolist() == [[-1, -1, -1, -1, -1]]
    with pytest.raises(DataError, match="of another TokenSet"):
        tokens_at(TokenSet(ids[:1], document[:1], ["a", "b"], "none"), places)


def test_malformed_batches_are_refused() -> None:
    tokens = text(4, 0)
    h = activity(tokens, 0)
    one, two = batches(h, tokens.ids, 2)
    collector = PositionCollector(F, tokens)
    collector.add(*one)
    with pytest.raises(DataError, match="whole sequences"):
        collector.add(*one)
    code, sequence, position = two
    with pytest.raises(DataError, match="in order"):
        collector.add(code, sequence[::-1].copy(), position)
    with pytest.raises(DataError, match="need as many sequences and positions"):
        collector.add(code, sequence[1:], position)
    with pytest.raises(DataError, match="are of another TokenSet than this one of 4 sequences of 9 tokens"):
        collector.add(code, sequence + 2, position)
    with pytest.raises(DataError, match="does not fit a collector"):
        PositionCollector(F + 1, tokens).add(*one)
    with pytest.raises(ConfigError, match="cannot keep 0"):
        PositionCollector(F, tokens, n_positions=0)
    h[3, 2:, 0] = np.inf
    with pytest.raises(NonFiniteError, match="sequence 3"):
        collector.add(*list(batches(h, tokens.ids, 2))[1])


def test_no_tokens() -> None:
    tokens = text(2, 0)
    found = collect_positions([], F, tokens)
    assert found.n_tokens == 0 and found.passage_sizes.size == 0 and (found.strongest.sequence == -1).all()
