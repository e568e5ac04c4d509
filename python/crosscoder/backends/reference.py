"""Dense torch on any device, in any floating dtype: what the fast backends must agree with.

Code, reconstruction and loss are the definition's, the training step is the closed form's (`README.md`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crosscoder import definition
from crosscoder.backends.adam_state import MATRICES, AdamState, dequantize_m, dequantize_v, quantize_m, quantize_v
from crosscoder.backends.base import Backend, Room, SparsePass, StepSettings, Training, Update
from crosscoder.backends.closed_form import Gradients
from crosscoder.code import SparseCode
from crosscoder.config import TrainConfig
from crosscoder.kernels.decode import reference as decode_reference
from crosscoder.kernels.encode import reference as encode_reference
from crosscoder.kernels.update.reference import adam
from crosscoder.parameters import Weights
from crosscoder.penalty import LossSettings, LossTerms

TILE = 4096


class ReferenceBackend(Backend):
    """Derives nothing that it keeps."""

    name = "reference"

    @classmethod
    def fits(cls, weights: Weights) -> str | None:
        """None: whatever torch computes with."""
        return None

    def encode(self, weights: Weights, x_BKD: Tensor, candidates: str = "exact") -> SparseCode:
        """The code of activations."""
        h_BF, gate = definition.preactivations(weights, x_BKD), weights.gate
        return encode_reference.encode(h_BF, weights.norms(), weights.theta(gate, h_BF.dtype), gate)

    def decode(self, weights: Weights, code: SparseCode) -> Tensor:
        """The reconstruction of a code."""
        dtype = code.values.dtype
        return decode_reference.decode(code, weights.W_dec.to(dtype), weights.b_dec.to(dtype))

    def loss(self, weights: Weights, x_BKD: Tensor, settings: LossSettings) -> LossTerms:
        """The definition's, differentiated by autograd."""
        return definition.loss(weights, x_BKD, settings)

    def training(self, weights: Weights, config: TrainConfig, state: AdamState) -> Training:
        """Dense steps."""
        return ReferenceTraining(state)


class TorchVectors:
    """Adam on the small vectors in torch, for the backends whose host knows every step's outcome."""

    def __init__(self, state: AdamState) -> None:
        self.state = state

    def input(self, weights: Weights, x_BKD: Tensor) -> Tensor:
        """In the weights' dtype or float32."""
        return weights.input(x_BKD)

    def update_vector(self, weights: Weights, name: str, gradient: Tensor, lr: float, update: Update) -> None:
        """torch.optim.Adam's step."""
        parameter, moments = getattr(weights, name), self.state[name]
        w = parameter.to(moments["m"].dtype)
        adam(w, moments["m"], moments["v"], gradient.to(w.dtype) * update.scale, lr=lr, t=update.t)
        parameter.copy_(w)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Nothing."""
        return iter(())


class ReferenceTraining(TorchVectors):
    """Adam in dense torch, on the closed form's gradients."""

    dense_above = -1.0

    def tile(self, n_tokens: int) -> int:
        return TILE

    def sparse_pass(
        self, weights: Weights, x_BKD: Tensor, settings: StepSettings, max_density: float, room: Room | None
    ) -> SparsePass | None:
        """None: every step is dense."""
        return None

    def squares(self, weights: Weights, batch: SparsePass) -> Tensor:
        raise NotImplementedError("the reference has no sparse pass")

    def update(self, weights: Weights, batch: SparsePass, update: Update) -> None:
        raise NotImplementedError("the reference has no sparse pass")

    def finish(self, weights: Weights, db_enc_F: Tensor, fired_F: Tensor, update: Update) -> None:
        """Everything is done."""

    def update_tile(
        self, weights: Weights, features: slice, gradients: Gradients, fired_F: Tensor, update: Update
    ) -> None:
        """Adam on the rows of some features that have a gradient, or, unless lazy, on all of them."""
        touched_T = fired_F[features] > 0
        if update.everywhere or not update.lazy:
            touched_T = torch.ones_like(touched_T)
        if features.start == 0:  # the noise goes on from one tile to the next
            self._generator = torch.Generator().manual_seed(update.settings.seed)
        rows = touched_T.nonzero().squeeze(1)
        all_rows = rows + features.start
        elapsed_n = update.t - self.state.last_step_F[all_rows]
        for name in (*MATRICES, "b_enc"):
            parameter, moments = getattr(weights, name), self.state[name]
            gradient = getattr(gradients, name)[rows] * update.scale
            elapsed = elapsed_n.to(gradient.dtype).view(-1, *(1,) * (gradient.ndim - 1))
            w = parameter[all_rows].to(gradient.dtype)
            eight_bit = "m_scale" in moments
            m, v = moments["m"][all_rows], moments["v"][all_rows]
            if eight_bit:
                m = dequantize_m(m, moments["m_scale"][all_rows])
                v = dequantize_v(v, moments["v_scale"][all_rows])
            adam(w, m, v, gradient, lr=update.settings.lr, t=update.t, elapsed=elapsed)
            if eight_bit:
                noise = torch.rand(m.shape, generator=self._generator, dtype=torch.float32).to(m.device)
                m, moments["m_scale"][all_rows] = quantize_m(m, noise)
                v, moments["v_scale"][all_rows] = quantize_v(v, noise)
                w = _round_stochastically(w, self._generator)
            moments["m"][all_rows], moments["v"][all_rows] = m, v
            parameter[all_rows] = w.to(parameter.dtype)
        self.state.last_step_F[all_rows] = update.t
        if update.norm_limit is not None:
            rows_nKD = weights.W_dec[all_rows]
            largest_n = torch.linalg.vector_norm(rows_nKD.to(gradients.W_dec.dtype), dim=2).amax(dim=1)
            factor_n = (update.norm_limit / largest_n).clamp_max(1)
            weights.W_dec[all_rows] = (rows_nKD * factor_n[:, None, None]).to(rows_nKD)


def _round_stochastically(w: Tensor, generator: torch.Generator) -> Tensor:
    """bfloat16, up or down so that the mean is `w`."""
    low = torch.randint(0, 1 << 16, w.shape, generator=generator, dtype=torch.int32).to(w.device)
    return ((w.float().view(torch.int32) + low) & ~0xFFFF).view(torch.float32).bfloat16()
