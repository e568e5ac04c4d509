"""Collecting activations: the same tokens through every snapshot, resumable at any moment, by any number of processes.

Letters: S sequences, C context, T tokens of a shard, K snapshots, D width.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscoder.activations.claim import claim
from crosscoder.activations.manifest import new_manifest
from crosscoder.activations.proof import proven
from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.store import ActivationStore
from crosscoder.activations.tokens import TokenSet
from crosscoder.activations.trunk import SITES, Trunks
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.progress import Progress, warn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POLL_SECONDS = 1.0
"""How often a process that has nothing left to claim looks whether the others are done."""


@dataclass(frozen=True)
class Shard:
    """Which tokens a shard holds, in which order."""

    sequences: np.ndarray
    """(s,) sequences of the shard."""
    rows: np.ndarray
    """(T,) positions in the shard's s x C tokens, shuffled, without end-of-text tokens and those left out."""


@dataclass(frozen=True)
class CollectOptions:
    """How activations are computed. All but `device` and `skip_bad` may change the last bits of the result."""

    batch_sequences: int = 64
    """Sequences in a forward pass."""
    together: int = 1
    """Snapshots that are in memory and run side by side in one batched forward."""
    model_dtype: str = "fp32"
    """Precision of the language model: fp32, bf16 or fp16."""
    device: str = "cpu"
    skip_bad: bool = False
    """A snapshot that is missing, damaged, has another tokenizer or gives NaN is recorded as skipped."""


