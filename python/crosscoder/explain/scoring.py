"""Does an explanation hold? Detection and fuzzing (Paulo et al. 2024, arXiv 2410.13928), as passages and their truth.

Letters: L tokens in a window, n passages of a test.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscoder.common.byte_text import byte_level_text
from crosscoder.explain.passages import FeatureContexts

HALF = 5
"""Passages of each of the two kinds."""
MARK_ABOVE = 0.7
"""A token is marked where its activation is above this share of the largest in its window. (The paper's 0.7 is of "the
maximum"; with the feature's own, weaker passages would be left without a mark.)"""
PASSES = 0.7
"""Balanced accuracy of an explanation that holds."""
KINDS = ("detection", "fuzzing")

_LINE_BREAK = re.compile("\r\n|[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")


@dataclass(frozen=True)
class Test:
    """Passages, and which of them are of the kind that is asked for."""

    __test__ = False  # for pytest

    passages: tuple[str, ...]
    truth: NDArray[np.bool_]
    """(n,)"""


class Texts:
    """Windows of token ids as passages."""

    def __init__(self, tokenizer: Any, end_of_text: int) -> None:
        self._tokenizer = tokenizer
        self.end_of_text = end_of_text
        """Crosscoders see nothing there: a mark on it would give itself away."""

    def passage(self, tokens_L: NDArray[np.integer], marked_L: NDArray[np.bool_] | None = None) -> str:
        """On one line, each marked token between << and >>."""
        here = tokens_L >= 0
        marks = np.zeros(len(tokens_L), dtype=bool) if marked_L is None else marked_L
        parts: list[list[str]] = [[]]
        kinds = [False]
        pieces = self._tokenizer.convert_ids_to_tokens(tokens_L[here].tolist())
        for piece, marked in zip(pieces, marks[here].tolist(), strict=True):
            # A character may be spread over several tokens; it stays whole where these are of one kind.
            if marked != kinds[-1] or (marked and parts[-1] and not _in_characters(parts[-1])):
                parts.append([])
                kinds.append(marked)
            parts[-1].append(piece)
        texts = [readable("".join(part)) for part in parts]
        return "".join(f"<<{text}>>" if kind else text for text, kind in zip(texts, kinds, strict=True)).strip()


def _in_characters(pieces: Sequence[str]) -> bool:
    """Whether byte-level pieces end within a character."""
    return "\\x" in byte_level_text("".join(pieces))


def readable(pieces: str) -> str:
    """Joined token pieces as one line of text that has no marks of its own."""
    text = byte_level_text(pieces).replace("▁", " ")
    return _LINE_BREAK.sub("⏎", text).replace("<<", "< <").replace(">>", "> >")


def strongest(activations_L: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(L,) the tokens to mark."""
    return np.asarray(activations_L > MARK_ABOVE * activations_L.max())


def top_passages(contexts: FeatureContexts, n: int, texts: Texts) -> list[str]:
    """Of the n-th feature, to explain it."""
    return [
        texts.passage(tokens, strongest(activations))
        for tokens, activations in zip(contexts.top_tokens[n], contexts.top_activations[n], strict=True)
    ]


def make_test(kind: str, contexts: FeatureContexts, n: int, texts: Texts, seed: int) -> Test | str:
    """The test of the n-th feature, or why it cannot be made. The same feature and seed give the same test."""
    rng = np.random.default_rng([seed, int(contexts.features[n]), KINDS.index(kind)])
    active = rng.permutation(int(contexts.n_active[n]))
    if kind == "detection":
        silent = np.flatnonzero(contexts.pool_silent[n])
        if len(active) < HALF or len(silent) < HALF:
            return f"{len(active)} active and {len(silent)} silent passages, {HALF} of each are needed"
        right = [texts.passage(contexts.active_tokens[n, i]) for i in active[:HALF]]
        wrong = [texts.passage(contexts.pool_tokens[i]) for i in rng.choice(silent, HALF, replace=False)]
    else:
        if len(active) < 2 * HALF:
            return f"{len(active)} active passages, {2 * HALF} are needed"
        right, wrong = [], []
        for place, i in enumerate(active[: 2 * HALF]):
            tokens, activations = contexts.active_tokens[n, i], contexts.active_activations[n, i]
            marks = strongest(activations)
            if place >= HALF:
                silent = np.flatnonzero((tokens >= 0) & (tokens != texts.end_of_text) & (activations == 0))
                if not len(silent):
                    return "it is active on every token of a passage"
                marks = np.isin(
                    np.arange(len(tokens)), rng.choice(silent, min(int(marks.sum()), len(silent)), replace=False)
                )
            (right if place < HALF else wrong).append(texts.passage(tokens, marks))
    order = rng.permutation(2 * HALF)
    both = right + wrong
    return Test(tuple(both[i] for i in order), order < HALF)


def balanced_accuracy(truth: NDArray[np.bool_], named: Sequence[int]) -> float:
    """Mean of the shares of both kinds that are called right; `named` are indices of the passages said to be true."""
    said = np.zeros(len(truth), dtype=bool)
    said[list(named)] = True
    return float((said[truth].mean() + (~said[~truth]).mean()) / 2)
