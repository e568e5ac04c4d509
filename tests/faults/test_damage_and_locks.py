"""Damaged records, special files, links, two commands on one run: right, or refused with the file named."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.damage import flips, put
from support.command_line import error, run

from crosscoder import ActivationLoader, ActivationStore, Crosscoder, CrosscoderConfig, TrainConfig, Trainer, locks
from crosscoder.activations.claim import claim
from crosscoder.common.arrays import load_arrays, save_arrays
from crosscoder.common.tables import csv_text, read_table, write_table
from crosscoder.errors import BusyError, ConfigError, DataError, StorageError
from crosscoder.explain.endpoint import Endpoint
from crosscoder.files import read_json, write_bytes, write_json
from crosscoder.locks import locked, open_lock, working_on


def test_a_record_without_what_is_needed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"step": 35, "done": True})
    assert read_json(path, step=int) == {"step": 35, "done": True}
    for missing in ({"steps": int}, {"done": int}):
        with pytest.raises(DataError, match=r"record\.json: '(steps|done)' is missing or not a whole number"):
            read_json(path, **missing)


def test_a_flipped_bit_of_arrays_and_tables_changes_nothing_unseen(tmp_path: Path) -> None:
    arrays = {"a.norms": np.arange(40.0).reshape(8, 5), "b": np.array(["x", "yz"]), "c": np.array(3)}
    table = {"n": np.arange(30), "score": np.linspace(0, 1, 30), "word": [f"w{i}" for i in range(30)]}
    save_arrays(tmp_path / "a.npz", arrays)
    write_table(tmp_path / "t.parquet", table)
    for path, read, wanted in (
        (tmp_path / "a.npz", load_arrays, arrays),
        (tmp_path / "t.parquet", read_table, table),
    ):
        refused = 0
        for data in flips(path.read_bytes(), every=7):
            put(path, data)
            try:
                found = read(path)
            except DataError as damage:
                assert path.name in str(damage)
                refused += 1
            else:
                assert found.keys() == wanted.keys()
                assert all(np.array_equal(found[name], np.asarray(wanted[name])) for name in wanted)
        assert refused > 100


def test_a_damaged_configuration_or_checkpoint_is_named(tmp_path: Path) -> None:
    trainer = Trainer(Crosscoder(CrosscoderConfig(3, 5, 8)), TrainConfig(n_steps=50, batch_size=16, lr=1e-3))
    trainer.step(torch.randn(16, 3, 5))
    trainer.save(tmp_path / "ck")
    other = Trainer(Crosscoder(CrosscoderConfig(3, 5, 8)), trainer.config)
    for name in ("config.json", "trainer.json"):
        path = tmp_path / "ck" / name
        whole = path.read_bytes()
        for data in flips(whole, every=5):
            put(path, data)
            with pytest.raises(DataError, match=name):
                other.resume(tmp_path / "ck")
        put(path, whole)
    weights = tmp_path / "ck" / "model.safetensors"
    data = weights.read_bytes()
    at = data.index(b"F32", data.index(b"snapshot_scale"))
    weights.write_bytes(data[:at] + b"I" + data[at + 1 :])
    with pytest.raises(DataError, match="snapshot_scale is of torch.int32"):
        Crosscoder.from_pretrained(tmp_path / "ck")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = Crosscoder(CrosscoderConfig(3, 5, 8))
    with torch.no_grad():
        model.W_dec[1, 2, 3] = torch.inf
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(DataError, match=r"model\.safetensors: W_dec holds NaN or infinity"):
        Crosscoder.from_pretrained(tmp_path / "m")


def test_locks_and_temporary_files_follow_no_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for link in (os.symlink, os.link):
        link(victim, tmp_path / ".lock")
        with pytest.raises(StorageError, match=r"\.lock"), locked(tmp_path / ".lock"):
            pass
        (tmp_path / ".lock").unlink()
        link(victim, tmp_path / ".tmp-file")
        write_bytes(tmp_path / "file", b"mine")
        store = ActivationStore.create(tmp_path / link.__name__, 2, 3, "fp32", shard_rows=[9])
        segment = store.segment_path(0, 0)
        segment.parent.mkdir(parents=True, exist_ok=True)
        link(victim, segment.with_name(f".tmp-{segment.name}"))
        with claim(segment) as mine:
            assert mine
            store.write_segment(0, 0, torch.ones(9, 3))
    assert victim.read_text() == "precious" and (tmp_path / "file").read_bytes() == b"mine"


def test_a_file_system_without_locks_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_told", set())
    with working_on(tmp_path, "train"):
        ActivationStore.from_array(tmp_path / "s", np.ones((9, 2, 3), np.float32))
        with claim(tmp_path / "file") as mine, locked(tmp_path / ".other"):
            assert mine
    told = [line for line in capsys.readouterr().err.splitlines() if "cannot be locked" in line]
    assert len(told) == 1 and "let only one command at a time work on" in told[0] and "No locks available" in told[0]


def test_a_lock_is_gone_with_its_file_and_can_be_had_again(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("crosscoder train (process 1)\n")  # of a killed process
    with working_on(tmp_path, "train"):
        with working_on(tmp_path, "eval"):
            pass
        assert (tmp_path / ".lock").read_text() == f"crosscoder train (process {os.getpid()})\n"
        busy: list[BaseException] = []

        def other() -> None:
            try:
                with working_on(tmp_path, "eval"):
                    pass
            except BusyError as error:
                busy.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert f"crosscoder train (process {os.getpid()}) works on {tmp_path}" in str(busy[0])
    assert not list(tmp_path.iterdir())


def test_of_many_that_want_a_lock_one_at_a_time_has_it(tmp_path: Path) -> None:
    """The file is removed and made again all the time, and still nobody is beside another."""
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(200):
            with locked(tmp_path / ".lock"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and inside == 0 and not list(tmp_path.iterdir())


def test_merging_into_a_store_holds_it_or_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone, inside = tmp_path / "store", tmp_path / "run" / "activations" / "train"
    for path in (alone, inside, tmp_path / "other"):
        ActivationStore.from_array(path, np.ones((9, 2, 3), np.float32))
    for held, store in ((alone, alone), (tmp_path / "run", inside)):
        descriptor = open_lock(held / ".lock")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert run("store", "merge", store, tmp_path / "other") == BusyError.exit_code
        assert f"works on {held}" in error(capsys)
        os.close(descriptor)
        assert run("store", "merge", store, tmp_path / "other") == 0
        assert not (held / ".lock").exists()


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    store = ActivationStore.from_array(tmp_path / "s", np.ones((9, 2, 3), np.float32))
    for path in (store.segment_path(0, 1), tmp_path / "s" / "manifest.json"):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(DataError, match=r"manifest\.json is not a file"):
        ActivationStore.open(tmp_path / "s")
    assert any("snapshot-001.seg is not a file" in line for line in store.damage())


def test_formulas_in_a_table_are_text() -> None:
    text = csv_text({"word": ["=1+1", "@x", "a"], "value": [-1.5, 2, None]})
    assert text == "word,value\n'=1+1,-1.5\n'@x,2\na,\n"


def test_no_part_of_the_key_is_shown() -> None:
    key = "sk-SECRETSECRET1234567890"
    endpoint = Endpoint("http://localhost:1/v1", "m", key=key, max_output=1, timeout=1)
    for end in range(5, len(key) + 1):
        shown = endpoint._clean("x " * 140 + key[:end] + "\x1b[2J")
        assert key[:5] not in shown and "\x1b" not in shown


def test_one_pass_at_a_time_over_a_loader(tmp_path: Path) -> None:
    x = np.arange(1, 2001, dtype=np.float32)[:, None, None].repeat(2, axis=1).repeat(4, axis=2)
    loader = ActivationLoader(ActivationStore.from_array(tmp_path / "s", x, "fp32"), 64, scale=np.ones(2))
    first = iter(loader)
    next(first)
    with pytest.raises(ConfigError, match="another iterator reads from this loader"):
        next(iter(loader))
    refused: list[BaseException] = []

    def other() -> None:
        try:
            next(iter(loader))
        except ConfigError as busy:
            refused.append(busy)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(refused) == 1
    rest = torch.cat(list(first))
    assert (rest == rest[:, :1, :1]).all() and len(rest[:, 0, 0].unique()) == len(rest)
    assert sum(len(batch) for batch in loader) == 31 * 64, "the next pass is whole"


FORKED = """
import os, sys
import numpy as np
from crosscoder import ActivationLoader, ActivationStore
from crosscoder.errors import DataError
store = ActivationStore.from_array(sys.argv[1], np.ones((20000, 2, 16), np.float32))
loader = ActivationLoader(store, 256)
running = iter(loader)
next(running)
child = os.fork()
if child == 0:
    try:
        next(running)
    except DataError as error:
        assert "before a fork" in str(error)
        os._exit(0 if sum(len(batch) for batch in loader) > 0 else 4)
    os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert sum(len(batch) for batch in running) > 0
