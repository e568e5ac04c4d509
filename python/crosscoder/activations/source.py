"""What a store's loader and the live source have in common: the order of an epoch, its ranks, and going on in it.

Letters: B tokens in a batch, N tokens in all. A **run** is a number of consecutive rows of a shard; a **window** is a
number of runs from all over the collection, whose rows are shuffled together.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from crosscoder.activations.dealing import Dealer
from crosscoder.errors import ConfigError, DataError
from crosscoder.inputs import with_scale


def require_whole(option: str, value: Any, least: int) -> None:
    """Raises `ConfigError` unless `value` is a whole number of `least` or more."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{option} must be a whole number of {least} or more, not {value!r}")


class Source:
    """Iterates batches (B, K, D): one pass over it is one epoch, each epoch in a fresh order.

    The order depends on the seed, the epoch and the cut into runs and windows alone. `state_dict` and
    `load_state_dict` go on in the middle of an epoch, also with another number of ranks.
    """

    scale_K: np.ndarray
    """(K,): what activations are multiplied by."""
    wait_seconds: float = 0.0
    """How long the caller had to wait for batches (the first of a pass apart)."""
    dealer: Dealer
    """What is left of the epoch."""
    waits: int = 0
    """How many batches the caller had to wait for."""
    wait_reason: str
    """Why a caller that waits often does so, and what helps."""

    def __init__(
        self,
        name: str,
        shard_rows: list[int],
        run_rows: int,
        window_runs: int,
        batch_size: int,
        seed: int,
        *,
        shuffle: bool,
        drop_last: bool,
        rank: int,
        world_size: int,
    ) -> None:
        """Raises `DataError` if there is less than one batch, `ConfigError` for a rank outside of the world, or a
        batch size or seed that is no whole number of its range."""
        for option, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("world_size", world_size, 1)):
            require_whole(option, value, least)
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must be 0 to {world_size - 1}, not {rank}")
        self.n_tokens = sum(shard_rows)
        if drop_last and self.n_tokens < batch_size * world_size:
            raise DataError(
                f"{name} has {self.n_tokens} tokens, less than one batch of {batch_size * world_size}; "
                "collect more tokens or lower batch_size"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.run_rows = run_rows
        self.window_runs = window_runs
        self.runs_R3 = np.array(
            [
                (shard, start, min(run_rows, rows - start))
                for shard, rows in enumerate(shard_rows)
                for start in range(0, rows, run_rows)
            ],
            dtype=np.int64,
        )
        """(R, 3): shard, first row and rows of each run."""
        self._pass, self._process = threading.Lock(), os.getpid()
        self._begin_epoch(0)

    def __len__(self) -> int:
        """Batches in an epoch, the same on all ranks."""
        whole, rest = divmod(self.n_tokens, self.batch_size * self.world_size)
        return whole if self.drop_last or rest == 0 else whole + 1

    def __iter__(self) -> Iterator[Tensor]:
        """The batches left of this epoch. Each knows its scale (`crosscoder.inputs.scale_of`).

        Raises `ConfigError` when the first is asked for while another pass over this source is on.
        """
        if self._process != os.getpid():  # a forked child: the parent's pass is not its own
            self._pass, self._process = threading.Lock(), os.getpid()
        mine = self._pass
        if not mine.acquire(blocking=False):
            raise ConfigError(
                "another iterator reads from this loader, and two would take each other's batches; close that one "
                "first, or give each thread a loader of its own"
            )
        try:
            batches = self._batches(self.dealer.copy())
            try:
                for x_BKD in batches:
                    self.dealer.step(self.shares(self.dealer))
                    yield with_scale(x_BKD, self.scale_K)
            finally:
                batches.close()  # type: ignore[attr-defined]
            self._begin_epoch(self.epoch + 1)
        finally:
            mine.release()

    def _batches(self, plan: Dealer) -> Iterator[Tensor]:
        """A generator of this rank's batches, from `plan` to the end of the epoch."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from; a few numbers, the same on every rank."""
        return {
            "epoch": self.epoch,
            "dealt": self.dealer.state_dict(),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "n_tokens": self.n_tokens,
            "run_rows": self.run_rows,
            "window_runs": self.window_runs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, also with another number of ranks: what is left of the epoch is dealt to them.

        Raises `ConfigError` if it is of other tokens, batch size or order.
        """
        mine = self.state_dict()
        different = [key for key in mine if key not in ("epoch", "dealt") and state.get(key) != mine[key]]
        if different:
            remedy = "; set memory_bytes and dtype as they were" if different[0] in ("run_rows", "window_runs") else ""
            raise ConfigError(f"the loader's state was saved with another {', '.join(different)}{remedy}")
        self._begin_epoch(int(state["epoch"]))
        self.dealer = Dealer.restore(self.dealer.window_rows, self.world_size, state["dealt"])

    def _begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        count = len(self.runs_R3)
        self._order_R = (
            np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)
        )
        firsts = np.arange(0, count, self.window_runs)
        self.dealer = Dealer(np.add.reduceat(self.runs_R3[self._order_R, 2], firsts).tolist(), self.world_size)

    def shares(self, dealer: Dealer) -> list[int]:
        """Rows of each rank in the next step; none at the end of the epoch."""
        step = self.batch_size * self.world_size
        if dealer.remaining >= step:
            return [self.batch_size] * self.world_size
        if self.drop_last or dealer.remaining == 0:
            return []
        cuts = [dealer.remaining * rank // self.world_size for rank in range(self.world_size + 1)]
        return [end - begin for begin, end in pairwise(cuts)]

    def window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The runs (M, 3) of a window, and (rows,) which row of them, one after the other, is i-th in its order."""
        runs_M3 = self.runs_R3[self._order_R[number * self.window_runs : (number + 1) * self.window_runs]]
        rows = int(runs_M3[:, 2].sum())
        if not self.shuffle:
            return runs_M3, np.arange(rows)
        return runs_M3, np.random.default_rng([self.seed, self.epoch, number]).permutation(rows)
