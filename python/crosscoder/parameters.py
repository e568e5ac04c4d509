"""A crosscoder's tensors and options as the backends take them.

Letters: B tokens, K snapshots, D width of one activation, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.config import CrosscoderConfig
from crosscoder.errors import DataError
from crosscoder.gate import Gate
from crosscoder.inputs import Array, as_tensor
from crosscoder.precision import full_precision

BATCH_THRESHOLD_DECAY = 0.9
"""Of the running mean over batches: about twenty count, so that it lags ten steps behind weights that change."""
PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec", "log_threshold")


@dataclass
class Writes:
    """A count of the writes that torch's own counters may have missed."""

    count: int = 0


@dataclass(frozen=True, eq=False)
class Weights:
    """The tensors of one crosscoder (not copies), and what they mean."""

    config: CrosscoderConfig
    W_enc: Tensor
    """(F, K, D)."""
    W_dec: Tensor
    """(F, K, D)."""
    b_enc: Tensor
    """(F,)."""
    b_dec: Tensor
    """(K, D)."""
    log_threshold: Tensor
    """(F,)."""
    snapshot_scale: Tensor
    """(K,): ones, unless the crosscoder is folded for raw activations."""
    snapshot_mix: Tensor | None
    """(K, K), or None: the encoder reads activations as they are."""
    batch_threshold: Tensor
    """(): BatchTopK's threshold at inference."""
    training: bool
    """As `nn.Module.training`."""
    writes: Writes

    @property
    def gate(self) -> Gate:
        """The gate of a code."""
        return Gate.of(self.config, training=self.training)

    def theta(self, gate: Gate, dtype: torch.dtype = torch.float32) -> Tensor:
        """theta (F,): what strengths are compared with; for gates by rank it means nothing."""
        if gate.learned or gate.ranked:
            return self.log_threshold.detach().exp().to(dtype)
        return self.batch_threshold.to(dtype).expand(self.config.n_features).contiguous()

    def norms(self) -> Tensor:
        """n (F, K): a feature's strength at each snapshot, in units of scaled activations; at least float32."""
        dtype = torch.promote_types(self.W_dec.dtype, torch.float32)
        norms_FK: Tensor = torch.linalg.vector_norm(self.W_dec, dim=2, dtype=dtype) * self.snapshot_scale
        return norms_FK

    def check(self, x_BKD: Tensor) -> None:
        """Raises `DataError` for activations that are not (B, K, D) or no floating-point numbers."""
        expected = (self.config.n_snapshots, self.config.d_model)
        if x_BKD.ndim != 3 or x_BKD.shape[1:] != expected:
            raise DataError(
                f"expected activations of shape (tokens, {expected[0]} snapshots, width {expected[1]}), "
                f"got {tuple(x_BKD.shape)}; is the crosscoder of other snapshots or another model?"
            )
        if not x_BKD.is_floating_point():
            raise DataError(f"activations must be floating point, not {x_BKD.dtype}")

    def input(self, x_BKD: Tensor | Array) -> Tensor:
        """`x_BKD` in the weights' dtype or float32, on their device. Raises as `check` and `inputs.as_tensor`."""
        x_BKD = as_tensor(x_BKD)
        self.check(x_BKD)
        return x_BKD.to(self.W_enc.device, torch.promote_types(self.W_enc.dtype, torch.float32))

    def encoder_input(self, x_BKD: Tensor) -> Tensor:
        """What the encoder reads for activations (B, K, D): themselves, unless they are mixed over the snapshots, which
        makes them float32 at least."""
        return x_BKD if self.snapshot_mix is None else mixed(self.snapshot_mix, x_BKD)

    def score_sums(self, x_sum_KD: Tensor, n_tokens: int) -> Tensor:
        """sum_b h_b,f (F,) float32 over all tokens, from the sum of what the encoder reads; rows a few at a time."""
        W_FC = self.W_enc.detach().flatten(1)
        rows = 1024 if W_FC.dtype != torch.float32 or W_FC.device.type == "cpu" else max(1, len(W_FC))
        parts = [some.float() @ x_sum_KD.flatten() for some in torch.split(W_FC, rows)]
        return torch.cat(parts) + n_tokens * self.b_enc.detach().float()

    @torch.no_grad()
    def update_batch_threshold(self, smallest: Tensor) -> None:
        """BatchTopK's running mean of the smallest score kept: its threshold at inference until one is calibrated."""
        start = self.batch_threshold == 0
        mean = BATCH_THRESHOLD_DECAY * self.batch_threshold + (1 - BATCH_THRESHOLD_DECAY) * smallest
        self.batch_threshold.copy_(torch.where(start, smallest, mean))

    # ------------------------------------------------------------------------------------------- who wrote them

    def state(self) -> tuple[int, ...] | None:
        """Numbers that differ after every write to W_enc or W_dec; None while a write could go unnoticed.

        torch counts the writes to a tensor (`_version`), and a new tensor lies at another address. Some of its fused
        optimisers do not count: so a backward pass counts as a write, and while there are gradients nothing is taken
        for unchanged. What escapes is a write through `.data` in place: call `Crosscoder.weights_changed` after it.
        """
        if self.W_enc.grad is not None or self.W_dec.grad is not None:
            return None
        if self.W_enc.is_inference() or self.W_dec.is_inference():  # whose writes are not counted
            return None
        of_tensors = (n for tensor in (self.W_enc, self.W_dec) for n in (tensor.data_ptr(), tensor._version))
        return (*of_tensors, self.writes.count)

    @torch.no_grad()
    def written(self) -> None:
        """A kernel has written W_enc and W_dec past torch: count it."""
        for matrix in (self.W_enc, self.W_dec):
            matrix[:0].zero_()


def mixed(mix_KK: Tensor, x_BKD: Tensor) -> Tensor:
    """sum_l mix[k, l] x[b, l, d] (B, K, D), in float32 or the wider dtype of `x_BKD`.

    Never in 16 bits: a mix that whitens takes differences of numbers ten times as large.
    """
    dtype = torch.promote_types(x_BKD.dtype, torch.float32)
    with full_precision(x_BKD.device):
        return mix_KK.to(x_BKD.device, dtype) @ x_BKD.to(dtype)
