"""Tasks: single-token answers, prompts of one length, balance, seeds, splits, and files of one's own."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution import small

from crosscoder.activations.tokens import END_OF_TEXT
from crosscoder.attribution.prompts.induction import induction, induction_in_text
from crosscoder.attribution.task import Example, Task
from crosscoder.attribution.tasks import NOTES, make_task, word_tokens
from crosscoder.config import AttributionSettings
from crosscoder.errors import ConfigError, DataError

SVA = [name for name in NOTES if name.startswith("sva")]
SETTINGS = AttributionSettings(n_prompts=40)


def texts(task: Task, tokenizer: Any) -> list[tuple[str, str, str, str]]:
    parts = [(e.clean[1:], e.corrupted[1:], [e.right], [e.wrong]) for e in task.examples]
    return [tuple(tokenizer.decode(tokens) for tokens in part) for part in parts]


@pytest.mark.parametrize("name", [*SVA, "ioi", "induction"])
def test_every_task_fits_the_tokenizer(name: str, tokenizer: Any) -> None:
    task = make_task(name, tokenizer, SETTINGS, context=64)
    assert 8 <= len(task) <= 40 and 0 < task.n_train < len(task) and task.note
    assert len(set(task.examples)) == len(task)
    for example in task.examples:
        assert len(example.clean) == len(example.corrupted) and example.clean != example.corrupted
        assert example.clean[0] == example.corrupted[0] == END_OF_TEXT and END_OF_TEXT not in example.clean[1:]
        assert example.right != example.wrong
    for clean, _, right, wrong in texts(task, tokenizer):
        for answer in (right, wrong):
            assert tokenizer.encode(answer, add_special_tokens=False) and answer.startswith(" ")
        assert not clean.endswith(" ")
    assert sorted([*task.train.tolist(), *task.test.tolist()]) == list(range(len(task)))


@pytest.mark.parametrize("name", SVA)
def test_agreement_is_grammar_and_balanced(name: str, tokenizer: Any) -> None:
    task = make_task(name, tokenizer, SETTINGS, context=64)
    plural_answers = {" have", " are", " were", " do"}
    numbers = collections.Counter(right in plural_answers for _, _, right, _ in texts(task, tokenizer))
    assert numbers[True] == numbers[False]
    for clean, corrupted, right, wrong in texts(task, tokenizer):
        words, other = clean.split(), corrupted.split()
        changed = [place for place, (a, b) in enumerate(zip(words, other, strict=True)) if a != b]
        assert changed == [len(words) - 1 if name == "sva-within-rc" else 1], "the subject alone changes its number"
        subject = words[changed[0]]
        assert (subject.endswith("s") and len(subject) > len(other[changed[0]])) == (right in plural_answers)
        assert (wrong in plural_answers) != (right in plural_answers)
        assert len(words) == {"sva-simple": 2, "sva-across-pp": 5, "sva-within-rc": 5, "sva-across-rc": 6}[name]


def test_ioi_has_both_orders_and_swaps_the_names(tokenizer: Any) -> None:
    task = make_task("ioi", tokenizer, SETTINGS, context=64)
    orders: collections.Counter[bool] = collections.Counter()
    for clean, corrupted, *answers in texts(task, tokenizer):
        right, wrong = (answer.strip() for answer in answers)
        assert clean.count(right) == 1 and clean.count(wrong) == 2
        assert corrupted.count(right) == 2 and corrupted.count(wrong) == 1
        assert corrupted.index(right) == clean.index(right), "the first two names stay"
        orders[clean.index(right) < clean.index(wrong)] += 1
    assert orders[True] == orders[False] == len(task) / 2


def test_induction_is_answered_by_the_first_saying_alone() -> None:
    for example in induction(range(100, 200), 50, seed=3, context=64):
        clean, corrupted, last = example.clean[1:], example.corrupted[1:], example.clean[-1]
        assert corrupted[-1] == last and sorted(clean) == sorted(corrupted)
        for tokens, answer in ((clean, example.right), (corrupted, example.wrong)):
            assert [tokens[at + 1] for at in range(len(tokens) - 1) if tokens[at] == last] == [answer]
    lengths = {len(example.clean) for example in induction(range(100, 200), 50, seed=3, context=64)}
    assert len(lengths) > 10, "copying from a fixed distance must fail"


def test_induction_in_text_prefers_neither_answer() -> None:
    """Half of the clean prompts are the text itself, half the changed one: bigrams of the text answer nothing."""
    rows = np.arange(1, 4001).reshape(40, 100).astype(np.int32)
    examples = induction_in_text(rows, 40, seed=0, context=64)
    follows = [example.right == example.clean[-1] + 1 for example in examples]
    assert sum(follows) == 20
    assert [example.wrong == example.clean[-1] + 1 for example in examples] == [not natural for natural in follows]
    with pytest.raises(DataError, match="windows for induction"):
        induction_in_text(np.ones((4, 30), np.int32), 10, 0, 64)
    with pytest.raises(DataError, match="too few"):
        induction(range(1, 9), 10, 0, context=12)


def test_seeds(tokenizer: Any) -> None:
    for name in ("sva-simple", "induction", "ioi"):
        first, again = (make_task(name, tokenizer, SETTINGS, context=64) for _ in range(2))
        other = make_task(name, tokenizer, AttributionSettings(n_prompts=40, seed=1), context=64)
        assert first.examples == again.examples and first.fingerprint == again.fingerprint
        assert first.examples != other.examples and first.fingerprint != other.fingerprint


def test_word_tokens_are_words(tokenizer: Any) -> None:
    words = [tokenizer.decode([token]) for token in word_tokens(tokenizer)]
    assert " the" in words and " near" in words
    assert all(word[0] == " " and word[1:].isalpha() and len(word) > 3 for word in words)


def test_metrics() -> None:
    task = small.task(10)
    logits = torch.randn(3, small.VOCABULARY, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([4, 0, 7])
    right, wrong = task.answers_P2[index].T
    rows = torch.arange(3)
    expected = logits[rows, right] - logits[rows, wrong]
    torch.testing.assert_close(task.measure(logits, index), expected)
    p = logits.softmax(dim=1)
    as_probabilities = Task(task.name, task.examples, task.n_train, "probability-difference")
    torch.testing.assert_close(as_probabilities.measure(logits, index), p[rows, right] - p[rows, wrong])
    with pytest.raises(ConfigError, match="metric must be one of"):
        Task(task.name, task.examples, task.n_train, "accuracy")  # type: ignore[arg-type]


# --- files


def lines(n: int = 12) -> list[dict[str, str]]:
    nouns = ["friend", "teacher", "farmer", "soldier", "leader", "citizen"]
    frames = ["The {}", "Then the {}", "And the {}", "Now the {}"]
    rows = [
        {"clean": frame.format(f"{noun}s"), "corrupted": frame.format(noun), "right": " have", "wrong": " has"}
        for frame in frames
        for noun in nouns
    ]
    return rows[:n]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")
    return path


def encode_words(text: str) -> list[int]:
    return [1 + sum(map(ord, word)) % 997 for word in text.split()]


class Words:
    """Each word is a token."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return encode_words(text)


