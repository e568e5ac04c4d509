"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> " Mary".

Both orders of the two names (ABBA, as here, and BABA). The corrupted prompt repeats the other name, so that the right
and the wrong answer change places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from crosscoder.attribution.prompts import words
from crosscoder.attribution.task import Example, fitting
from crosscoder.errors import DataError

ENOUGH_NAMES = 8
"""With fewer names of people, those of nations join them."""
_TRIES = 8


def ioi(encode: Callable[[str], list[int]], n: int, seed: int) -> list[Example]:
    """Up to `n` pairs, half of either order. Raises `DataError` if fewer than 2 names are single tokens."""
    names = [name for name in words.NAMES if len(encode(f" {name}")) == 1]
    if len(names) < ENOUGH_NAMES:
        names += [name for name in words.NATIONS if len(encode(f" {name}")) == 1]
    if len(names) < 2:
        raise DataError(
            f"task ioi: of {len(words.NAMES) + len(words.NATIONS)} names {len(names)} are single tokens for this "
            "tokenizer, at least 2 are needed; write pairs with other names to a file: --task FILE.jsonl"
        )
    rng = np.random.default_rng([seed, 8])
    return fitting(_candidates(names, rng, _TRIES * n), encode, n)


def _candidates(names: list[str], rng: np.random.Generator, count: int) -> Iterator[dict[str, str]]:
    def pick(choices: tuple[str, ...]) -> str:
        return choices[rng.integers(len(choices))]

    for number in range(count):
        indirect, subject = (names[index] for index in rng.choice(len(names), 2, replace=False))
        abba = number % 2 == 0
        first, second = (indirect, subject) if abba else (subject, indirect)
        template, fill = pick(words.IOI_TEMPLATES), {"first": first, "second": second}
        fill |= {"place": pick(words.IOI_PLACES), "object": pick(words.IOI_OBJECTS), "verb": pick(words.IOI_VERBS)}
        yield {
            "clean": template.format(subject=subject, **fill),
            "corrupted": template.format(subject=indirect, **fill),
            "right": f" {indirect}",
            "wrong": f" {subject}",
            "group": "abba" if abba else "baba",
        }
