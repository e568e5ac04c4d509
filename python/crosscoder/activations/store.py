"""Activations on disk: one file for each (shard, snapshot), so that snapshots are written and read on their own.

Letters: T tokens of a shard, N tokens in all, K snapshots, D width. The format is in docs/store-format.md; files are
written and read in C++ (csrc/store/segment.hpp).
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.activations.claim import take, temporary_file
from crosscoder.activations.manifest import (
    MANIFEST_FILE,
    identity,
    new_manifest,
    read_manifest,
    reconciled,
    row_bytes,
    write_manifest,
)
from crosscoder.errors import ConfigError, CrosscoderError, DataError, NonFiniteError
from crosscoder.files import explained_write_errors, make_folder, read_json, write_json
from crosscoder.inputs import floating
from crosscoder.locks import locked

TOKEN_COLUMNS = ("token", "document", "sequence", "position")

_OPEN_FILES = 256


class ActivationStore:
    """The activations (N, K, D) of N tokens in K snapshots, in a folder.

    Rows are shuffled within each shard when the store is made; row i of every snapshot's segment is the same token,
    whose id, document, sequence and position are row i of the shard's token segment.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], numbers: Sequence[int]) -> None:
        self.path = path
        self.manifest = manifest
        """As in the file, but `snapshots` and `n_snapshots` are of the snapshots that this object shows."""
        self.numbers = list(numbers)
        """(K,) number of each snapshot's files."""
        self.identity = identity(manifest)
        self._segments: OrderedDict[tuple[int, int], _core.SegmentFile] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes, which open the files themselves."""
        return {**self.__dict__, "_segments": OrderedDict()}

    # ------------------------------------------------------------------------------------------- making

    @classmethod
    def create(
        cls,
        path: Path | str,
        n_snapshots: int,
        d_model: int,
        dtype: str = "bf16",
        *,
        shard_rows: Sequence[int],
        snapshots: Sequence[str] | None = None,
        source: dict[str, Any] | None = None,
    ) -> ActivationStore:
        """A new store of `len(shard_rows)` shards, still without activations; an equal one that exists is reopened.

        `snapshots` names the snapshots; those that an existing store does not know are added to it. `source` (JSON)
        says where the activations come from. Raises `ConfigError` if a store of other tokens, width or dtype is at
        `path`, `StorageError` if it cannot be written.
        """
        names = list(snapshots or [f"snapshot{k}" for k in range(n_snapshots)])
        if len(names) != n_snapshots:
            raise ConfigError(f"{len(names)} snapshot names for {n_snapshots} snapshots")
        return cls.create_from(path, new_manifest(names, d_model, dtype, shard_rows, source))

    @classmethod
    def create_from(cls, path: Path | str, manifest: dict[str, Any]) -> ActivationStore:
        """As `create`, from a `new_manifest`."""
        path, names = Path(path), manifest["snapshots"]
        make_folder(path)
        with locked(path / f".{MANIFEST_FILE}.lock"):
            merged = cls.reconciled(path, manifest)
            if not cls.exists(path) or merged != read_manifest(path):
                write_manifest(path, merged)
        return cls.open(path).select(names)

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether there is a store at `path`."""
        return (path / MANIFEST_FILE).exists()

    @classmethod
    def reconciled(cls, path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
        """`manifest`, or that of the store at `path` with more snapshots; writes nothing.

        Raises `ConfigError` saying what differs if that store is of something else.
        """
        if not cls.exists(path):
            return manifest
        store = cls.open(path)
        shards = range(len(store.shard_rows))
        begun = [name for k, name in enumerate(store.snapshot_names) if any(store.has_segment(s, k) for s in shards)]
        return reconciled(path, read_manifest(path), manifest, begun)

    @classmethod
    def from_array(
        cls,
        path: Path | str,
        x_NKD: np.ndarray | Tensor,
        dtype: str = "bf16",
        *,
        rows_per_shard: int = 65_536,
    ) -> ActivationStore:
        """A store of activations (N, K, D) that are already in memory; token ids, documents and sequences are -1."""
        x_NKD = floating(x_NKD)
        if rows_per_shard < 1:
            raise ConfigError(f"rows_per_shard must be at least 1, not {rows_per_shard}")
        if x_NKD.ndim != 3 or 0 in x_NKD.shape:
            raise DataError(f"expected activations of shape (tokens, snapshots, width), got {tuple(x_NKD.shape)}")
        N, K, D = x_NKD.shape
        starts = range(0, N, rows_per_shard)
        store = cls.create(path, K, D, dtype, shard_rows=[min(rows_per_shard, N - start) for start in starts])
        for shard, start in enumerate(starts):
            rows = x_NKD[start : start + rows_per_shard]
            tokens = np.full((len(rows), len(TOKEN_COLUMNS)), -1, dtype=np.int32)
            tokens[:, -1] = np.arange(start, start + len(rows))
            store.write_tokens(shard, tokens)
            for k in range(K):
                store.write_segment(shard, k, rows[:, k])
        return store

    @classmethod
    def open(cls, path: Path | str) -> ActivationStore:
        """An existing store, with all its snapshots. Raises `DataError` if it is missing, foreign or malformed."""
        manifest = read_manifest(Path(path))
        numbers = range(len(manifest["snapshots"]))
        return cls(Path(path), {**manifest, "n_snapshots": len(numbers)}, numbers)

    def select(self, names: Sequence[str]) -> ActivationStore:
        """The same store with some of its snapshots, in the order of `names`. Raises `DataError` for unknown ones."""
        unknown = [name for name in names if name not in self.snapshot_names]
        if unknown or not names:
            raise DataError(
                f"{self.path} has no snapshot {', '.join(unknown) or 'to select'}; it has "
                f"{', '.join(self.snapshot_names)}"
            )
        numbers = [self.numbers[self.snapshot_names.index(name)] for name in names]
        return ActivationStore(
            self.path, {**self.manifest, "snapshots": list(names), "n_snapshots": len(names)}, numbers
        )

    def without_skipped(self) -> ActivationStore:
        """The same store without the snapshots that collection skipped. Raises `DataError` if none is left."""
        skipped = self.skipped()
        left = [name for name in self.snapshot_names if name not in skipped]
        if not left:
            raise DataError(f"{self.path}: every snapshot was skipped ({next(iter(skipped.values()))})")
        return self.select(left) if skipped else self

    def write_tokens(self, shard: int, rows_T4: np.ndarray) -> None:
        """Write token id, document, sequence and position (T, 4) int32 of a shard's rows."""
        self._check_shape(shard, rows_T4.shape, len(TOKEN_COLUMNS))
        path = self.token_path(shard)
        make_folder(path.parent)
        with explained_write_errors(path):
            _core.write_tokens(
                str(path),
                str(temporary_file(path)),
                np.ascontiguousarray(rows_T4, dtype=np.int32),
                store=self.identity,
                shard=shard,
            )

    def write_segment(self, shard: int, k: int, x_TD: Tensor) -> None:
        """Write snapshot k's activations (T, D) of a shard, atomically.

        Raises `NonFiniteError` naming the snapshot for a NaN or an infinity (also after rounding to the store's
        dtype), `DataError` for a wrong shape.
        """
        x_TD = floating(x_TD)
        self._check_shape(shard, x_TD.shape, self.d_model)
        name, path = self.snapshot_names[k], self.segment_path(shard, k)
        make_folder(path.parent)
        with explained_write_errors(path):
            finite = _core.write_activations(
                str(path),
                str(temporary_file(path)),
                x_TD.detach().to("cpu", torch.float32).contiguous().numpy(),
                dtype=self.dtype,
                group=int(self.manifest["scale_group"]),
                store=self.identity,
                shard=shard,
                name=name,
            )
        if not finite:
            raise NonFiniteError(
                f"NaN or infinity in the activations of snapshot {name} (shard {shard}, dtype {self.dtype}); "
                "leave that snapshot out"
                + (", or store fp32 if the values are too large" if self.dtype != "fp32" else "")
            )

    def has_segment(self, shard: int, k: int) -> bool:
        """True if snapshot k of a shard is there (segments are complete or absent)."""
        return self.segment_path(shard, k).exists()

    def skip(self, k: int, reason: str) -> None:
        """Record that snapshot k cannot be had; its segments are no longer expected."""
        write_json(self._skip_path(k), {"snapshot": self.snapshot_names[k], "reason": reason})

    def skipped(self) -> dict[str, str]:
        """Name -> reason of the snapshots that collection skipped."""
        paths = {name: self._skip_path(k) for k, name in enumerate(self.snapshot_names)}
        return {name: str(read_json(path, reason=str)["reason"]) for name, path in paths.items() if path.exists()}

    # ------------------------------------------------------------------------------------------- reading

    @property
    def n_snapshots(self) -> int:
        return len(self.numbers)

    @property
    def d_model(self) -> int:
        return int(self.manifest["d_model"])

    @property
    def dtype(self) -> str:
        return str(self.manifest["dtype"])

    @property
    def snapshot_names(self) -> list[str]:
        return list(self.manifest["snapshots"])

    @property
    def shard_rows(self) -> list[int]:
        """Tokens of each shard."""
        return list(self.manifest["shard_rows"])

    @property
    def n_tokens(self) -> int:
        """N."""
        return sum(self.shard_rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's activation in one snapshot, scales included."""
        return row_bytes(self.dtype, self.d_model, self.manifest["scale_group"])

    @property
    def n_bytes(self) -> int:
        """Size of the activations, without headers."""
        return self.n_tokens * self.n_snapshots * self.row_bytes

    def missing(self) -> list[tuple[int, int]]:
        """(shard, snapshot) pairs that are not there yet and have not been skipped."""
        present = [
            {entry.name for entry in os.scandir(folder)} if (folder := self._shard_folder(shard)).is_dir() else set()
            for shard in range(len(self.shard_rows))
        ]
        skipped = self.skipped()
        return [
            (shard, k)
            for k in range(self.n_snapshots)
            if self.snapshot_names[k] not in skipped
            for shard in range(len(self.shard_rows))
            if self.segment_path(shard, k).name not in present[shard]
        ]

    def require_complete(self) -> None:
        """Raises `DataError` naming what is missing."""
        skipped = self.skipped()
        if skipped:
            name, reason = next(iter(skipped.items()))
            raise DataError(
                f"{self.path}: collection skipped {', '.join(skipped)} ({name}: {reason}); "
                "read the others with without_skipped()"
            )
        missing = self.missing()
        if missing:
            names = sorted({self.snapshot_names[k] for _, k in missing})
            raise DataError(
                f"{self.path} is incomplete: {len(missing)} segments of {', '.join(names[:4])}"
                f"{', ...' if len(names) > 4 else ''} are missing; run the collection again"
            )

    def segment(self, shard: int, k: int) -> _core.SegmentFile:
        """One segment, its header checked against the manifest."""
        if (shard, k) not in self._segments:
            self._segments[shard, k] = self._open_segment(shard, k)
            if len(self._segments) > _OPEN_FILES:
                self._segments.popitem(last=False)
        self._segments.move_to_end((shard, k))
        return self._segments[shard, k]

    def _open_segment(self, shard: int, k: int) -> _core.SegmentFile:
        return self._checked(
            self.segment_path(shard, k),
            {
                "kind": "activations",
                "shard": shard,
                "name": self.snapshot_names[k],
                "rows": self.shard_rows[shard],
                "width": self.d_model,
                "dtype": self.dtype,
                "group": self.manifest["scale_group"],
                "store": self.identity,
            },
        )

    def _open_tokens(self, shard: int) -> _core.SegmentFile:
        wanted = {"kind": "tokens", "shard": shard, "rows": self.shard_rows[shard], "width": len(TOKEN_COLUMNS)}
        return self._checked(self.token_path(shard), {**wanted, "store": self.identity})

    def _checked(self, path: Path, wanted: dict[str, Any]) -> _core.SegmentFile:
        try:
            found = _core.SegmentFile(str(path))
        except OSError as error:
            if isinstance(error, CrosscoderError):
                raise
            raise DataError(f"{path} cannot be read ({error.strerror}); remove it and collect again") from error
        head = found.head
        wrong = [key for key, value in wanted.items() if head[key] != value]
        if wrong:
            raise DataError(
                f"{path} does not belong there: its {', '.join(wrong)} differ from the manifest; collect it again"
            )
        return found

    def tokens(self, shard: int) -> np.ndarray:
        """(T, 4) int32: token id, document, sequence and position of a shard's rows."""
        return self._open_tokens(shard).read_tokens()

    def gather(self, shard: int, rows: np.ndarray, out_nKD: np.ndarray, scale_K: np.ndarray) -> None:
        """Read the given rows (n,) int64 of all snapshots into float32 `out_nKD`, times `scale_K`."""
        for k in range(self.n_snapshots):
            self.segment(shard, k).gather(rows, float(scale_K[k]), out_nKD, k)

    def read(self, shard: int, rows: slice | np.ndarray = slice(None)) -> Tensor:
        """Raw activations (n, K, D) float32 of some rows of a shard."""
        if not 0 <= shard < len(self.shard_rows):
            raise DataError(f"{self.path} has the shards 0 to {len(self.shard_rows) - 1}, not {shard}")
        T = self.shard_rows[shard]
        self.segment(shard, 0)  # a manifest may promise more rows than memory could hold the numbers of
        if isinstance(rows, slice):
            index = np.arange(*rows.indices(T), dtype=np.int64)
        else:
            index = np.ascontiguousarray(np.arange(T, dtype=np.int64)[rows])
        out = np.empty((len(index), self.n_snapshots, self.d_model), dtype=np.float32)
        self.gather(shard, index, out, np.ones(self.n_snapshots))
        return torch.from_numpy(out)

    def whole_sequences(
        self, batch_tokens: int, *, skip: int = 0, sequences: np.ndarray | None = None
    ) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
        """Raw activations (B, K, D) float32 of whole sequences, with sequence (B,) and position (B,), shard by shard.

        A batch has about `batch_tokens` tokens of one shard, in the order of the text. `skip`: leave out the batches
        of that many tokens at the beginning. `sequences`: only these. Needs memory for the places of one shard's
        tokens, whatever the number of shards (collection puts a sequence into one shard).
        """
        for shard, shard_rows in enumerate(self.shard_rows):
            if sequences is None and skip >= shard_rows:
                skip -= shard_rows
                continue
            sequence_T, position_T = self.tokens(shard)[:, 2:].T
            order_T = np.lexsort((position_T, sequence_T))
            if sequences is not None:
                order_T = order_T[np.isin(sequence_T[order_T], sequences)]
            begin, skip = min(skip, len(order_T)), max(0, skip - len(order_T))
            starts = np.flatnonzero(np.diff(sequence_T[order_T], prepend=-2))
            while begin < len(order_T):
                late = starts[np.searchsorted(starts, begin + batch_tokens) :]
                end = int(late[0]) if len(late) else len(order_T)
                rows = order_T[begin:end]
                yield self.read(shard, rows), sequence_T[rows], position_T[rows]
                begin = end

    def scales(self) -> np.ndarray:
        """s_K (K,) float64: sqrt(D) over the mean norm of the whole collection (docs/method.md, section 1).

        Raises `DataError` for a snapshot whose activations are all 0.
        """
        norms_K = np.array([sum(s.head["norm_sum"] for s in self._of_snapshot(k)) for k in range(self.n_snapshots)])
        silent = [self.snapshot_names[k] for k in np.flatnonzero(norms_K <= 0)]
        if silent:
            raise DataError(f"{self.path}: all activations of {', '.join(silent)} are 0; leave these snapshots out")
        return math.sqrt(self.d_model) * self.n_tokens / norms_K

    def means(self) -> np.ndarray:
        """(K, D) float64: mean raw activation of each snapshot."""
        sums = [np.sum([s.column_sums() for s in self._of_snapshot(k)], axis=0) for k in range(self.n_snapshots)]
        return np.stack(sums) / self.n_tokens

    def damage(self) -> Iterator[str]:
        """Read everything; yields one line for each damaged block and each file that is missing or not readable."""
        for shard in range(len(self.shard_rows)):
            yield from self.damage_of(shard)

    def damage_of(self, shard: int) -> Iterator[str]:
        """`damage` of one shard."""
        skipped = self.skipped()
        for k in (None, *range(self.n_snapshots)):
            if k is not None and self.snapshot_names[k] in skipped:
                continue
            path = self.token_path(shard) if k is None else self.segment_path(shard, k)
            try:
                found = self._open_tokens(shard) if k is None else self._open_segment(shard, k)
                blocks = found.damaged_blocks()
            except DataError as error:
                yield str(error)
            except OSError as error:
                yield f"{path} cannot be read: {error.strerror}"
            else:
                for block in blocks:
                    yield f"{path}: block {block} of {found.head['n_blocks']} is damaged; collect it again"

    def verify(self) -> None:
        """Read everything and compare all checksums.

        Raises `DataError` naming the first damaged file and block, and how many more there are.
        """
        self.require_complete()
        damage = list(self.damage())
        if damage:
            more = f" (and {len(damage) - 1} more: crosscoder store verify {self.path})" if len(damage) > 1 else ""
            raise DataError(damage[0] + more)

    def merge(self, other: ActivationStore) -> int:
        """Take over what `other`, a store of the same tokens, has and this one lacks; returns the number of files.

        Snapshots that only `other` has are added. Files are linked where both folders are on one file system, else
        copied. Raises `DataError` if the stores do not go together or a file of `other` is damaged, `ConfigError` if a
        snapshot that both have was made from other weights.
        """
        if other.identity != self.identity:
            keys = [key for key in self.manifest if key not in ("snapshots", "contents", "n_snapshots")]
            different = [key for key in keys if self.manifest[key] != other.manifest[key]]
            raise DataError(f"{other.path} and {self.path} differ in {', '.join(different)}: they cannot be merged")
        wanted = {key: other.manifest[key] for key in other.manifest if key != "n_snapshots"}
        contents = {k: v for k, v in wanted.get("contents", {}).items() if k in other.snapshot_names}
        mine = ActivationStore.create_from(self.path, {**wanted, "contents": contents})
        taken = 0
        for shard in range(len(self.shard_rows)):
            if other.token_path(shard).exists():
                taken += take(other._open_tokens(shard), mine.token_path(shard))
            for k in range(other.n_snapshots):
                if other.has_segment(shard, k) and not mine.has_segment(shard, k):
                    taken += take(other._open_segment(shard, k), mine.segment_path(shard, k))
        return taken

    def _of_snapshot(self, k: int) -> Iterator[_core.SegmentFile]:
        return (self._open_segment(shard, k) for shard in range(len(self.shard_rows)))

    def _shard_folder(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}"

    def token_path(self, shard: int) -> Path:
        return self._shard_folder(shard) / "tokens.seg"

    def segment_path(self, shard: int, k: int) -> Path:
        return self._shard_folder(shard) / self._segment_name(k)

    def segment_paths(self, shard: int) -> list[str]:
        """Of every snapshot, as text: the loader needs thousands, and a `Path` takes 20 microseconds to make."""
        folder = self._shard_folder(shard)
        return [os.path.join(folder, self._segment_name(k)) for k in range(self.n_snapshots)]

    def _segment_name(self, k: int) -> str:
        return f"snapshot-{self.numbers[k]:03d}.seg"

    def _skip_path(self, k: int) -> Path:
        return self.path / f"skipped-{self.numbers[k]:03d}.json"

    def _check_shape(self, shard: int, shape: Sequence[int], width: int) -> None:
        wanted = (self.shard_rows[shard], width)
        if tuple(shape) != wanted:
            raise DataError(f"{self.path}: shard {shard} needs rows of shape {wanted}, got {tuple(shape)}")
