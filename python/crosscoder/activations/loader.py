"""Batches of a store, well mixed, in an order that a seed fixes and a small state resumes.

Letters: B tokens in a batch, K snapshots, D width. A run of rows is read in one piece in each snapshot. While the
batches of a window are used, C++ threads read the next one (csrc/store/prefetcher.hpp).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.activations.dealing import Dealer, Piece
from crosscoder.activations.source import Source, require_whole
from crosscoder.activations.store import ActivationStore
from crosscoder.errors import ConfigError
from crosscoder.hardware import cpu_count
from crosscoder.hardware import memory_bytes as machine_memory

READ_BYTES = 8 << 20
"""The largest piece that is read at once."""
RUNS_PER_WINDOW = 8
"""At least so many places of the store are in a window, where memory allows."""
CACHE_BYTES = 8 << 20
"""Batches above this are written past the processor's caches."""


@dataclass
class _Batch:
    rows: int
    memory: np.ndarray | None = None
    pinned: Tensor | None = None
    tickets: tuple[int, ...] = ()


@dataclass
class _Window:
    ticket: int
    last_batch: int


class ActivationLoader(Source):
    """Iterates float32 batches (B, K, D): one pass over it is one epoch, each epoch in a fresh order.

    Activations come multiplied by `scale` (K,), by default the store's own s_K. Unless `drop_last` is off,
    an epoch leaves out its last N mod B tokens, which differ from epoch to epoch. `state_dict` and `load_state_dict`
    go on in the middle of an epoch. With `world_size` ranks, each takes its own B tokens of every step, and all
    together every token once.

    The memory of a batch belongs to the tensor that is yielded: it returns to the loader's pool (on a GPU: to torch's)
    when the last reference to the tensor is gone, and nobody frees it by hand. Until a batch is yielded, the C++
    threads that fill it hold plain addresses, and the loader keeps its buffer alive for them.

    `wait_seconds` and `waits` count how long, and for how many batches, the caller had to wait for data (the first
    batch of a pass apart).
    """

    wait_reason = "the disk is slower than the training; an int8 or int4 store takes less reading"

    def __init__(
        self,
        store: ActivationStore,
        batch_size: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        scale: np.ndarray | None = None,
        drop_last: bool = True,
        dtype: Literal["fp32", "bf16"] = "fp32",
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str | None = None,
        n_threads: int | None = None,
        memory_bytes: int = 1 << 30,
        direct: bool | None = None,
    ) -> None:
        """`dtype` is that of the batches, `device` where they go (a CUDA device gets them through pinned memory).

        `memory_bytes` bounds the host memory for batches and reading, whatever the store's size. `direct`: past the
        page cache; by default where the store is larger than half of the memory that is free.

        Raises `DataError` if the store is incomplete or has less than one batch, `ConfigError` for bad options.
        """
        if dtype not in ("fp32", "bf16"):
            raise ConfigError(f"the dtype of batches must be fp32 or bf16, not {dtype!r}")
        if not isinstance(store, ActivationStore):
            raise ConfigError(
                f"the first argument of a loader is an ActivationStore, not {type(store).__name__}: "
                "ActivationLoader(ActivationStore.open(folder), batch_size)"
            )
        require_whole("batch_size", batch_size, 1)
        store.require_complete()
        self.store = store
        self.dtype = dtype
        self.device = torch.device(device if device is not None else "cpu")
        self.n_threads = n_threads or max(2, min(8, cpu_count()))
        self.direct = store.n_bytes > machine_memory()[1] // 2 if direct is None else direct
        run_rows, window_runs = self._geometry(batch_size, memory_bytes)
        super().__init__(
            str(store.path),
            store.shard_rows,
            run_rows,
            window_runs,
            batch_size,
            seed,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        self.scale_K = store.scales() if scale is None else scale
        self._pool: _core.BufferPool
        self._prefetcher: _core.Prefetcher | None = None

    def _geometry(self, batch_size: int, memory_bytes: int) -> tuple[int, int]:
        """Rows of a run and runs of a window: two windows and four batches fit into the memory."""
        block = int(self.store.segment(0, 0).head["rows_per_block"])
        reading = self.n_threads * (READ_BYTES if self.direct else 0)
        window = ((memory_bytes - reading) // self._row_bytes - 4 * batch_size) // 2
        # A store may have less than one block a shard.
        smallest = min(block, max(self.store.shard_rows))
        if window < smallest:
            need = 2 * (2 * (smallest + 2 * batch_size) * self._row_bytes + reading)
            raise ConfigError(
                f"batches of {batch_size} x {self.store.n_snapshots} x {self.store.d_model} in {self.dtype} do "
                f"not fit into {memory_bytes / 2**30:.1f} GiB of memory; allow memory_bytes={need} (or use bf16 "
                "batches, or lower batch_size)"
            )
        rows = min(READ_BYTES // self.store.row_bytes, window // RUNS_PER_WINDOW)
        run = max(1, rows // block) * block
        return run, max(1, window // run)

    @property
    def _row_bytes(self) -> int:
        return self.store.n_snapshots * self.store.d_model * (4 if self.dtype == "fp32" else 2)

    def _batches(self, plan: Dealer) -> Iterator[Tensor]:
        return self._on_device(plan) if self.device.type == "cuda" else self._on_host(plan)

    def _on_host(self, plan: Dealer) -> Iterator[Tensor]:
        """The batches of this rank from here to the end of the epoch, on the CPU."""
        if self._prefetcher is None or not self._prefetcher.is_of_this_process():
            self._pool = _core.BufferPool(self.batch_size * self._row_bytes)
            self._prefetcher = _core.Prefetcher(
                store=self.store.identity,
                width=self.store.d_model,
                dtype=self.store.dtype,
                snapshots=self.store.snapshot_names,
                scales=[float(scale) for scale in self.scale_K],
                bf16=self.dtype == "bf16",
                stream=self.batch_size * self._row_bytes > CACHE_BYTES,
                direct=self.direct,
                n_threads=self.n_threads,
            )
        prefetcher = self._prefetcher
        reading = _Reading(self, prefetcher, plan)
        try:
            first = True
            while (batch := reading.next()) is not None:
                ready = all(prefetcher.is_done(ticket) for ticket in batch.tickets)
                began = time.perf_counter()
                for ticket in batch.tickets:
                    prefetcher.wait(ticket)
                if not (ready or first):
                    self.waits += 1
                    self.wait_seconds += time.perf_counter() - began
                first = False
                yield self._tensor(batch)
        finally:
            prefetcher.drain()

    def _on_device(self, plan: Dealer) -> Iterator[Tensor]:
        """The same on a CUDA device: the next batch is copied while the caller works on this one."""
        stream: Any = torch.cuda.Stream
        copies = stream(self.device)
        ahead: Tensor | None = None
        host = self._on_host(plan)
        try:
            for x_BKD in host:
                previous = ahead
                with torch.cuda.stream(copies):
                    ahead = x_BKD.to(self.device, non_blocking=True)
                if previous is not None:
                    yield previous
                torch.cuda.current_stream(self.device).wait_stream(copies)
                ahead.record_stream(torch.cuda.current_stream(self.device))
            if ahead is not None:
                yield ahead
        finally:
            host.close()  # type: ignore[attr-defined]

    def take_memory(self, batch: _Batch) -> int:
        """Give the batch its buffer; returns the address."""
        if batch.memory is None and self.device.type == "cuda":
            batch.pinned = torch.empty(self.batch_size * self._row_bytes, dtype=torch.uint8, pin_memory=True)
            batch.memory = batch.pinned.numpy()
        elif batch.memory is None:
            batch.memory = self._pool.take()
        return int(batch.memory.ctypes.data)

    def _tensor(self, batch: _Batch) -> Tensor:
        shape = (batch.rows, self.store.n_snapshots, self.store.d_model)
        dtype = torch.float32 if self.dtype == "fp32" else torch.bfloat16
        if batch.memory is None:
            return torch.empty(shape, dtype=dtype)
        whole = batch.pinned if batch.pinned is not None else torch.from_numpy(batch.memory)
        return whole[: batch.rows * self._row_bytes].view(dtype).view(shape)


class _Reading:
    """Batches planned ahead, their windows being read: the next one while one is used."""

    def __init__(self, loader: ActivationLoader, prefetcher: _core.Prefetcher, plan: Dealer) -> None:
        self.loader = loader
        self.prefetcher = prefetcher
        self.plan = plan
        self.batches: dict[int, _Batch] = {}
        self.planned = self.delivered = 0
        self.unread: dict[int, list[tuple[Piece, int, int]]] = {}
        """For each window that rank holds: its pieces, the batch they go to, and the place in it."""
        self.reading: deque[_Window] = deque()

    def next(self) -> _Batch | None:
        """The next batch, its windows on their way; None at the end of the epoch."""
        while self.reading and self.reading[0].last_batch < self.delivered:
            self.reading.popleft()
        # The batch after this one is read while the caller has this one, however many windows it takes.
        while len(self.reading) < 2 or not self._is_submitted(self.delivered + 1):
            if not self._read_another_window():
                break
        batch = self.batches.pop(self.delivered, None)
        self.delivered += 1
        return batch

    def _is_submitted(self, number: int) -> bool:
        waiting = (batch for pieces in self.unread.values() for _, batch, _ in pieces)
        return number < self.planned and number not in waiting

    def _read_another_window(self) -> bool:
        """Plan batches until a window is dealt out, and begin to read it. False if nothing is left."""
        loader, plan = self.loader, self.plan
        while True:
            for window in list(self.unread):
                if not plan.holds(loader.rank, window):
                    self._submit(window, self.unread.pop(window))
                    return True
            shares = loader.shares(plan)
            if not shares:
                if not self.unread:
                    return False
                window = next(iter(self.unread))
                self._submit(window, self.unread.pop(window))
                return True
            place = 0
            for piece in plan.step(shares)[loader.rank]:
                self.unread.setdefault(piece[0], []).append((piece, self.planned, place))
                place += piece[2] - piece[1]
            self.batches[self.planned] = _Batch(place)
            self.planned += 1

    def _submit(self, window: int, pieces: Sequence[tuple[Piece, int, int]]) -> None:
        store = self.loader.store
        runs_M3, order = self.loader.window(window)
        runs = [
            (
                int(shard),
                store.shard_rows[shard],
                int(first),
                int(rows),
                store.segment_paths(shard),
            )
            for shard, first, rows in runs_M3
        ]
        numbers = sorted({number for _, number, _ in pieces})
        targets = np.full(len(order), -1, dtype=np.int64)
        B = self.loader.batch_size
        for (_, begin, end), number, place in pieces:
            start = numbers.index(number) * B + place
            targets[order[begin:end]] = np.arange(start, start + end - begin)
        addresses = [self.loader.take_memory(self.batches[number]) for number in numbers]
        ticket = self.prefetcher.submit(runs, targets, addresses, B, store.n_snapshots)
        for number in numbers:
            self.batches[number].tickets += (ticket,)
        self.reading.append(_Window(ticket, numbers[-1]))
