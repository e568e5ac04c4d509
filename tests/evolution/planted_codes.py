"""Planted activations with the code that made them, which `PlantedDictionary.sample` does not tell."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.code import SparseCode
from crosscoder.evolution.planted import PlantedDictionary


def planted_tokens(truth: PlantedDictionary, n_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations (B, K, D) and true feature activations (B, T), float32."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_tokens, truth.config.n_features)
    fires = torch.rand(shape, generator=generator) < torch.from_numpy(truth.rates).float()
    a_BT = fires * (torch.randn(shape, generator=generator) * 0.3).exp()
    x_BKD = torch.einsum("bt,tkd->bkd", a_BT, truth.decoders())
    return x_BKD + truth.config.noise * torch.randn(x_BKD.shape, generator=generator), a_BT


def code_of(a_BT: Tensor, present_TK: Tensor) -> SparseCode:
    """The code of activations (B, T), with gates open where `present_TK`."""
    row_N, feature_N = a_BT.nonzero(as_tuple=True)
    return SparseCode.from_pairs(row_N, feature_N, a_BT[row_N, feature_N], present_TK[feature_N], a_BT.shape)
