"""Answers are read from whatever text they come in, and refused where they are not what was asked for."""

from __future__ import annotations

import json

import pytest

from crosscoder.explain.prompts import (
    MalformedError,
    explain_prompt,
    read_explanation,
    read_passages,
    scoring_prompt,
)

GOOD = {"explanation": "the word <<the>>", "consistency": 4, "complexity": 2}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GOOD),
        f"```json\n{json.dumps(GOOD, indent=2)}\n```\n",
        f"Here you are:\n\n{json.dumps(GOOD)}\n\nAnything else? {{}}",
        f'<think>maybe {{"explanation": "no", "consistency": 9}} or {{this</think>{json.dumps(GOOD)}',
        json.dumps({**GOOD, "consistency": 4.0, "more": [1]}),
        json.dumps({**GOOD, "explanation": " the  word\n<<the>> "}),
    ],
)
def test_explanations(text: str) -> None:
    assert read_explanation(text) == GOOD


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON object in it: (empty)"),
        ("The word is: the", "no JSON object in it: The word"),
        ('{"explanation": "a', "no JSON object"),
        ('{"complexity": 1}', "no explanation in it"),
        (json.dumps({**GOOD, "explanation": 5}), "the explanation is not a text"),
        (json.dumps({**GOOD, "explanation": "  "}), "the explanation is not a text"),
        (json.dumps({**GOOD, "explanation": "long " * 1000}), "has 4999 characters"),
        (json.dumps({**GOOD, "complexity": "3"}), 'complexity is "3", not a whole number from 1 to 5'),
        (json.dumps({**GOOD, "complexity": True}), "complexity is true"),
        (json.dumps({**GOOD, "complexity": 2.5}), "complexity is 2.5"),
        (json.dumps({**GOOD, "complexity": 1e400}), "complexity is Infinity"),
        (json.dumps({**GOOD, "complexity": float("nan")}), "complexity is NaN"),
        (json.dumps({**GOOD, "consistency": 6}), "consistency is 6"),
        (json.dumps({"explanation": "x", "complexity": 1}), "consistency is null"),
    ],
)
def test_malformed_explanations(text: str, message: str) -> None:
    with pytest.raises(MalformedError) as error:
        read_explanation(text)
    assert message in str(error.value)


def test_halves_of_characters_are_replaced() -> None:
    text = read_explanation('{"explanation": "a \\ud83d b", "consistency": 1, "complexity": 1}')["explanation"]
    assert text.encode() and text == "a ? b"


def test_passages() -> None:
    assert read_passages('{"passages": []}', 10) == []
    assert read_passages('Passages 3 and 10.\n```\n{"passages": [10, 3, 3.0]}\n```', 10) == [2, 9]
    for text in ('{"passages": "3"}', '{"passages": [0]}', '{"passages": [11]}', '{"passages": ["3"]}', "[1, 2]"):
        with pytest.raises(MalformedError):
            read_passages(text, 10)


def test_prompts_take_any_text() -> None:
    passages = ['{"a": {}} {0}', "100 % <<of>> {n}"]
    prompt = explain_prompt(passages)
    assert "1. " + passages[0] + "\n2. " + passages[1] in prompt and "the 2 passages" in prompt
    for kind in ("detection", "fuzzing"):
        prompt = scoring_prompt(kind, "{braces}", passages)
        assert "{braces}" in prompt and passages[1] in prompt and '{"passages": [...]}' in prompt
