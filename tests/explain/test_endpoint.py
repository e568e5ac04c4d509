"""One request: both forms, what failures become, and that the key goes nowhere."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from explain.server import Fault, Server

from crosscoder.errors import ConfigError
from crosscoder.explain.endpoint import Endpoint, EndpointError, PromptRefusedError, TransientError, read_key

KEY = "sk-secret-0123456789"
OPENAI = {"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}


def endpoint(url: str, **options: Any) -> Endpoint:
    return Endpoint(url, "m", **{"max_output": 50, "timeout": 5.0, "key": KEY, **options})


def failing(fault: Fault, **options: Any) -> EndpointError:
    """What `ask` raises for the fault."""
    with Server(lambda prompt: "never", lambda prompt, attempt: fault) as server:
        with pytest.raises(EndpointError) as error:
            endpoint(server.url, **options).ask("p")
        assert server.asked.wait(30)
        assert len(server.prompts) == 1, "retries are not the endpoint's"
    assert KEY not in str(error.value) and "\n" not in str(error.value)
    return error.value


def test_openai_form() -> None:
    with Server(lambda prompt: f"you said {prompt}") as server:
        reply = endpoint(server.url + "/").ask("grüß")
    assert reply.text == "you said grüß" and not reply.cut
    assert (reply.tokens_in, reply.tokens_out) == (1, 4)
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert server.bodies[0] == {"model": "m", "messages": [{"role": "user", "content": "grüß"}], "max_tokens": 50}


def test_anthropic_form() -> None:
    with Server(lambda prompt: f"you said {prompt}") as server:
        for url in (server.url, server.url.removesuffix("/v1")):
            reply = endpoint(url, api="anthropic").ask("p")
            assert reply.text == "you said p" and (reply.tokens_in, reply.tokens_out) == (0, 3)
    assert server.paths == ["/v1/messages"] * 2
    assert server.headers[0]["x-api-key"] == KEY and server.headers[0]["anthropic-version"] == "2023-06-01"
    assert "authorization" not in server.headers[0] and server.bodies[0]["max_tokens"] == 50


def test_the_form_follows_from_the_host() -> None:
    assert Endpoint("https://api.anthropic.com", "m", max_output=1, timeout=1).url == (
        "https://api.anthropic.com/v1/messages"
    )
    chat = Endpoint("https://api.anthropic.com/v1/", "m", api="openai", max_output=1, timeout=1)
    assert chat.url == "https://api.anthropic.com/v1/chat/completions"
    assert Endpoint(chat.url, "m", max_output=1, timeout=1).url == "https://api.anthropic.com/v1/messages"


def test_this_machine_is_not_reached_by_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Server(lambda prompt: "yes") as server:
        assert endpoint(server.url).ask("p").text == "yes"


def test_without_a_key_no_header_is_sent() -> None:
    with Server(lambda prompt: "yes") as server:
        endpoint(server.url, key=None).ask("p")
    assert "authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("answer", "text", "cut"),
    [
        ({**OPENAI, "usage": None}, "hello", False),
        ({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}, "", True),
        ({"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"type": "x"}]}}]}, "a", False),
        ({"choices": [{"message": {"content": f"I saw {KEY}"}}]}, "I saw [key]", False),
    ],
)
def test_answers_of_other_servers(answer: object, text: str, cut: bool) -> None:
    body = json.dumps(answer).encode()
    with Server(lambda prompt: "", lambda prompt, attempt: Fault(body=body)) as server:
        reply = endpoint(server.url).ask("p")
    assert (reply.text, reply.cut, reply.tokens_in) == (text, cut, None)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (Fault(429), TransientError, "HTTP 429"),
        (Fault(500, body=b"<html>oh no</html>"), TransientError, "HTTP 500: <html>oh no</html>"),
        (Fault(529, body=b'{"error": {"message": "overloaded"}}'), TransientError, "HTTP 529: overloaded"),
        (Fault(body=b'{"choices": [{"mess'), TransientError, 'no text where one is expected: {"choices"'),
        (Fault(body=b""), TransientError, "no text where one is expected: (empty)"),
        (Fault(body=b"[1, 2]"), TransientError, "no text where one is expected"),
        (Fault(body=b'{"choices": []}'), TransientError, "no text where one is expected"),
        (Fault(body=b'{"choices": [{"message": {"content": 5}}]}'), TransientError, "no text where one is expected"),
        (Fault(body=b"[" * 100_000), TransientError, "no text where one is expected"),
        (Fault(body=json.dumps(OPENAI).encode(), cut=True), TransientError, "cut after"),
        (Fault(body=json.dumps(OPENAI).encode(), cut=True, chunked=True), TransientError, "no connection"),
        (Fault(close=True), TransientError, "no connection to 127.0.0.1: Remote end closed"),
        (Fault(400, body=b'{"error": {"message": "too long"}}'), PromptRefusedError, "HTTP 400: too long"),
        (Fault(401, body=f"bad key {KEY}".encode()), EndpointError, "HTTP 401: bad key [key]; is the key in CROSSC"),
        (Fault(404, body=b'{"detail": "no model m"}'), EndpointError, "no model m; are --endpoint (http://127"),
        (Fault(402), EndpointError, "127.0.0.1 refuses: HTTP 402"),
    ],
)
def test_failures(fault: Fault, kind: type[EndpointError], message: str) -> None:
    error = failing(fault)
    assert type(error) is kind
    assert message in str(error)


def test_nobody_listens() -> None:
    with Server(lambda prompt: "") as server:
        url = server.url
    with pytest.raises(TransientError, match="no connection to 127.0.0.1: .*refused"):
        endpoint(url).ask("p")


def test_slow_answers() -> None:
    # Long enough for a busy machine to send the question; both answers would take longer.
    assert "no answer within 2.5 s" in str(failing(Fault(delay=20), timeout=2.5))
    # A byte every now and then keeps a socket's own timeout from ever passing.
    dripping = failing(Fault(body=json.dumps(OPENAI).encode(), drip=0.05), timeout=2.5)
    assert type(dripping) is TransientError and "no answer within 2.5 s" in str(dripping)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("soon", None),
        ("inf", None),
        (lambda: email.utils.formatdate(time.time() + 60, usegmt=True), 60.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    ],
)
def test_retry_after(header: str | Callable[[], str], seconds: float | None) -> None:
    value = header if isinstance(header, str) else header()
    error = failing(Fault(429, {"Retry-After": value}))
    assert isinstance(error, TransientError)
    assert error.retry_after == (seconds if seconds is None else pytest.approx(seconds, abs=5.0))


def test_redirects_do_not_take_the_key_along() -> None:
    with Server(lambda prompt: "got it") as other:
        error = failing(Fault(302, {"Location": f"{other.url}/chat/completions"}))
        assert other.headers == []
    assert type(error) is EndpointError and "answers with another address" in str(error)


def test_where_the_key_comes_from() -> None:
    openai, anthropic, local = "https://api.openai.com/v1", "https://api.anthropic.com", "http://localhost:8000/v1"
    everything = {"OPENAI_API_KEY": "o", "ANTHROPIC_API_KEY": "a"}
    assert read_key(openai, everything) == "o" and read_key(anthropic, everything) == "a"
    assert read_key(local, everything) is None, "a vendor's key is for the vendor alone"
    assert read_key("https://api.openai.com.evil.example/v1", everything) is None
    own = {**everything, "CROSSCODER_API_KEY": " mine\n"}
    assert {read_key(url, own) for url in (openai, anthropic, local)} == {"mine"}
    with pytest.raises(ConfigError, match="api.openai.com needs a key.*as OPENAI_API_KEY or CROSSCODER_API_KEY"):
        read_key(openai, {"ANTHROPIC_API_KEY": "a"})
    for broken in ("sk-with space", "sk-line\nbreak", "schlüssel"):
        with pytest.raises(ConfigError, match="CROSSCODER_API_KEY holds characters") as error:
            read_key(local, {"CROSSCODER_API_KEY": broken})
        assert broken not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "api.openai.com/v1",
        "ftp://host/v1",
        "http://",
        "http://host:port/v1",
        f"http://{KEY}@host/v1",
        f"http://h/?{KEY}",
    ],
)
def test_addresses_that_cannot_be(url: str) -> None:
    with pytest.raises(ConfigError, match="--endpoint must be") as error:
        endpoint(url)
    assert KEY not in str(error.value)


def test_a_key_in_the_open_is_noticed() -> None:
    assert endpoint("http://192.168.0.7:8000/v1").unsafe
    assert not endpoint("http://192.168.0.7:8000/v1", key=None).unsafe
    assert not endpoint("http://localhost:8000/v1").unsafe and not endpoint("https://host/v1").unsafe
