"""A tiny run that has every kind of file: what each verb writes, and what a killed one leaves behind.

    python tools/whole_run.py /tmp/whole

Makes `run/` there (quickstart, attribute, sweep, compare, explain with an endpoint of its own), `other/` (the run that
it is compared with) and `killed/` (a training with a checkpoint). About half a minute on one core, without a network.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

from crosscoder import cli

QUICKSTART = ("--max-characters", 300_000, "--lm-steps", 12, "--lm-snapshots", 6, "--train-steps", 120)
FEATURES = 48
_WORDS = ("people", "country", "Congress", "States", "year", "war", "law", "time", "peace", "world")
PAIRS = [
    {"clean": f" of {word} and", "corrupted": f" the {word} and", "right": " the", "wrong": " upon"} for word in _WORDS
]
"""A task that is above chance from the first steps on: the commonest word against a rarer one."""
BATCH = 64


def build_quietly(folder: Path) -> None:
    """`build` without what the commands print."""
    with contextlib.redirect_stdout(io.StringIO()):
        build(folder)


def build(folder: Path) -> Path:
    """Make the runs in `folder`; returns `run/`."""
    run, other, killed = folder / "run", folder / "other", folder / "killed"
    with _left_behind(killed):
        _verb("quickstart", "--out", run, *QUICKSTART, "--n-features", FEATURES, "--batch-size", BATCH)
    with patch("crosscoder.attribution.attribution_study.remove_folder"):  # killed before its work is removed
        task = folder / "the.jsonl"
        task.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
        _verb("attribute", run, "--task", task, "--n-exact", 4, "--n-random", 1)
    _verb("sweep", run, "--sparsity", 0.05, 0.1, "--baselines", "sae")
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("crosscoder", "training", "evolution", "sweep"))
    _verb("train", other, "--config", run / "config" / "train.yaml", "--seed", 1, "--n-steps", 20)
    _verb("evolve", other, "--only", "life")
    _verb("compare", run, other)
    with _endpoint() as url:
        _verb("explain", run, "--endpoint", url, "--model", "m", "--n-features", 6, "--yes")
    _verb("report", run)
    return run


def _verb(*arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    code = cli.main(words)
    if code:
        raise SystemExit(f"crosscoder {' '.join(words)} ended with {code}")


@contextlib.contextmanager
def _left_behind(killed: Path) -> Iterator[None]:
    """Keep what a kill at the right moment would leave: the last checkpoint, the state of an unfinished analysis."""

    def keep(checkpoints: Path) -> None:
        shutil.copytree(checkpoints.parent, killed / "training")
        shutil.rmtree(checkpoints)

    with (
        patch("crosscoder.train.run._drop_checkpoints", keep),
        patch("crosscoder.evolution.partial.Partial.remove"),
        patch("crosscoder.evolution.partial.SECONDS", 0.0),
        patch("crosscoder.evolution.partial.MOST_SHARE", 1.0),
    ):
        yield


@contextlib.contextmanager
def _endpoint() -> Iterator[str]:
    """A language model's address that answers every request in the right form."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
            explained = {"explanation": "active on words", "consistency": 4, "complexity": 2}
            answer = explained if '"explanation"' in prompt else {"passages": [1, 3]}
            reply = {"message": {"content": json.dumps(answer)}, "finish_reason": "stop"}
            usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": 20}
            body = json.dumps({"choices": [reply], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
