"""Peak memory of training at true size, counted without a GPU: `python benchmarks/memory_ghost.py`.

The code of training runs with tensors that have shape, dtype and device but no data (the ghost of tests/support, on
torch's "meta" device), kernels are left out, and what is alive is added up at every operation. What the host reads of
the device is given: 40 active features a token, 2,048 dead ones. Not counted: what CUDA, cuBLAS and the allocator's
rounding take (about 1 GB), and the sparse product of joining (at most 40 million products, about 1 GB).

Results: benchmarks/results/memory-ghost.json, shown in docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import traceback
import weakref
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support import ghost_guard

ghost_guard.load()

import pytest
import torch
from support.ghost import Ghost, Machine, ghost_machine
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from triton.runtime.jit import JITFunction

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.train import checkpoint, checkpoint_writer, joining
from crosscoder.train import trainer as trainer_module
from crosscoder.train.checkpoint_writer import CheckpointWriter

SIZES = {  # B, K, D, F, state, bar in GB
    "6.9B, F = 32,768": (2048, 32, 4096, 32_768, "low-memory", 48),
    "6.9B, F = 65,536": (2048, 32, 4096, 65_536, "low-memory", 80),
    "160M, F = 98,304": (2048, 32, 768, 98_304, "fp32", 70),
    "160M, F = 98,304, low-memory": (2048, 32, 768, 98_304, "low-memory", None),
}
ACTIVE, DEAD = 40, 2048
HOST_FROM = 1 << 24
"""Host tensors of so many bytes have no data either, and are counted."""
META = torch.device("meta")


class Counter(Machine):
    """A ghost without data that adds up what is alive on the device and on the host."""

    def __init__(self, n_devices: int = 1) -> None:
        super().__init__(n_devices)
        self.alive: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = defaultdict(int)
        self.pairs = 0
        self._known: dict[int, Any] = {}

    def reset(self) -> None:
        """Count peaks anew from what is alive."""
        self.peak = defaultdict(int, self.alive)

    def _track(self, ghost: Ghost) -> Ghost:
        storage = ghost.inner.untyped_storage()
        key, kind, size = storage._cdata, ghost.device.type, storage.nbytes()
        if key not in self._known:

            def gone(reference: Any) -> None:
                self._known.pop(key, None)
                self.alive[kind] -= size

            self._known[key] = weakref.ref(storage, gone)
            self.alive[kind] += size
            self.peak[kind] = max(self.peak[kind], self.alive[kind])
        return ghost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func._can_decompose() and torch.is_inference_mode_enabled():
            with self:
                return func.decompose(*args, **kwargs)
        flat, _ = tree_flatten((args, kwargs))
        ghosts = [value for value in flat if isinstance(value, Ghost)]
        name = func._schema.name.removeprefix("aten::")
        pinned = kwargs.pop("pin_memory", False)
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if name == "is_pinned":
            return False
        if name in ("pin_memory", "_pin_memory"):
            return args[0]
        if target is not None and target.type == "meta":
            return func(*args, **kwargs)
        if not ghosts and (target is None or target.type == "cpu"):
            if name in ("empty", "empty_strided", "zeros", "ones") or pinned:
                made = func(*args, **{**kwargs, "device": META})
                if made.untyped_storage().nbytes() >= HOST_FROM:
                    return self._track(Ghost(made, torch.device("cpu")))
            return func(*args, **kwargs)
        devices = {ghost.device for ghost in ghosts}
        device = target or next((d for d in devices if d.type == "cuda"), None) or torch.device("cpu")
        device = torch.device("cuda", 0) if device.type == "cuda" else device
        if name == "_local_scalar_dense":
            return self._answer(args[0])
        if name == "nonzero":
            return self._track(
                Ghost(torch.empty(args[0].numel(), args[0].ndim, dtype=torch.int64, device=META), device)
            )
        if name == "repeat_interleave":
            return self._made((self.pairs,), device)
        if name == "bincount":
            size = args[2] if len(args) > 2 else kwargs["minlength"]
            return self._made((size,), device)
        if name in ("index", "index_put_", "_index_put_impl_"):  # a mask: as if all were true
            indices = [self._as_index(value) for value in args[1]]
            args = (args[0], indices, *args[2:])
        if name == "copy_" and not isinstance(args[0], Ghost):
            return args[0].fill_(1)
        small = name == "_to_copy" and device.type == "cpu" and args[0].numel() * 8 < HOST_FROM
        if small:
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name in ("_to_copy", "copy_"):
            kwargs.pop("non_blocking", None)
        if target is not None:
            kwargs["device"] = META
        wrappers = {id(ghost.inner): ghost for ghost in ghosts}
        found = func(*tree_map(_shape, args), **tree_map(_shape, kwargs))

        def wrap(value: Any) -> Any:
            if type(value) is not Tensor:
                return value
            return wrappers[id(value)] if id(value) in wrappers else self._track(Ghost(value, device))

        return tree_map(wrap, found)

    def _made(self, shape: tuple[int, ...], device: torch.device) -> Ghost:
        return self._track(Ghost(torch.empty(shape, dtype=torch.int64, device=META), device))

    def _answer(self, asked: Tensor) -> float:
        """What the host reads: everything is finite, and some features are dead."""
        asking = {frame.name for frame in traceback.extract_stack()}
        if "revive" in asking and not asked.dtype.is_floating_point:
            return DEAD if asked.dtype == torch.int64 else 0
        return self.pairs if asked.dtype == torch.int64 and "encode" in asking else 1

    def _as_index(self, index: Any) -> Any:
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            return self._track(
                Ghost(torch.empty(index.numel(), dtype=torch.int64, device=META), torch.device("cuda", 0))
            )
        return index


def _shape(value: Any) -> Any:
    """What an operation on "meta" takes."""
    if isinstance(value, Ghost):
        return value.inner
    return value.to(META) if isinstance(value, Tensor) and value.ndim else value


class _AtOnce:
    """In the place of a thread: the ghost is one thread's."""

    def __init__(self, target: Any, name: str) -> None:
        self._target = target

    def start(self) -> None:
        self._target()

    def join(self) -> None:
        pass

    def is_alive(self) -> bool:
        return False


