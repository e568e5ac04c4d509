"""A task: pairs of prompts, of equal length in tokens, whose right answers are one token each.

A pair is a clean prompt with its right and its wrong answer, and a corrupted prompt for which the two change places
(or the right one is no longer right). Letters: P pairs, T tokens, B pairs of a batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from crosscoder.activations.tokens import END_OF_TEXT
from crosscoder.config import Metric
from crosscoder.errors import ConfigError, DataError

FIELDS = {"clean": "clean_prefix", "corrupted": "patch_prefix", "right": "clean_answer", "wrong": "patch_answer"}
"""Fields of a line of JSON, and their names in the files of Marks et al. (2024), which are read as well."""
MINIMUM_PAIRS = 8


@dataclass(frozen=True)
class Example:
    """One pair in tokens. The two prompts have one length."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    right: int
    wrong: int


@dataclass(frozen=True)
class Task:
    """P examples, the first `n_train` of them for attribution, the others for ablation."""

    name: str
    examples: tuple[Example, ...]
    n_train: int
    metric: Metric = "logit-difference"
    note: str = ""
    """What the task is, in a sentence."""
    _cache: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise ConfigError(f"the metric must be one of {', '.join(get_args(Metric))}, not {self.metric!r}")
        if not 0 < self.n_train < len(self.examples):
            raise DataError(
                f"task {self.name}: {len(self.examples)} examples cannot be split into {self.n_train} for attribution "
                "and the rest for ablation"
            )

    def __len__(self) -> int:
        """P."""
        return len(self.examples)

    def ids(self, side: str) -> Tensor:
        """(P, T) int64, padded at the right with end-of-text; `side` is "clean" or "corrupted"."""
        if side not in self._cache:
            T = max(len(example.clean) for example in self.examples)
            ids_PT = torch.full((len(self), T), END_OF_TEXT)
            for row, example in zip(ids_PT, self.examples, strict=True):
                tokens = getattr(example, side)
                row[: len(tokens)] = torch.tensor(tokens)
            self._cache[side] = ids_PT
        return self._cache[side]

    @property
    def last_P(self) -> Tensor:
        """(P,) position of the last token."""
        return torch.tensor([len(example.clean) - 1 for example in self.examples])

    @property
    def answers_P2(self) -> Tensor:
        """(P, 2) int64: right and wrong answer."""
        return torch.tensor([(example.right, example.wrong) for example in self.examples])

    @property
    def train(self) -> Tensor:
        """Indices of the pairs for attribution."""
        return torch.arange(self.n_train)

    @property
    def test(self) -> Tensor:
        """Indices of the pairs for ablation."""
        return torch.arange(self.n_train, len(self))

    def measure(self, logits_BV: Tensor, index_B: Tensor) -> Tensor:
        """(B,): the metric of the pairs `index_B`, above 0 where the right answer is preferred. Differentiable."""
        answers_B2 = self.answers_P2[index_B].to(logits_BV.device)
        scores_BV = logits_BV if self.metric == "logit-difference" else logits_BV.softmax(dim=1)
        right_B, wrong_B = scores_BV.gather(1, answers_B2).unbind(dim=1)
        return right_B - wrong_B

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the results rest on."""
        tokens = [[example.clean, example.corrupted, example.right, example.wrong] for example in self.examples]
        record = [self.name, self.n_train, self.metric, tokens]
        return hashlib.sha256(json.dumps(record).encode()).hexdigest()

    def require_fit(self, context: int, vocabulary: int) -> None:
        """Raises `DataError` where a prompt is longer than the model's `context`, or a token not in its vocabulary."""
        longest = int(self.last_P.max()) + 1
        if longest > context:
            raise DataError(
                f"task {self.name}: a prompt has {longest} tokens, the language model reads {context}; shorten it"
            )
        largest = max(int(self.ids("clean").max()), int(self.ids("corrupted").max()), int(self.answers_P2.max()))
        if largest >= vocabulary:
            raise DataError(
                f"task {self.name}: token {largest} is not in the language model's vocabulary of {vocabulary}; "
                "the tokenizer is of another model"
            )

    @classmethod
    def of(
        cls,
        name: str,
        examples: Sequence[Example],
        *,
        seed: int = 0,
        test_share: float = 0.5,
        metric: Metric = "logit-difference",
        note: str = "",
    ) -> Task:
        """The examples in an order that `seed` fixes, split. Raises `DataError` where there are too few."""
        if not 0 < test_share < 1:
            raise ConfigError(f"the share of examples for ablation must lie between 0 and 1, not {test_share:g}")
        if len(examples) < MINIMUM_PAIRS:
            raise DataError(f"task {name} has {len(examples)} examples, at least {MINIMUM_PAIRS} are needed")
        order = np.random.default_rng([seed, 17]).permutation(len(examples))
        n_train = min(max(1, round((1 - test_share) * len(examples))), len(examples) - 1)
        return cls(name, tuple(examples[index] for index in order), n_train, metric, note)

    @classmethod
    def from_jsonl(
        cls,
        path: Path | str,
        tokenizer: Any,
        *,
        n: int | None = None,
        seed: int = 0,
        test_share: float = 0.5,
        metric: Metric = "logit-difference",
    ) -> Task:
        """A task of one's own: a line of JSON a pair, with the texts "clean", "corrupted", "right", "wrong".

        Answers are continuations and carry their leading space: `{"clean": "The friends", "corrupted": "The friend",
        "right": " have", "wrong": " has"}`. At most `n` lines are used. Raises `DataError` naming the line for what is
        not JSON, lacks a field, has an answer of several tokens or prompts of different length.
        """
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the task {path}: {error}") from error
        examples = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            examples.append(example_of_texts(_fields(line, where), text_encoder(tokenizer), where))
        if n is not None and len(examples) > n:
            chosen = np.random.default_rng([seed, 18]).choice(len(examples), n, replace=False)
            examples = [examples[index] for index in np.sort(chosen)]
        note = f"pairs from {path.name}"
        return cls.of(path.stem, examples, seed=seed, test_share=test_share, metric=metric, note=note)


