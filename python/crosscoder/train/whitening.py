"""The encoder's coordinates while it is trained: activations whitened over the snapshots.

Neighbouring snapshots are almost copies of each other, so what tells a late feature from the rest lies in small
differences that gradient descent on raw activations finds last. Mixing the encoder's input with the inverse square
root of the snapshots' covariance makes these differences as large as what all snapshots share. It costs K / F of the
encoder's product, and the trained crosscoder is an ordinary one: the mix is multiplied into its encoder in the end
(docs/method.md, section 6, and docs/numerics.md for what it gains).
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.model import Crosscoder
from crosscoder.parameters import mixed
from crosscoder.precision import full_precision

RIDGE = 0.01
"""Added to the covariance, as a share of its mean eigenvalue: directions below it are noise."""


@torch.no_grad()
def whitening_mix(x_BKD: Tensor) -> Tensor:
    """(K, K) float64: (A + ridge)^(-1/2), A the snapshots' covariance E<x_k - mean, x_l - mean> over the tokens
    `x_BKD`, scaled to a mean eigenvalue of 1. The identity where they do not vary, or are not finite."""
    K = x_BKD.shape[1]
    centred_BKD = x_BKD - x_BKD.mean(dim=0)
    by_snapshot = centred_BKD.transpose(0, 1).flatten(1)
    with full_precision(x_BKD.device):
        covariance_KK = (by_snapshot @ by_snapshot.T).double()
    mean = covariance_KK.diagonal().mean()
    if not len(x_BKD) or not bool(torch.isfinite(covariance_KK).all()) or not float(mean) > 0:
        return torch.eye(K, dtype=torch.float64, device=x_BKD.device)
    values_K, vectors_KK = torch.linalg.eigh(covariance_KK / mean)
    mix_KK: Tensor = (vectors_KK * (values_K.clamp_min(0) + RIDGE).rsqrt()) @ vectors_KK.T
    return mix_KK


def whiten(model: Crosscoder, x_BKD: Tensor) -> None:
    """Let the encoder of `model` read whitened activations, from a sample (B, K, D); it computes what it did."""
    if model.config.n_snapshots > 1:
        model.set_snapshot_mix(whitening_mix(model.weights().input(x_BKD)))


def matched_encoder(model: Crosscoder, W_dec_nKD: Tensor) -> Tensor:
    """Encoder rows (n, K, D), in the model's coordinates, for features with the decoder rows `W_dec_nKD`.

    The matched filter: the direction that tells the feature best from activations with the snapshots' covariance, as
    long as W_dec is along itself. Without a mix it is W_dec.
    """
    if not model.is_mixed:
        return W_dec_nKD
    rows_nKD = mixed(model.snapshot_mix, W_dec_nKD)
    along_n = (mixed(model.snapshot_mix, rows_nKD) * W_dec_nKD).sum(dim=(1, 2))
    return rows_nKD * (W_dec_nKD.square().sum(dim=(1, 2)) / along_n)[:, None, None]