def test_a_task_from_a_file(tmp_path: Path) -> None:
    task = Task.from_jsonl(write(tmp_path / "mine.jsonl", lines()), Words(), seed=1, test_share=0.25)
    assert task.name == "mine" and len(task) == 12 and task.n_train == 9
    first = Example((0, *encode_words("The friends")), (0, *encode_words("The friend")), *encode_words("have has"))
    assert first in task.examples
    others = {"clean": "clean_prefix", "corrupted": "patch_prefix", "right": "clean_answer", "wrong": "patch_answer"}
    renamed = [{others[name]: text for name, text in row.items()} for row in lines()]
    same = Task.from_jsonl(write(tmp_path / "theirs.jsonl", renamed), Words(), seed=1, test_share=0.25)
    assert same.examples == task.examples
    assert len(Task.from_jsonl(tmp_path / "mine.jsonl", Words(), n=9)) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"right": " have not"}, "line 3: the right answer ' have not' is 2 tokens"),
        ({"wrong": " have"}, "line 3: the right and the wrong answer are the same"),
        ({"corrupted": "The one friend"}, "line 3: the clean prompt has 2 tokens, the corrupted one 3"),
        ({"corrupted": "The farmers"}, "line 3: the clean and the corrupted prompt are the same"),
        ({"clean": ""}, "line 3 lacks the text of clean"),
        ({"right": 5}, "line 3 lacks the text of right"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = lines()
    rows[2] = {**rows[2], **change}
    with pytest.raises(DataError, match=message):
        Task.from_jsonl(write(tmp_path / "t.jsonl", rows), Words())


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the task"):
        Task.from_jsonl(tmp_path / "none.jsonl", Words())
    with pytest.raises(DataError, match="line 2 is not JSON"):
        Task.from_jsonl(write(tmp_path / "a.jsonl", [lines()[0], "{"]), Words())
    with pytest.raises(DataError, match="line 1 must be an object"):
        Task.from_jsonl(write(tmp_path / "b.jsonl", ["[1]"]), Words())
    with pytest.raises(DataError, match="has 5 examples, at least 8"):
        Task.from_jsonl(write(tmp_path / "c.jsonl", list(lines(5))), Words())


def test_what_does_not_fit_the_model() -> None:
    task = small.task(10)
    task.require_fit(context=20, vocabulary=small.VOCABULARY)
    longest = int(task.last_P.max()) + 1
    with pytest.raises(DataError, match=f"a prompt has {longest} tokens, the language model reads {longest - 1}"):
        task.require_fit(context=longest - 1, vocabulary=small.VOCABULARY)
    with pytest.raises(DataError, match="not in the language model's vocabulary"):
        task.require_fit(context=64, vocabulary=10)


def test_unknown_tasks_and_words_that_the_tokenizer_lacks(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no task 'svo'; known are induction"):
        make_task("svo", tokenizer, SETTINGS, context=64)

    class Letters:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [ord(letter) for letter in text]

    for name, message in (("sva-simple", "only 0 pairs have answers of one token"), ("ioi", "0 are single tokens")):
        with pytest.raises(DataError, match=message):
            make_task(name, Letters(), SETTINGS, context=64)
    with pytest.raises(DataError, match="needs held-out tokens"):
        make_task("induction-text", tokenizer, SETTINGS, context=64)