def _fields(line: str, where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} must be an object with {', '.join(FIELDS)}")
    texts = {name: row.get(name, row.get(other)) for name, other in FIELDS.items()}
    missing = [name for name, text in texts.items() if not isinstance(text, str) or not text]
    if missing:
        raise DataError(f"{where} lacks the text of {', '.join(missing)}; each line needs {', '.join(FIELDS)}")
    return {name: str(text) for name, text in texts.items()}


def text_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text -> token ids, without special tokens."""
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False))


def example_of_texts(texts: dict[str, str], encode: Callable[[str], list[int]], where: str) -> Example:
    """The pair in tokens, an end-of-text token in front, as each document has in training.

    Raises `DataError` naming `where` if an answer is not one token, both are the same, or the prompts differ in length.
    """
    answers = {}
    for name in ("right", "wrong"):
        tokens = encode(texts[name])
        if len(tokens) != 1:
            raise DataError(
                f"{where}: the {name} answer {texts[name]!r} is {len(tokens)} tokens for this tokenizer; answers must "
                "be one token, with their leading space: choose other words"
            )
        answers[name] = tokens[0]
    if answers["right"] == answers["wrong"]:
        raise DataError(f"{where}: the right and the wrong answer are the same token {texts['right']!r}")
    clean, corrupted = encode(texts["clean"]), encode(texts["corrupted"])
    if len(clean) != len(corrupted):
        raise DataError(
            f"{where}: the clean prompt has {len(clean)} tokens, the corrupted one {len(corrupted)}; patching needs "
            "prompts of one length: choose words with as many tokens"
        )
    if clean == corrupted:
        raise DataError(f"{where}: the clean and the corrupted prompt are the same")
    return Example((END_OF_TEXT, *clean), (END_OF_TEXT, *corrupted), answers["right"], answers["wrong"])


def fitting(candidates: Iterable[dict[str, str]], encode: Callable[[str], list[int]], n: int) -> list[Example]:
    """Up to `n` different examples that this tokenizer can express, as many of each `texts["group"]` as of the others.

    `candidates` come in random order; those whose answers are not single tokens, or whose prompts differ in length,
    are passed over.
    """
    found: dict[str, dict[Example, None]] = {}
    for texts in candidates:
        try:
            example = example_of_texts(texts, encode, "")
        except DataError:
            continue
        found.setdefault(texts["group"], {})[example] = None
    each = min([n // max(1, len(found)), *map(len, found.values())])
    return [example for group in found.values() for example in list(group)[:each]]
