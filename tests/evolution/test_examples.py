"""What is kept of every feature against a plain version that holds everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscoder.activations.tokens import TokenSet
from crosscoder.code import SparseCode
from crosscoder.common.arrays import load_arrays, save_arrays
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.evolution import ExampleCollector, collect_examples, contexts, density_histogram, histogram_edges
from crosscoder.evolution import examples as examples_module

F, K, C = 7, 3, 9
MASK = (1 << 64) - 1


def activity(n_sequences: int, seed: int, n_snapshots: int = K) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """h (S, C, F) with many ties, gates (S, C, K, F), and which tokens (S, C) are kept: a few are not."""
    rng = np.random.default_rng(seed)
    h = rng.integers(1, 5, (n_sequences, C, F)) * (rng.random((n_sequences, C, F)) < 0.3)
    h[:, :, 4] = 0  # never fires
    gates = (rng.random((n_sequences, C, n_snapshots, F)) < 0.6) & (h > 0)[:, :, None]
    return torch.from_numpy(h).float(), torch.from_numpy(gates), rng.random((n_sequences, C)) < 0.9


def sparse(h_BF: torch.Tensor, open_BKF: torch.Tensor) -> SparseCode:
    """The code of values (B, F) with gates (B, K, F)."""
    open_BFK = open_BKF.permute(0, 2, 1)
    row, feature = open_BFK.any(dim=2).nonzero(as_tuple=True)
    return SparseCode.from_pairs(row, feature, h_BF[row, feature], open_BFK[row, feature], h_BF.shape)


def batches(h, gates, kept, size, order=None):  # type: ignore[no-untyped-def]
    """Batches of `size` sequences, in the given order of batches."""
    starts = np.arange(0, len(h), size)
    for start in starts if order is None else order.permutation(starts):
        rows = slice(start, start + size)
        sequence, position = np.nonzero(kept[rows])
        code = sparse(h[rows][sequence, position], gates[rows][sequence, position])
        yield code, sequence + start, torch.from_numpy(position)


def mix(x: int) -> int:
    """splitmix64's output for the state x."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def key(seed: int, feature: int, sequence: int, position: int) -> int:
    return mix((mix((mix(seed) + feature) & MASK) + (sequence << 32) + position) & MASK)


def assert_kept(kept, f, expected, padded, before):  # type: ignore[no-untyped-def]
    """Feature f has exactly the `expected` (sequence, position), with their windows."""
    found, length = len(expected), kept.activations.shape[2]
    assert kept.sequence[f, :found].tolist() == [s for s, _ in expected]
    assert kept.position[f, :found].tolist() == [t for _, t in expected]
    assert (kept.sequence[f, found:] == -1).all() and (kept.position[f, found:] == -1).all()
    for rank, (s, t) in enumerate(expected):
        assert (kept.activations[f, rank] == padded[s, t : t + length, f]).all()
        assert kept.value[f, rank] == padded[s, t + before, f] > 0
    assert not kept.activations[f, found:].any()


@settings(max_examples=60, deadline=None)
@given(
    n_sequences=st.integers(1, 12),
    size=st.integers(1, 5),
    n_snapshots=st.sampled_from([1, 3, 64]),
    n=st.integers(1, 4),
    m=st.sampled_from([1, 2, 7, 200]),
    around=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    seed=st.integers(0, 1000),
)
def test_equals_the_plain_version(  # type: ignore[no-untyped-def]
    n_sequences, size, n_snapshots, n, m, around, seed
) -> None:
    h, gates, kept = activity(n_sequences, seed, n_snapshots)
    before, after = around
    stream = batches(h, gates, kept, size, np.random.default_rng(seed))
    options = {"n_examples": n, "n_samples": m, "before": before, "after": after, "seed": seed}
    result = collect_examples(stream, F, n_snapshots, **options)

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
        strongest = sorted(entry for entry in best if entry[0] < 0)[:n]
        assert_kept(result.strongest, f, [entry[1:] for entry in strongest], padded, before)
        active = [(int(s), int(t)) for s, t in zip(*np.nonzero(value[:, :, f]), strict=True)]
        sampled = sorted(active, key=lambda place: key(seed, f, *place))[:m]
        assert_kept(result.sampled, f, sampled, padded, before)
        counts, _ = np.histogram(value[:, :, f][value[:, :, f] > 0], histogram_edges())
        assert (result.histogram[f] == counts).all()
    assert (result.firing_rate <= 1).all() and result.mean_activation[4] == 0


