"""The strongest contexts of every feature against a plain version that holds everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscoder.activations.tokens import TokenSet
from crosscoder.code import SparseCode
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.evolution import ExampleCollector, collect_examples, contexts, density_histogram

F, K, C = 7, 3, 9


def activity(n_sequences: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """h (S, C, F) with many ties, gates (S, C, K, F), and which tokens (S, C) are kept: a few are not."""
    rng = np.random.default_rng(seed)
    h = rng.integers(1, 5, (n_sequences, C, F)) * (rng.random((n_sequences, C, F)) < 0.3)
    h[:, :, 4] = 0  # never fires
    gates = (rng.random((n_sequences, C, K, F)) < 0.6) & (h > 0)[:, :, None]
    return torch.from_numpy(h).float(), torch.from_numpy(gates), rng.random((n_sequences, C)) < 0.9


def sparse(h_BF: torch.Tensor, open_BKF: torch.Tensor) -> SparseCode:
    """The code of values (B, F) with gates (B, K, F)."""
    open_BFK = open_BKF.permute(0, 2, 1)
    row, feature = open_BFK.any(dim=2).nonzero(as_tuple=True)
    bits = torch.tensor([1 << k for k in range(63)] + [-(1 << 63)])[: open_BFK.shape[2]]
    return SparseCode(
        row_offsets=torch.searchsorted(row, torch.arange(len(h_BF) + 1)),
        features=feature.int(),
        values=h_BF[row, feature],
        gates=(open_BFK[row, feature] * bits).sum(dim=1),
        n_snapshots=open_BFK.shape[2],
        n_features=h_BF.shape[1],
    )


def batches(h, gates, kept, size):  # type: ignore[no-untyped-def]
    for start in range(0, len(h), size):
        rows = slice(start, start + size)
        sequence, position = np.nonzero(kept[rows])
        code = sparse(h[rows][sequence, position], gates[rows][sequence, position])
        yield code, sequence + start, torch.from_numpy(position)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_equals_the_plain_version(n_sequences: int, size: int, n: int, seed: int) -> None:
    h, gates, kept = activity(n_sequences, seed)
    before, after = 2, 3
    stream = batches(h, gates, kept, size)
    result = collect_examples(stream, F, K, n_examples=n, before=before, after=after)

    on = gates.numpy() & kept[:, :, None, None]
    value = np.where(on.any(axis=2), h.numpy(), 0)
    assert result.n_tokens == kept.sum()
    assert (result.fired == on.sum(axis=(0, 1)).T).all()
    assert (result.fired_any == (value > 0).sum(axis=(0, 1))).all()
    assert (result.max_activation == value.max(axis=(0, 1))).all()
    np.testing.assert_allclose(result.sum_activation, value.sum(axis=(0, 1)))
    padded = np.pad(value, ((0, 0), (before, after), (0, 0)))
    for f in range(F):
        best = [(-value[s, :, f].max(), s, int(value[s, :, f].argmax())) for s in range(n_sequences)]
        expected = sorted(entry for entry in best if entry[0] < 0)[:n]
        found = len(expected)
        assert result.value[f, :found].tolist() == [-entry[0] for entry in expected]
        assert result.sequence[f, :found].tolist() == [entry[1] for entry in expected]
        assert result.position[f, :found].tolist() == [entry[2] for entry in expected]
        assert (result.sequence[f, found:] == -1).all() and (result.value[f, found:] == 0).all()
        for rank, (_, s, t) in enumerate(expected):
            assert (result.activations[f, rank] == padded[s, t : t + before + 1 + after, f]).all()
        assert not result.activations[f, found:].any()
    assert (result.firing_rate <= 1).all() and result.mean_activation[4] == 0


def test_windows_of_text() -> None:
    """Two documents in three sequences of 5; the second begins in the middle of sequence 1."""
    ids = np.arange(15, dtype=np.int32).reshape(3, 5)
    document = np.array([[0] * 5, [0, 0, 1, 1, 1], [1] * 5], dtype=np.int32)
    ids[0, 0] = ids[1, 2] = 0
    tokens = TokenSet(ids=ids, document=document, names=["one", "two"], tokenizer="none")
    h = torch.zeros(3, 5, 2)
    h[0, 4, 0], h[0, 3, 0], h[0, 1, 0] = 9, 2, 1
    h[1, 3, 0], h[1, 1, 0] = 5, 3
    h[2, 0, 1] = 1
    kept = ids != 0
    result = collect_examples(batches(h, (h > 0)[:, :, None], kept, 3), 2, 1, n_examples=2, before=2, after=1)
    found = contexts(result, tokens)
    assert found.feature.tolist() == [0, 0, 1]
    assert found.tokens.tolist() == [[2, 3, 4, -1], [-1, 0, 8, 9], [-1, -1, 10, 11]]
    # What precedes the second document belongs to the first, also its activation.
    assert found.activations.tolist() == [[0, 2, 9, 0], [0, 0, 5, 0], [0, 0, 1, 0]]
    assert found.document.tolist() == [0, 1, 1]
    assert found.position.tolist() == [2, 0, 3]
    assert contexts(result, tokens, max_examples=1).feature.tolist() == [0, 1]
    with pytest.raises(DataError, match="do not fit"):
        contexts(result, TokenSet(ids=ids[:1], document=document[:1], names=["one"], tokenizer="none"))


def test_order_of_the_text_is_required() -> None:
    h, gates, kept = activity(4, seed=1)
    kept[:] = True
    (one, two) = batches(h, gates, kept, 2)
    collector = ExampleCollector(F, K)
    collector.add(*one)
    with pytest.raises(DataError, match="whole sequences"):
        collector.add(*one)
    code, sequence, position = two
    with pytest.raises(DataError, match="in order"):
        collector.add(code, sequence[::-1].copy(), position)
    with pytest.raises(DataError, match="for 18 tokens"):
        collector.add(code, sequence[1:], position)
    with pytest.raises(DataError, match="does not fit a collector"):
        ExampleCollector(F + 1, K).add(*one)
    h[3, 2, 0], gates[3, 2, 0, 0] = torch.inf, True
    with pytest.raises(NonFiniteError, match="sequence 3"):
        collector.add(*list(batches(h, gates, kept, 2))[1])
    with pytest.raises(ConfigError, match="cannot keep 0"):
        ExampleCollector(F, K, n_examples=0)


def test_a_batch_without_tokens() -> None:
    h, gates, kept = activity(2, seed=1)
    kept[:] = False
    result = collect_examples(batches(h, gates, kept, 1), F, K)
    assert result.n_tokens == 0 and not result.firing_rate.any() and (result.sequence == -1).all()


def test_64_snapshots_use_the_sign_bit() -> None:
    h = torch.ones(1, 1)
    gates = torch.zeros(1, 64, 1, dtype=torch.bool)
    gates[0, [0, 63], 0] = True
    result = collect_examples([(sparse(h, gates), [0], [0])], 1, 64)
    assert np.flatnonzero(result.fired[0]).tolist() == [0, 63]


def test_density_histogram() -> None:
    edges, counts = density_histogram([0, 1e-9, 1e-3, 0.5, 1.0], bins_per_decade=1)
    np.testing.assert_allclose(edges, np.logspace(-7, 0, 8))
    assert counts.tolist() == [1, 0, 0, 0, 1, 0, 2]
