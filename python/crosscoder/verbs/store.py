"""Look at an activation store, check every byte of it, or bring several into one.

info: what is in it and what is missing. verify: read all of it and name every damaged block (exit code 3 if there is
one). merge: take over from other stores of the same tokens the segments and snapshots that this one lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from crosscoder.activations.store import ActivationStore

EXAMPLE = "crosscoder store verify runs/mine/activations/train"


@dataclass(frozen=True)
class StoreConfig:
    """Options of `crosscoder store`."""

    action: tyro.conf.Positional[Literal["info", "verify", "merge"]]
    """What to do."""
    path: tyro.conf.Positional[Path]
    """The store: a folder with a manifest.json. For merge it may be a new one."""
    others: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Stores to merge into it."""


def run(config: StoreConfig) -> int:
    """Do it. Raises `DataError` for a damaged store, `ConfigError` for other stores without merge."""
    from crosscoder.activations.store import ActivationStore
    from crosscoder.errors import ConfigError

    if bool(config.others) != (config.action == "merge"):
        raise ConfigError(f"{config.action} takes {'the stores to merge' if config.action == 'merge' else 'one store'}")
    if config.action == "merge":
        return _merge(config)
    store = ActivationStore.open(config.path)
    return _info(store) if config.action == "info" else _verify(store)


def _info(store: ActivationStore) -> int:
    missing, skipped = store.missing(), store.skipped()
    source = ", ".join(f"{key} {value}" for key, value in store.manifest["source"].items())
    print(f"store      {store.path} (format version {store.manifest['format_version']})")
    print(f"tokens     {store.n_tokens:,} in {len(store.shard_rows):,} shards")
    print(f"snapshots  {store.n_snapshots}: {', '.join(store.snapshot_names)}")
    print(f"width      {store.d_model}")
    print(f"dtype      {store.dtype}, {store.row_bytes:,} bytes an activation, {store.n_bytes / 1e9:,.2f} GB in all")
    print(f"source     {source or 'unknown'}")
    for name, reason in skipped.items():
        print(f"skipped    {name}: {reason}")
    if missing:
        names = sorted({store.snapshot_names[k] for _, k in missing})
        print(f"missing    {len(missing):,} segments, of {', '.join(names)}")
    else:
        print("complete")
    return 0


def _verify(store: ActivationStore) -> int:
    from crosscoder.errors import DataError
    from crosscoder.progress import Progress

    damage = []
    with Progress("verifying", len(store.shard_rows), "shards") as progress:
        for shard in range(len(store.shard_rows)):
            for line in store.damage_of(shard):
                damage.append(line)
                print(line)
            progress.advance(1)
    if damage:
        raise DataError(f"{store.path}: {len(damage)} blocks or files are damaged or missing; they are named above")
    print(f"{store.path} is whole: {store.n_tokens:,} tokens x {store.n_snapshots} snapshots")
    return 0


def _merge(config: StoreConfig) -> int:
    from crosscoder.activations.manifest import MANIFEST_FILE
    from crosscoder.activations.store import ActivationStore
    from crosscoder.files import make_folder
    from crosscoder.locks import working_on

    others = [ActivationStore.open(path) for path in config.others]
    first = others[0]
    with working_on(make_folder(_worked_on(config.path)), "store merge"):
        store = (
            ActivationStore.open(config.path)
            if (config.path / MANIFEST_FILE).exists()
            else ActivationStore.create(
                config.path,
                first.n_snapshots,
                first.d_model,
                first.dtype,
                shard_rows=first.shard_rows,
                snapshots=first.snapshot_names,
                source=first.manifest["source"],
            )
        )
        for other in others:
            print(f"{other.path}: {store.merge(other)} files")
    return _info(ActivationStore.open(config.path))


def _worked_on(store: Path) -> Path:
    """What a command that writes into a store works on: the run that it is a part of, or the store alone."""
    store = store.absolute()
    return store.parent.parent if store.parent.name == "activations" else store
