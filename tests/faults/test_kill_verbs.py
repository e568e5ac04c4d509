"""kill -9 in the verbs that analyse a run, at moments spread over all they do, and the same command again."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from explain.planted_run import make_run as make_planted_run
from explain.server import Server, knowing
from faults.contents import contents
from faults.forking import Forks
from faults.tiny_run import ATTRIBUTE, EVOLVE, SWEEP

KILLS = int(os.environ.get("VERB_KILLS", "20"))
SEED = int(os.environ.get("KILL_SEED", "0"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def kill(forks: Forks, start: Path, folder: Path, *command: object, at_changes: int = KILLS) -> dict[str, Any]:
    """Kill `command` in copies of `start` at `KILLS` moments of its time and `at_changes` of its changes of files.

    It goes on from kill to kill. Where it ends before its moment, what it left must be what an undisturbed run leaves,
    and it begins anew, so that every moment is as likely. Returns the contents of the folder.
    """
    dice = random.Random(SEED)
    folder = folder / "work"  # the same for all: some records name it
    shutil.copytree(start, folder)
    began = time.monotonic()
    changes = forks.run(folder, *command).changes()
    seconds = time.monotonic() - began
    wanted = contents(folder)
    shutil.rmtree(folder)
    assert changes > 5 and wanted.keys() > contents(start).keys(), "it does something"
    moments: list[tuple[float, int | None]] = [(seconds * (i + dice.random()) / KILLS, None) for i in range(KILLS)]
    moments += [(600, 1 + int(changes * (i + dice.random()) / at_changes)) for i in range(at_changes)]
    dice.shuffle(moments)
    ended = 0
    for number, (after, change) in enumerate([*moments, (600, None)]):
        if not folder.exists():
            shutil.copytree(start, folder)
        running = forks.start(folder, *command, kill_at=change)
        running.wait(after)
        running.kill()
        code = running.wait()
        assert code in (0, -9), f"kill {number}: exit code {code}\n{running.printed()[-4000:]}"
        if code == 0:
            found = contents(folder)
            assert found.keys() == wanted.keys(), f"after {number} kills"
            assert [name for name in wanted if found[name] != wanted[name]] == [], f"after {number} kills"
            shutil.rmtree(folder)
            ended += 1
    assert code == 0 and len(moments) - ended >= KILLS
    print(f"{len(moments) + 1 - ended} kills in {seconds:.1f} s and {changes} changes of files; {ended} ends")
    return wanted


def test_attribute(base: Path, forks: Forks, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(base / "run", start / "run")
    wanted = kill(forks, start, tmp_path, "attribute", "run", "--task", base / "liked.jsonl", *ATTRIBUTE)
    found = json.loads(wanted["run/attribution/liked/results.json"])
    assert "step8" in found["figures"]["above_chance"], "there was something to attribute"


def test_evolve(base: Path, forks: Forks, tmp_path: Path) -> None:
    shutil.copytree(base / "run", tmp_path / "start" / "run")
    kill(forks, tmp_path / "start", tmp_path, "evolve", "run", *EVOLVE)


def test_report(evolved: Path, forks: Forks, tmp_path: Path) -> None:
    kill(forks, evolved, tmp_path, "report", "run", at_changes=KILLS // 2)


def test_sweep(base: Path, forks: Forks, tmp_path: Path) -> None:
    shutil.copytree(base / "run", tmp_path / "start" / "run")
    kill(forks, tmp_path / "start", tmp_path, "sweep", "run", *SWEEP)


def test_compare(evolved: Path, forks: Forks, tmp_path: Path) -> None:
    kill(forks, evolved, tmp_path, "compare", "run", "other")


def test_explain(forks: Forks, tmp_path: Path) -> None:
    make_planted_run(tmp_path / "start" / "run")
    with Server(knowing) as server:
        options = ["--endpoint", server.url, "--model", "m", "--n-features", 6, "--yes"]
        kill(forks, tmp_path / "start", tmp_path, "explain", "run", *options)
