"""Two commands on one run at once: one works, the other says so and leaves, and nothing is mixed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from explain.server import Server, knowing
from faults.contents import contents
from faults.forking import Command, Forks
from faults.tiny_run import ATTRIBUTE, EVOLVE, SWEEP, TRAIN, collect_options
from support.command_line import error, run

from crosscoder import ActivationStore, CrosscoderConfig, TrainConfig
from crosscoder.errors import BusyError
from crosscoder.train.run import train

VERBS = (
    "train", "eval", "evolve", "report", "attribute", "explain", "sweep", "compare", "store", "collect", "quickstart",
)  # fmt: skip
"""All that write into a run."""
SHARED = ("collect",)
"""Of these, several fill one run together (test_kill.py has that)."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with Server(knowing) as server:
        yield server.url


@pytest.fixture
def command(base: Path, endpoint: str, verb: str) -> list[object]:
    """The command of a verb on the run `run`, with something to do in a copy of the run `evolved`."""
    return arguments_of(verb, base, endpoint)


def arguments_of(verb: str, base: Path, endpoint: str) -> list[object]:
    small = ["--max-characters", 16_000, "--lm-steps", 8, "--lm-snapshots", 6, "--n-features", 32]
    options: dict[str, list[object]] = {
        "train": ["run", *TRAIN, "--no-resume", "--seed", 3],
        "eval": ["run", "--loss-tokens", 256],
        "evolve": ["run", *EVOLVE, "--tau", 0.4, "--only", "life"],
        "report": ["run"],
        "attribute": ["run", "--task", base / "liked.jsonl", *ATTRIBUTE],
        "explain": ["run", "--endpoint", endpoint, "--model", "m", "--n-features", 3, "--yes"],
        "sweep": ["run", *SWEEP, "--baselines", "sae"],
        "compare": ["run", "other"],
        "store": ["merge", "run/activations/train", "more"],
        "collect": ["run", *collect_options(base)],
        "quickstart": ["--out", "run", "--text", base / "text.txt", *small, "--train-steps", 8, "--batch-size", 64],
    }
    return [verb, *options[verb]]


@pytest.fixture
def start(evolved: Path, tmp_path: Path, verb: str) -> Path:
    """A folder with a run in which `verb` has something to do, and a copy `work` of it."""
    folder = tmp_path / "start"
    for name in ("run", "other"):
        shutil.copytree(evolved / name, folder / name)
    for path in folder.glob("run/report.html"):
        path.unlink()
    if verb == "collect":
        for path in ("activations", "crosscoder", "training"):
            shutil.rmtree(folder / "run" / path)
    if verb == "quickstart":
        shutil.rmtree(folder / "run")
        (folder / "run").mkdir()
    store = ActivationStore.open(evolved / "run" / "activations" / "train")
    more = ActivationStore.create(
        folder / "more", 1, store.d_model, store.dtype, shard_rows=store.shard_rows, snapshots=["step64"],
        source=store.manifest["source"],
    )  # fmt: skip
    for shard in range(len(store.shard_rows)):
        more.write_tokens(shard, store.tokens(shard))
        more.write_segment(shard, 0, store.read(shard)[:, 0])
    shutil.copytree(folder, tmp_path / "work")
    return folder


def begun(forks: Forks, folder: Path, command: list[object]) -> Command:
    """`command`, stopped in the middle of its work with the run in its hands."""
    holder = forks.start(folder, *command, stop_after=".collect.lock" if command[0] == "collect" else ".lock")
    holder.wait_until_stopped()
    return holder


@pytest.mark.parametrize("verb", VERBS)
def test_every_pair_of_verbs(
    forks: Forks,
    base: Path,
    endpoint: str,
    start: Path,
    verb: str,
    command: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    forks.run(work, *command)
    wanted = contents(work)
    assert wanted != contents(start), "it did something"
    shutil.rmtree(work)
    shutil.copytree(start, work)
    holder = begun(forks, work, command)
    held = contents(work)
    for other in VERBS:
        if other == verb and verb in SHARED:
            continue
        code = forks.start(work, *arguments_of(other, base, endpoint))
        assert code.wait() == BusyError.exit_code, f"{other} beside {verb}: {code.printed()[-2000:]}"
        process = "one process or several" if verb in SHARED else f"process {holder.pid}"
        name = "store merge" if verb == "store" else verb
        lines = [line for line in code.printed().splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and f"crosscoder {name} ({process}) works on " in lines[0], code.printed()
        assert contents(work) == held, f"{other} changed something beside {verb}"
    if verb != "quickstart" and verb != "collect":
        for reading in (["store", "info"], ["store", "verify"]):
            assert run(*reading, work / "run" / "activations" / "train") == 0
        assert run("sweep", work / "run", *SWEEP, "--plan") == 0
    capsys.readouterr()
    holder.go_on()
    assert holder.wait() == 0, holder.printed()
    assert contents(work) == wanted


@pytest.mark.parametrize("verb", ["train"])
def test_training_in_python_is_a_command_like_any(
    forks: Forks, start: Path, command: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "work" / "run"
    store, crosscoder = ActivationStore.open(folder / "activations" / "train"), CrosscoderConfig(3, 16, 8)
    options = TrainConfig(n_steps=3, batch_size=16)
    holder = begun(forks, tmp_path / "work", command)
    before = contents(folder)
    with pytest.raises(BusyError, match=rf"crosscoder train \(process {holder.pid}\) works on"):
        train(store, crosscoder, options, folder, resume=False)
    assert contents(folder) == before
    holder.kill()
    inside, refused = threading.Event(), threading.Event()

    def begin() -> None:
        inside.set()
        assert refused.wait(60)

    thread = threading.Thread(
        target=train, args=(store, crosscoder, options, folder), kwargs={"resume": False, "begin": begin}
    )
    thread.start()
    assert inside.wait(60)
    assert run("eval", folder) == BusyError.exit_code
    assert "works on" in error(capsys)
    with pytest.raises(BusyError):
        train(store, crosscoder, options, folder, resume=False)
    refused.set()
    thread.join(60)
    assert ".lock" not in {path.name for path in folder.rglob("*")}


@pytest.mark.parametrize("verb", ["compare"])
def test_a_run_that_is_compared_with_is_only_read(
    forks: Forks, base: Path, endpoint: str, start: Path, command: list[object], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    shutil.copytree(work / "run", work / "third")
    holder = forks.start(work, *command, stop_after=".tmp-compare.yaml")
    holder.wait_until_stopped()
    assert (work / "other" / ".lock").exists()
    assert run("train", work / "other", *TRAIN) == run("eval", work / "other") == BusyError.exit_code
    assert run("compare", work / "third", work / "other") == 0
    assert (work / "other" / ".lock").exists()
    holder.go_on()
    assert holder.wait() == 0
    assert not [path for path in work.rglob(".lock")]


@pytest.mark.parametrize("verb", ["sweep"])
def test_sweeps_of_two_runs_into_one_folder(
    forks: Forks, start: Path, command: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    (work / "sweep").mkdir()
    holder = forks.start(work, *command, "--out", "sweep", stop_after=".tmp-settings.json")
    holder.wait_until_stopped()
    before = contents(work)
    assert run("sweep", work / "other", *SWEEP, "--out", work / "sweep") == BusyError.exit_code
    assert f"crosscoder sweep (process {holder.pid}) works on {work / 'sweep'}" in error(capsys)
    assert contents(work) == before
    holder.go_on()
    assert holder.wait() == 0
