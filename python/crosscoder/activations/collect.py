"""Collecting activations: the same tokens through every snapshot, one snapshot at a time, resumable at any moment.

Letters: S sequences, C context, T tokens of a shard, K snapshots, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscoder.activations.snapshots import SnapshotSet, decoder_layers, truncate
from crosscoder.activations.store import ActivationStore
from crosscoder.activations.tokens import END_OF_TEXT, TokenSet
from crosscoder.errors import DataError
from crosscoder.progress import Progress


@dataclass(frozen=True)
class Shard:
    """Which tokens a shard holds, in which order."""

    sequences: np.ndarray
    """(s,) sequences of the shard."""
    rows: np.ndarray
    """(T,) positions in the shard's s x C tokens, shuffled, without end-of-text tokens."""


def plan_shards(tokens: TokenSet, rows_per_shard: int, seed: int) -> list[Shard]:
    """Deal the sequences over the shards at random and shuffle the tokens within each; fixed by `seed`.

    Raises `DataError` if there is no token but end-of-text.
    """
    S, C = tokens.ids.shape
    per_shard = max(1, rows_per_shard // C)
    order = np.random.default_rng([seed, 0]).permutation(S)
    shards = []
    for number, start in enumerate(range(0, S, per_shard)):
        sequences = np.sort(order[start : start + per_shard])
        rows = np.flatnonzero(tokens.ids[sequences].reshape(-1) != END_OF_TEXT)
        if len(rows):
            shards.append(Shard(sequences, np.random.default_rng([seed, 1, number]).permutation(rows)))
    if not shards:
        raise DataError("there is no token to collect: the text is empty, or shorter than one context")
    return shards


def residual_stream(model: Any, layer: int, ids_SC: Tensor) -> Tensor:
    """Residual stream (S, C, D) after block `layer`, before any final norm. `model` may be truncated."""
    caught: list[Tensor] = []

    def catch(module: Any, inputs: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_layers(model)[layer].register_forward_hook(catch)
    try:
        with torch.no_grad():
            model(input_ids=ids_SC, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


def collect(
    snapshots: SnapshotSet,
    tokens: TokenSet,
    path: Path,
    *,
    dtype: str = "bf16",
    rows_per_shard: int = 65_536,
    seed: int = 0,
    batch_sequences: int = 64,
    title: str = "activations",
) -> ActivationStore:
    """Fill the store at `path`; segments that are already there are kept, so a second call completes a killed one.

    Raises `DataError` for a missing, damaged or differently shaped snapshot, `NonFiniteError` naming the snapshot,
    `ConfigError` if `path` holds activations of other tokens or snapshots, `StorageError` if the disk is full.
    """
    shards = plan_shards(tokens, rows_per_shard, seed)
    D = _width(snapshots)
    store = ActivationStore.create(
        path,
        snapshots.n_snapshots,
        D,
        dtype,
        shard_rows=[len(shard.rows) for shard in shards],
        snapshots=snapshots.revisions,
        source={
            "model": Path(snapshots.model).name if Path(snapshots.model).is_dir() else snapshots.model,
            "layer": snapshots.layer,
            "site": "residual stream after the block",
            "tokens": tokens.fingerprint,
            "context": int(tokens.ids.shape[1]),
            "seed": seed,
        },
    )
    missing = store.missing()
    if not missing:
        return store
    C = tokens.ids.shape[1]
    total = store.n_snapshots * sum(len(shard.sequences) for shard in shards) * C
    left = sum(len(shards[shard].sequences) for shard, _ in missing) * C
    for number, shard in enumerate(shards):
        flat = shard.sequences.repeat(C)[shard.rows], (shard.rows % C)
        columns = [tokens.ids[flat], tokens.document[flat], *flat]
        store.write_tokens(number, np.stack(columns, axis=1).astype(np.int32))
    with Progress(title, total, "tokens", done=total - left) as progress:
        for k in sorted({k for _, k in missing}):
            model = snapshots.load(k)
            if model.config.hidden_size != D:
                raise DataError(
                    f"snapshot {snapshots.revisions[k]} has width {model.config.hidden_size}, the first one {D}"
                )
            model = truncate(model, snapshots.layer)
            for number in [shard for shard, missing_k in missing if missing_k == k]:
                ids = tokens.ids[shards[number].sequences]
                parts = []
                for x_SCD in _batches(model, snapshots.layer, ids, batch_sequences):
                    parts.append(x_SCD.flatten(0, 1))
                    progress.advance(len(parts[-1]), {"snapshot": snapshots.revisions[k]})
                store.write_segment(number, k, torch.cat(parts)[torch.from_numpy(shards[number].rows)])
    return store


def _batches(model: Any, layer: int, ids_SC: np.ndarray, batch_sequences: int) -> Iterator[Tensor]:
    for start in range(0, len(ids_SC), batch_sequences):
        yield residual_stream(model, layer, torch.from_numpy(ids_SC[start : start + batch_sequences]).long())


def _width(snapshots: SnapshotSet) -> int:
    """D, from the first snapshot's configuration alone."""
    return int(snapshots.load_config(0).hidden_size)
