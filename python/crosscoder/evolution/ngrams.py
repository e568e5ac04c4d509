"""The statistical phase: how close a model's predictions are to unigram and bigram statistics.

Letters: V vocabulary, S sequences, C context (tokens a sequence), R tracked current tokens, T predictions.
Everything is in nats.

The paper's (P, Fig. 7): KL_uni = KL(p || q) with q the mean prediction; KL_bi = sum_u p(u) KL(p(.|u) || q(.|u)) with
q(.|u) the mean prediction where the current token is u; the loss beside the unigram and bigram entropies. Finite counts
make rows look more certain than they are, which raises a plug-in KL: beside KL_bi stands one less the first-order
(Miller and Madow 1955) estimate of that, sum_u p(u) (m_u - 1) / (2 n_u) with m_u the distinct tokens seen after u in
n_u (ours). Ours, because the paper leaves them open: the smoothing (add-k with k = 0.01, or Kneser-Ney), the bigram
entropy (the cross-entropy of an interpolated Kneser-Ney bigram model on the evaluation tokens: what a bigram model can
reach on text it has not seen), and the mean KL of each single prediction to the bigram row. Counts must come from text
that is disjoint from the evaluation text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.kernels.arrays import n_threads

_DENSE_ROWS = 4096
_CACHED_ELEMENTS = 1 << 18
_FLUSH = 1 << 16


@dataclass(frozen=True)
class NgramCounts:
    """Unigram and bigram counts of a corpus, bigrams as a sorted sparse list of N distinct pairs."""

    unigrams: NDArray[np.int64]
    """(V,) occurrences of each token."""
    first: NDArray[np.int32]
    """(N,) current token, ascending."""
    second: NDArray[np.int32]
    """(N,) next token, ascending within `first`."""
    count: NDArray[np.int64]
    """(N,) occurrences, at least 1. No bigram crosses the end of a sequence."""

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.unigrams.size

    @property
    def n_bigrams(self) -> int:
        """All bigrams, not only distinct ones."""
        return int(self.count.sum())

    @property
    def contexts(self) -> NDArray[np.int64]:
        """(V,) occurrences of each token as the first of a bigram."""
        return np.bincount(self.first, self.count, minlength=self.vocab_size).astype(np.int64)


@dataclass(frozen=True)
class EntropyLines:
    """Levels that a loss can be compared with, in nats a token."""

    uniform: float
    """ln V."""
    unigram: float
    """Cross-entropy of the counting corpus's unigrams (add-k) on the evaluation tokens."""
    bigram: float
    """Cross-entropy of the Kneser-Ney bigram model on the evaluation tokens: the bigram entropy on the same tokens."""
    unigram_plugin: float
    """Entropy of the counting corpus's unigram frequencies: slightly optimistic."""
    bigram_plugin: float
    """H(next | current) of the counting corpus's bigram frequencies: optimistic, as rare pairs look certain."""
    bigram_corrected: float
    """`bigram_plugin` with the Miller-Madow correction: less optimistic, still a lower line on sparse counts."""
    n_tokens: int
    """Evaluation tokens predicted."""


@dataclass(frozen=True)
class NgramTargets:
    """What predictions are compared with."""

    unigram: NDArray[np.float32]
    """(V,) p."""
    rows: NDArray[np.int64]
    """(R,) the tracked current tokens u, the most frequent first."""
    bigram: NDArray[np.float32]
    """(R, V) p(.|u)."""
    weight: NDArray[np.float64]
    """(R,) p(u) in the counting corpus, not renormalised."""
    bias: NDArray[np.float64]
    """(R,) (m_u - 1) / (2 n_u), nats: first order of what finite counts add to a row's KL; 0 with Kneser-Ney rows,
    which are no plug-in estimate."""
    smoothing: str
    """For example "add-0.01" or "kneser-ney"."""

    @property
    def coverage(self) -> float:
        """Share of the counting corpus's tokens that are a tracked u."""
        return float(self.weight.sum())


