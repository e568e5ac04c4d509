"""One request to a language model over HTTP: the OpenAI-compatible form and Anthropic's own.

What a server sends is not trusted: it has one deadline for everything, a bound on its length, and what of it is shown
has no control characters and no part of the key.

The standard library does it: the `openai` client would be 71 MB and half a second of import for one POST, and what
matters here (which failures are worth another try, for how long, and that the key goes nowhere else) is ours anyway.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import itertools
import json
import math
import os
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, Literal, TypeVar

from crosscoder.errors import ConfigError, CrosscoderError, printable

Api = Literal["auto", "openai", "anthropic"]
_T = TypeVar("_T")

KEY_VARIABLE = "CROSSCODER_API_KEY"
VENDOR_KEYS = {"api.openai.com": "OPENAI_API_KEY", "api.anthropic.com": "ANTHROPIC_API_KEY"}
"""A vendor's own variable is read for the vendor's host alone: its key must not reach another."""

_ANTHROPIC_VERSION = "2023-06-01"
_LOCAL = ("localhost", "127.0.0.1", "::1")
_RETRIED = (408, 409, 425, 429)
_OF_THE_PROMPT = (400, 413, 422)
_MOST_BYTES = 8 << 20
_SHOWN = 300
_SECRET = 8
"""Characters from which on a key is a secret; local servers take "none" or "x". Also the shortest piece of one that is
taken out of answers."""
_SHOWN_PIECE = 5
"""The shortest piece of a key that is taken out of messages."""
_MOST_ERROR_BYTES = 1 << 16


class EndpointError(CrosscoderError):
    """The endpoint gave no answer, and will give none to the same request: wrong key, model or address."""


class TransientError(EndpointError):
    """Another try may help: too many requests, a failure of the server, a cut connection, no answer in time."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        """Seconds that the server asks to wait."""


class PromptRefusedError(EndpointError):
    """This request is refused; another prompt may pass (too long, filtered) or not (a wrong parameter)."""


@dataclass(frozen=True)
class Reply:
    """What the model wrote."""

    text: str
    tokens_in: int | None
    """As the endpoint counts them; None if it does not say."""
    tokens_out: int | None
    cut: bool
    """The answer reached the limit on its length."""


class Endpoint:
    """A model behind an address. `ask` is one request, and safe to call from several threads."""

    def __init__(
        self, url: str, model: str, *, api: Api = "auto", key: str | None = None, max_output: int, timeout: float
    ) -> None:
        """`url` as vendors give it (https://api.openai.com/v1, http://localhost:11434/v1); `timeout` in seconds, for a
        whole answer. Raises `ConfigError` for an address that cannot be one, or that has a key in it."""
        parts = _checked_url(url)
        self.host = parts.hostname or ""
        self.model, self.max_output, self.timeout = model, max_output, timeout
        self.anthropic = api == "anthropic" or (api == "auto" and self.host == "api.anthropic.com")
        self._key = key
        base = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/messages")
        if self.anthropic:
            base = base if base.endswith("/v1") else f"{base}/v1"
        self.url = f"{base}/{'messages' if self.anthropic else 'chat/completions'}"

    @property
    def unsafe(self) -> bool:
        """A key would travel in the open."""
        return self._key is not None and self.url.startswith("http://") and self.host not in _LOCAL

    def ask(self, prompt: str) -> Reply:
        """The model's answer. Raises `TransientError`, `PromptRefusedError` or `EndpointError` (no use going on); no
        message of theirs has the key in it."""
        exchange = _Exchange(self.timeout)
        request = urllib.request.Request(self.url, self._body(prompt), self._headers(), method="POST")
        try:
            status, headers, data = exchange.within_time(lambda: self._send(request, exchange))
        except TimeoutError:
            raise TransientError(f"no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                raise TransientError(f"no answer within {self.timeout:g} s") from None
            raise TransientError(
                f"no connection to {self.host}: {self._clean(cause) or type(cause).__name__}"
            ) from None
        if status >= 300:
            raise self._explain(status, headers, data)
        try:
            return self._reply(json.loads(data))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            shown = self._clean(data.decode(errors="replace"))
            raise TransientError(f"the answer has no text where one is expected: {shown or '(empty)'}") from None

    def _send(self, request: urllib.request.Request, exchange: _Exchange) -> tuple[int, Any, bytes]:
        """Status, headers and body of the answer."""
        handlers = [_NoRedirect(), *exchange.handlers()]
        if self.host in _LOCAL:  # a proxy of the environment cannot reach this machine's own
            handlers.append(urllib.request.ProxyHandler({}))
        opener = urllib.request.build_opener(*handlers)
        try:
            with opener.open(request, timeout=self.timeout) as response:
                return response.status, response.headers, _read(response)
        except urllib.error.HTTPError as error:
            body = b""
            with error, contextlib.suppress(OSError, http.client.HTTPException):
                body = error.read(_MOST_ERROR_BYTES)
            return error.code, error.headers, body

    def _body(self, prompt: str) -> bytes:
        # OpenAI's newer models refuse max_tokens, servers of open models do not know its successor.
        limit = "max_completion_tokens" if self.host == "api.openai.com" else "max_tokens"
        messages = [{"role": "user", "content": prompt}]
        return json.dumps({"model": self.model, "messages": messages, limit: self.max_output}).encode()

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "User-Agent": "crosscoder"}
        if self.anthropic:
            headers["anthropic-version"] = _ANTHROPIC_VERSION
        if self._key is not None:
            headers |= {"x-api-key": self._key} if self.anthropic else {"Authorization": f"Bearer {self._key}"}
        return headers

    def _reply(self, answer: Any) -> Reply:
        usage = answer.get("usage") or {}
        if self.anthropic:
            text = "".join(part["text"] for part in answer["content"] if part["type"] == "text")
            tokens = _count(usage, "input_tokens"), _count(usage, "output_tokens")
            return Reply(self._without_key(text), *tokens, cut=answer.get("stop_reason") == "max_tokens")
        choice = answer["choices"][0]
        content = choice["message"]["content"]
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content)
        if content is not None and not isinstance(content, str):
            raise TypeError
        tokens = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        return Reply(self._without_key(content or ""), *tokens, cut=choice.get("finish_reason") == "length")

    def _explain(self, status: int, headers: Any, body: bytes) -> EndpointError:
        said = self._clean(_message(body))
        message = f"HTTP {status}" + (f": {said}" if said else "")
        if status in _RETRIED or status >= 500:
            return TransientError(message, _seconds(headers.get("Retry-After")))
        if status in _OF_THE_PROMPT:
            return PromptRefusedError(message)
        if 300 <= status < 400:
            return EndpointError(f"{self.host} answers with another address ({message}); give --endpoint that one")
        remedies = {
            401: f"is the key in {_variables(self.host)} right?",
            403: f"is the key in {_variables(self.host)} right?",
            404: f"are --endpoint ({self.url} was asked) and --model right?",
        }
        remedy = remedies.get(status)
        return EndpointError(f"{self.host} refuses: {message}" + (f"; {remedy}" if remedy else ""))

    def _clean(self, text: object) -> str:
        """On one line, short, printable, and without any part of the key: servers like to repeat it."""
        line = " ".join(str(text)[:_MOST_ERROR_BYTES].split())
        return printable(self._without_key(line[: 4 * _SHOWN], _SHOWN_PIECE))[:_SHOWN]

    def _without_key(self, text: str, piece: int = _SECRET) -> str:
        """`text` with [key] for whatever it has in common with the key, from `piece` characters on."""
        key = self._key or ""
        if len(key) < _SECRET:
            return text
        pieces = {key[i : i + piece] for i in range(len(key) - piece + 1)}
        hidden = [False] * len(text)
        for i in range(len(text) - piece + 1):
            if text[i : i + piece] in pieces:
                hidden[i : i + piece] = [True] * piece
        shown = (
            "[key]" if dark else "".join(text[i] for i, _ in run)
            for dark, run in itertools.groupby(enumerate(hidden), key=lambda entry: entry[1])
        )
        return "".join(shown)


def read_key(url: str, environment: Mapping[str, str] | None = None) -> str | None:
    """The key for the endpoint, from the environment; None where there is none and the host may need none.

    Raises `ConfigError` where a vendor's is missing, or for what cannot be a key (without showing it).
    """
    environment = os.environ if environment is None else environment
    host = _checked_url(url).hostname or ""
    for variable in (KEY_VARIABLE, VENDOR_KEYS.get(host)):
        key = environment.get(variable, "").strip() if variable else ""
        if key:
            # http.client would show the whole of a header that it refuses.
            if not all("!" <= character <= "~" for character in key):
                raise ConfigError(f"{variable} holds characters that no key has (a space, a line break?)")
            return key
    if host in VENDOR_KEYS:
        raise ConfigError(f"{host} needs a key: put it into the environment as {_variables(host)}")
    return None


def _variables(host: str) -> str:
    return " or ".join(name for name in (VENDOR_KEYS.get(host), KEY_VARIABLE) if name)


def _checked_url(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigError("--endpoint must be an address like https://api.openai.com/v1 or http://localhost:11434/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            f"--endpoint must be without user, password and ?...; a key belongs into the environment as {KEY_VARIABLE}"
        )
    return parts


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the key along to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        return None


class _Exchange:
    """One request and its answer, under one deadline, whatever a server does to keep the connection alive.

    A socket's own timeout begins anew with every byte, and the names of hosts are looked up without any. So the work
    is done in a thread; when the time is over the connection is shut down, which ends the thread.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._over = False

    def within_time(self, work: Callable[[], _T]) -> _T:
        """What `work` returns or raises; `TimeoutError` when the time is over first."""
        done: list[tuple[_T | None, BaseException | None]] = []

        def run() -> None:
            try:
                done.append((work(), None))
            except BaseException as error:
                done.append((None, error))

        thread = threading.Thread(target=run, name="request", daemon=True)
        thread.start()
        try:
            thread.join(max(0.0, self._end - time.monotonic()))
        finally:
            self._end_all()
        if not done:
            raise TimeoutError
        value, error = done[0]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def handlers(self) -> list[urllib.request.BaseHandler]:
        """For urllib: connections that this exchange can end."""
        watch = self._watch

        class Plain(http.client.HTTPConnection):
            def connect(self) -> None:
                self._create_connection = watch
                super().connect()

        class Encrypted(http.client.HTTPSConnection):
            def connect(self) -> None:
                self._create_connection = watch
                super().connect()

        class PlainHandler(urllib.request.HTTPHandler):
            def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
                return self.do_open(Plain, req)

        class EncryptedHandler(urllib.request.HTTPSHandler):
            def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
                return self.do_open(Encrypted, req)

        return [PlainHandler(), EncryptedHandler()]

    def _watch(self, *arguments: Any, **options: Any) -> socket.socket:
        connected = socket.create_connection(*arguments, **options)
        with self._lock:
            if self._over:
                connected.close()
                raise TimeoutError
            # A second descriptor of the same connection: the first moves into the encryption's socket.
            self._sockets.append(connected.dup())
        return connected

    def _end_all(self) -> None:
        with self._lock:
            self._over = True
            for connection in self._sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            self._sockets.clear()


def _read(response: Any) -> bytes:
    """The body, of a bounded length."""
    body = b""
    length = int(response.headers.get("Content-Length") or -1)
    while len(body) != length and (part := response.read1(1 << 16)):
        body += part
        if len(body) > _MOST_BYTES:
            raise http.client.HTTPException(f"an answer of more than {_MOST_BYTES >> 20} MiB")
    if len(body) < length:
        raise http.client.HTTPException(f"the connection was cut after {len(body)} of {length} bytes")
    return body


def _message(body: bytes) -> str:
    """What an error's body says, wherever servers put it."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
        for name in ("error", "message", "detail"):
            found = found.get(name, found) if isinstance(found, dict) else found
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, str) else text


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After header: seconds or a date."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
