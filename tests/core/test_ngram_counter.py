"""NgramCounter against a plain count."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscoder import _core


def plain_counts(batches: list[np.ndarray], ignore: int | None) -> tuple[Counter[int], Counter[tuple[int, int]]]:
    unigrams: Counter[int] = Counter()
    bigrams: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        for sequence in np.atleast_2d(batch).tolist():
            unigrams.update(token for token in sequence if token != ignore)
            pairs = pairwise(sequence)
            bigrams.update(pair for pair in pairs if ignore not in pair)
    return unigrams, bigrams


def assert_counts(counter: _core.NgramCounter, batches: list[np.ndarray], n_threads: int = 1) -> None:
    unigrams, bigrams = plain_counts(batches, counter.ignore)
    assert counter.unigrams().dtype == np.int64
    assert counter.unigrams().tolist() == [unigrams[i] for i in range(counter.vocab_size)]
    assert counter.total == unigrams.total()
    first, second, count = counter.bigrams(n_threads)
    assert [str(a.dtype) for a in (first, second, count)] == ["int32", "int32", "int64"]
    assert list(zip(first.tolist(), second.tolist(), count.tolist(), strict=True)) == [
        (*pair, bigrams[pair]) for pair in sorted(bigrams)
    ]
    assert len(counter.bigrams()[0]) == len(bigrams)


def zipf(seed: int, vocab_size: int, shape: tuple[int, ...]) -> np.ndarray:
    cumulative = np.cumsum(1 / np.arange(1, vocab_size + 1))
    drawn: np.ndarray = np.random.default_rng(seed).random(shape) * cumulative[-1]
    return np.minimum(np.searchsorted(cumulative, drawn), vocab_size - 1).astype(np.int32)


@settings(deadline=None, max_examples=60)
@given(
    vocab_size=st.sampled_from([1, 2, 3, 4, 5, 17, 300]),
    shapes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), max_size=4),
    ignore=st.sampled_from([None, 0, 2, -1, 1000]),
    n_threads=st.integers(1, 3),
    seed=st.integers(0, 1 << 16),
)
def test_counts_are_those_of_a_plain_count(
    vocab_size: int, shapes: list[tuple[int, int]], ignore: int | None, n_threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    batches = [rng.integers(0, vocab_size, shape, dtype=np.int32) for shape in shapes]
    if ignore is not None:
        for batch in batches:
            batch[rng.random(batch.shape) < 0.2] = ignore
    counter = _core.NgramCounter(vocab_size, ignore=ignore)
    for batch in batches:
        counter.add(batch, n_threads)
    assert_counts(counter, batches, n_threads)


@pytest.mark.parametrize("n_threads", [1, 2, 7])
def test_a_long_stream_with_rows_of_every_size(n_threads: int) -> None:
    """Enough for several threads; the rows of frequent tokens become direct tables, rare ones stay small."""
    batches = [zipf(seed, 700, (500, 400)) for seed in range(2)]
    counter = _core.NgramCounter(700)
    for batch in batches:
        counter.add(batch, n_threads)
    assert_counts(counter, batches, n_threads)


def test_one_dimension_is_one_sequence() -> None:
    tokens = np.array([3, 1, 3, 1, 2], dtype=np.int32)
    counter = _core.NgramCounter(4)
    counter.add(tokens)
    assert [a.tolist() for a in counter.bigrams()] == [[1, 1, 3], [2, 3, 1], [1, 1, 2]]


def test_no_bigram_crosses_sequences_batches_or_ignored_tokens() -> None:
    counter = _core.NgramCounter(6, ignore=0)
    counter.add(np.array([[1, 2], [3, 4]], dtype=np.int32))
    counter.add(np.array([[5, 0, 1]], dtype=np.int32))
    first, second, _ = counter.bigrams()
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(1, 2), (3, 4)]
    assert counter.unigrams().tolist() == [0, 2, 1, 1, 1, 1]


def test_results_are_snapshots_that_outlive_the_counter() -> None:
    counter = _core.NgramCounter(5)
    counter.add(np.array([1, 2], dtype=np.int32))
    first, second, count = counter.bigrams()
    unigrams = counter.unigrams()
    counter.add(np.array([1, 2], dtype=np.int32))
    del counter
    assert (first.tolist(), second.tolist(), count.tolist(), unigrams.tolist()) == (
        [1],
        [2],
        [1],
        [0, 1, 1, 0, 0],
    )


def test_adding_from_several_python_threads_loses_nothing() -> None:
    batches = [zipf(seed, 50, (100, 100)) for seed in range(8)]
    counter = _core.NgramCounter(50)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(counter.add, batches))
    assert_counts(counter, batches)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([[0, 1], [2, 10]], np.int32), r"tokens\[1, 1\] is 10, outside 0\.\.9"),
        (np.array([0, -3, 11], np.int32), r"tokens\[1\] is -3, outside 0\.\.9"),
        (np.append(np.zeros(5000, np.int32), np.int32(10)), r"tokens\[5000\] is 10, outside 0\.\.9"),
        (np.zeros(3, np.int64), "tokens must be int32, not int64"),
        (np.zeros((1, 1, 1), np.int32), r"tokens must have shape \(T,\) or \(S, C\), not \(1, 1, 1\)"),
        (np.zeros((4, 4), np.int32).T[::2], "tokens must be C-contiguous"),
    ],
)
def test_wrong_tokens_are_named_and_not_counted(tokens: np.ndarray, message: str) -> None:
    counter = _core.NgramCounter(10)
    with pytest.raises(ValueError, match=f"^{message}"):
        counter.add(tokens)
    assert counter.total == 0


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="^vocab_size must be between 1 and 2147483647, not 0"):
        _core.NgramCounter(0)
    with pytest.raises(ValueError, match="^n_threads must be at least 1, not -1"):
        _core.NgramCounter(3).add(np.zeros(3, np.int32), -1)
    with pytest.raises(TypeError, match="^tokens must be a numpy array, not list"):
        _core.NgramCounter(3).add([1, 2])  # type: ignore[arg-type]
