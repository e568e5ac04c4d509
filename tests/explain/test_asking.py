"""Many requests: tries, waits, bounds, and what is kept of them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from explain.server import Fault, Server

from crosscoder.errors import ConfigError
from crosscoder.explain import asking
from crosscoder.explain.answers import Answers, key_of
from crosscoder.explain.asking import Asker, Question, Spending
from crosscoder.explain.endpoint import Endpoint, EndpointError
from crosscoder.explain.prompts import VERSION, read_passages
from crosscoder.files import read_lines


def echo(prompt: str) -> str:
    return json.dumps({"passages": [int(prompt.split()[1])]})


def questions(n: int, first: int = 1) -> list[Question]:
    return [
        Question("detection", i, f"question {i}", lambda text: read_passages(text, 100), 10)
        for i in range(first, first + n)
    ]


class Setting:
    """An asker on a file, its waits recorded in place of being waited for."""

    def __init__(self, server: Server, path: Path, **options: Any) -> None:
        prices = options.pop("prices", (None, None))
        budget = options.pop("budget", None)
        in_flight = options.pop("max_in_flight", 4)
        self.endpoint = Endpoint(server.url, "m", **{"max_output": 100, "timeout": 5.0, **options})
        self.answers = Answers(path)
        self.spending = Spending(self.answers, self.endpoint, *prices, budget)
        self.asker = Asker(self.endpoint, self.answers, self.spending, max_in_flight=in_flight)
        self.waits: list[float] = []
        self.asker.wait = self.waits.append

    def ask(self, asked: list[Question]) -> list[Any]:
        return [answer.value if answer.missing is None else answer.missing for answer in self.asker.ask("t", asked)]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "deep" / "answers.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    return [record or {} for _, record in read_lines(path)]


def test_answers_are_kept_beside_their_prompts(path: Path) -> None:
    with Server(echo) as server:
        assert Setting(server, path).ask(questions(3)) == [[0], [1], [2]]
        assert Setting(server, path).ask(questions(4)) == [[0], [1], [2], [3]]
        assert set(server.counts.values()) == {1} and len(server.counts) == 4
    records = {record["feature"]: record for record in lines(path)}
    assert len(lines(path)) == 4
    expected = {
        "key": key_of("question 2", "m", VERSION),
        "kind": "detection",
        "feature": 2,
        "model": "m",
        "prompt_version": VERSION,
        "value": [1],
        "missing": None,
        "tokens_in": 2,
        "tokens_out": 5,
        "max_output": 100,
        "prompt": "question 2",
        "text": '{"passages": [2]}',
    }
    assert records[2] == expected


def test_a_model_or_version_of_its_own_is_asked_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(echo) as server:
        Setting(server, path).ask(questions(1))
        other = Setting(server, path)
        other.endpoint.model = "n"
        other.ask(questions(1))
        assert len(server.prompts) == 2
        monkeypatch.setattr(asking, "VERSION", VERSION + 1)
        Setting(server, path).ask(questions(1))
        assert len(server.prompts) == 3
    with Server(echo) as elsewhere:  # the endpoint does not matter
        assert Setting(elsewhere, path).ask(questions(1)) == [[0]]
        assert elsewhere.prompts == []


def test_equal_prompts_are_asked_once(path: Path) -> None:
    with Server(echo) as server:
        assert Setting(server, path).ask(questions(2) + questions(2)) == [[0], [1], [0], [1]]
        assert len(server.prompts) == 2


def test_no_more_in_flight_than_allowed(path: Path) -> None:
    together = threading.Barrier(3)  # breaks unless three requests are there at once

    def model(prompt: str) -> str:
        together.wait(timeout=20)
        return echo(prompt)

    with Server(model) as server:
        assert Setting(server, path, max_in_flight=3).ask(questions(12)) == [[i] for i in range(12)]
        assert server.most_in_flight == 3


def test_answers_out_of_order(path: Path) -> None:
    def model(prompt: str) -> str:
        until = time.monotonic() + 20
        while prompt == "question 1" and not path.exists() and time.monotonic() < until:
            time.sleep(0.005)
        return echo(prompt)

    with Server(model) as server:
        assert Setting(server, path, max_in_flight=2).ask(questions(3)) == [[0], [1], [2]]
    assert lines(path)[0]["feature"] == 2


def test_waits_double_and_heed_retry_after(path: Path) -> None:
    def faults(prompt: str, attempt: int) -> Fault | None:
        return (
            [Fault(500), Fault(429, {"Retry-After": "40"}), Fault(close=True), Fault(429, {"Retry-After": "9999"})][
                attempt - 1
            ]
            if attempt <= 4
            else None
        )

    waits = []
    for name in ("a", "b"):
        with Server(echo, faults) as server:
            setting = Setting(server, path.with_name(name))
            assert setting.ask(questions(1)) == [[0]]
            waits.append(setting.waits)
        assert setting.asker.n_asked == 5 and setting.asker.n_retries == 4
    first, second, third, fourth = waits[0]
    assert 0.5 <= first <= 1.5 and second == 40 and 2 <= third <= 6 and fourth == asking.LONGEST_WAIT
    assert waits[0] == waits[1], "deterministic"
    with Server(echo, lambda prompt, attempt: Fault(500) if attempt == 1 else None) as server:
        setting = Setting(server, path)
        setting.ask(questions(8))
        assert len(set(setting.waits)) == 8, "requests that failed together do not come back together"


def test_a_request_that_keeps_failing_is_missing_and_asked_again_later(path: Path) -> None:
    def faults(prompt: str, attempt: int) -> Fault | None:
        return Fault(503, body=b"busy") if prompt == "question 1" else None

    with Server(echo, faults) as server:
        found = Setting(server, path).ask(questions(3))
        assert found == ["HTTP 503: busy", [1], [2]]
        assert server.counts["question 1"] == asking.TRIES
    with Server(echo) as server:
        assert Setting(server, path).ask(questions(3)) == [[0], [1], [2]]
        assert server.prompts == ["question 1"]


def test_a_refused_prompt_is_not_tried_again(path: Path) -> None:
    def faults(prompt: str, attempt: int) -> Fault | None:
        return Fault(400, body=b'{"error": {"message": "filtered"}}') if prompt == "question 2" else None

    with Server(echo, faults) as server:
        assert Setting(server, path).ask(questions(3)) == [[0], "HTTP 400: filtered", [2]]
        assert server.counts["question 2"] == 1


def test_malformed_answers_are_tried_again_then_kept_as_missing(path: Path) -> None:
    def model(prompt: str) -> str:
        if prompt == "question 2" or (prompt == "question 3" and server.counts[prompt] < 3):
            return '{"passages": "all of them"}'
        return f"```json\n{echo(prompt)}\n```"

    with Server(model) as server:
        assert Setting(server, path).ask(questions(3)) == [[0], "passages is not a list", [2]]
        assert server.counts == {"question 1": 1, "question 2": asking.MALFORMED_TRIES, "question 3": 3}
        used = {record["feature"]: record["tokens_in"] for record in lines(path)}
        assert used == {1: 2, 2: 6, 3: 6}, "every try is paid for"
        assert Setting(server, path).ask(questions(3))[1] == "passages is not a list"
        assert len(server.prompts) == 7, "the missing one is not asked again"
        record = next(record for record in lines(path) if record["feature"] == 2)
        assert record["value"] is None and record["text"] == '{"passages": "all of them"}'


def test_what_was_cut_is_asked_again_with_more_room(path: Path) -> None:
    body = json.dumps({"choices": [{"message": {"content": '{"passag'}, "finish_reason": "length"}]}).encode()
    with Server(echo, lambda prompt, attempt: Fault(body=body)) as server:
        reason = "cut at 100 tokens (raise --max-output)"
        assert Setting(server, path).ask(questions(1)) == [reason]
        n = len(server.prompts)
        assert Setting(server, path, max_output=50).ask(questions(1)) == [reason] and len(server.prompts) == n
    with Server(echo) as server:
        setting = Setting(server, path, max_output=200)
        assert setting.ask(questions(1)) == [[0]]
        assert Setting(server, path).ask(questions(1)) == [[0]] and len(server.prompts) == 1
        # Three cut tries without a count of the tokens, and the good one.
        assert setting.answers.tokens_of("m") == (3 * 10 + 2, 3 * 3 + 5) == Answers(path).tokens_of("m")


def test_failures_between_answers_do_not_end_it(path: Path) -> None:
    def faults(prompt: str, attempt: int) -> Fault | None:
        return Fault(400) if int(prompt.split()[1]) % 3 else None

    with Server(echo, faults) as server:
        found = Setting(server, path, max_in_flight=1).ask(questions(12))
        assert [value == "HTTP 400" for value in found] == [True, True, False] * 4


@pytest.mark.parametrize("fault", [Fault(500), Fault(400), Fault(body=b"<html>"), Fault(close=True)])
def test_an_endpoint_that_only_fails_is_given_up(path: Path, fault: Fault) -> None:
    with Server(echo, lambda prompt, attempt: None if prompt == "question 1" else fault) as server:
        setting = Setting(server, path, max_in_flight=1)
        with pytest.raises(EndpointError, match="failed 3 requests in a row.*run the same command again"):
            setting.ask(questions(50))
        assert len(server.counts) == 4
    assert [record["feature"] for record in lines(path)] == [1]


def test_a_wrong_key_ends_it_at_once(path: Path) -> None:
    with Server(echo, lambda prompt, attempt: Fault(401)) as server:
        with pytest.raises(EndpointError, match="HTTP 401; is the key"):
            Setting(server, path, max_in_flight=2).ask(questions(50))
        assert len(server.prompts) <= 4
    assert not path.exists()


def test_an_interrupt_keeps_what_is_in_flight(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(asking.Progress):
        def advance(self, amount: int = 1, figures: Any = None) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(asking, "Progress", Interrupting)
    with Server(echo) as server:
        with pytest.raises(KeyboardInterrupt):
            Setting(server, path, max_in_flight=3).ask(questions(40))
        asked = sorted(server.prompts)
    assert sorted(record["prompt"] for record in lines(path)) == asked and len(asked) < 40


def test_a_torn_last_line_is_dropped_and_a_damaged_one_asked_again(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server(echo) as server:
        Setting(server, path, max_in_flight=1).ask(questions(4))
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        assert Setting(server, path).ask(questions(4)) == [[0], [1], [2], [3]]
        assert path.read_bytes() == whole and server.counts["question 4"] == 2
        parts = whole.split(b"\n")
        path.write_bytes(b"\n".join([parts[0], b'{"key": "x"}', b"\xff{", *parts[3:]]))
        assert len(Answers(path)) == 2
        printed = capsys.readouterr().err
        assert "2 line(s) damaged" in printed and "the first is line 2" in printed
        assert Setting(server, path).ask(questions(4)) == [[0], [1], [2], [3]]
        assert server.counts == {"question 1": 1, "question 2": 2, "question 3": 2, "question 4": 2}


def test_odd_characters_survive(path: Path) -> None:
    with Server(lambda prompt: '{"passages": []} \ud83d \u2028 \r é') as server:
        Setting(server, path).ask(questions(1))
    answers = Answers(path)
    assert len(answers) == 1 and lines(path)[0]["text"].endswith("é")


def test_the_budget_holds(path: Path) -> None:
    """Each answer takes 2 tokens in and 5 out: 2 * 1 + 5 * 2 = 12 millionths; the longest, 10 * 1 + 100 * 2."""
    with Server(echo) as server:
        setting = Setting(server, path, prices=(1.0, 2.0), budget=300e-6, max_in_flight=1)
        found = setting.ask(questions(30))
        assert found[:8] == [[i] for i in range(8)] and set(found[8:]) == {
            "not asked: it could exceed the budget of 0.0003"
        }
        assert setting.spending.spent == pytest.approx(8 * 12e-6)
        again = Setting(server, path, prices=(1.0, 2.0), budget=300e-6)
        assert again.spending.spent == pytest.approx(8 * 12e-6), "earlier calls count"
        assert again.ask(questions(30))[8:] == found[8:] and len(server.prompts) == 8
        more = Setting(server, path, prices=(1.0, 2.0), budget=1.0)
        assert more.ask(questions(30)) == [[i] for i in range(30)] and len(server.prompts) == 30
        with pytest.raises(ConfigError, match="needs --price-in and --price-out"):
            Setting(server, path, prices=(1.0, None), budget=1.0)


def test_the_budget_holds_with_many_in_flight(path: Path) -> None:
    """The longest answer of each is reserved: four at a time never spend more than the budget together."""
    long = json.dumps({"choices": [{"message": {"content": '{"passages": []}'}}],
                       "usage": {"prompt_tokens": 10, "completion_tokens": 100}}).encode()  # fmt: skip
    with Server(echo, lambda prompt, attempt: Fault(body=long, delay=0.02)) as server:
        setting = Setting(server, path, prices=(1.0, 2.0), budget=1000e-6)
        setting.ask(questions(30))
        assert len(server.prompts) == 4 and setting.spending.spent == pytest.approx(4 * 210e-6)
