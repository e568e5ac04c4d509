"""A segment that is cut or rewritten while a loader reads it: refused, never a crash, never other rows."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from crosscoder import ActivationStore

ATTACKED = """
import os, random, sys, threading
import numpy as np
from crosscoder import ActivationLoader, ActivationStore
from crosscoder.errors import DataError
store = ActivationStore.open(sys.argv[1])
file = str(store.segment_path(0, 1))
good = open(file, "rb").read()
refused = 0
for round in range(12):
    open(file, "wb").write(good)
    loader = ActivationLoader(store, 64, scale=np.ones(2), memory_bytes=64 << 20, n_threads=3)
    assert sum(len(batch) for batch in loader) == 19_968
    stop = False
    def attack():
        draw = random.Random(round)
        while not stop:
            if round % 2:
                os.truncate(file, draw.randrange(len(good)))
                os.truncate(file, len(good))
            else:
                with open(file, "r+b") as out:
                    out.seek(draw.randrange(8192, len(good) - 8192))
                    out.write(bytes(4096))
    thread = threading.Thread(target=attack)
    thread.start()
    for _ in range(6):
        try:
            for batch in loader:
                assert bool((batch[:, 1] == batch[:, 0]).all()), "other rows without an error"
        except DataError as error:
            assert "snapshot-001.seg" in str(error)
            refused += 1
    stop = True
    thread.join()
assert refused > 0
"""


def store_of(folder: Path) -> ActivationStore:
    x = np.ones((20_000, 2, 64), np.float32) * np.arange(1, 20_001, dtype=np.float32)[:, None, None]
    return ActivationStore.from_array(folder, x, "fp32", rows_per_shard=20_000)


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_segment_cut_or_rewritten_under_a_loader_is_refused(tmp_path: Path) -> None:
    store_of(tmp_path / "s")
    done = run(ATTACKED, tmp_path / "s")
    assert done.returncode == 0, f"{done.returncode} {done.stderr[-2000:]}"


FOREIGN = """
import faulthandler, mmap, os, signal, sys
from crosscoder import ActivationLoader, ActivationStore
order, path = sys.argv[2], sys.argv[1] + ".other"
loader = ActivationLoader(ActivationStore.open(sys.argv[1]), 64)
def read():
    for _ in range(2):
        for batch in loader:
            pass
for step in order.split():
    if step == "read":
        read()
    elif step == "faulthandler":
        faulthandler.enable()
    else:
        signal.signal(signal.SIGBUS, getattr(signal, step))
if "SIG_IGN" in order:
    os.kill(os.getpid(), signal.SIGBUS)
    print("ignored", flush=True)
with open(path, "wb+") as file:
    file.write(bytes(8192))
    file.flush()
    mapped = mmap.mmap(file.fileno(), 8192)
    file.truncate(4096)
    mapped[5000]
"""


@pytest.mark.parametrize(
    "order",
    ["read", "faulthandler read", "read faulthandler", "read faulthandler read", "SIG_IGN read", "read SIG_DFL read"],
)
def test_a_bus_error_that_is_not_of_a_segment_goes_where_it_went_before(order: str, tmp_path: Path) -> None:
    """To faulthandler, which tells where it was, and to the end of the process: not hidden, and not for ever."""
    store_of(tmp_path / "s")
    done = run(FOREIGN, tmp_path / "s", order)
    assert done.returncode == -signal.SIGBUS, done.stderr[-2000:]
    assert done.stderr.count("Fatal Python error: Bus error") == ("faulthandler" in order)
    assert done.stdout == ("ignored\n" if "SIG_IGN" in order else "")
