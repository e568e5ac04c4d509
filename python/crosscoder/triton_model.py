"""A crosscoder's code and reconstruction on a GPU, from the Triton operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from crosscoder.code import SparseCode
from crosscoder.kernels.decode.triton import decode as triton_decode
from crosscoder.kernels.encode.triton import Gate, encoder_weights
from crosscoder.kernels.encode.triton import encode as triton_encode

if TYPE_CHECKING:
    from crosscoder.model import Crosscoder


def encode(model: Crosscoder, x_BKD: Tensor) -> SparseCode:
    """The code of a batch (B, K, D). What is derived from the weights is made anew at every call."""
    config = model.config
    kind, theta_F = config.gate, model.threshold.float()
    if kind == "batchtopk" and not model.training:
        kind, theta_F = "scaled", model.batch_threshold.float().expand(config.n_features).contiguous()  # type: ignore[assignment]
    norms_FK = model.decoder_norms().float()
    weights = encoder_weights(model.W_enc, model.b_enc.float(), norms_FK, theta_F)
    return triton_encode(model.encoder_input(x_BKD), weights, Gate(kind, top_k=config.top_k or 0))[0]


def decode(model: Crosscoder, code: SparseCode) -> Tensor:
    """The reconstruction (B, K, D) float32."""
    return triton_decode(code, model.W_dec, model.b_dec)
