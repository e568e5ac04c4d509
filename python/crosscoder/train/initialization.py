"""The start of training, from a sample of activations: the decoders' norm, and thresholds where they are calibrated.

A fresh crosscoder has one direction d_f a feature, the same in all snapshots, and W_enc = W_dec = n d. So with
u_b,f = sum_k <x_b,k, d_f> everything depends on a = n^2 alone: h n = a u, and x^_b,k = a sum_f u_b,f 1[a u > theta]
d_f, the same at every snapshot. The searches below need one (B, F) x (F, D) product a candidate, whatever K is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from crosscoder.config import TrainConfig
from crosscoder.errors import DataError
from crosscoder.gate import Gate
from crosscoder.kernels.encode.reference import open_features
from crosscoder.model import Crosscoder

SMALLEST_NORM = 0.02
RATIO = 1.25
CANDIDATES = 24
SAMPLE_TOKENS = 512
TILE = 8192


def initialize(model: Crosscoder, x_BKD: Tensor, config: TrainConfig) -> None:
    """The start that `config` asks for, from a sample `x_BKD` (scaled activations) of a few hundred tokens."""
    if config.start == "calibrated" and Gate.of(model.config).learned:
        calibrate(model, x_BKD, config.start_l0)
    else:
        search_decoder_norm(model, x_BKD)


@torch.no_grad()
def search_decoder_norm(model: Crosscoder, x_BKD: Tensor) -> float:
    """Scale every decoder row of a fresh `model` to the norm with the smallest squared error on `x_BKD`.

    The paper's start (docs/method.md, section 4). The search is geometric, from 0.02 to about 3.4: a linear grid that
    starts at 0.1 misses the best for large K F. W_enc = W_dec afterwards. Returns the norm.
    """
    x_BKD = model.check_input(x_BKD[:SAMPLE_TOKENS])
    sum_BD = x_BKD.sum(dim=1)
    norms = [SMALLEST_NORM * RATIO**i for i in range(CANDIDATES)]
    # Squared error of x^ = a r, summed over the snapshots, up to a constant: K a^2 |r|^2 - 2 a <r, sum_k x_k>.
    reconstruction_CBD = torch.zeros(CANDIDATES, *sum_BD.shape, dtype=x_BKD.dtype, device=x_BKD.device)
    gate = Gate.of(model.config)
    for features, directions_TD, u_BT in _projections(model, sum_BD):
        if gate.ranked:  # which features are kept does not depend on a
            break
        theta_T = model.threshold[features].to(u_BT.dtype)
        for i, norm in enumerate(norms):
            open_BT = (norm**2 if gate.by_snapshot else norm) * u_BT > theta_T  # h = n u
            reconstruction_CBD[i] += torch.where(open_BT, u_BT, 0.0) @ directions_TD
    if gate.ranked:
        reconstruction_CBD += _ranked_reconstruction(model, sum_BD, gate)
    a_C = torch.tensor(norms, dtype=x_BKD.dtype, device=x_BKD.device) ** 2
    squares_C = reconstruction_CBD.square().sum(dim=(1, 2))
    errors_C = x_BKD.shape[1] * a_C**2 * squares_C - 2 * a_C * (reconstruction_CBD * sum_BD).sum(dim=(1, 2))
    best = norms[int(errors_C.argmin())]
    _set_norm(model, best)
    return best


@torch.no_grad()
def calibrate(model: Crosscoder, x_BKD: Tensor, l0: float) -> float:
    """Start with about `l0` active features a token: every feature fires on a share l0 / F of the sample.

    Thresholds are the quantiles of h n there, and the decoder norm is the best one for these gates, in closed form
    (the error is quadratic in a = n^2). At random initialisation half of all features would fire. Returns the norm.
    Raises `DataError` if the sample is empty or has no positive projections.
    """
    x_BKD = model.check_input(x_BKD[:SAMPLE_TOKENS])
    if not len(x_BKD):
        raise DataError("a calibrated start needs a sample of activations, this one is empty")
    sum_BD = x_BKD.sum(dim=1)
    share = min(0.5, l0 / model.config.n_features)
    reconstruction_BD = torch.zeros_like(sum_BD)
    quantiles = []
    for _, directions_TD, u_BT in _projections(model, sum_BD):
        cut_T = _quantile(u_BT, 1 - share).clamp_min(torch.finfo(u_BT.dtype).tiny)
        reconstruction_BD += torch.where(u_BT > cut_T, u_BT, 0.0) @ directions_TD
        quantiles.append(cut_T)
    squares = x_BKD.shape[1] * reconstruction_BD.square().sum()
    a = float((reconstruction_BD * sum_BD).sum() / squares.clamp_min(torch.finfo(squares.dtype).tiny))
    if not a > 0:
        raise DataError("a calibrated start needs activations that differ between tokens; these look constant")
    norm = math.sqrt(a)
    _set_norm(model, norm)
    unit = a if Gate.of(model.config).by_snapshot else norm
    model.log_threshold.copy_((unit * torch.cat(quantiles)).log())
    return norm


def _projections(model: Crosscoder, sum_BD: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tile by tile: its features, their directions (T, D), and u (B, T)."""
    for first in range(0, model.config.n_features, TILE):
        features = slice(first, first + TILE)
        rows_TD = model.W_dec[features, 0].to(sum_BD.dtype)
        directions_TD = rows_TD / torch.linalg.vector_norm(rows_TD, dim=1, keepdim=True)
        yield features, directions_TD, sum_BD @ directions_TD.T


def _ranked_reconstruction(model: Crosscoder, sum_BD: Tensor, gate: Gate) -> Tensor:
    parts = list(_projections(model, sum_BD))
    u_BF = torch.cat([u for _, _, u in parts], dim=1)
    ones_F = u_BF.new_ones(u_BF.shape[1])  # all norms are equal
    open_BF, _ = open_features(u_BF, ones_F[:, None], ones_F, gate)
    kept_BF = torch.where(open_BF, u_BF, 0.0)
    reconstruction: Tensor = sum(
        (kept_BF[:, features] @ directions for features, directions, _ in parts), torch.zeros_like(sum_BD)
    )
    return reconstruction


def _quantile(u_BT: Tensor, share: float) -> Tensor:
    """(T,): each column's quantile. The smallest of a sample of n stands for the share 1 / n and so on."""
    position = share * (len(u_BT) - 1)
    low = int(position)
    values_BT = u_BT.sort(dim=0).values
    high_T = values_BT[min(low + 1, len(u_BT) - 1)]
    return torch.lerp(values_BT[low], high_T, position - low)


def _set_norm(model: Crosscoder, norm: float) -> None:
    for first in range(0, model.config.n_features, TILE):
        rows = model.W_dec[first : first + TILE, :1].to(torch.promote_types(model.W_dec.dtype, torch.float32))
        scaled = rows * (norm / torch.linalg.vector_norm(rows, dim=2, keepdim=True))
        model.W_dec[first : first + TILE] = scaled.to(model.W_dec.dtype)
    model.W_enc.copy_(model.W_dec)
