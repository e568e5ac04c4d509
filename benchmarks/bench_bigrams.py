"""How fast are bigrams counted, and how many bytes does a distinct one take, at the vocabulary of Pythia?

Tokens are drawn from Zipf's law, each by itself: no real text has as many distinct bigrams a token, so this is the
hardest case. "text-like" tokens follow one of a few successors of the token before, half of the time. They are counted
in chunks, as a corpus on disk is. "scan" reads the same tokens and counts single tokens only (numpy's bincount).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from crosscoder import _core
from crosscoder.evolution import count_ngrams
from harness.measure import compare
from harness.memory import peak_anonymous
from harness.results import Recorder

CONTEXT = 2_048
SUCCESSORS = 32
RESULT_BYTES = 16
"""Of a distinct bigram in the result: two int32 and an int64."""


@dataclass(frozen=True)
class Stream:
    """Tokens of one case."""

    n_tokens: int
    kind: str
    vocab_size: int = 50_304

    def __str__(self) -> str:
        return f"V{self.vocab_size}-{self.kind}-{self.n_tokens // 10**6}M"


QUICK = [Stream(1 << 22, "zipf"), Stream(1 << 22, "text-like")]
FULL = [Stream(1 << 26, "zipf"), Stream(1 << 26, "text-like")]


def tokens(stream: Stream, seed: int = 0) -> np.ndarray:
    """(S, C) int32; ranks of frequency are spread over the ids at random."""
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(1 / np.arange(1, stream.vocab_size + 1))
    ids = rng.permutation(stream.vocab_size).astype(np.int32)
    result = np.empty(stream.n_tokens, dtype=np.int32)
    for start in range(0, stream.n_tokens, 1 << 22):
        drawn = rng.random(min(1 << 22, stream.n_tokens - start)) * cumulative[-1]
        result[start : start + len(drawn)] = ids[np.minimum(np.searchsorted(cumulative, drawn), len(ids) - 1)]
    if stream.kind == "text-like":
        successors = ids[
            np.minimum(np.searchsorted(cumulative, rng.random((len(ids), SUCCESSORS)) * cumulative[-1]), len(ids) - 1)
        ]
        follows = np.flatnonzero(rng.random(len(result) - 1) < 0.5)
        choice = rng.integers(0, SUCCESSORS, len(follows))
        result[follows + 1] = successors[result[follows], choice]
    return result.reshape(-1, CONTEXT)


def test_counting(benchmark: Any, case: Stream, rounds: int, recorder: Recorder) -> None:
    ids = tokens(case)
    with peak_anonymous() as peak:
        counts = count_ngrams(ids, case.vocab_size)
    distinct = counts.count.size
    del counts

    def fill() -> _core.NgramCounter:
        counter = _core.NgramCounter(case.vocab_size)
        for part in np.array_split(ids, max(1, ids.size >> 22)):
            counter.add(part, torch.get_num_threads())
        return counter

    with peak_anonymous() as held:
        start = time.process_time()
        fill()
        cpu_seconds = time.process_time() - start
    contenders = {
        "scan": lambda: np.bincount(ids.ravel(), minlength=case.vocab_size),
        "count": fill,
        "count and sort": lambda: count_ngrams(ids, case.vocab_size),
    }
    timings = compare(benchmark, "count and sort", contenders, rounds)
    figures = {name: case.n_tokens / timing.median / 1e6 for name, timing in timings.items()}
    recorder.add(
        str(case),
        timings,
        stream=asdict(case),
        distinct=distinct,
        million_tokens_a_second=figures,
        million_tokens_a_cpu_second=case.n_tokens / cpu_seconds / 1e6,
        bytes_a_distinct_bigram_counting=held.bytes / distinct,
        bytes_a_distinct_bigram_with_result=peak.bytes / distinct,
        bytes_a_distinct_bigram_of_the_result=RESULT_BYTES,
    )
    benchmark.extra_info["million_tokens_a_second"] = round(figures["count and sort"], 1)
    print(
        f"\n{case}: {figures['count']:.1f} M tokens/s, {figures['count and sort']:.1f} with the sorted result; "
        f"{case.n_tokens / cpu_seconds / 1e6:.1f} M tokens a CPU-second; "
        f"{held.bytes / distinct:.1f} bytes a distinct bigram ({distinct / 1e6:.1f} M), {peak.bytes / distinct:.1f} "
        f"at the peak with the result's {RESULT_BYTES}"
    )
