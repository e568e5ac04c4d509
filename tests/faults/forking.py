"""Commands in processes forked from one that has imported everything: each starts within milliseconds.

`python -m faults.forking` is that process; `Forks` talks to it. A change of files is when Python code opens a file for
writing, renames, removes, or makes or removes a folder. A command may be told to kill itself just before the n-th one,
or to stop just before the first one after a file of some name was changed.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

LIMIT_SECONDS = 300
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
LATER = (
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "transformers.convert_slow_tokenizer",
    "tyro.constructors",
    "scipy.optimize",
    "scipy.stats",
    "pandas",
    "pyarrow.compute",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
)
"""What commands import in the middle of their work."""


class Forks:
    """Runs of `crosscoder ARGUMENTS`, several at a time if need be."""

    def __init__(self, folder: Path) -> None:
        """`folder`: for what the commands print."""
        self._logs = folder
        self._count = 0
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self._server = subprocess.Popen(
            [sys.executable, "-m", "faults.forking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, "PYTHONPATH": path},
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer

    def start(
        self, folder: Path, *arguments: object, kill_at: int | None = None, stop_after: str | None = None
    ) -> Command:
        """`crosscoder ARGUMENTS`, run in `folder`. `kill_at`: it ends itself at that change of files, from 1;
        `stop_after`: it stops at the next change after one of a file of that name, until `go_on`."""
        self._count += 1
        log = self._logs / f"command-{self._count}.log"
        request = {"arguments": list(map(str, arguments)), "folder": str(folder), "log": str(log)}
        pid = self._ask(do="start", **request, kill_at=kill_at, stop_after=stop_after)["pid"]
        return Command(self, int(pid), log)

    def run(self, folder: Path, *arguments: object) -> Command:
        """To the end; fails with what it printed."""
        command = self.start(folder, *arguments)
        code = command.wait()
        assert code == 0, f"exit code {code}: {command.printed()[-4000:]}"
        return command


class Command:
    """One run of a command."""

    def __init__(self, forks: Forks, pid: int, log: Path) -> None:
        self._forks, self.pid, self.log = forks, pid, log
        self._code: int | None = None
        self._stopped = False

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs, or is stopped."""
        if self._code is None:
            answer = self._forks._ask(do="poll", pid=self.pid)
            self._code = answer["code"]
            self._stopped |= answer["stopped"]
        return self._code

    def wait_until_stopped(self) -> None:
        """Fails where it ends instead."""
        until = time.monotonic() + LIMIT_SECONDS
        while not self._stopped:
            assert self.poll() is None and time.monotonic() < until, f"it never stopped: {self.printed()[-4000:]}"
            time.sleep(0.002)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        self._stopped = False

    def wait(self, seconds: float = LIMIT_SECONDS) -> int | None:
        """The exit code; None where it still runs after so many seconds."""
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        return self.poll()

    def kill(self) -> None:
        """SIGKILL, whatever it does."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def changes(self) -> int:
        """How often it changed files, if it ended by itself."""
        return int(self.log.with_suffix(".changes").read_text())


# ---------------------------------------------------------------------------------------------- the server


def _import_everything() -> None:
    import crosscoder

    for module in pkgutil.walk_packages(crosscoder.__path__, "crosscoder."):
        if module.name not in ("crosscoder.__main__",) and "triton" not in module.name:
            importlib.import_module(module.name)
    for name in LATER:
        importlib.import_module(name)


def _watch(log: str, kill_at: int | None, stop_after: str | None) -> None:
    """Count changes of files in this process and all its threads, and end or stop it as asked for."""
    count, near = 0, False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count, near, stop_after
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        elif event == "import" and arguments[0] == "this":  # the end
            Path(log).with_suffix(".changes").write_text(str(count))
            changes = False
        else:
            changes = event in CHANGES and not isinstance(arguments[0], int)
        if changes:
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if near:
                near, stop_after = False, None
                os.kill(os.getpid(), signal.SIGSTOP)
            near = stop_after is not None and os.path.basename(os.fsdecode(arguments[0])) == stop_after

    sys.addaudithook(hook)


def _child(request: dict[str, Any]) -> int:
    from crosscoder import cli

    output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, target)
    os.chdir(request["folder"])
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    _watch(request["log"], request["kill_at"], request["stop_after"])
    code = cli.main(request["arguments"])
    sys.audit("import", "this", None, None, None, None)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve() -> None:
    """Requests as lines of JSON on standard input, answers on standard output."""
    _import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            pid = os.fork()
            if pid == 0:
                code = 70
                try:
                    code = _child(request)
                finally:
                    os._exit(code)
            answer: dict[str, Any] = {"pid": pid}
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG | os.WUNTRACED)
            stopped = bool(pid) and os.WIFSTOPPED(status)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid and not stopped else None, "stopped": stopped}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
