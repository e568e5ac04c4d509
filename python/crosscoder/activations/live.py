"""Activations without a disk: the snapshots stay in memory and fill a shuffle buffer while a crosscoder is trained.

The same tokens in the same order as from a store that was collected with the same settings and is read in whole
shards: the same batches, so the same training. Letters: B tokens in a batch, T tokens of a shard, K snapshots, D width.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscoder.activations.collect import check_tokens, forward_shard, load_trunks, plan_shards, row_order
from crosscoder.activations.dealing import Dealer, Piece
from crosscoder.activations.proof import proven
from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.source import Source
from crosscoder.activations.tokens import TokenSet
from crosscoder.activations.trunk import Trunks
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.progress import warn


class LiveSource(Source):
    """Iterates batches (B, K, D) on `device`, computed as they are needed; otherwise like `ActivationLoader`.

    A window is `window_shards` shards of `rows_per_shard` tokens. While the batches of one are used, the forward
    passes of the next are spread evenly between them. So memory holds the K truncated models and two windows:
    `crosscoder plan` says how much that is.
    """

    wait_reason = (
        "the language model's forward passes take longer than the training; a run that reads its text more than once "
        "saves them by collecting to disk first"
    )

    def __init__(
        self,
        snapshots: SnapshotSet,
        tokens: TokenSet,
        batch_size: int,
        seed: int = 0,
        *,
        rows_per_shard: int = 4_096,
        window_shards: int = 8,
        shard_seed: int = 0,
        scale: np.ndarray | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        batch_sequences: int = 64,
        together: int | None = None,
        model_dtype: str = "fp32",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        """`shard_seed`, `rows_per_shard` and `batch_sequences` are those of a collection; `scale` (K,) is s_K, by
        default that of the first window's tokens (and kept in `state_dict`). `together`: snapshots in one batched
        forward, all of them by default.

        Raises `DataError` for a missing or damaged snapshot or a tokenizer that differs between them, `ConfigError` for
        an architecture that cannot be collected, or only with another `together`.
        """
        check_tokens(snapshots, tokens)
        self.shards = plan_shards(tokens, rows_per_shard, shard_seed)
        snapshots = proven(snapshots, tokens, device)
        rows = [len(shard.rows) for shard in self.shards]
        self.tokens = tokens
        self.snapshots = snapshots
        self.batch_sequences = batch_sequences
        self.dtype = dtype
        self.device = device
        self.d_model = int(snapshots.load_config(0).hidden_size)
        try:
            self.trunks = self._load(together or snapshots.n_snapshots, model_dtype)
        except ConfigError as error:
            if together is not None:
                raise
            warn(f"{error}. They are run one by one now, which takes longer")
            self.trunks = self._load(1, model_dtype)
        super().__init__(
            snapshots.model,
            rows,
            max(rows),
            window_shards,
            batch_size,
            seed,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        self.scale_K = self._first_scales() if scale is None else np.asarray(scale, dtype=np.float64)

    def _load(self, together: int, model_dtype: str) -> list[Trunks]:
        numbers = range(self.snapshots.n_snapshots)
        return [
            load_trunks(self.snapshots, numbers[start : start + together], model_dtype, self.device)
            for start in range(0, len(numbers), together)
        ]

    @property
    def path(self) -> str:
        """Where the activations come from."""
        return f"{self.snapshots.model} (live)"

    @property
    def n_snapshots(self) -> int:
        return self.snapshots.n_snapshots

    @property
    def snapshot_names(self) -> list[str]:
        return list(self.snapshots.revisions)

    @property
    def manifest(self) -> dict[str, Any]:
        """What a store of these activations would say of itself."""
        return {
            "snapshots": self.snapshot_names,
            "d_model": self.d_model,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shard_rows": [len(shard.rows) for shard in self.shards],
            "source": {
                "model": self.snapshots.model,
                "layer": self.snapshots.layer,
                "site": self.snapshots.site,
                "tokens": self.tokens.fingerprint,
                "live": True,
            },
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scale": [float(scale) for scale in self.scale_K]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale_K = np.array(state.get("scale", self.scale_K), dtype=np.float64)
        super().load_state_dict({**state, "scale": [float(scale) for scale in self.scale_K]})

    def _first_scales(self) -> np.ndarray:
        """s_K (K,): sqrt(D) over the mean norm, of the shards of epoch 0's first window."""
        runs_M3, _ = self.window(0)
        norms, rows, width = 0.0, 0, 0
        for shard, _, count in runs_M3:
            for x_KnD in self._forward(int(shard)):
                norms = norms + x_KnD.double().norm(dim=2).sum(dim=1).cpu().numpy()
                width = x_KnD.shape[2]
            rows += int(count)
        scales: np.ndarray = math.sqrt(width) * rows / np.asarray(norms)
        if not np.isfinite(scales).all():
            silent = [
                name for name, scale in zip(self.snapshots.revisions, scales, strict=True) if not np.isfinite(scale)
            ]
            raise DataError(
                f"the activations of {', '.join(silent)} are all 0 or not finite; leave these snapshots out"
            )
        return scales

    def _forward(self, shard: int) -> Iterator[Tensor]:
        """Activations (K, n, D) of the shard's tokens in the order of the text, a forward pass at a time."""
        passes = [
            forward_shard(t, self.tokens, self.shards[shard], self.batch_sequences, self.device) for t in self.trunks
        ]
        for parts in zip(*passes, strict=True):
            yield torch.cat(parts)

    def _fill(self, number: int) -> Iterator[Tensor | None]:
        """One None a forward pass, then the window (rows, K, D), in its order, scaled."""
        runs_M3, order = self.window(number)
        scale_K = torch.from_numpy(self.scale_K).float().to(self.device)
        parts = []
        for shard, _, _ in runs_M3:
            passes = []
            for x_KnD in self._forward(int(shard)):
                if not bool(torch.isfinite(x_KnD).all()):
                    bad = (~torch.isfinite(x_KnD)).flatten(1).any(dim=1).nonzero()[0].item()
                    raise NonFiniteError(
                        f"NaN or infinity in the activations of snapshot {self.snapshots.revisions[int(bad)]}; "
                        "leave that snapshot out"
                    )
                passes.append(x_KnD)
                yield None
            rows = row_order(self.shards[int(shard)]).to(self.device)
            x_TKD = torch.cat(passes, dim=1).transpose(0, 1)[rows]
            parts.append((x_TKD.float() * scale_K[:, None]).to(self.dtype))
        yield torch.cat(parts)[torch.from_numpy(order).to(self.device)]

    def _batches(self, plan: Dealer) -> Iterator[Tensor]:
        planned: deque[list[Piece]] = deque()
        windows: dict[int, Tensor] = {}
        filling: tuple[int, Iterator[Tensor | None]] | None = None

        def look_ahead() -> bool:
            shares = self.shares(plan)
            if shares:
                planned.append(plan.step(shares)[self.rank])
            return bool(shares)

        def next_unfilled() -> int | None:
            """The next window that a planned batch needs, planning as far as needed."""
            while True:
                for pieces in planned:
                    for window, _, _ in pieces:
                        if window not in windows and (filling is None or filling[0] != window):
                            return window
                if not look_ahead():
                    return None

        def passes_of(window: int) -> int:
            runs_M3, _ = self.window(window)
            return sum(-(-len(self.shards[int(shard)].sequences) // self.batch_sequences) for shard, _, _ in runs_M3)

        def advance(steps: int) -> None:
            """Some forward passes of the window that is being filled."""
            nonlocal filling
            for _ in range(steps):
                if filling is None:
                    window = next_unfilled() if len(windows) < 2 else None
                    if window is None:
                        return
                    filling = (window, self._fill(window))
                result = next(filling[1])
                if result is not None:
                    windows[filling[0]] = result
                    filling = None

        first = True
        while planned or look_ahead():
            pieces = planned[0]
            began = time.perf_counter()
            late = False
            while any(window not in windows for window, _, _ in pieces):
                if filling is None and len(windows) >= 2:  # a batch across three windows: small windows
                    window = next(window for window, _, _ in pieces if window not in windows)
                    filling = (window, self._fill(window))
                late = True
                advance(1)
            if late and not first:
                self.waits += 1
                self.wait_seconds += time.perf_counter() - began
            first = False
            parts = [windows[window][begin:end] for window, begin, end in pieces]
            yield torch.cat(parts) if parts else next(iter(windows.values()))[:0]
            planned.popleft()
            needed = {window for later in planned for window, _, _ in later}
            held = {window for window in windows if plan.holds(self.rank, window)}
            for window in set(windows) - needed - held:
                del windows[window]
            used = next(iter(windows.values()), None)
            ahead = filling[0] if filling is not None else next_unfilled()
            if ahead is not None:
                per_window = max(1, (len(used) if used is not None else self.batch_size) // self.batch_size)
                advance(-(-(passes_of(ahead) + len(self.window(ahead)[0])) // per_window))
