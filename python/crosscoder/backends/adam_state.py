"""Adam's moments of a crosscoder's parameters, in float32 or in 8 bits.

"fp32": two float32 numbers a parameter. "low-memory": W_enc and W_dec have 8-bit moments in blocks of at most
`BLOCK` neighbours of one (feature, snapshot), with a float32 scale a block:

    m = scale * q |q| / 127^2, q int8        sqrt(v) = scale * q^2 / 255^2, q uint8

(the square keeps small numbers apart: a block spans a factor of 16,129, or 65,025 in sqrt(v)). Rounding is stochastic,
since a moment that moves by a thousandth a step would otherwise stand still: up or down so that the mean of m and of
sqrt(v), not that of q, is what was rounded; one random number decides for both, so that their quotient, the step, keeps
its size. Only a sqrt(v) below the smallest number of its block is always raised to it, lest it become 0. All other
parameters are small and stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crosscoder.parameters import PARAMETERS, Weights

BLOCK = 256
"""Neighbours along D that share a scale."""
MATRICES = ("W_enc", "W_dec")


class AdamState:
    """The moments by name: `self[name]` is `{"m": ..., "v": ...}`, with `m_scale` and `v_scale` where in 8 bits.

    `last_step_F` (F,) int32 is Adam's t at the last update of a feature's rows (0: never), for the decay of the
    moments over the steps that the row-lazy mode skipped.
    """

    def __init__(self, weights: Weights, kind: str) -> None:
        self.kind = kind
        self._moments: dict[str, dict[str, Tensor]] = {}
        for name in PARAMETERS:
            parameter: Tensor = getattr(weights, name)
            if kind == "low-memory" and name in MATRICES:
                self._moments[name] = _eight_bit(parameter)
            else:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                self._moments[name] = {key: torch.zeros_like(parameter.detach(), dtype=dtype) for key in ("m", "v")}
        self.last_step_F = torch.zeros(len(weights.W_enc), dtype=torch.int32, device=weights.W_enc.device)

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        return self._moments[name]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything, under names for a checkpoint."""
        for name, moments in self._moments.items():
            for key, tensor in moments.items():
                yield f"{name}.{key}", tensor
        yield "last_step", self.last_step_F

    @torch.no_grad()
    def restart_rows(self, rows: Tensor, live_F: Tensor, step: int) -> None:
        """New features at `rows`: first moments 0, second moments the mean of the live features' (`live_F` bool)."""
        live = live_F.nonzero().squeeze(1)
        for name in ("W_enc", "W_dec", "b_enc", "log_threshold"):
            moments = self._moments[name]
            moments["m"][rows] = 0
            eight_bit = "m_scale" in moments
            total = moments["v"].new_zeros(moments["v"].shape[1:], dtype=None if not eight_bit else torch.float32)
            for some in torch.split(live, 1024):  # never a copy of everything
                v = moments["v"][some]
                total += (dequantize_v(v, moments["v_scale"][some]) if eight_bit else v).sum(dim=0)
            mean = total / max(1, len(live))
            if not eight_bit:
                moments["v"][rows] = mean
                continue
            moments["m_scale"][rows] = 0
            moments["v"][rows], moments["v_scale"][rows] = quantize_v(mean[None])
        self.last_step_F[rows] = step


def _eight_bit(parameter: Tensor) -> dict[str, Tensor]:
    F, K, D = parameter.shape
    scale = torch.zeros(F, K, -(-D // BLOCK), dtype=torch.float32, device=parameter.device)
    return {
        "m": torch.zeros_like(parameter, dtype=torch.int8),
        "m_scale": scale,
        "v": torch.zeros_like(parameter, dtype=torch.uint8),
        "v_scale": scale.clone(),
    }


def _spread(scale: Tensor, width: int) -> Tensor:
    """A block's scale for each of its elements: (..., blocks) to (..., D)."""
    return scale.repeat_interleave(BLOCK, dim=-1)[..., :width]


def _largest(magnitude: Tensor) -> Tensor:
    """(..., blocks): the largest element of each block."""
    padded = torch.nn.functional.pad(magnitude, (0, -magnitude.shape[-1] % BLOCK))
    return padded.view(*magnitude.shape[:-1], padded.shape[-1] // BLOCK, BLOCK).amax(dim=-1)


def dequantize_m(q: Tensor, scale: Tensor) -> Tensor:
    """First moments (..., D) float32."""
    signed = q.float()
    return _spread(scale, q.shape[-1]) * signed * signed.abs() / 127**2


def dequantize_v(q: Tensor, scale: Tensor) -> Tensor:
    """Second moments (..., D) float32."""
    return (_spread(scale, q.shape[-1]) * q.float() ** 2 / 255**2) ** 2


def quantize_m(m: Tensor, noise: Tensor | float = 0.5) -> tuple[Tensor, Tensor]:
    """8 bits and scales of first moments. `noise` is uniform in [0, 1); 0.5 rounds to nearest."""
    scale = _largest(m.abs())
    return (torch.sign(m) * _square_code(m.abs(), scale, 127, noise)).to(torch.int8), scale


def quantize_v(v: Tensor, noise: Tensor | float = 0.5) -> tuple[Tensor, Tensor]:
    """8 bits and scales of second moments; no code is 0, so that none becomes 0 by rounding."""
    root = v.sqrt()
    scale = _largest(root)
    return _square_code(root, scale, 255, noise).clamp_min(1).to(torch.uint8), scale


def _square_code(size: Tensor, scale: Tensor, levels: int, noise: Tensor | float) -> Tensor:
    """Whole q in [0, levels] with scale q^2 / levels^2 next to `size`, above or below, and `size` on average."""
    spread = _spread(scale, size.shape[-1])
    x = levels**2 * torch.where(spread > 0, size / spread.clamp_min(1e-38), 0.0)
    below = x.sqrt().floor()
    gap = 2 * below + 1  # from one square to the next
    return (below + (x - below.square() + noise * gap >= gap)).clamp_max(levels)
