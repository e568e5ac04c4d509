"""A local endpoint that can misbehave, and scripted models behind it."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Model = Callable[[str], str]


@dataclass(frozen=True)
class Fault:
    """One way of not answering."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay: float = 0.0
    """Seconds before anything is sent."""
    drip: float = 0.0
    """Seconds between two bytes of the body."""
    cut: bool = False
    """Close in the middle: half of the body, the length promised for all of it."""
    chunked: bool = False
    """With `cut`: in chunked coding, without the last chunk."""
    close: bool = False
    """Close without a word."""


class Server:
    """Answers with `model(prompt)`, except where `faults(prompt, number of the try)` has something else in mind."""

    def __init__(self, model: Model, faults: Callable[[str, int], Fault | None] = lambda prompt, attempt: None) -> None:
        self.model, self.faults = model, faults
        self.prompts: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self.usage = True
        self._lock = threading.Lock()
        self.over = threading.Event()
        self.asked = threading.Event()
        """Has a prompt come? One whose sender gave up at once may come after that."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.handle(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass  # clients that are gone

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def counts(self) -> Counter[str]:
        """How often each prompt came."""
        return Counter(self.prompts)

    @contextmanager
    def _counted(self) -> Any:
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            yield
        finally:
            with self._lock:
                self.in_flight -= 1

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self._counted():
            with self._lock:
                self.prompts.append(prompt)
                self.headers.append({name.lower(): value for name, value in handler.headers.items()})
                self.bodies.append(body)
                self.paths.append(handler.path)
                attempt = self.prompts.count(prompt)
            self.asked.set()
            fault = self.faults(prompt, attempt)
            if fault is not None:
                misbehave(handler, fault, self.over)
            else:
                text = self.model(prompt)
                send(handler, 200, {}, json.dumps(self._answer(handler.path, prompt, text)).encode())

    def _answer(self, path: str, prompt: str, text: str) -> dict[str, Any]:
        tokens_in, tokens_out = len(prompt) // 4, len(text) // 4 + 1
        if path.endswith("/messages"):
            usage = {"input_tokens": tokens_in, "output_tokens": tokens_out}
            answer = {"content": [{"type": "text", "text": text}], "stop_reason": "end_turn"}
        else:
            usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
            answer = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        return {**answer, "usage": usage} if self.usage else answer


def send(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def misbehave(handler: BaseHTTPRequestHandler, fault: Fault, over: threading.Event) -> None:
    if fault.delay:
        over.wait(fault.delay)
    handler.close_connection = True
    if fault.close:
        return
    if fault.cut or fault.drip:
        handler.send_response(fault.status)
        if fault.chunked:
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(f"{len(fault.body):x}\r\n".encode() + fault.body + b"\r\n")
            return
        handler.send_header("Content-Length", str(len(fault.body)))
        handler.end_headers()
        if fault.cut:
            handler.wfile.write(fault.body[: len(fault.body) // 2])
            return
        for i in range(len(fault.body)):
            if over.is_set():
                return
            handler.wfile.write(fault.body[i : i + 1])
            time.sleep(fault.drip)
        return
    send(handler, fault.status, fault.headers, fault.body)


# ------------------------------------------------------------------------------------------------ models

PASSAGE = re.compile(r"^(\d+)\. (.*)$", re.MULTILINE)


def knowing(prompt: str) -> str:
    """Explains by the word most often marked; checks by looking for it."""
    passages = {int(number): text for number, text in PASSAGE.findall(prompt)}
    if '"explanation"' in prompt:
        words = Counter(word for text in passages.values() for word in re.findall(r"<<(.*?)>>", text))
        word = words.most_common(1)[0][0].strip()
        return json.dumps({"explanation": f"active on [{word}]", "consistency": 5, "complexity": 1})
    found = re.search(r"active on \[(.*?)\]", prompt)
    assert found is not None
    word = found.group(1)
    if "<<" in "".join(passages.values()):
        here = [
            n for n, text in passages.items() if any(word == mark.strip() for mark in re.findall(r"<<(.*?)>>", text))
        ]
    else:
        here = [n for n, text in passages.items() if re.search(rf"(?<!\S){re.escape(word)}(?!\S)", text)]
    return json.dumps({"passages": here})


def guessing(prompt: str) -> str:
    """Explanations and guesses at random (the same ones for the same prompt)."""
    dice = random.Random(prompt)
    if '"explanation"' in prompt:
        grades = {"consistency": dice.randint(1, 5), "complexity": dice.randint(1, 5)}
        return json.dumps({"explanation": f"active on [{dice.random()}]", **grades})
    return json.dumps({"passages": [n for n in range(1, 11) if dice.random() < 0.5]})
