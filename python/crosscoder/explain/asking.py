"""Many requests to an endpoint: some at a time, failures tried again, answers kept, spending bounded."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from crosscoder.errors import ConfigError
from crosscoder.explain.answers import Answers, Record, key_of
from crosscoder.explain.endpoint import Endpoint, EndpointError, PromptRefusedError, Reply, TransientError
from crosscoder.explain.prompts import VERSION, MalformedError
from crosscoder.progress import Progress, warn

TRIES = 6
"""Of one request that fails for a reason that may pass."""
MALFORMED_TRIES = 3
"""Of one prompt whose answers are malformed."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0
"""Seconds: before the second try, doubled for each further one; and the most that a server's Retry-After is heeded."""
FAILURES = 3
"""Requests in a row that fail for good, and nothing is asked any more."""


@dataclass(frozen=True)
class Question:
    """One request, and how its answer is read."""

    kind: str
    """"explanation", "detection", ...: for the reader of the record."""
    feature: int
    prompt: str
    read: Callable[[str], Any]
    """From the answer's text to plain data; raises `MalformedError`."""
    tokens_in: int
    """Estimated length of the prompt."""


@dataclass(frozen=True)
class Answer:
    """A question's outcome: a value, or why there is none."""

    value: Any
    missing: str | None


class _Stopped(Exception):
    """Not asked, because the work ends early; the argument says why."""


class Spending:
    """What answers cost, kept under a bound: a request starts only if its longest answer still fits."""

    def __init__(
        self,
        answers: Answers,
        endpoint: Endpoint,
        price_in: float | None,
        price_out: float | None,
        budget: float | None,
    ) -> None:
        """Prices per million tokens, the budget in the same money, for all answers of the model in the file. Raises
        `ConfigError` for a budget without prices, or one that no request fits in."""
        self._lock = threading.Lock()
        self._prices = None if price_in is None or price_out is None else (price_in / 1e6, price_out / 1e6)
        self._budget, self._longest = budget, endpoint.max_output
        self._reserved = 0.0
        if budget is not None and self._prices is None:
            raise ConfigError("--budget needs --price-in and --price-out (per million tokens)")
        self.spent = self.cost(*answers.tokens_of(endpoint.model)) or 0.0

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """None without prices."""
        return None if self._prices is None else tokens_in * self._prices[0] + tokens_out * self._prices[1]

    @contextmanager
    def reserved(self, question: Question) -> Iterator[Callable[[int, int], None]]:
        """Room for one request; call what it yields with the tokens that it took. Raises `_Stopped` without room."""
        most = self.cost(question.tokens_in, self._longest) or 0.0
        with self._lock:
            if self._budget is not None and self.spent + self._reserved + most > self._budget:
                raise _Stopped(f"not asked: it could exceed the budget of {self._budget:g}")
            self._reserved += most
        try:
            yield self._add
        finally:
            with self._lock:
                self._reserved -= most

    def _add(self, tokens_in: int, tokens_out: int) -> None:
        with self._lock:
            self.spent += self.cost(tokens_in, tokens_out) or 0.0


