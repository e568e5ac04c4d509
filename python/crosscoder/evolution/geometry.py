"""Products of decoders in blocks of features, straight from memory-mapped bf16 weights where the CPU can.

Letters: F features, n features of a block, K snapshots, D width of one activation, P width padded to whole panels.

bf16 on a CPU with bf16 instructions goes through the C++ core: products of two bf16 numbers are exact in fp32, sums
are fp32, and nothing is widened in memory. Everything else goes through torch, in float32 (float64 if given so), on
the weights' device. A Gram matrix is symmetric, so both compute only the part at and above its diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crosscoder import _core
from crosscoder.errors import NonFiniteError
from crosscoder.evolution.checks import Decoders, checked_decoders, decoders_of, inverse
from crosscoder.kernels.arrays import n_threads

_BLOCK_BYTES = 1 << 26
_COLUMNS = 192


def blocks(W_dec: Tensor, block_bytes: int = _BLOCK_BYTES) -> Iterator[slice]:
    """Ranges of features whose decoders (F, K, D) take about `block_bytes`."""
    size = max(1, block_bytes // (W_dec[0].numel() * W_dec.element_size()))
    for start in range(0, len(W_dec), size):
        yield slice(start, min(start + size, len(W_dec)))


def is_native(W_dec: Tensor) -> bool:
    """Whether the C++ core takes these decoders: contiguous bf16 on a CPU with bf16 instructions."""
    on_cpu = W_dec.device.type == "cpu" and W_dec.dtype == torch.bfloat16
    return on_cpu and W_dec.is_contiguous() and _core.geometry_available()


@torch.no_grad()
def decoder_norms(W_dec: Decoders) -> Tensor:
    """(F, K) Euclidean norms of decoders (F, K, D), float32 (float64 if given so), on the CPU.

    Raises `DataError` for wrong shapes, `NonFiniteError` naming the first feature with NaN or infinity.
    """
    W_dec = decoders_of(W_dec)
    n_features, n_snapshots, _ = checked_decoders(W_dec)
    norms_FK = torch.empty(n_features, n_snapshots, dtype=_dtype(W_dec))
    for rows in blocks(W_dec):
        norms_FK[rows] = _norms(W_dec[rows])
        _require_finite(norms_FK[rows], rows.start)
    return norms_FK


def cosines(W_nKD: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """(n, K, K) float32 cosines between a block's snapshots, 0 with a decoder that is 0, and (n, K) norms; on the CPU.

    Raises `NonFiniteError` naming a feature, counted from `first`, with NaN or infinity.
    """
    n, n_snapshots, _ = W_nKD.shape
    if is_native(W_nKD):
        products = np.empty((n, n_snapshots, n_snapshots), dtype=np.float32)
        _core.snapshot_products(_bits(W_nKD), products, n_threads())
        products_nKK = torch.from_numpy(products)
        norm_nK = products_nKK.diagonal(dim1=1, dim2=2).sqrt()
        _require_finite(norm_nK, first)
        one_over = inverse(norm_nK)
        cosines_nKK = products_nKK.mul_(one_over[:, :, None]).mul_(one_over[:, None, :])
    else:
        w_nKD = W_nKD.to(_dtype(W_nKD))
        norm_nK = torch.linalg.vector_norm(w_nKD, dim=2)
        _require_finite(norm_nK, first)
        unit_nKD = w_nKD * inverse(norm_nK)[:, :, None]
        cosines_nKK = torch.bmm(unit_nKD, unit_nKD.transpose(1, 2)).to("cpu", torch.float32)
    return cosines_nKK.clamp_(-1, 1), norm_nK.cpu()


class Grams(Protocol):
    """W_k^T W_k of each snapshot, and the quadratic forms w^T (W_k^T W_k) w."""

    def add(self, W_nKD: Tensor) -> None:
        """Add a block of features."""

    def close(self) -> None:
        """After the last block. Raises `NonFiniteError` naming a snapshot with NaN or infinity."""

    def interference(self, W_nKD: Tensor) -> tuple[Tensor, Tensor]:
        """(n, K) sum_j (w_fk . w_jk)^2 / n_fk^2 over the features added, 0 for a decoder that is 0, and n_fk^2; on
        the CPU."""


def grams(W_dec: Tensor) -> Grams:
    """Empty Gram matrices for decoders like these."""
    _, n_snapshots, width = checked_decoders(W_dec)
    if is_native(W_dec):
        return _NativeGrams(n_snapshots, width)
    return _TorchGrams(n_snapshots, width, _dtype(W_dec), W_dec.device)


class _NativeGrams:
    """In C++; a Gram matrix is read as two bf16 numbers an element, so a form is exact to about 2^-16 of its terms."""

    def __init__(self, n_snapshots: int, width: int) -> None:
        padded = _core.padded_width(width)
        self._width = width
        self._grams = np.zeros((n_snapshots, padded, padded), dtype=np.float32)
        self._forms = np.zeros((n_snapshots, 0), dtype=np.uint16)

    def add(self, W_nKD: Tensor) -> None:
        _core.add_grams(_bits(W_nKD), self._grams, n_threads())

    def close(self) -> None:
        for k, gram in enumerate(self._grams):
            _require_finite_gram(bool(np.isfinite(np.trace(gram))), k)
        self._forms = np.stack([_core.pack_form(gram, self._width) for gram in self._grams])

    def interference(self, W_nKD: Tensor) -> tuple[Tensor, Tensor]:
        forms = np.empty(W_nKD.shape[:2], dtype=np.float32)
        squares = np.empty_like(forms)
        _core.quadratic_forms(_bits(W_nKD), self._forms, forms, n_threads())
        _core.squared_norms(_bits(W_nKD), squares, n_threads())
        square_nK = torch.from_numpy(squares)
        return torch.from_numpy(forms) * inverse(square_nK), square_nK


class _TorchGrams:
    """In torch, in bands of columns: of each band only the rows down to its own diagonal."""

    def __init__(self, n_snapshots: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._grams = torch.zeros(n_snapshots, width, width, dtype=dtype, device=device)
        self._bands = [slice(start, min(start + _COLUMNS, width)) for start in range(0, width, _COLUMNS)]

    def add(self, W_nKD: Tensor) -> None:
        for k, gram_DD in enumerate(self._grams):
            w_nD = W_nKD[:, k].to(gram_DD.dtype)
            for band in self._bands:
                gram_DD[: band.stop, band].addmm_(w_nD[:, : band.stop].T, w_nD[:, band])

    def close(self) -> None:
        for k, gram_DD in enumerate(self._grams):
            _require_finite_gram(bool(gram_DD.diagonal().sum().isfinite()), k)
            # Both triangles in one: twice what lies above the diagonal.
            gram_DD.copy_(gram_DD.triu() + gram_DD.triu(1))

    def interference(self, W_nKD: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.zeros(W_nKD.shape[:2], dtype=self._grams.dtype)
        squares = torch.zeros_like(found)
        for k, gram_DD in enumerate(self._grams):
            w_nD = W_nKD[:, k].to(gram_DD.dtype)
            norm_n = torch.linalg.vector_norm(w_nD, dim=1)
            unit_nD = w_nD * inverse(norm_n)[:, None]
            for band in self._bands:
                band_nD = unit_nD[:, : band.stop] @ gram_DD[: band.stop, band]
                found[:, k] += torch.linalg.vecdot(band_nD, unit_nD[:, band]).cpu()
            squares[:, k] = norm_n.square().cpu()
        return found, squares


def _dtype(W_dec: Tensor) -> torch.dtype:
    return torch.float64 if W_dec.dtype == torch.float64 else torch.float32


def _bits(W_nKD: Tensor) -> NDArray[np.uint16]:
    bits: NDArray[np.uint16] = W_nKD.detach().view(torch.uint16).numpy()
    return bits


def _norms(W_nKD: Tensor) -> Tensor:
    if not is_native(W_nKD):
        norm_nK: Tensor = torch.linalg.vector_norm(W_nKD, dim=2, dtype=_dtype(W_nKD)).cpu()
        return norm_nK
    squares = np.empty(W_nKD.shape[:2], dtype=np.float32)
    _core.squared_norms(_bits(W_nKD), squares, n_threads())
    return torch.from_numpy(squares).sqrt_()


def _require_finite(norm_nK: Tensor, first: int) -> None:
    if not bool(norm_nK.isfinite().all()):
        feature = first + int((~norm_nK.isfinite()).any(dim=1).nonzero()[0])
        raise NonFiniteError(f"the decoder of feature {feature} holds NaN or infinity")


def _require_finite_gram(finite: bool, k: int) -> None:
    if not finite:
        raise NonFiniteError(f"the decoder of snapshot {k} holds NaN or infinity (or overflows its square)")
