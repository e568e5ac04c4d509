"""The tasks by name, made for the tokenizer in hand, and tasks from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from crosscoder.attribution.prompts import agreement
from crosscoder.attribution.prompts.induction import induction, induction_in_text
from crosscoder.attribution.prompts.ioi import ioi
from crosscoder.attribution.task import MINIMUM_PAIRS, Example, Task, text_encoder
from crosscoder.config import AttributionSettings
from crosscoder.errors import ConfigError, DataError

NOTES = {
    "induction": "random words said twice; at the end only the first saying tells which word follows",
    "induction-text": "windows of the held-out text, as they are or with two tokens changed over, said twice",
    "ioi": "indirect object identification: which of two names, in both orders (ABBA, BABA), receives",
    "sva-simple": "subject-verb agreement: The friends -> have",
    "sva-across-pp": "subject-verb agreement across a prepositional phrase: The teachers near the desk -> are",
    "sva-within-rc": "subject-verb agreement within a relative clause: The fathers that the chefs -> do",
    "sva-across-rc": "subject-verb agreement across a relative clause: The fathers that the chefs like -> do",
}
"""What each named task is."""


def make_task(
    name: str, tokenizer: Any, settings: AttributionSettings, *, context: int, text: np.ndarray | None = None
) -> Task:
    """The task called `name`, or the one in the file of that name (`.jsonl`).

    `context` is the longest prompt that the language model reads, in tokens; `text` (S, C) the token ids that
    "induction-text" takes its windows from. Raises `ConfigError` for an unknown name, `DataError` where the tokenizer
    cannot express the task.
    """
    options: dict[str, Any] = {"seed": settings.seed, "test_share": settings.test_share, "metric": settings.metric}
    if name.endswith(".jsonl"):
        return Task.from_jsonl(Path(name), tokenizer, n=settings.n_prompts, **options)
    if name not in NOTES:
        known = ", ".join(NOTES)
        raise ConfigError(f"there is no task {name!r}; known are {known}, or a file of your own: FILE.jsonl")
    examples = _examples(name, tokenizer, settings, context, text)
    if len(examples) < MINIMUM_PAIRS:
        raise DataError(
            f"task {name}: of our words only {len(examples)} pairs have answers of one token and prompts of one length "
            f"for this tokenizer, at least {MINIMUM_PAIRS} are needed; write pairs with other words to a file: "
            "--task FILE.jsonl"
        )
    return Task.of(name, examples, note=NOTES[name], **options)


def _examples(
    name: str, tokenizer: Any, settings: AttributionSettings, context: int, text: np.ndarray | None
) -> list[Example]:
    n, seed = settings.n_prompts, settings.seed
    if name == "induction":
        return induction(word_tokens(tokenizer), n, seed, context)
    if name == "induction-text":
        if text is None:
            raise DataError("task induction-text needs held-out tokens, and the run has none; use --task induction")
        return induction_in_text(text, n, seed, context)
    encode = text_encoder(tokenizer)
    if name == "ioi":
        return ioi(encode, n, seed)
    return agreement.agreement(name.removeprefix("sva-"), encode, n, seed)


def word_tokens(tokenizer: Any) -> list[int]:
    """The tokens that are a word of their own, of three letters or more, with the space before it."""
    found = []
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if text.startswith(" ") and len(text) > 3 and text[1:].isalpha() and text[1:].isascii():
            found.append(token)
    return found