class Asker:
    """Asks questions of one endpoint; answers that are on disk are not asked for again."""

    def __init__(self, endpoint: Endpoint, answers: Answers, spending: Spending, *, max_in_flight: int) -> None:
        self.endpoint, self.answers, self.spending = endpoint, answers, spending
        self._max_in_flight = max_in_flight
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failures = 0
        self.n_asked = self.n_retries = 0
        self.wait: Callable[[float], object] = self._stop.wait
        """Between two tries; ends at once when the work is stopped."""

    def known(self, question: Question) -> Answer | None:
        """The answer on disk."""
        record = self.answers.find(self._key(question), self.endpoint.max_output)
        return None if record is None else Answer(record["value"], record["missing"])

    def ask(self, title: str, questions: Sequence[Question]) -> list[Answer]:
        """Answers in the order of the questions, in whichever order they come.

        What is missing for another reason than malformed answers is not kept: the next call asks again. Raises
        `EndpointError` where there is no use going on; the answers until then are kept.
        """
        found = {self._key(question): self.known(question) for question in questions}
        todo = {key: q for q in questions if found[key := self._key(q)] is None}
        cached = len(questions) - sum(found[self._key(q)] is None for q in questions)
        missing = sum(answer is not None and answer.missing is not None for answer in found.values())
        with (
            Progress(title, len(questions), "requests", done=cached) as progress,
            ThreadPoolExecutor(self._max_in_flight) as pool,
        ):
            futures = {pool.submit(self._one, key, question): key for key, question in todo.items()}
            try:
                for future in as_completed(futures):
                    answer = future.result()
                    found[futures[future]] = answer
                    missing += answer.missing is not None
                    figures = {"asked": self.n_asked, "cached": cached, "missing": missing, "retries": self.n_retries}
                    progress.advance(1, {name: f"{count:,}" for name, count in figures.items()})
            except BaseException:
                # What is in flight is paid for: its answers are still waited for, and kept.
                self._stop.set()
                if any(future.running() for future in futures):
                    warn(f"waiting for the answers in flight, {self.endpoint.timeout:g} s at most")
                raise
        answers = [found[self._key(question)] for question in questions]
        return [answer for answer in answers if answer is not None]

    def _key(self, question: Question) -> str:
        return key_of(question.prompt, self.endpoint.model, VERSION)

    def _one(self, key: str, question: Question) -> Answer:
        """Ask until there is an answer that can be read, or no use in asking."""
        used = [0, 0]
        reply: Reply | None = None
        for malformed in range(1, MALFORMED_TRIES + 1):
            try:
                reply = self._reply(key, question, used)
            except _Stopped as stopped:
                return Answer(None, str(stopped))
            except (TransientError, PromptRefusedError) as error:
                self._failed(error)
                return Answer(None, str(error))
            try:
                value, reason = question.read(reply.text), None
                break
            except MalformedError as error:
                value, reason = None, str(error)
                if reply.cut:
                    reason = f"cut at {self.endpoint.max_output} tokens (raise --max-output)"
            if malformed < MALFORMED_TRIES:
                self._count_retry()
        with self._lock:
            self._failures = 0
        assert reply is not None
        self.answers.add(self._record(key, question, value, reason, reply.text, used))
        return Answer(value, reason)

    def _reply(self, key: str, question: Question, used: list[int]) -> Reply:
        """One reply, after as many tries as it takes. Adds its tokens to `used`."""
        for attempt in range(TRIES):
            if self._stop.is_set():
                raise _Stopped("not asked: the work was stopped")
            try:
                with self.spending.reserved(question) as spend:
                    with self._lock:
                        self.n_asked += 1
                    reply = self.endpoint.ask(question.prompt)
                    # Where the endpoint does not count: the estimate, and a token for three characters.
                    tokens_in = question.tokens_in if reply.tokens_in is None else reply.tokens_in
                    tokens_out = 1 + len(reply.text) // 3 if reply.tokens_out is None else reply.tokens_out
                    spend(tokens_in, tokens_out)
                used[0] += tokens_in
                used[1] += tokens_out
                return reply
            except TransientError as error:
                if attempt == TRIES - 1:
                    raise
                self._count_retry()
                # Of the key, so that a test sees the same waits and requests that failed together part.
                jitter = random.Random(f"{key}/{attempt}").uniform(0.5, 1.5)
                self.wait(min(max(FIRST_WAIT * 2**attempt * jitter, error.retry_after or 0.0), LONGEST_WAIT))
        raise AssertionError("the last try returns or raises")

    def _failed(self, error: EndpointError) -> None:
        with self._lock:
            self._failures += 1
            if self._failures < FAILURES:
                return
        self._stop.set()
        raise EndpointError(
            f"{self.endpoint.host} failed {FAILURES} requests in a row, the last with: {error}; the answers until then "
            "are kept: run the same command again later"
        )

    def _count_retry(self) -> None:
        with self._lock:
            self.n_retries += 1

    def _record(
        self, key: str, question: Question, value: Any, reason: str | None, text: str, used: Sequence[int]
    ) -> Record:
        return {
            "key": key,
            "kind": question.kind,
            "feature": question.feature,
            "model": self.endpoint.model,
            "prompt_version": VERSION,
            "value": value,
            "missing": reason,
            "tokens_in": used[0],
            "tokens_out": used[1],
            "max_output": self.endpoint.max_output,
            "prompt": question.prompt,
            "text": text,
        }
