"""Subject-verb agreement, the usual four kinds: the verb's number follows its subject, whatever stands between.

simple "The friends" -> " have"; across a PP "The teachers near the desk" -> " are"; within an RC "The fathers that the
chefs" -> " do" (agrees with "chefs"); across an RC "The fathers that the chefs like" -> " do" (agrees with "fathers").
The corrupted prompt has the subject in the other number; the other noun keeps its own, and is singular as often as
plural.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from crosscoder.attribution.prompts import words
from crosscoder.attribution.task import Example, fitting

KINDS = ("simple", "across-pp", "within-rc", "across-rc")
_TRIES = 40
"""Candidates drawn for each example that is wanted: many do not fit the tokenizer, or come twice."""


def agreement(kind: str, encode: Callable[[str], list[int]], n: int, seed: int) -> list[Example]:
    """Up to `n` pairs, right answers and numbers of the other noun in balance; fewer where the lists end.

    `kind` is one of `KINDS`.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    return fitting(_candidates(kind, rng, _TRIES * n), encode, n)


def _candidates(kind: str, rng: np.random.Generator, count: int) -> Iterator[dict[str, str]]:
    def pick(choices: tuple[tuple[str, str], ...]) -> tuple[str, str]:
        return choices[rng.integers(len(choices))]

    for _ in range(count):
        number, other_number = int(rng.integers(2)), int(rng.integers(2))
        subject, answer = pick(words.NOUNS), pick(words.ANSWERS)
        if kind == "simple":
            frame, other_number = "{}", 0
        elif kind == "across-pp":
            preposition = words.PREPOSITIONS[rng.integers(len(words.PREPOSITIONS))]
            frame = "{} " + f"{preposition} the {pick(words.PLACES)[other_number]}"
        else:
            other = pick(words.NOUNS)
            if other == subject:
                continue
            if kind == "across-rc":
                frame = "{} " + f"that the {other[other_number]} {pick(words.VERBS)[other_number]}"
            else:
                frame = f"The {other[other_number]} that the " + "{}"
        start = "" if kind == "within-rc" else "The "
        yield {
            "clean": frame.format(start + subject[number]),
            "corrupted": frame.format(start + subject[1 - number]),
            "right": f" {answer[number]}",
            "wrong": f" {answer[1 - number]}",
            "group": f"{number}{other_number}",
        }
