"""Peak memory of one training step beyond weights, optimiser state and the batch, in a fresh process.

The process first takes a step of a tiny crosscoder, so that libraries, threads and compilers are there; what the
process holds then is not counted. Then come the situation and one step, which makes the optimiser's state; the peak
is that of the next step. `python -m harness.memory '{"shape": {...}, "contender": "step"}'` prints one JSON line.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.opponents import DenseCrosscoder, DenseTrainer
from harness.situation import Shape, make
from harness.variants import LEARNING_RATE, SPARSITY, Variant

DENSE = "dense autograd"


def measure(shape: Shape, contender: Variant | str, device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """Run `contender` (a variant of our step, or `DENSE`) in a fresh process. All figures in bytes.

    "beyond" is the peak of a step less what the process held before and the counted state; "at_rest_a_parameter" is
    what the process holds after a step, less the batch, for each parameter: it needs no counting.
    """
    request = {
        "shape": shape.to_dict(),
        "contender": contender if isinstance(contender, str) else dataclasses.asdict(contender),
        "device": device,
        "threads": threads or torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "harness.memory", json.dumps(request)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{contender} failed in its own process:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _trainer(request: dict[str, Any], shape: Shape) -> tuple[Any, list[Tensor]]:
    situation = make(shape, n_batches=1, device=request["device"])
    contender = request["contender"]
    if contender == DENSE:
        dense = DenseCrosscoder(situation.model, SPARSITY).to(request["device"])
        return DenseTrainer(dense, LEARNING_RATE), situation.batches
    return Variant(**contender).trainer(situation.model), situation.batches


def state_bytes(trainer: Any) -> int:
    """Weights, buffers and the optimiser's state, each storage once; no gradients, nothing derived from weights."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(thing: Any) -> None:
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return
        if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type(None), torch.nn.Module)):
            return
        seen.add(id(thing))
        if isinstance(thing, dict):
            for key, value in thing.items():
                visit(key)
                visit(value)
        elif isinstance(thing, (list, tuple, set)):
            for value in thing:
                visit(value)
        elif hasattr(thing, "__dict__"):
            visit(vars(thing))

    state = [tensor for _, tensor in trainer.engine.tensors()] if hasattr(trainer, "engine") else trainer.optimizer
    visit([*trainer.model.parameters(), *trainer.model.buffers(), state])
    return sum(storages.values())


def _resident() -> dict[str, int]:
    """Bytes in memory now ("VmRSS"; not from files: "RssAnon"), and at most since `_forget_peak` ("VmHWM")."""
    fields: dict[str, int] = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "VmHWM", "RssAnon"):
            fields[key] = int(value.split()[0]) * 1024
    return fields


class Peak:
    """What `peak_anonymous` found."""

    bytes = 0


@contextlib.contextmanager
def peak_anonymous(every: float = 0.01) -> Iterator[Peak]:
    """The most memory that this process holds of its own, beyond what it holds now, while the block runs.

    Pages of mapped files do not count, unless written to. Looked at every few milliseconds: shorter peaks are missed.
    """
    peak, done = Peak(), threading.Event()
    _settle()
    before = _resident()["RssAnon"]

    def watch() -> None:
        while not done.is_set():
            peak.bytes = max(peak.bytes, _resident()["RssAnon"] - before)
            done.wait(every)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _settle() -> None:
    """Give back what nothing uses."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    cuda = request["device"].startswith("cuda")
    shape = Shape(**request["shape"])
    tiny, batches = _trainer(request, Shape(3, 32, 256, 64, 8.0))
    for _ in range(2):
        tiny.step(batches[0])
    del tiny, batches
    _settle()
    before = torch.cuda.memory_allocated() if cuda else _resident()["VmRSS"]
    trainer, batches = _trainer(request, shape)
    trainer.step(batches[0])
    _settle()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        _forget_peak()
    trainer.step(batches[0])
    peak = torch.cuda.max_memory_allocated() if cuda else _resident()["VmHWM"]
    _settle()
    rest = torch.cuda.memory_allocated() if cuda else _resident()["VmRSS"]
    batch = sum(x.untyped_storage().nbytes() for x in batches)
    state = state_bytes(trainer)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(
        json.dumps(
            {
                "parameters": parameters,
                "batch": batch,
                "state": state,
                "peak": peak - before,
                "beyond": peak - before - state - batch,
                "at_rest_a_parameter": (rest - before - batch) / parameters,
            }
        )
    )


if __name__ == "__main__":
    _main()
