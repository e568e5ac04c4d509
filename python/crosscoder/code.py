"""The sparse code: which features are on for which token, how strongly, and at which snapshots.

Letters: B tokens, K snapshots, F features, N non-zero (token, feature) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.errors import DataError
from crosscoder.inputs import as_tensor


@dataclass(frozen=True)
class SparseCode:
    """N pairs (token, feature), token by token, features ascending within a token (docs/method.md, section 1).

    A feature has the same value at every snapshot where its gate is open, so a pair is a value and K bits.
    """

    row_offsets: Tensor
    """(B + 1,) int64: the pairs of token b are `row_offsets[b]` to `row_offsets[b + 1]`."""
    features: Tensor
    """(N,) int32: feature of each pair."""
    values: Tensor
    """(N,) floating point: h of each pair, always positive."""
    gates: Tensor
    """(N,) int64: bit k is set iff the gate is open at snapshot k (never 0)."""
    n_snapshots: int
    """K."""
    n_features: int
    """F."""

    @property
    def n_tokens(self) -> int:
        """B."""
        return self.row_offsets.numel() - 1

    @property
    def n_pairs(self) -> int:
        """N."""
        return self.features.numel()

    def rows(self) -> Tensor:
        """(N,) int64: token of each pair."""
        counts = self.row_offsets.diff()
        return torch.repeat_interleave(torch.arange(self.n_tokens, device=counts.device), counts)

    def open_gates(self) -> Tensor:
        """(N, K) bool: the gates' bits."""
        bits = torch.arange(self.n_snapshots, device=self.gates.device)
        return (self.gates[:, None] >> bits) & 1 != 0

    def to_dense(self) -> Tensor:
        """(B, K, F): the activation of each feature at each snapshot, 0 where its gate is closed."""
        dense_BKF = self.values.new_zeros(self.n_tokens, self.n_snapshots, self.n_features)
        dense_BKF[self.rows(), :, self.features.long()] = self.values[:, None] * self.open_gates()
        return dense_BKF

    @classmethod
    def from_pairs(
        cls, rows_N: Tensor, features_N: Tensor, values_N: Tensor, open_NK: Tensor, shape: torch.Size
    ) -> SparseCode:
        """The code of the given pairs, sorted by (row, feature); `shape` is (B, F).

        Raises `DataError` if K is over 64.
        """
        return cls(
            row_offsets=offsets_of(rows_N, shape[0]),
            features=features_N.to(torch.int32),
            values=values_N,
            gates=pack_gates(open_NK),
            n_snapshots=open_NK.shape[1],
            n_features=shape[1],
        )

    def checked(self, device: torch.device, dtype: torch.dtype) -> SparseCode:
        """The same code with its tensors on `device` and contiguous, its values in `dtype`; numpy arrays are converted.

        Raises `DataError` where it is no sparse code; on a CPU also by its numbers, for which a GPU would be waited.
        """
        kinds = {"row_offsets": torch.int64, "features": torch.int32, "values": dtype, "gates": torch.int64}
        parts = {}
        for name, kind in kinds.items():
            part = as_tensor(getattr(self, name), f"{name} of a sparse code")
            if part.ndim != 1 or part.is_floating_point() != kind.is_floating_point or part.is_complex():
                numbers = "floating-point" if kind.is_floating_point else "whole"
                raise DataError(f"{name} of a sparse code must be a row of {numbers} numbers, not {_described(part)}")
            parts[name] = part.to(device, kind).contiguous()
        offsets, features = parts["row_offsets"], parts["features"]
        good = len(offsets) > 0 and len(features) == len(parts["values"]) == len(parts["gates"])
        if good and device.type == "cpu":
            good = int(offsets[0]) == 0 and int(offsets[-1]) == len(features) and bool((offsets.diff() >= 0).all())
            good = good and bool(((features >= 0) & (features < self.n_features)).all())
        if not good:
            raise DataError(
                "not a sparse code: row_offsets must ascend from 0 to the number of pairs, each pair must have a "
                f"feature from 0 to {self.n_features - 1}, a value and gates"
            )
        return SparseCode(**parts, n_snapshots=self.n_snapshots, n_features=self.n_features)

    def column(self, k: int) -> Tensor:
        """(B, F): the activations at snapshot k, densely."""
        open_N = (self.gates >> k) & 1 != 0
        dense_BF = self.values.new_zeros(self.n_tokens, self.n_features)
        dense_BF[self.rows(), self.features.long()] = torch.where(open_N, self.values, 0.0)
        return dense_BF


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def pack_gates(open_NK: Tensor) -> Tensor:
    """(N, K) bool gates as (N,) int64 bits. Raises `DataError` if K is over 64."""
    n_snapshots = open_NK.shape[1]
    if n_snapshots > 64:
        raise DataError(f"a sparse code holds the gates of at most 64 snapshots, not {n_snapshots}")
    # Bit 63 is the sign: shifting 1 by 63 gives the smallest int64, and the sum of distinct bits never overflows.
    bits_K = torch.ones((), dtype=torch.int64, device=open_NK.device) << torch.arange(
        n_snapshots, device=open_NK.device
    )
    return (open_NK * bits_K).sum(dim=1)


def offsets_of(rows: Tensor, n_rows: int) -> Tensor:
    """(n_rows + 1,) int64 offsets of sorted row numbers `rows` (N,)."""
    counts = torch.bincount(rows, minlength=n_rows)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
