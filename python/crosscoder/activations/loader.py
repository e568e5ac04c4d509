"""Batches of a store, well mixed, in an order that a seed fixes and a small state resumes.

Letters: B tokens in a batch, N tokens in all, K snapshots, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from crosscoder.errors import ConfigError, DataError

RUN_ROWS = 32
"""Rows read in one piece. A shard's rows are shuffled when it is written, so neighbours are unrelated tokens."""


class ActivationLoader:
    """Iterates float32 batches (B, K, D): one pass over it is one epoch, each epoch in a fresh order.

    Activations come multiplied by `scale` (K,), by default the store's own s_K. The last N mod B tokens of an epoch
    are left out, others each time, unless `drop_last` is off. `state_dict` and `load_state_dict` go on in the middle
    of an epoch.
    """

    def __init__(
        self,
        store: ActivationStore,
        batch_size: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        scale: np.ndarray | None = None,
        drop_last: bool = True,
    ) -> None:
        """Raises `DataError` if the store is incomplete or has less than one batch, `ConfigError` for bad options."""
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        store.require_complete()
        if drop_last and store.n_tokens < batch_size:
            raise DataError(
                f"{store.path} has {store.n_tokens} tokens, less than one batch of {batch_size}; "
                "collect more tokens or lower batch_size"
            )
        self.store = store
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.scale_K = store.scales() if scale is None else scale
        self._epoch = 0
        self._batch = 0
        runs = [
            (shard, start, min(RUN_ROWS, rows - start))
            for shard, rows in enumerate(store.shard_rows)
            for start in range(0, rows, RUN_ROWS)
        ]
        self._runs_R3 = np.array(runs, dtype=np.int64)

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(self.store.n_tokens, self.batch_size)
        return whole if self.drop_last or rest == 0 else whole + 1

    def __iter__(self) -> Iterator[Tensor]:
        """The batches left of this epoch."""
        order_R = self._order()
        ends_R = np.cumsum(self._runs_R3[order_R, 2])
        while self._batch < len(self):
            first = self._batch * self.batch_size
            last = min(first + self.batch_size, self.store.n_tokens)
            self._batch += 1
            yield self._read(order_R, ends_R, first, last)
        self._epoch += 1
        self._batch = 0

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from; a few numbers."""
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "n_tokens": self.store.n_tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises `ConfigError` if it is of another store, batch size or order."""
        mine = self.state_dict()
        different = [key for key in mine if key not in ("epoch", "batch") and state.get(key) != mine[key]]
        if different:
            raise ConfigError(f"the loader's state was saved with another {', '.join(different)}")
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])

    def _order(self) -> np.ndarray:
        count = len(self._runs_R3)
        if not self.shuffle:
            return np.arange(count)
        return np.random.default_rng([self.seed, self._epoch]).permutation(count)

    def _read(self, order_R: np.ndarray, ends_R: np.ndarray, first: int, last: int) -> Tensor:
        """Rows `first` to `last` of the epoch's order, grouped by shard to read each file once."""
        lo, hi = np.searchsorted(ends_R, [first, last - 1], side="right")
        runs_R3 = self._runs_R3[order_R[lo : hi + 1]]
        shards = np.repeat(runs_R3[:, 0], runs_R3[:, 2])
        rows = np.concatenate([np.arange(start, start + count) for _, start, count in runs_R3])
        skip = first - (ends_R[lo] - runs_R3[0, 2])
        shards, rows = shards[skip : skip + last - first], rows[skip : skip + last - first]
        out = np.empty((last - first, self.store.n_snapshots, self.store.d_model), dtype=np.float32)
        end = 0
        for shard in np.unique(shards):
            index = rows[shards == shard]
            self.store.gather(int(shard), index, out[end : end + len(index)], self.scale_K)
            end += len(index)
        return torch.from_numpy(out)
