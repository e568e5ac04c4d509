"""N-gram statistics: small cases by hand and naive versions of every distance."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from evolution.ngram_reference import counts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.evolution import (
    KneserNey,
    NgramCounts,
    NgramMeter,
    NgramPhase,
    NgramTargets,
    count_ngrams,
    entropy_lines,
    measure_phase,
    ngram_targets,
    ngrams,
    phase_curves,
)

V = 12


def text(n_sequences: int, seed: int, vocab_size: int = V) -> NDArray[np.int32]:
    """(S, 20) ids from a random Markov chain with a few frequent tokens."""
    rng = np.random.default_rng(seed)
    table = np.random.default_rng(99).dirichlet(np.full(vocab_size, 0.3), size=vocab_size).cumsum(axis=1)
    ids = np.zeros((n_sequences, 20), dtype=np.int32)
    for t in range(1, 20):
        ids[:, t] = (rng.random(n_sequences)[:, None] > table[ids[:, t - 1]]).sum(axis=1).clip(0, vocab_size - 1)
    return ids


def test_counts_equal_the_reference() -> None:
    ids = text(50, seed=0)
    counted, expected = count_ngrams(ids, V, chunk_tokens=7 * ids.shape[1]), counts_of(ids, V)
    for name in ("unigrams", "first", "second", "count"):
        assert (getattr(counted, name) == getattr(expected, name)).all()
    assert counted.n_bigrams == 50 * 19 and counted.vocab_size == V
    with pytest.raises(DataError, match=r"\[0, 11\], outside a vocabulary of 11"):
        count_ngrams(np.array([[0, 11]]), 11)
    with pytest.raises(DataError, match="integers"):
        count_ngrams(np.zeros((3, 4)), V)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", "uint64"])
def test_counts_of_ids_on_disk(dtype: str, tmp_path: Path) -> None:
    """Mapped, of any integer type, chunk by chunk: the same counts, and ids that narrowing would hide are refused."""
    ids = text(50, seed=0)
    np.save(tmp_path / "ids.npy", ids.astype(dtype))
    mapped = np.load(tmp_path / "ids.npy", mmap_mode="r")
    done: list[int] = []
    counted, expected = count_ngrams(mapped, V, chunk_tokens=240, on_chunk=done.append), counts_of(ids, V)
    for name in ("unigrams", "first", "second", "count"):
        assert (getattr(counted, name) == getattr(expected, name)).all()
    assert done == [12, 12, 12, 12, 2]
    wrong = ids.astype(dtype)
    wrong[40, 3] = 60_000 if dtype == "uint16" else V if dtype == "int32" else 2**32 + 1
    with pytest.raises(DataError, match=rf"\[0, {wrong.max()}\], outside a vocabulary of {V}"):
        count_ngrams(wrong, V, chunk_tokens=240)


def test_kneser_ney_by_hand() -> None:
    """a b a b a c: ab twice, ba twice, ac once; d = 1 / (1 + 2 * 2)."""
    model = KneserNey(counts_of(np.array([[0, 1, 0, 1, 0, 2]]), 3))
    assert model.discount == pytest.approx(0.2)
    np.testing.assert_allclose(model.continuation, np.full(3, 1 / 3))  # each follows one distinct token
    np.testing.assert_allclose(model.backoff, [0.2 * 2 / 3, 0.2 * 1 / 2, 1])  # nothing follows c
    expected = [(2 - 0.2) / 3 + 0.4 / 9, (1 - 0.2) / 3 + 0.4 / 9, 0.4 / 9, 1 / 3]
    np.testing.assert_allclose(model.probability([0, 0, 0, 2], [1, 2, 0, 1]), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 15), st.integers(0, 1000))
def test_kneser_ney_is_a_distribution(n_sequences: int, vocab_size: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, vocab_size, (n_sequences, 9))
    model = KneserNey(counts_of(ids, vocab_size))
    rows = model.rows(np.arange(vocab_size))
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-12)
    assert (rows > 0).all() and 0 <= model.discount <= 1
    first, second = np.divmod(np.arange(vocab_size**2), vocab_size)
    np.testing.assert_allclose(model.probability(first, second), rows.ravel(), rtol=1e-12)


def test_entropy_lines() -> None:
    lines = entropy_lines(counts_of(np.array([[0, 0, 1, 1, 0]]), 2), np.array([[0, 1, 0]]))
    assert lines.uniform == pytest.approx(np.log(2)) and lines.n_tokens == 2
    share = np.array([3, 2]) / 5
    assert lines.unigram_plugin == pytest.approx(-(share * np.log(share)).sum())
    assert lines.bigram_plugin == pytest.approx(np.log(2))  # after each token, either with 1/2
    assert lines.bigram_corrected == pytest.approx(np.log(2) + (4 - 2) / (2 * 4))
    assert lines.unigram == pytest.approx(-(np.log(2.5 / 6) + np.log(3.5 / 6)) / 2)
    # On a long text of a chain all estimates meet its entropy: plug-in under it, cross-entropy over it.
    counts, fresh = counts_of(text(3000, seed=1), V), text(3000, seed=2)
    long = entropy_lines(counts, fresh)
    assert long.bigram_plugin < long.bigram_corrected < long.bigram_plugin + 0.01
    assert abs(long.bigram - long.bigram_corrected) < 0.01
    assert long.bigram < long.unigram < long.uniform
    assert KneserNey(counts_of(np.zeros((1, 9), dtype=int), 2)).rows([0, 1]).min() > 0  # no pair seen once
    few = entropy_lines(counts_of(text(10, seed=1), V), fresh)
    assert few.bigram_plugin < long.bigram < few.bigram


def naive_phase(log_q: NDArray[Any], ids: NDArray[Any], targets: NgramTargets) -> NgramPhase:
    q_TV = np.exp(log_q[:, :-1].reshape(-1, log_q.shape[-1]))
    current, following = ids[:, :-1].ravel(), ids[:, 1:].ravel()
    p_uni = targets.unigram.astype(np.float64)
    mean = q_TV.mean(axis=0)

    def kl(p: NDArray[Any], q: NDArray[Any]) -> float:
        return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))

    bi = bias = weight = each = n_each = 0.0
    rows = zip(targets.rows, targets.bigram.astype(np.float64), targets.weight, targets.bias, strict=True)
    for u, p, share, row_bias in rows:
        where = current == u
        if where.any():
            bi += share * kl(p, q_TV[where].mean(axis=0))
            bias += share * row_bias
            weight += share
            each += sum(kl(p, q) for q in q_TV[where])
            n_each += where.sum()
    return NgramPhase(
        loss=-np.log(q_TV[np.arange(len(following)), following]).mean(),
        kl_unigram=kl(p_uni, mean),
        kl_bigram=bi / weight,
        kl_bigram_corrected=(bi - bias) / weight,
        kl_bigram_each=each / n_each,
        n_predictions=len(following),
        coverage=weight,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.5, "kneser-ney"])
@pytest.mark.parametrize("max_rows", [None, 3])
def test_phase_equals_the_naive_version(smoothing: Any, max_rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "_CACHED_ELEMENTS", 17 * V)  # several slices of a batch
    monkeypatch.setattr(ngrams, "_FLUSH", 100)
    targets = ngram_targets(counts_of(text(40, seed=3), V), smoothing=smoothing, max_rows=max_rows)
    ids = text(9, seed=4)
    logits = 2 * np.random.default_rng(5).standard_normal((9, 20, V))
    meter = NgramMeter(targets)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 9)):
        meter.add(torch.from_numpy(logits[rows]), torch.from_numpy(ids[rows]))
    result = meter.result()
    log_q = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = naive_phase(log_q, ids, targets)
    for name, value in vars(expected).items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-5), name
    assert result == meter.result()
    np.testing.assert_allclose(targets.bigram.sum(axis=1), 1, rtol=1e-5)
    assert targets.unigram.sum() == pytest.approx(1, rel=1e-5)
    if max_rows is None:
        assert targets.coverage == pytest.approx(1)
    else:
        assert len(targets.rows) == 3 and targets.coverage < 1


def test_a_bigram_model_has_no_distance() -> None:
    """A model that predicts p(.|u) after u, and one that always predicts p."""
    counts = counts_of(text(500, seed=6), V)
    ids = torch.from_numpy(text(300, seed=7)).long()
    targets = ngram_targets(counts, smoothing="kneser-ney")
    table = torch.from_numpy(KneserNey(counts).rows(np.arange(V)))
    meter = NgramMeter(targets)
    meter.add(table.log()[ids], ids)
    result = meter.result()
    assert result.kl_bigram == pytest.approx(0, abs=1e-5)
    assert result.kl_bigram_each == pytest.approx(0, abs=1e-5)
    assert result.loss == pytest.approx(entropy_lines(counts, ids.numpy()).bigram, rel=1e-5)
    meter = NgramMeter(ngram_targets(counts, smoothing=0.5))
    unigram = torch.from_numpy(ngram_targets(counts, smoothing=0.5).unigram)
    meter.add(unigram.log().expand(300, 20, V), ids)
    assert meter.result().kl_unigram == pytest.approx(0, abs=1e-5)
    assert meter.result().loss == pytest.approx(entropy_lines(counts, ids.numpy()).unigram, rel=1e-5)
    # Predictions that differ at a token have a mean that is closer to p than each of them (convexity).
    noisy = NgramMeter(targets)
    noisy.add(table.log()[ids] + torch.randn(300, 20, V), ids)
    assert noisy.result().kl_bigram < noisy.result().kl_bigram_each


@pytest.mark.parametrize("smoothing", [0.0, 0.01])
def test_corrected_distance_is_nearer_to_that_of_the_text(smoothing: float) -> None:
    """Counts of a short text make the model look farther off than counts of a long one do; the correction of all rows
    together is that of the bigram entropy."""
    ids = torch.from_numpy(text(300, seed=7)).long()
    logits = torch.randn(V, V, generator=torch.Generator().manual_seed(0))[ids]

    def phase(counts: NgramCounts, k: float) -> ngrams.NgramPhase:
        meter = NgramMeter(ngram_targets(counts, smoothing=k))
        meter.add(logits, ids)
        return meter.result()

    truth = phase(counts_of(text(6000, seed=99), V), 0.0)
    assert truth.kl_bigram - truth.kl_bigram_corrected < 1e-3
    plain, corrected = [], []
    for seed in range(20):
        counts = counts_of(text(10, seed=seed), V)
        found, lines = phase(counts, smoothing), entropy_lines(counts, ids.numpy())
        assert found.kl_bigram - found.kl_bigram_corrected == pytest.approx(
            lines.bigram_corrected - lines.bigram_plugin
        )
        plain.append(found.kl_bigram - truth.kl_bigram)
        corrected.append(found.kl_bigram_corrected - truth.kl_bigram)
    assert np.mean(plain) > 0 and abs(np.mean(corrected)) < np.mean(plain) / 2
    assert not ngram_targets(counts, smoothing="kneser-ney").bias.any()


def test_measure_phase_runs_a_model() -> None:
    counts = counts_of(text(40, seed=8), V)
    ids, targets = text(7, seed=9), ngram_targets(counts)
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
    done: list[int] = []

    def model(input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache and not torch.is_grad_enabled()
        return SimpleNamespace(logits=table[input_ids].bfloat16())

    phase = measure_phase(model, ids, targets, batch_size=3, on_batch=done.append)
    meter = NgramMeter(targets)
    meter.add(table[torch.from_numpy(ids).long()].bfloat16(), torch.from_numpy(ids))
    assert done == [3, 3, 1]
    assert phase == meter.result()
    curves = phase_curves([phase, phase], targets)
    assert curves.loss.tolist() == [phase.loss] * 2 and curves.smoothing == "add-0.01"
    assert curves.n_predictions == 7 * 19
    with pytest.raises(DataError, match="same tokens"):
        phase_curves([], targets)


def test_bad_input() -> None:
    counts = counts_of(text(5, seed=0), V)
    targets = ngram_targets(counts, max_rows=1)
    ids = torch.from_numpy(text(2, seed=1))
    with pytest.raises(DataError, match="do not match"):
        NgramMeter(targets).add(torch.zeros(2, 20, V + 1), ids)
    with pytest.raises(NonFiniteError, match="logits"):
        NgramMeter(targets).add(torch.full((2, 20, V), torch.nan), ids)
    with pytest.raises(DataError, match="empty"):
        NgramMeter(targets).result()
    unseen = NgramMeter(targets)
    other = next(u for u in range(V) if u != targets.rows[0])
    unseen.add(torch.zeros(1, 3, V), torch.full((1, 3), other))
    with pytest.raises(DataError, match="max_rows"):
        unseen.result()
    with pytest.raises(ConfigError, match="smoothing"):
        ngram_targets(counts, smoothing=-1)
    with pytest.raises(ConfigError, match="add_k"):
        entropy_lines(counts, text(5, seed=0), add_k=0)
    empty = np.zeros(0, dtype=np.int32)
    with pytest.raises(DataError, match="too short"):
        KneserNey(NgramCounts(np.zeros(3, dtype=np.int64), empty, empty, empty.astype(np.int64)))