def plan_shards(tokens: TokenSet, rows_per_shard: int, seed: int) -> list[Shard]:
    """Deal the sequences over the shards at random and shuffle the tokens within each; fixed by `seed`.

    Raises `DataError` if there is no token but end-of-text.
    """
    S, C = tokens.ids.shape
    stored_SC = tokens.stored_SC
    per_shard = max(1, rows_per_shard // C)
    order = np.random.default_rng([seed, 0]).permutation(S)
    shards = []
    for number, start in enumerate(range(0, S, per_shard)):
        sequences = np.sort(order[start : start + per_shard])
        rows = np.flatnonzero(stored_SC[sequences].reshape(-1))
        if len(rows):
            shards.append(Shard(sequences, np.random.default_rng([seed, 1, number]).permutation(rows)))
    if not shards:
        raise DataError("there is no token to collect: the text is empty, or shorter than one context")
    return shards


def token_rows(tokens: TokenSet, shard: Shard) -> np.ndarray:
    """(T, 4) int32: token id, document, sequence and position of the shard's rows."""
    C = tokens.ids.shape[1]
    place = shard.sequences.repeat(C)[shard.rows], shard.rows % C
    return np.stack([tokens.ids[place], tokens.document[place], *place], axis=1).astype(np.int32)


def row_order(shard: Shard) -> Tensor:
    """(T,) int64: which of the shard's tokens, counted in the order of the text, each of its rows is."""
    return torch.from_numpy(np.argsort(np.argsort(shard.rows)))


def check_tokens(snapshots: SnapshotSet, tokens: TokenSet) -> None:
    """Raises `DataError` for token ids that the model does not know, `ConfigError` for a context too long for it."""
    config = snapshots.first_config()
    check_context(snapshots, tokens.context)
    highest = int(tokens.ids.max())
    if highest >= config.vocab_size:
        raise DataError(
            f"the tokens have ids up to {highest}, {snapshots.model} knows {config.vocab_size}: they were made with "
            "another tokenizer; delete the run's tokens folder and collect again"
        )


def check_context(snapshots: SnapshotSet, context: int) -> None:
    """Raises `ConfigError` for sequences that are longer than those that the model was made for."""
    most = getattr(snapshots.first_config(), "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < context:
        raise ConfigError(
            f"sequences of {context} tokens are longer than {snapshots.model} was made for ({most}, its "
            f"max_position_embeddings); make the tokens with --context {most} or less"
        )


def load_trunks(snapshots: SnapshotSet, numbers: Sequence[int], model_dtype: str, device: str) -> Trunks:
    """Some snapshots up to their layer, side by side on `device`.

    Raises `DataError` naming the snapshot that is missing, damaged, or has another tokenizer or shape.
    """
    models = [load_trunk(snapshots, k, model_dtype, device) for k in numbers]
    return Trunks(models, snapshots.layer, snapshots.site, snapshots.module)


def load_trunk(snapshots: SnapshotSet, k: int, model_dtype: str, device: str) -> Any:
    """Snapshot k up to its layer. The same ids must mean the same text to all snapshots: raises `DataError` if not."""
    last, names = snapshots.n_snapshots - 1, snapshots.revisions
    mine, other = snapshots.tokenizer_fingerprint(k), snapshots.tokenizer_fingerprint(last)
    if mine is not None and other is not None and mine != other:
        raise DataError(
            f"snapshot {names[k]} of {snapshots.model} has another tokenizer than {names[last]}, with which "
            "the text was made into tokens; leave that snapshot out"
        )
    return snapshots.load_trunk(k, DTYPES[model_dtype]).to(device)


def forward_shard(
    trunks: Trunks, tokens: TokenSet, shard: Shard, batch_sequences: int, device: str
) -> Iterator[Tensor]:
    """Activations (K, n, D) float32 of the shard's tokens in the order of the text, a forward pass at a time."""
    ids_SC = tokens.ids[shard.sequences]
    kept, C = np.sort(shard.rows), ids_SC.shape[1]
    for start in range(0, len(ids_SC), batch_sequences):
        batch = torch.from_numpy(ids_SC[start : start + batch_sequences]).long()
        x_KSCD = trunks(batch.to(device))
        lo, hi = np.searchsorted(kept, [start * C, start * C + batch.numel()])
        rows = torch.from_numpy(kept[lo:hi] - start * C).to(x_KSCD.device)
        yield x_KSCD.flatten(1, 2)[:, rows].float()


def collect(
    snapshots: SnapshotSet,
    tokens: TokenSet,
    path: Path,
    *,
    dtype: str = "bf16",
    rows_per_shard: int = 65_536,
    seed: int = 0,
    batch_sequences: int = 64,
    together: int = 1,
    model_dtype: str = "fp32",
    device: str = "cpu",
    skip_bad: bool = False,
    title: str = "activations",
) -> ActivationStore:
    """Fill the store at `path`; segments that are already there are kept, so a second call completes a killed one.

    Several processes may fill one store at the same time: each takes what nobody else works on, and all return when
    the store is complete. A snapshot that cannot be had (missing, damaged, another tokenizer or shape, NaN) does not
    stop the others: with `skip_bad` it is recorded in the store, else its error is raised when the rest is done.

    Raises `DataError` for a missing, damaged or differently shaped snapshot, `NonFiniteError` naming the snapshot,
    `ConfigError` if `path` holds activations of other tokens, `StorageError` if the disk is full.
    """
    options = CollectOptions(batch_sequences, together, model_dtype, device, skip_bad)
    if together < 1 or batch_sequences < 1:
        raise ConfigError(f"together and batch_sequences must be at least 1, not {together} and {batch_sequences}")
    snapshots = snapshots.identified()
    planned = plan_store(snapshots, tokens, path, dtype, rows_per_shard, seed, model_dtype)
    if planned.is_complete():
        return planned.create()
    snapshots = proven(snapshots, tokens, device)
    store = planned.create()
    _Collection(snapshots, tokens, planned.shards, store, options, title).run()
    return store


@dataclass(frozen=True)
class PlannedStore:
    """A store that a collection fills: what it is to hold. Nothing is written before `create`."""

    path: Path
    shards: list[Shard]
    manifest: dict[str, Any]
    """With the snapshots that are in the store already."""
    names: tuple[str, ...]
    """The snapshots to be collected."""

    def create(self) -> ActivationStore:
        """Make the store, or open the one that is there. Raises as `ActivationStore.create` does."""
        return ActivationStore.create_from(self.path, self.manifest).select(self.names)

    def is_complete(self) -> bool:
        """Whether all of it is on disk."""
        if not ActivationStore.exists(self.path):
            return False
        store = ActivationStore.open(self.path)
        if not set(self.names) <= set(store.snapshot_names):
            return False
        store = store.select(self.names)
        tokens = all(store.token_path(shard).exists() for shard in range(len(self.shards)))
        return tokens and not store.missing()


def plan_store(
    snapshots: SnapshotSet,
    tokens: TokenSet,
    path: Path,
    dtype: str = "bf16",
    rows_per_shard: int = 65_536,
    seed: int = 0,
    model_dtype: str = "fp32",
) -> PlannedStore:
    """What `collect` would write, all checked that can be before a model runs; nothing is written.

    Raises `ConfigError` saying what differs if `path` holds activations of other tokens, another place in the model or
    other settings, and what `check_tokens` raises.
    """
    check_tokens(snapshots, tokens)
    config = snapshots.first_config()
    if snapshots.layer >= config.num_hidden_layers:
        raise ConfigError(
            f"layer {snapshots.layer} does not exist: {snapshots.model} has layers 0 to {config.num_hidden_layers - 1}"
        )
    shards = plan_shards(tokens, rows_per_shard, seed)
    source = {
        "model": Path(snapshots.model).name if Path(snapshots.model).is_dir() else snapshots.model,
        "layer": snapshots.layer,
        "site": SITES[snapshots.site],
        "tokens": tokens.fingerprint,
        "context": int(tokens.ids.shape[1]),
        "seed": seed,
        "model_dtype": model_dtype,
        **({"left_out": tokens.source.get("left_out", {})} if tokens.left_out is not None else {}),
    }
    rows = [len(shard.rows) for shard in shards]
    contents = dict(zip(snapshots.revisions, snapshots.identified().content, strict=True))
    known = {name: content for name, content in contents.items() if content}
    manifest = new_manifest(snapshots.revisions, int(config.hidden_size), dtype, rows, source, known)
    return PlannedStore(path, shards, ActivationStore.reconciled(path, manifest), snapshots.revisions)


@dataclass
class _Collection:
    snapshots: SnapshotSet
    tokens: TokenSet
    shards: Sequence[Shard]
    store: ActivationStore
    options: CollectOptions
    title: str
    bad: dict[int, Exception] = field(default_factory=dict)
    """Snapshots that cannot be had, and why."""

    def run(self) -> None:
        C = self.tokens.ids.shape[1]
        sizes = [len(shard.sequences) * C for shard in self.shards]
        for number, shard in enumerate(self.shards):
            self._write_tokens(number, shard)
        total = self.store.n_snapshots * sum(sizes)
        left = sum(sizes[shard] for shard, _ in self.store.missing())
        with Progress(self.title, total, "tokens", done=total - left) as progress:
            while missing := [pair for pair in self.store.missing() if pair[1] not in self.bad]:
                now = sum(sizes[shard] for shard, _ in missing)
                progress.advance(max(0, left - now))  # what other processes have done
                left = now - self._pass(missing, progress)
        for k, error in self.bad.items():
            if not self.options.skip_bad:
                raise error
            self.store.skip(k, str(error))

    def _write_tokens(self, number: int, shard: Shard) -> None:
        path = self.store.token_path(number)
        while not path.exists():
            with claim(path) as mine:
                if mine:
                    self.store.write_tokens(number, token_rows(self.tokens, shard))
                elif not path.exists():
                    time.sleep(POLL_SECONDS / 10)

    def _pass(self, missing: Sequence[tuple[int, int]], progress: Progress) -> int:
        """Work on what can be claimed of `missing`; returns the tokens done. Waits a little if all is claimed."""
        size, done, claimed = self.options.together, 0, False
        groups = sorted({k // size for _, k in missing})
        # Processes start at different snapshots, so that each loads its own.
        first = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) * len(groups)
        first = first // int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) % len(groups)
        for group in groups[first:] + groups[:first]:
            loaded: tuple[list[int], Trunks] | None = None
            for shard in sorted({shard for shard, k in missing if k // size == group}):
                wanted = [k for s, k in missing if s == shard and k // size == group and k not in self.bad]
                with contextlib.ExitStack() as claims:
                    paths = {k: self.store.segment_path(shard, k) for k in wanted}
                    mine = [k for k in wanted if claims.enter_context(claim(paths[k]))]
                    claimed = claimed or bool(mine)
                    if mine and loaded is None:
                        loaded = self._load(range(group * size, min((group + 1) * size, self.store.n_snapshots)))
                    mine = [k for k in mine if k not in self.bad]
                    if not mine or loaded is None:
                        continue
                    # The whole group runs, also for a part of it: the bits of a batched forward depend on its size.
                    numbers, trunks = loaded
                    x_KTD = self._run(trunks, self.shards[shard], progress, mine)
                    for k in mine:
                        self._write(shard, k, x_KTD[numbers.index(k)])
                    done += len(self.shards[shard].sequences) * self.tokens.ids.shape[1] * len(mine)
        if not claimed:
            time.sleep(POLL_SECONDS)
        return done

    def _load(self, members: Sequence[int]) -> tuple[list[int], Trunks] | None:
        """The snapshots of a group that can be had, side by side."""
        options, models = self.options, {}
        for k in members:
            try:
                model = load_trunk(self.snapshots, k, options.model_dtype, options.device)
                if model.config.hidden_size != self.store.d_model:
                    raise DataError(
                        f"snapshot {self.snapshots.revisions[k]} has width {model.config.hidden_size}, "
                        f"the first one {self.store.d_model}"
                    )
                models[k] = model
            except (DataError, ConfigError) as error:  # a ConfigError: it has fewer layers
                self._set_aside(k, error)
        if not models:
            return None
        return list(models), Trunks(
            list(models.values()), self.snapshots.layer, self.snapshots.site, self.snapshots.module
        )

    def _run(self, trunks: Trunks, shard: Shard, progress: Progress, mine: Sequence[int]) -> Tensor:
        """Activations (K, T, D) of the shard's rows, in their order, on the CPU."""
        parts, names = [], ", ".join(self.snapshots.revisions[k] for k in mine)
        left, size = len(shard.sequences), self.options.batch_sequences
        for x_KnD in forward_shard(trunks, self.tokens, shard, size, self.options.device):
            parts.append(x_KnD.cpu())
            progress.advance(min(left, size) * self.tokens.ids.shape[1] * len(mine), {"snapshot": names})
            left -= size
        return torch.cat(parts, dim=1)[:, row_order(shard)]

    def _write(self, shard: int, k: int, x_TD: Tensor) -> None:
        try:
            self.store.write_segment(shard, k, x_TD)
        except NonFiniteError as error:
            self._set_aside(k, error)

    def _set_aside(self, k: int, error: Exception) -> None:
        if k not in self.bad:
            self.bad[k] = error
            warn(f"{error}; going on with the other snapshots")
