"""Activations on disk: one file for each (shard, snapshot), so that snapshots are written and read on their own.

Letters: T tokens of a shard, N tokens in all, K snapshots, D width. The format is in docs/store-format.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.activations.segment import Segment, open_segment, write_segment
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.files import make_folder, read_json, write_json

FORMAT = "crosscoder-activations"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKEN_COLUMNS = ("token", "document", "sequence", "position")


class ActivationStore:
    """The activations (N, K, D) of N tokens in K snapshots, in a folder.

    Rows are shuffled within each shard when the store is made; row i of every snapshot's segment is the same token,
    whose id, document, sequence and position are row i of the shard's token segment.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._segments: dict[tuple[int, int], Segment] = {}

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

        `snapshots` names the snapshots; `source` (JSON) says where the activations come from. Raises `ConfigError`
        if another store is at `path`, `StorageError` if it cannot be written.
        """
        path = Path(path)
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        names = list(snapshots or [f"snapshot{k}" for k in range(n_snapshots)])
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "byte_order": "little",
            "n_snapshots": n_snapshots,
            "d_model": d_model,
            "dtype": dtype,
            "shard_rows": [int(rows) for rows in shard_rows],
            "snapshots": names,
            "source": source or {},
        }
        if len(names) != n_snapshots:
            raise ConfigError(f"{len(names)} snapshot names for {n_snapshots} snapshots")
        if (path / MANIFEST_FILE).exists():
            existing = cls.open(path).manifest
            different = [key for key in manifest if existing.get(key) != manifest[key]]
            if different:
                raise ConfigError(
                    f"{path} already holds other activations (different {', '.join(different)}); "
                    "choose another folder or delete that one"
                )
        else:
            make_folder(path)
            write_json(path / MANIFEST_FILE, manifest)
        return cls(path, manifest)

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
        x_NKD = torch.as_tensor(x_NKD)
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
        """An existing store. Raises `DataError` if it is missing, foreign, newer or malformed."""
        path = Path(path)
        file = path / MANIFEST_FILE
        if not file.exists():
            raise DataError(f"{path} is not an activation store: it has no {MANIFEST_FILE}")
        manifest = read_json(file)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DataError(f"{file} is not the manifest of an activation store")
        if manifest.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{file} has format version {manifest.get('format_version')!r}, this release reads {FORMAT_VERSION}"
            )
        _check_manifest(file, manifest)
        return cls(path, manifest)

    def write_tokens(self, shard: int, rows_T4: np.ndarray) -> None:
        """Write token id, document, sequence and position (T, 4) int32 of a shard's rows."""
        self._check_shape(shard, rows_T4.shape, len(TOKEN_COLUMNS))
        header = {"kind": "tokens", "shard": shard, "columns": TOKEN_COLUMNS}
        write_segment(self._token_path(shard), rows_T4, "int32", np.zeros(len(TOKEN_COLUMNS)), header)

    def write_segment(self, shard: int, k: int, x_TD: Tensor) -> None:
        """Write snapshot k's activations (T, D) of a shard, atomically.

        Raises `NonFiniteError` naming the snapshot for a NaN or an infinity (also after rounding to the store's
        dtype), `DataError` for a wrong shape.
        """
        self._check_shape(shard, x_TD.shape, self.d_model)
        name = self.snapshot_names[k]
        stored = x_TD.detach().to("cpu", DTYPES[self.dtype]).contiguous()
        if not bool(torch.isfinite(stored).all()):
            raise NonFiniteError(
                f"NaN or infinity in the activations of snapshot {name} (shard {shard}, dtype {self.dtype}); "
                "leave that snapshot out, or store fp32 if the values are too large"
            )
        exact = stored.double()
        header = {
            "kind": "activations",
            "shard": shard,
            "snapshot": k,
            "name": name,
            "norm_sum": float(torch.linalg.vector_norm(exact, dim=1).sum()),
        }
        bits = stored if self.dtype == "fp32" else stored.view(torch.uint16)
        write_segment(self._segment_path(shard, k), bits.numpy(), self.dtype, exact.sum(dim=0).numpy(), header)

    def has_segment(self, shard: int, k: int) -> bool:
        """True if snapshot k of a shard is there (segments are complete or absent)."""
        return self._segment_path(shard, k).exists()

    # ------------------------------------------------------------------------------------------- reading

    @property
    def n_snapshots(self) -> int:
        return int(self.manifest["n_snapshots"])

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
    def n_bytes(self) -> int:
        """Size of the activations, without headers."""
        return self.n_tokens * self.n_snapshots * self.d_model * DTYPES[self.dtype].itemsize

    def missing(self) -> list[tuple[int, int]]:
        """(shard, snapshot) pairs that are not there yet."""
        pairs = ((shard, k) for k in range(self.n_snapshots) for shard in range(len(self.shard_rows)))
        return [pair for pair in pairs if not self.has_segment(*pair)]

    def require_complete(self) -> None:
        """Raises `DataError` naming what is missing."""
        missing = self.missing()
        if missing:
            names = sorted({self.snapshot_names[k] for _, k in missing})
            raise DataError(
                f"{self.path} is incomplete: {len(missing)} segments of {', '.join(names[:4])}"
                f"{', ...' if len(names) > 4 else ''} are missing; run the collection again"
            )

    def segment(self, shard: int, k: int) -> Segment:
        """One segment, checked against the manifest."""
        if (shard, k) not in self._segments:
            found = open_segment(self._segment_path(shard, k))
            wanted = {
                "kind": "activations",
                "shard": shard,
                "snapshot": k,
                "name": self.snapshot_names[k],
                "rows": self.shard_rows[shard],
                "width": self.d_model,
                "dtype": self.dtype,
            }
            wrong = [key for key, value in wanted.items() if found.header.get(key) != value]
            if wrong:
                raise DataError(f"{found.path} does not belong there: its {', '.join(wrong)} differ from the manifest")
            self._segments[shard, k] = found
        return self._segments[shard, k]

    def tokens(self, shard: int) -> np.ndarray:
        """(T, 4) int32: token id, document, sequence and position of a shard's rows."""
        found = open_segment(self._token_path(shard))
        if (found.header.get("kind"), found.header.get("shard")) != ("tokens", shard):
            raise DataError(f"{found.path} does not belong there")
        found.verify()
        return np.array(found.rows)

    def gather(self, shard: int, rows: np.ndarray, out_nKD: np.ndarray, scale_K: np.ndarray) -> None:
        """Read the given rows (n,) int64 of all snapshots into float32 `out_nKD`, times `scale_K`."""
        for k in range(self.n_snapshots):
            source = self.segment(shard, k).rows
            _core.gather_rows(source, rows, float(scale_K[k]), out_nKD, k, self.dtype, torch.get_num_threads())

    def read(self, shard: int, rows: slice | np.ndarray = slice(None)) -> Tensor:
        """Raw activations (n, K, D) float32 of some rows of a shard."""
        index = np.arange(self.shard_rows[shard], dtype=np.int64)[rows]
        out = np.empty((len(index), self.n_snapshots, self.d_model), dtype=np.float32)
        self.gather(shard, index, out, np.ones(self.n_snapshots))
        return torch.from_numpy(out)

    def in_text_order(self, batch_tokens: int) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
        """Raw activations (B, K, D) float32 in the order of the text, with sequence (B,) and position (B,).

        Batches hold whole sequences, about `batch_tokens` tokens each. Needs 20 bytes a token of memory.
        """
        tokens = [self.tokens(shard) for shard in range(len(self.shard_rows))]
        shard_N = np.repeat(np.arange(len(tokens)), self.shard_rows)
        row_N = np.concatenate([np.arange(rows) for rows in self.shard_rows])
        sequence_N, position_N = np.concatenate([rows[:, 2:] for rows in tokens]).T
        order_N = np.lexsort((position_N, sequence_N))
        starts = np.flatnonzero(np.diff(sequence_N[order_N], prepend=-2))
        begin = 0
        while begin < len(order_N):
            after = starts[np.searchsorted(starts, begin, side="right") :]
            late = after[after >= begin + batch_tokens]
            end = int(late[0]) if len(late) else len(order_N)
            part = order_N[begin:end]
            out = np.empty((len(part), self.n_snapshots, self.d_model), dtype=np.float32)
            for shard in np.unique(shard_N[part]):
                here = np.flatnonzero(shard_N[part] == shard)
                rows = np.empty((len(here), self.n_snapshots, self.d_model), dtype=np.float32)
                self.gather(int(shard), row_N[part[here]], rows, np.ones(self.n_snapshots))
                out[here] = rows
            yield torch.from_numpy(out), sequence_N[part], position_N[part]
            begin = end

    def scales(self) -> np.ndarray:
        """s_K (K,) float64: sqrt(D) over the mean norm of the whole collection (docs/method.md, section 1).

        Raises `DataError` for a snapshot whose activations are all 0.
        """
        norms_K = np.array([sum(s.header["norm_sum"] for s in self._of_snapshot(k)) for k in range(self.n_snapshots)])
        silent = [self.snapshot_names[k] for k in np.flatnonzero(norms_K <= 0)]
        if silent:
            raise DataError(f"{self.path}: all activations of {', '.join(silent)} are 0; leave these snapshots out")
        return math.sqrt(self.d_model) * self.n_tokens / norms_K

    def means(self) -> np.ndarray:
        """(K, D) float64: mean raw activation of each snapshot."""
        sums = [np.sum([s.column_sums for s in self._of_snapshot(k)], axis=0) for k in range(self.n_snapshots)]
        return np.stack(sums) / self.n_tokens

    def verify(self) -> None:
        """Read everything and compare all checksums. Raises `DataError` naming the first damaged file and block."""
        self.require_complete()
        for shard in range(len(self.shard_rows)):
            self.tokens(shard)
            for k in range(self.n_snapshots):
                self.segment(shard, k).verify()

    def _of_snapshot(self, k: int) -> list[Segment]:
        return [self.segment(shard, k) for shard in range(len(self.shard_rows))]

    def _token_path(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}" / "tokens.seg"

    def _segment_path(self, shard: int, k: int) -> Path:
        return self.path / f"shard-{shard:05d}" / f"snapshot-{k:03d}.seg"

    def _check_shape(self, shard: int, shape: Sequence[int], width: int) -> None:
        wanted = (self.shard_rows[shard], width)
        if tuple(shape) != wanted:
            raise DataError(f"{self.path}: shard {shard} needs rows of shape {wanted}, got {tuple(shape)}")


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    def counts(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    rows, names = manifest.get("shard_rows"), manifest.get("snapshots")
    problems = {
        "n_snapshots": counts(manifest.get("n_snapshots")),
        "d_model": counts(manifest.get("d_model")),
        "dtype": manifest.get("dtype") in DTYPES,
        "byte_order": manifest.get("byte_order") == "little",
        "shard_rows": isinstance(rows, list) and bool(rows) and all(counts(count) for count in rows),
        "snapshots": isinstance(names, list)
        and len(names) == manifest.get("n_snapshots")
        and all(isinstance(name, str) for name in names),
        "source": isinstance(manifest.get("source"), dict),
    }
    wrong = [key for key, fine in problems.items() if not fine]
    if wrong:
        raise DataError(f"{file} is malformed: bad {', '.join(wrong)}; restore it or collect again")
