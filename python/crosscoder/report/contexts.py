"""Contexts in the form the page reads: by feature, in blocks that can be decoded one at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscoder.report.blocks import Blocks
from crosscoder.report.data import Contexts
from crosscoder.report.quantise import linear_codes

_TOKENS_PER_BLOCK = 1 << 20


@dataclass(frozen=True)
class SortedContexts:
    """Contexts in order of feature and rank, tokens renumbered by frequency so that most ids are small."""

    feature: NDArray[np.int64]
    """(N,) ascending."""
    rank: NDArray[np.int64]
    """(N,) 0 for a feature's strongest context."""
    tokens: NDArray[np.int32]
    """(N, L) indices into `vocabulary`; `len(vocabulary)` pads."""
    codes: NDArray[np.uint8]
    """(N, L) activation / feature maximum in 255 steps; an active token is at least 1."""
    document: NDArray[np.int64]
    position: NDArray[np.int64]
    vocabulary: list[str]
    documents: list[str]

    def only(self, chosen: NDArray[np.bool_]) -> SortedContexts:
        """The contexts where `chosen` (N,) is true."""
        return SortedContexts(
            self.feature[chosen],
            self.rank[chosen],
            self.tokens[chosen],
            self.codes[chosen],
            self.document[chosen],
            self.position[chosen],
            self.vocabulary,
            self.documents,
        )


def _ranks(feature: NDArray[np.int64]) -> NDArray[np.int64]:
    starts = np.flatnonzero(np.diff(feature, prepend=-1))
    lengths = np.diff(starts, append=feature.size)
    return np.arange(feature.size) - np.repeat(starts, lengths)


def sort_contexts(contexts: Contexts, max_activation: NDArray[Any]) -> SortedContexts:
    """Order by feature (the given order within it is kept), renumber tokens, quantise activations.

    An activation is kept as its share of the feature's maximum in 255 steps: the error is at most 1/510 of
    the maximum (1/255 for the smallest), and what is active stays visible.
    """
    given = np.asarray(contexts.feature, dtype=np.int64)
    order = np.argsort(given, kind="stable")
    feature = given[order]
    tokens = np.asarray(contexts.tokens)[order].astype(np.int32) + 1  # 0 is the padding
    counts = np.bincount(tokens.ravel(), minlength=len(contexts.vocabulary) + 1)
    counts[0] = 0
    by_count = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    vocabulary = [contexts.vocabulary[token - 1] for token in by_count.tolist()]
    new_id = np.full(counts.size, by_count.size, dtype=np.int32)
    new_id[by_count] = np.arange(by_count.size, dtype=np.int32)
    tokens = new_id[tokens]

    largest = np.maximum(np.asarray(max_activation, dtype=np.float32)[feature][:, None], np.float32(1e-30))
    shares = np.asarray(contexts.activations, dtype=np.float32)[order] / largest
    shares[tokens == len(vocabulary)] = 0
    codes = linear_codes(shares, 0.0, 1.0, 8, keep_positive=True).astype(np.uint8)

    missing = np.full(feature.size, -1, dtype=np.int64)
    document = missing if contexts.document is None else np.asarray(contexts.document)[order].astype(np.int64)
    position = missing if contexts.position is None else np.asarray(contexts.position)[order].astype(np.int64)
    return SortedContexts(
        feature, _ranks(feature), tokens, codes, document, position, vocabulary, list(contexts.documents)
    )


def top_tokens(contexts: SortedContexts, n_features: int) -> NDArray[np.int64]:
    """(F,) the token at the largest activation of each feature's first context, -1 without contexts."""
    top = np.full(n_features, -1, dtype=np.int64)
    first = contexts.rank == 0
    if first.any():
        where = contexts.codes[first].argmax(axis=1)
        top[contexts.feature[first]] = np.take_along_axis(contexts.tokens[first], where[:, None], axis=1)[:, 0]
    return top


def _write_blocks(contexts: SortedContexts, blocks: Blocks) -> list[dict[str, Any]]:
    n_contexts, length = contexts.tokens.shape
    wide = len(contexts.vocabulary) > np.iinfo(np.uint16).max
    per_block = max(1, _TOKENS_PER_BLOCK // max(length, 1))
    parts = []
    for start in range(0, n_contexts, per_block):
        stop = min(start + per_block, n_contexts)
        parts.append(
            {
                "start": start,
                "stop": stop,
                "tokens": blocks.add_raw(contexts.tokens[start:stop], "uint32" if wide else "uint16"),
                "codes": blocks.add_raw(contexts.codes[start:stop], "uint8"),
            }
        )
    return parts


def _fewer(contexts: SortedContexts, rate: NDArray[Any], share: float) -> SortedContexts:
    """About `share` of the contexts: the strongest of each feature, or of those features that fire most."""
    n_contexts = contexts.feature.size
    most = int(contexts.rank.max()) + 1
    if most > 1:
        up_to_rank = np.cumsum(np.bincount(contexts.rank, minlength=most))[:-1]
        allowed = int((up_to_rank <= share * n_contexts).sum())
        return contexts.only(contexts.rank < max(allowed, 1))
    chosen = np.zeros(n_contexts, dtype=bool)
    chosen[np.argsort(-rate[contexts.feature], kind="stable")[: int(share * n_contexts)]] = True
    return contexts.only(chosen)


def _describe(contexts: SortedContexts, top: NDArray[np.int64], n_features: int) -> tuple[dict[str, Any], Blocks]:
    blocks = Blocks("contexts")
    return {
        "length": int(contexts.tokens.shape[1]),
        "padding": len(contexts.vocabulary),
        "vocabulary": blocks.add_bytes(json.dumps(contexts.vocabulary).encode()),
        "documents": blocks.add_bytes(json.dumps(contexts.documents).encode()),
        "count": blocks.add_raw(np.bincount(contexts.feature, minlength=n_features), "uint32"),
        "document": blocks.add_raw(contexts.document, "int32"),
        "position": blocks.add_raw(contexts.position, "int32"),
        "top": blocks.add_raw(top, "int32"),
        "parts": _write_blocks(contexts, blocks),
    }, blocks


def write_contexts(
    contexts: Contexts, max_activation: NDArray[Any], rate: NDArray[Any], blocks: Blocks, budget: int
) -> tuple[dict[str, Any], str | None]:
    """Add contexts to `blocks` within about `budget` bytes: first fewer a feature, then for fewer features.

    Returns what the page needs to read them, and a sentence saying what was left out, if anything was.
    `rate` (F,) decides which features keep theirs where not all can: those that fire most.
    """
    everything = sort_contexts(contexts, max_activation)
    n_features = np.size(max_activation)
    top = top_tokens(everything, n_features)
    keep = everything
    described, own = _describe(keep, top, n_features)
    while own.n_bytes > budget and keep.feature.size:
        keep = _fewer(keep, rate, 0.97 * max(budget, 0) / own.n_bytes)
        described, own = _describe(keep, top, n_features)
    blocks.extend(own)
    left_out = None
    if keep.feature.size < everything.feature.size:
        left_out = (
            f"To stay within its size this page holds {keep.feature.size:,} of {everything.feature.size:,} "
            f"contexts: at most {int(keep.rank.max(initial=-1)) + 1} a feature, for "
            f"{np.unique(keep.feature).size:,} features."
        )
    return described, left_out
