"""What a crosscoder's features do on texts of one's own: any tokens through all snapshots, then encoded.

Letters: S sequences, C tokens in each, K snapshots, D width, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from crosscoder.activations.collect import load_trunks
from crosscoder.errors import DataError
from crosscoder.progress import Progress

if TYPE_CHECKING:
    from crosscoder.activations.snapshots import SnapshotSet
    from crosscoder.model import Crosscoder

Ints = NDArray[np.int64]

_FORWARD_TOKENS = 8_192
_MEMORY_BYTES = 1 << 30


class Pairs(NamedTuple):
    """The active features of the last `kept` tokens of S sequences."""

    row: Ints
    """(N,) token: sequence * kept + its number among the last `kept`; ascending."""
    feature: Ints
    """(N,)"""
    value: NDArray[np.float32]
    """(N,) activation, above 0."""


Read = Callable[[Sequence[Ints], int], list[Pairs]]
"""`read(ids, kept)`: for each array (S, C) of token ids, what the features do on the last `kept` of the C tokens."""


def snapshot_reader(
    snapshots: SnapshotSet, crosscoder: Crosscoder, *, title: str, memory_bytes: int = _MEMORY_BYTES
) -> Read:
    """A `Read` through the snapshots' models, for a crosscoder of raw activations, on its device.

    One snapshot is in memory at a time. Activations of all snapshots take at most `memory_bytes` (and at least one
    forward pass's); where more are asked for, the snapshots are loaded several times. `title` stands before a
    progress bar over S * C * K token passes. Raises `DataError` for a crosscoder of another number of snapshots; `read`
    does for tokens that the models do not know, and for a missing or damaged snapshot.
    """
    device = crosscoder.W_enc.device
    K, D = crosscoder.config.n_snapshots, crosscoder.config.d_model
    if snapshots.n_snapshots != K:
        raise DataError(f"the crosscoder has {K} snapshots, the language model {snapshots.n_snapshots}")
    vocabulary = int(snapshots.load_config(0).vocab_size)

    def read(ids: Sequence[Ints], kept: int) -> list[Pairs]:
        for ids_SC in ids:
            if ids_SC.ndim != 2 or not 1 <= kept <= ids_SC.shape[1]:
                raise DataError(f"cannot keep the last {kept} tokens of sequences of shape {ids_SC.shape}")
            if ids_SC.size and not 0 <= ids_SC.min() <= ids_SC.max() < vocabulary:
                raise DataError(f"token ids must lie in 0 to {vocabulary - 1}, the vocabulary of {snapshots.model}")
        found: list[list[Pairs]] = [[] for _ in ids]
        with Progress(title, K * sum(ids_SC.size for ids_SC in ids), "token passes") as progress:
            fill(found, ids, kept, progress)
        return [_joined(parts) for parts in found]

    def fill(found: list[list[Pairs]], ids: Sequence[Ints], kept: int, progress: Progress) -> None:
        for group in _groups(ids, kept * K * D * 4, memory_bytes):
            x = [torch.empty((rows.stop - rows.start) * kept, K, D, device=device) for _, rows in group]
            for k in range(K):
                trunks = load_trunks(snapshots, [k], "fp32", str(device))
                for (number, rows), x_BKD in zip(group, x, strict=True):
                    part = torch.from_numpy(ids[number][rows]).to(device)
                    x_BKD[:, k] = trunks(part)[0, :, -kept:].flatten(0, 1)
                    progress.advance(part.numel())
            for (number, rows), x_BKD in zip(group, x, strict=True):
                code = crosscoder.encode(x_BKD)
                found[number].append(
                    Pairs(
                        code.rows().cpu().numpy() + rows.start * kept,
                        code.features.cpu().numpy().astype(np.int64),
                        code.values.float().cpu().numpy(),
                    )
                )

    return read


def _groups(ids: Sequence[Ints], row_bytes: int, memory_bytes: int) -> Iterator[list[tuple[int, slice]]]:
    """Rows for one forward pass each (array, rows), as many together as fit the memory."""
    group: list[tuple[int, slice]] = []
    held = 0
    for number, ids_SC in enumerate(ids):
        together = max(1, min(_FORWARD_TOKENS // ids_SC.shape[1], memory_bytes // row_bytes))
        for start in range(0, len(ids_SC), together):
            rows = slice(start, min(start + together, len(ids_SC)))
            size = (rows.stop - rows.start) * row_bytes
            if group and held + size > memory_bytes:
                yield group
                group, held = [], 0
            group.append((number, rows))
            held += size
    if group:
        yield group


def _joined(parts: Sequence[Pairs]) -> Pairs:
    nothing = np.zeros(0, dtype=np.int64)
    empty = Pairs(nothing, nothing, np.zeros(0, dtype=np.float32))
    return Pairs(*(np.concatenate(column) for column in zip(empty, *parts, strict=True)))