@dataclass(frozen=True)
class NgramPhase:
    """One snapshot's distance to unigram and bigram statistics, in nats."""

    loss: float
    """Mean cross-entropy of the model."""
    kl_unigram: float
    """KL(p || mean prediction) (P)."""
    kl_bigram: float
    """sum_u p(u) KL(p(.|u) || mean prediction after u), over tracked u that occur, renormalised (P)."""
    kl_bigram_corrected: float
    """`kl_bigram` less the sampling bias of the counts (`NgramTargets.bias`): nearer, still high on sparse counts."""
    kl_bigram_each: float
    """Mean over predictions after a tracked u of KL(p(.|u) || prediction) (ours); at least the same mean of
    KL(p(.|u) || mean prediction after u)."""
    n_predictions: int
    """T."""
    coverage: float
    """Share of the counting corpus's tokens that are a tracked u which occurs in the evaluation text."""


@dataclass(frozen=True)
class NgramCurves:
    """`NgramPhase` of K snapshots."""

    loss: NDArray[np.float64]
    """(K,)"""
    kl_unigram: NDArray[np.float64]
    """(K,)"""
    kl_bigram: NDArray[np.float64]
    """(K,)"""
    kl_bigram_corrected: NDArray[np.float64]
    """(K,)"""
    kl_bigram_each: NDArray[np.float64]
    """(K,)"""
    n_predictions: int
    coverage: float
    smoothing: str


# ------------------------------------------------------------------------------------------- counts