def _write_nothing(path: Path, tensors: Any, metadata: Any = None) -> dict[str, str]:
    """One tensor after the other on the host, as the writer has them."""
    for tensor in tensors.values():
        tensor.detach().cpu().contiguous()
    return dict.fromkeys(tensors, "")


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """The ghost, without kernels and without files."""
    with pytest.MonkeyPatch.context() as patch, ghost_machine(machine=Counter()) as counter:
        assert isinstance(counter, Counter)
        patch.setattr(JITFunction, "run", lambda self, *args, **kwargs: None)
        patch.setattr(checkpoint_writer.threading, "Thread", _AtOnce)
        patch.setattr(checkpoint, "write_tensors", _write_nothing)
        patch.setattr(checkpoint.weights, "save", lambda config, tensors, folder: _write_nothing(folder, tensors))
        patch.setattr(trainer_module, "join_features", lambda model, sample, cosine: torch.zeros(0, dtype=torch.int64))
        patch.setattr(joining.JoiningSample, "take", lambda self, n_features: None)
        yield counter


def count(B: int, K: int, D: int, F: int, state: Any) -> dict[str, float]:
    """GB of each part of a training."""
    gb = lambda number: round(number / 1e9, 1)  # noqa: E731 - a function of one line
    with counting() as counter, tempfile.TemporaryDirectory() as folder:
        counter.pairs = ACTIVE * B
        config = CrosscoderConfig(K, D, F)
        train = TrainConfig(n_steps=1000, batch_size=B, state=state, revival_every=3, backend="triton")
        low = state == "low-memory"
        dtype = torch.bfloat16 if low else torch.float32
        model = Crosscoder(config, seed=0, device="cuda", dtype=dtype)
        trainer = Trainer(model, train)
        engine: Any = trainer.engine
        engine._count.send = lambda value: engine._count._host.fill_(ACTIVE * B)
        engine._error.send = lambda value: engine._error._host.fill_(-1)
        engine._error.send(None)
        found = {"held": gb(counter.alive["cuda"])}

        def measured(part: str, work: Any) -> None:
            counter.reset()
            work()
            found[part] = gb(counter.peak["cuda"])

        def steps(number: int, *, measured: bool) -> None:
            for _ in range(number):
                x = torch.empty(B, K, D, dtype=dtype, device="cuda")
                trainer.step(x, measured=measured)

        measured("first step, with whitening", lambda: steps(1, measured=False))
        trainer.config = TrainConfig(**{**train.to_dict(), "revival": "none"})
        measured("step", lambda: steps(4, measured=False))
        measured("step with metrics", lambda: steps(2, measured=True))
        trainer.config = train
        measured("step with joining and revival", lambda: steps(3, measured=False))
        assert trainer.n_revived == DEAD, trainer.n_revived
        engine.dense_above = 0.0
        trainer.config = TrainConfig(**{**train.to_dict(), "revival": "none"})
        measured("dense step", lambda: steps(1, measured=False))
        engine.dense_above = 1.0
        steps(2, measured=False)
        host = counter.alive["cpu"]

        def save() -> None:
            with CheckpointWriter(trainer, Path(folder)) as writer:
                writer.write({})

        written = sum(
            t.numel() * t.element_size()
            for t in [*model.state_dict().values(), *trainer.state_dict()["tensors"].values()]
        )
        before = counter.alive["cuda"]
        measured("checkpoint", save)
        found["checkpoint adds, device"] = gb(counter.peak["cuda"] - before)
        found["checkpoint adds, host, beyond what is written"] = gb(counter.peak["cpu"] - host - written)
        exported = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        host = counter.alive["cpu"]
        folded: list[Crosscoder] = []
        measured("export", lambda: folded.append(model.fold_scales(torch.ones(K), device="cpu")))
        found["export adds, device"] = gb(counter.peak["cuda"] - before)
        found["export adds, host, beyond what is written"] = gb(counter.peak["cpu"] - host - exported)
        found["written in a checkpoint"] = gb(written)
    return found


def main() -> None:
    """Count all sizes, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results_file = ROOT / "benchmarks" / "results" / "memory-ghost.json"
    parser.add_argument("--out", type=Path, default=results_file, help="a JSON file for the table")
    out = parser.parse_args().out
    results = {}
    for name, (*shape, bar) in SIZES.items():
        parts = count(*shape)
        training = [
            value for part, value in parts.items() if part in ("held", "checkpoint", "export") or "step" in part
        ]
        results[name] = {"peak": max(training), "bar": bar, **parts}
        print(name, json.dumps(results[name], indent=1), flush=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