def test_bins_of_the_histogram() -> None:
    """Edges belong to the bin above; what lies outside, to the first and the last."""
    edges = histogram_edges()
    assert edges[0] == 2.0**-12 and edges[-1] == 2.0**12 and len(edges) == 97
    np.testing.assert_allclose(edges[1:] / edges[:-1], 2**0.25, rtol=1e-6)
    below = np.nextafter(edges, np.float32(0))
    values = torch.from_numpy(np.concatenate([[1e-30, 1e30, 1e-45], edges, below]).astype(np.float32))
    count = len(values)
    shape = torch.Size([count, 1])
    code = SparseCode.from_pairs(
        torch.arange(count), torch.zeros(count), values, torch.ones(count, 1, dtype=torch.bool), shape
    )
    result = collect_examples([(code, np.arange(count), np.zeros(count))], 1, 1)
    expected = np.zeros(96, dtype=int)
    for value in values.numpy():
        expected[np.clip(np.searchsorted(edges, value, side="right") - 1, 0, 95)] += 1
    assert result.histogram[0].tolist() == expected.tolist()
    assert expected.sum() == count and expected[40] == 2


def many(seed: int, n_features: int, n_tokens: int, n_snapshots: int) -> tuple[SparseCode, np.ndarray, np.ndarray]:
    """A batch with 20 pairs a token, in sequences of 128."""
    rng = np.random.default_rng(seed)
    features = np.sort(rng.integers(0, n_features, (n_tokens, 20)) ** 2 // n_features, axis=1)
    values = rng.integers(1, 9, features.shape).astype(np.float32)
    opened = rng.random((features.size, n_snapshots)) < 0.5
    opened[:, 0] = True
    rows = np.arange(n_tokens).repeat(20)
    code = SparseCode.from_pairs(
        *map(torch.from_numpy, (rows, features.ravel(), values.ravel(), opened)), torch.Size([n_tokens, n_features])
    )
    sequence, position = np.divmod(np.arange(n_tokens), 128)
    return code, sequence + 1000 * seed, position


def parts(n_features: int, division: int) -> Iterator[tuple[SparseCode, np.ndarray, np.ndarray]]:
    """The same tokens in batches of `division` sequences."""
    for seed in range(2):
        code, sequence, position = many(seed, n_features, 2048, 3)
        for begin in range(0, 2048, 128 * division):
            part = slice(begin, begin + 128 * division)
            lo, hi = int(code.row_offsets[begin]), int(code.row_offsets[min(begin + 128 * division, 2048)])
            piece = SparseCode(
                code.row_offsets[begin : begin + 128 * division + 1] - lo,
                code.features[lo:hi], code.values[lo:hi], code.gates[lo:hi], 3, n_features,
            )  # fmt: skip
            yield piece, sequence[part], position[part]


def test_threads_and_batches_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for threads, division in ((1, 16), (2, 16), (5, 7), (1, 1)):
        monkeypatch.setattr(examples_module, "n_threads", lambda threads=threads: threads)
        collector = ExampleCollector(900, 3, n_samples=5)
        for batch in parts(900, division):
            collector.add(*batch)
        states.append({name: array.tobytes() for name, array in collector.state().items()})
    assert states[0] == states[1] == states[2] == states[3]


def test_goes_on_from_a_saved_state(tmp_path: Path) -> None:
    stream = list(parts(300, 3))
    whole = ExampleCollector(300, 3)
    first = ExampleCollector(300, 3)
    for number, batch in enumerate(stream):
        whole.add(*batch)
        if number < 3:
            first.add(*batch)
    save_arrays(tmp_path / "state.npz", first.state(), compressed=False)
    second = ExampleCollector(300, 3)
    second.load_state(load_arrays(tmp_path / "state.npz"))
    assert second.n_tokens == 3 * 384
    for batch in stream[3:]:
        second.add(*batch)
    assert {n: a.tobytes() for n, a in second.state().items()} == {n: a.tobytes() for n, a in whole.state().items()}
    with pytest.raises(DataError, match="other options"):
        ExampleCollector(300, 3, n_samples=4).load_state(second.state())


def test_the_sample_is_uniform() -> None:
    """Each of 60 active tokens is kept 10 times in 60, whatever its activation; other seeds keep others."""
    n = 60
    h = torch.arange(1, n + 1, dtype=torch.float32)[:, None].repeat(1, 4000)
    code = sparse(h, torch.ones(n, 1, 4000, dtype=torch.bool))
    kept = [
        collect_examples([(code, np.arange(n), np.zeros(n))], 4000, 1, n_samples=10, seed=seed).sampled
        for seed in range(2)
    ]
    for sampled in kept:
        counts = np.bincount(sampled.sequence.ravel(), minlength=n)
        expected = 4000 * 10 / n
        chi_square = ((counts - expected) ** 2 / (expected * (1 - 10 / n))).sum()
        assert 30 < chi_square < 100  # 59 degrees of freedom
        first = np.bincount(sampled.sequence[:, 0], minlength=n)
        assert 30 < ((first - 4000 / n) ** 2 / (4000 / n)).sum() < 100, "each prefix is a sample"
    assert (kept[0].sequence != kept[1].sequence).mean() > 0.9


def test_98304_features() -> None:
    F = 98_304
    code, sequence, position = many(0, F, 1024, 64)
    result = collect_examples([(code, sequence, position)], F, 64, n_examples=3, n_samples=4)
    active = torch.bincount(code.features, minlength=F).numpy()
    assert (result.fired_any == active).all() and result.fired[:, 0].sum() == code.n_pairs
    assert (result.histogram.sum(axis=1) == active).all()
    assert ((result.sampled.sequence >= 0).sum(axis=1) == np.minimum(active, 4)).all()
    assert (result.fired.sum(axis=0) == code.open_gates().sum(dim=0).numpy()).all()


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
    found = contexts(result.strongest, tokens)
    assert found.feature.tolist() == [0, 0, 1]
    assert found.tokens.tolist() == [[2, 3, 4, -1], [-1, 0, 8, 9], [-1, -1, 10, 11]]
    # What precedes the second document belongs to the first, also its activation.
    assert found.activations.tolist() == [[0, 2, 9, 0], [0, 0, 5, 0], [0, 0, 1, 0]]
    assert found.document.tolist() == [0, 1, 1]
    assert found.position.tolist() == [2, 0, 3]
    sampled = contexts(result.sampled, tokens)
    assert sampled.feature.tolist() == [0] * 5 + [1]
    assert sorted(sampled.activations[:, 2].tolist()) == [1, 1, 2, 3, 5, 9]
    with pytest.raises(DataError, match="of another TokenSet"):
        contexts(result.strongest, TokenSet(ids=ids[:1], document=document[:1], names=["one"], tokenizer="none"))


def test_order_of_the_text_is_required() -> None:
    h, gates, kept = activity(4, seed=1)
    kept[:] = True
    (one, two) = batches(h, gates, kept, 2)
    collector = ExampleCollector(F, K)
    collector.add(*one)
    code, sequence, position = two
    with pytest.raises(DataError, match="whole sequences"):
        collector.add(code, sequence - 1, position)
    with pytest.raises(DataError, match="in order"):
        collector.add(code, sequence[::-1].copy(), position)
    with pytest.raises(DataError, match="18 tokens need as many"):
        collector.add(code, sequence[1:], position)
    with pytest.raises(DataError, match="does not fit a collector"):
        ExampleCollector(F + 1, K).add(*one)
    h[3, 2, 0], gates[3, 2, 0, 0] = torch.inf, True
    with pytest.raises(NonFiniteError, match="sequence 3"):
        collector.add(*list(batches(h, gates, kept, 2))[1])
    with pytest.raises(DataError, match="from 0 to"):
        collector.add(code, sequence - 4, position)
    with pytest.raises(ConfigError, match="n_examples and n_samples must be at least 1"):
        ExampleCollector(F, K, n_examples=0)


def test_a_batch_without_tokens() -> None:
    h, gates, kept = activity(2, seed=1)
    kept[:] = False
    result = collect_examples(batches(h, gates, kept, 1), F, K)
    assert result.n_tokens == 0 and not result.firing_rate.any() and (result.strongest.sequence == -1).all()


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
