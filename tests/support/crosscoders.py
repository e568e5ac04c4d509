"""Crosscoders, batches and codes of any shape; the same crosscoder in float64, and how far two tensors are apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from crosscoder import Crosscoder, CrosscoderConfig
from crosscoder.code import SparseCode

NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "log_threshold")
SHAPES = [(63, 1, 7, 50), (33, 3, 16, 1000), (17, 32, 5, 41), (9, 33, 3, 31), (5, 64, 2, 70)]
RANKED = ("topk", "batchtopk")
GATES = ("snapshot", "shared", *RANKED)


def make(
    shape: tuple[int, int, int, int],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shift: float = 0.0,
    device: torch.device | str = "cpu",
    **options: Any,
) -> tuple[Crosscoder, Tensor]:
    """A crosscoder whose norms, thresholds and biases all differ, and a batch (B, K, D), float64 if `dtype` is.

    `shape` is (B, K, D, F); `shift` is added to b_enc, so that more features fire, or fewer.
    """
    B, K, D, F = shape
    if options.get("gate") in RANKED:
        options.setdefault("top_k", min(6, F))
    generator = torch.Generator().manual_seed(seed)
    model = Crosscoder(CrosscoderConfig(K, D, F, **options), seed=seed)
    with torch.no_grad():
        model.W_dec *= torch.rand(F, K, 1, generator=generator) + 0.3
        model.W_enc += 0.1 * torch.randn(model.W_enc.shape, generator=generator)
        model.b_enc += 0.1 * torch.randn(F, generator=generator) + shift
        model.b_dec += 0.1 * torch.randn(K, D, generator=generator)
        model.log_threshold += 0.5 * torch.randn(F, generator=generator)
    x_BKD = torch.randn(B, K, D, generator=generator)
    return model.to(device, dtype), x_BKD.to(device, torch.promote_types(dtype, torch.float32))


def double(model: Crosscoder) -> Crosscoder:
    """The same numbers in float64, on the same device."""
    copy = Crosscoder(model.config).to(model.W_enc.device).double()
    copy.load_state_dict(model.state_dict())
    return copy.train(model.training)


def double_code(code: SparseCode) -> SparseCode:
    """The same code with values in float64."""
    return dataclasses.replace(code, values=code.values.double())


def relative_error(actual: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """Largest difference as a share of the largest expected element, or of `floor` where that is larger."""
    if not expected.numel():
        return 0.0
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(floor))


def random_code(
    shape: tuple[int, int, int], density: float, seed: int, spare: int = 0, device: torch.device | str = "cpu"
) -> SparseCode:
    """Any code (B, K, F); its buffers are `spare` longer than its pairs, and filled with what must not be used."""
    B, K, F = shape
    generator = torch.Generator().manual_seed(seed)
    on_BF = torch.rand(B, F, generator=generator) < density
    rows, features = on_BF.nonzero(as_tuple=True)
    n = len(rows)
    open_NK = torch.rand(n, K, generator=generator) < 0.6
    open_NK[torch.arange(n), torch.randint(K, (n,), generator=generator)] = True
    code = SparseCode.from_pairs(rows, features, torch.rand(n, generator=generator) + 0.1, open_NK, torch.Size((B, F)))

    def extend(values: Tensor, filler: float) -> Tensor:
        return torch.cat([values, values.new_full((spare,), filler)]).to(device)

    return SparseCode(
        code.row_offsets.to(device), extend(code.features, 0), extend(code.values, float("nan")),
        extend(code.gates, 0), K, F,
    )  # fmt: skip


def trimmed(code: SparseCode) -> SparseCode:
    """Without what is beyond the last pair."""
    n = int(code.row_offsets[-1])
    return SparseCode(
        code.row_offsets, code.features[:n], code.values[:n], code.gates[:n], code.n_snapshots, code.n_features
    )