"""

ENDING = """
import threading, time, torch, crosscoder as xc
def work():
    trainer = xc.Trainer(xc.Crosscoder(xc.CrosscoderConfig(3, 64, 512)), xc.TrainConfig(n_steps=10**6, batch_size=256))
    while True:
        trainer.step(torch.randn(256, 3, 64))
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
time.sleep(1.5)
"""


@pytest.mark.parametrize("program", [FORKED, ENDING], ids=["a forked child", "daemon threads at exit"])
def test_processes_end_well(tmp_path: Path, program: str) -> None:
    command = [sys.executable, "-c", program, str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


VERBS = ("train", "eval", "evolve", "report", "attribute", "explain", "sweep", "compare", "collect", "quickstart")
OPTIONS = {
    "train": ["--n-features", 8],
    "attribute": ["--task", "induction"],
    "explain": ["--endpoint", "http://localhost:1/v1", "--model", "m"],
    "sweep": ["--n-features", 8, "--sparsity", 0.1],
    "compare": ["other"],
    "collect": ["--model", "none", "--layer", 1],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_leaves_a_run_alone_that_another_works_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    arguments = [verb, "--out", folder] if verb == "quickstart" else [verb, folder, *OPTIONS.get(verb, [])]
    assert run(*arguments) == BusyError.exit_code
    assert f"crosscoder train (process {holder.pid}) works on {folder}" in error(capsys)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    holder.kill()
    holder.wait()
    with working_on(folder, "eval"), working_on(folder, "evolve"):
        descriptor = os.open(folder / ".lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


HOLD = """
import sys
from pathlib import Path
from crosscoder.locks import working_on
with working_on(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    sys.stdin.read()
"""