def count_ngrams(
    ids_SC: ArrayLike, vocab_size: int, *, chunk_tokens: int = 1 << 22, on_chunk: Callable[[int], None] | None = None
) -> NgramCounts:
    """Counts over token ids (S, C) by the C++ counter, on all CPUs. `vocab_size` is the model's (its number of
    logits), not the tokenizer's.

    The ids may be of any integer type and mapped from disk (`np.load(..., mmap_mode="r")`): they are read once, in
    chunks of whole sequences. Memory beyond a chunk: 10 to 15 bytes for each distinct bigram while counting, 16 more
    for the result. `on_chunk` is told the number of sequences done. Raises `DataError` for ids outside the vocabulary.
    """
    from crosscoder._core import NgramCounter

    ids = _id_array(ids_SC)
    counter = NgramCounter(vocab_size)
    size = max(1, chunk_tokens // ids.shape[1])
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        if not np.can_cast(chunk.dtype, np.int32):
            _check_range(chunk, vocab_size)  # before it is narrowed
        try:
            counter.add(np.ascontiguousarray(chunk, dtype=np.int32), n_threads())
        except ValueError as error:
            _check_range(chunk, vocab_size)
            raise DataError(f"sequences {start} to {start + len(chunk) - 1}: {error}") from error
        if on_chunk is not None:
            on_chunk(len(chunk))
    first, second, count = counter.bigrams(n_threads())
    return NgramCounts(unigrams=counter.unigrams(), first=first, second=second, count=count)


def _id_array(ids_SC: ArrayLike) -> NDArray[Any]:
    ids = np.asarray(ids_SC)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.shape[1] < 2 or not ids.size:
        raise DataError(f"token ids must be integers (S, C) with C at least 2, got {ids.shape} {ids.dtype}")
    return ids


def _check_range(ids: NDArray[Any], vocab_size: int) -> None:
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise DataError(f"token ids span [{ids.min()}, {ids.max()}], outside a vocabulary of {vocab_size}")


def _checked_ids(ids_SC: ArrayLike, vocab_size: int) -> NDArray[Any]:
    ids = _id_array(ids_SC)
    _check_range(ids, vocab_size)
    return ids


# ------------------------------------------------------------------------------------------- bigram model


class KneserNey:
    """Interpolated Kneser-Ney bigram model: p(v|u) = max(c(uv) - d, 0) / c(u) + lambda(u) p_cont(v).

    d = n1 / (n1 + 2 n2) from the numbers of bigrams seen once (at least 1) and twice; lambda(u) = d N(u.) / c(u), 1 for
    a u never seen; p_cont(v) ~ N(.v) + 1/2, the number of distinct tokens before v (ours: the half, so that nothing has
    probability 0). Each p(.|u) sums to 1. Source: Kneser and Ney 1995, in Chen and Goodman's interpolated form.
    """

    def __init__(self, counts: NgramCounts) -> None:
        if counts.n_bigrams == 0:
            raise DataError("no bigram was counted; the counting corpus is too short")
        size = counts.vocab_size
        self.counts = counts
        once, twice = (counts.count == 1).sum(), (counts.count == 2).sum()
        # Without a bigram seen once the estimate would be 0, and a new bigram impossible: as if there were one.
        once = max(once, 1)
        self.discount = float(once / (once + 2 * twice))
        continuation = np.bincount(counts.second, minlength=size) + 0.5
        self.continuation = continuation / continuation.sum()
        """(V,) p_cont."""
        self._context = counts.contexts
        followers = np.bincount(counts.first, minlength=size)
        seen = self._context > 0
        self.backoff = np.where(seen, self.discount * followers / np.maximum(self._context, 1), 1.0)
        """(V,) lambda(u)."""
        self._keys = counts.first.astype(np.int64) * size + counts.second

    def probability(self, first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
        """p(second | first), elementwise."""
        u, v = np.asarray(first, dtype=np.int64), np.asarray(second, dtype=np.int64)
        key = u * self.counts.vocab_size + v
        place = np.minimum(np.searchsorted(self._keys, key), self._keys.size - 1)
        count = np.where(self._keys[place] == key, self.counts.count[place], 0)
        direct = np.maximum(count - self.discount, 0) / np.maximum(self._context[u], 1)
        return np.asarray(direct + self.backoff[u] * self.continuation[v])

    def rows(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """(R, V) p(.|u) for each u in `tokens` (R,)."""
        chosen = np.asarray(tokens, dtype=np.int64)
        direct = np.maximum(_count_rows(self.counts, chosen) - self.discount, 0)
        direct /= np.maximum(self._context[chosen], 1)[:, None]
        return np.asarray(direct + self.backoff[chosen, None] * self.continuation)


def _count_rows(counts: NgramCounts, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """(R, V) dense counts of the bigrams that start with each of `tokens` (R,)."""
    rows = np.zeros((tokens.size, counts.vocab_size))
    starts, ends = np.searchsorted(counts.first, tokens), np.searchsorted(counts.first, tokens, side="right")
    lengths = ends - starts
    row = np.repeat(np.arange(tokens.size), lengths)
    place = np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    rows[row, counts.second[place]] = counts.count[place]
    return rows


def entropy_lines(counts: NgramCounts, evaluation_SC: ArrayLike, *, add_k: float = 0.5) -> EntropyLines:
    """Entropies of the counting corpus and cross-entropies on evaluation tokens (S, C), every token but each sequence's
    first, as the model's loss has it. `add_k` smooths the unigrams. Raises `DataError` for bad ids."""
    ids = _checked_ids(evaluation_SC, counts.vocab_size)
    if not add_k > 0:
        raise ConfigError(f"add_k must be above 0, or a token never counted has an infinite loss; got {add_k:g}")
    current, following = ids[:, :-1].ravel(), ids[:, 1:].ravel()
    smoothed = counts.unigrams + add_k
    model = KneserNey(counts)
    pairs, occupied = counts.n_bigrams, int((counts.contexts > 0).sum())
    bigram = _entropy(counts.count) - _entropy(counts.contexts)
    return EntropyLines(
        uniform=float(np.log(counts.vocab_size)),
        unigram=float(-np.log(smoothed / smoothed.sum())[following].mean()),
        bigram=float(-np.log(model.probability(current, following)).mean()),
        unigram_plugin=_entropy(counts.unigrams),
        bigram_plugin=bigram,
        bigram_corrected=bigram + (counts.count.size - occupied) / (2 * pairs),
        n_tokens=following.size,
    )


def _entropy(count: NDArray[np.int64]) -> float:
    share = count[count > 0] / count.sum()
    return float(-(share * np.log(share)).sum())


# ------------------------------------------------------------------------------------------- predictions


def ngram_targets(
    counts: NgramCounts, *, smoothing: float | Literal["kneser-ney"] = 0.01, max_rows: int | None = None
) -> NgramTargets:
    """The distributions that predictions are compared with.

    `smoothing`: k of add-k for p and p(.|u), or "kneser-ney" (p is then unsmoothed). `max_rows`: how many of the most
    frequent current tokens are tracked; default all for V up to 4,096, else 512. The table takes 4 R V bytes here and
    16 R V more while a snapshot is measured (V = 50,304, R = 512: 0.5 GB). Raises `ConfigError` for a negative k.
    """
    size = counts.vocab_size
    if smoothing != "kneser-ney" and not (isinstance(smoothing, (int, float)) and smoothing >= 0):
        raise ConfigError(f'smoothing must be a number of at least 0 or "kneser-ney", got {smoothing!r}')
    if max_rows is None:
        max_rows = size if size <= _DENSE_ROWS else 512
    context = counts.contexts
    order = np.argsort(-context, kind="stable")[:max_rows]
    rows = order[context[order] > 0]
    distinct = np.bincount(counts.first, minlength=size)[rows]
    bias = (distinct - 1) / (2 * context[rows])
    if isinstance(smoothing, str):
        k, name = 0.0, str(smoothing)
        bias = np.zeros(rows.size)
        bigram = KneserNey(counts).rows(rows)
    else:
        k, name = float(smoothing), f"add-{smoothing:g}"
        bigram = (_count_rows(counts, rows) + k) / (context[rows, None] + k * size)
    unigram = (counts.unigrams + k) / (counts.unigrams.sum() + k * size)
    return NgramTargets(
        unigram=unigram.astype(np.float32),
        rows=rows,
        bigram=bigram.astype(np.float32),
        weight=context[rows] / context.sum(),
        bias=bias,
        smoothing=name,
    )


class NgramMeter:
    """Accumulates one snapshot's predictions, batch by batch, in memory that does not grow."""

    def __init__(self, targets: NgramTargets, device: str | torch.device = "cpu") -> None:
        """`device`: that of the logits."""
        self._targets = targets
        n_rows, size = targets.bigram.shape
        # One more row takes the predictions after tokens that are not tracked.
        row_of = torch.full((size,), n_rows, dtype=torch.int64)
        row_of[torch.from_numpy(targets.rows)] = torch.arange(n_rows)
        bigram = np.concatenate([targets.bigram, np.zeros((1, size), np.float32)])
        self._row_of = row_of.to(device)
        self._bigram = torch.from_numpy(bigram).to(device)
        self._negative_entropy = torch.from_numpy(_plogp(bigram)).to(device)
        self._sums = torch.zeros(n_rows + 1, size, dtype=torch.float64, device=device)
        self._recent = torch.zeros(n_rows + 1, size, device=device)
        self._n_recent = 0
        self._counts = torch.zeros(n_rows + 1, dtype=torch.int64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._each = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, logits_SCV: Tensor, ids_SC: Tensor) -> None:
        """Logits (or log-probabilities) of a batch and its tokens; the last position of a sequence predicts
        nothing known and is left out. V is the model's vocabulary, padding included: count with that size.

        Raises `DataError` for shapes that do not match, `NonFiniteError` for NaN or infinite logits.
        """
        size = self._row_of.numel()
        if ids_SC.ndim != 2 or logits_SCV.shape != (*ids_SC.shape, size):
            raise DataError(
                f"logits {tuple(logits_SCV.shape)} do not match tokens {tuple(ids_SC.shape)} and a vocabulary of {size}"
            )
        ids = ids_SC.to(self._row_of.device, torch.int64)
        following = ids[:, 1:].reshape(-1)
        row = self._row_of[ids[:, :-1].reshape(-1)]
        logits_TV = logits_SCV[:, :-1].reshape(-1, size).to(ids.device)
        self._counts += torch.bincount(row, minlength=self._counts.numel())
        step = max(16, _CACHED_ELEMENTS // size)
        for start in range(0, row.numel(), step):
            part = slice(start, start + step)
            log_q_TV = logits_TV[part].float().log_softmax(dim=1)
            self._loss -= log_q_TV.gather(1, following[part, None]).sum(dtype=torch.float64)
            cross_T = torch.linalg.vecdot(self._bigram[row[part]], log_q_TV)
            self._each += (self._negative_entropy[row[part]] - cross_T).sum(dtype=torch.float64)
            self._recent.index_add_(0, row[part], log_q_TV.exp_())
        self._n_recent += row.numel()
        if not bool(self._loss.isfinite()):
            raise NonFiniteError("the model's logits hold NaN or infinity")
        if self._n_recent >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        """Float32 sums stay short, so that small probabilities are not lost beside large ones."""
        self._sums += self._recent
        self._recent.zero_()
        self._n_recent = 0

    def result(self) -> NgramPhase:
        """The distances. Raises `DataError` if nothing was added, or no tracked token occurred."""
        self._flush()
        targets = self._targets
        total = int(self._counts.sum())
        if total == 0:
            raise DataError("no prediction was measured: the evaluation text is empty")
        counts = self._counts[:-1].cpu().numpy()
        seen = counts > 0
        if not seen.any():
            raise DataError("no tracked token occurs in the evaluation text; track more (max_rows)")
        sums = self._sums.cpu().numpy()
        weight = targets.weight[seen]
        kl_R = _kl(targets.bigram[seen], sums[:-1][seen] / counts[seen, None])
        kl_bigram = float((weight * kl_R).sum() / weight.sum())
        return NgramPhase(
            loss=float(self._loss) / total,
            kl_unigram=float(_kl(targets.unigram[None], sums.sum(axis=0, keepdims=True) / total)[0]),
            kl_bigram=kl_bigram,
            kl_bigram_corrected=kl_bigram - float((weight * targets.bias[seen]).sum() / weight.sum()),
            kl_bigram_each=float(self._each) / int(counts.sum()),
            n_predictions=total,
            coverage=float(weight.sum()),
        )


def measure_phase(
    model: Callable[..., Any],
    ids_SC: ArrayLike,
    targets: NgramTargets,
    *,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> NgramPhase:
    """Run one snapshot (a causal language model of transformers, in eval mode) over token ids (S, C).

    Only `model(input_ids=..., use_cache=False).logits` is used. `on_batch` is told the number of sequences done with
    each batch. Raises `DataError` for bad ids, `NonFiniteError` for logits that are not finite.
    """
    size = targets.unigram.size
    ids = torch.from_numpy(_checked_ids(ids_SC, size).astype(np.int64))
    meter = NgramMeter(targets, device)
    with torch.inference_mode():
        for batch in torch.split(ids, batch_size):
            logits = model(input_ids=batch.to(device), use_cache=False).logits
            meter.add(logits, batch)
            if on_batch is not None:
                on_batch(len(batch))
    return meter.result()


def phase_curves(phases: Sequence[NgramPhase], targets: NgramTargets) -> NgramCurves:
    """Snapshots side by side. Raises `DataError` if there is none, or they saw different numbers of predictions."""
    if len({phase.n_predictions for phase in phases}) != 1:
        raise DataError("phase_curves takes one snapshot or more, all measured on the same tokens")
    return NgramCurves(
        loss=np.array([phase.loss for phase in phases]),
        kl_unigram=np.array([phase.kl_unigram for phase in phases]),
        kl_bigram=np.array([phase.kl_bigram for phase in phases]),
        kl_bigram_corrected=np.array([phase.kl_bigram_corrected for phase in phases]),
        kl_bigram_each=np.array([phase.kl_bigram_each for phase in phases]),
        n_predictions=phases[0].n_predictions,
        coverage=phases[0].coverage,
        smoothing=targets.smoothing,
    )


def _plogp(p: NDArray[Any]) -> NDArray[np.float32]:
    """(R,) sum_v p log p, with 0 log 0 = 0."""
    return np.array(
        [float((row * np.log(row, out=np.zeros_like(row), where=row > 0)).sum(dtype=np.float64)) for row in p],
        dtype=np.float32,
    )


def _kl(p: NDArray[Any], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """(R,) KL(p || q) of rows; q > 0 wherever p > 0, as a softmax gives it (underflow is caught at 1e-300)."""
    result = np.empty(len(p))
    for row, (p_V, q_V) in enumerate(zip(p, q, strict=True)):
        some = p_V > 0
        wide = p_V[some].astype(np.float64)
        result[row] = (wide * (np.log(wide) - np.log(np.maximum(q_V[some], 1e-300)))).sum()
    return result
