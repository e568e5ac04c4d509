"""What a backend is, and what a training step takes and gives.

Letters: B tokens, K snapshots, D width of one activation, F features, T features of a tile, N pairs (token, feature).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from crosscoder.backends.adam_state import AdamState
from crosscoder.backends.closed_form import Gradients
from crosscoder.code import SparseCode
from crosscoder.config import TrainConfig
from crosscoder.parameters import PARAMETERS, Weights
from crosscoder.penalty import LossSettings, LossTerms
from crosscoder.sharding import ONE_PROCESS, Sharding

Room = Callable[[Tensor], int | None]
"""How many pairs a step's buffers hold, from the number (1,) int64 that may be on; None: too many, go the dense way."""


@dataclass(frozen=True)
class StepSettings:
    """What differs from one step to the next."""

    number: int
    """Steps done before this one; Adam's t is one more."""
    lr: float
    """Learning rate of the weights and biases."""
    threshold_lr: float
    """Learning rate of log_threshold."""
    sparsity_coefficient: float
    """lambda."""
    preactivation_coefficient: float
    """lambda_P."""
    seed: int
    """Of everything random in this step: the tokens of threshold_mode "sampled", stochastic rounding."""

    def loss(self) -> LossSettings:
        """The loss's share of it, with a fresh generator."""
        generator = torch.Generator().manual_seed(self.seed)
        return LossSettings(self.sparsity_coefficient, self.preactivation_coefficient, generator)


@dataclass(frozen=True)
class StepStatistics:
    """What one batch gives, before the update: its loss and the figures that the metrics are made of."""

    loss: LossTerms
    residual_BKD: Tensor
    """x^ - x."""
    open_K: Tensor
    """(K,) int64: open gates at each snapshot, over all tokens and features."""
    fired_F: Tensor
    """(F,) int64: tokens on which the feature was on at one snapshot or more."""
    smallest_score: Tensor | None = None
    """(): BatchTopK's smallest score kept."""
    gradient_norm: Tensor | None = None
    """(): Euclidean norm of the whole gradient, where it is clipped."""
    candidate_recall: Tensor | None = None
    """(): share of the active pairs of a few audited tokens that the int8 candidates had found."""


@dataclass(frozen=True)
class SparsePass:
    """One batch through the pairs that are on: its figures, and everything that its gradients are made of."""

    statistics: StepStatistics
    parts: Any
    """The backend's own: from them it makes the gradients of W_enc and W_dec."""
    db_enc_F: Tensor
    db_dec_KD: Tensor
    dlog_threshold_F: Tensor


@dataclass(frozen=True)
class Update:
    """One Adam step on the weights."""

    settings: StepSettings
    lazy: bool
    """Rows of W_enc, W_dec, b_enc without a gradient wait; their moments decay when they are next touched."""
    norm_limit: float | None
    """A feature's largest decoder norm afterwards is at most this."""
    factor: Tensor | None = None
    """() float64: the gradient is multiplied by this (clipping); None: by 1."""
    allowed: Tensor | None = None
    """(1,) int32: nothing changes where this is 0. None: it takes effect, as the host knows."""

    @property
    def t(self) -> int:
        """Adam's step, from 1."""
        return self.settings.number + 1

    @property
    def everywhere(self) -> bool:
        """Has every feature a gradient, whether it fired or not?"""
        return self.settings.preactivation_coefficient > 0

    @property
    def scale(self) -> float:
        """`factor` on the host."""
        return 1.0 if self.factor is None else float(self.factor)


class Training(Protocol):
    """A backend's part of the training of one crosscoder; the rest of a step is the engine's."""

    dense_above: float
    """The density (share of all pairs of token and feature) above which a step goes the dense way; below 0: always."""

    def input(self, weights: Weights, x_BKD: Tensor) -> Tensor:
        """A batch as the backend reads it. Raises `DataError` for a wrong shape or dtype."""

    def tile(self, n_tokens: int) -> int:
        """Features whose dense gradients are made at once."""

    def sparse_pass(
        self, weights: Weights, x_BKD: Tensor, settings: StepSettings, max_density: float, room: Room | None
    ) -> SparsePass | None:
        """Loss and gradients of a batch from the pairs that are on; None if more than `max_density` of them are.

        `room` is given where the host runs ahead of the device, and decides in place of `max_density`.
        """

    def squares(self, weights: Weights, batch: SparsePass) -> Tensor:
        """() float64: squared norm of dW_enc and dW_dec."""

    def update(self, weights: Weights, batch: SparsePass, update: Update) -> None:
        """Adam on W_enc and W_dec, in place."""

    def update_tile(
        self, weights: Weights, features: slice, gradients: Gradients, fired_F: Tensor, update: Update
    ) -> None:
        """The same for some features, from gradients that are there; `fired_F` as in `StepStatistics`, of all."""

    def finish(self, weights: Weights, db_enc_F: Tensor, fired_F: Tensor, update: Update) -> None:
        """After all rows: b_enc, where `update` and `update_tile` have not done it, the decoders' limit, and what is
        derived from the weights."""

    def update_vector(self, weights: Weights, name: str, gradient: Tensor, lr: float, update: Update) -> None:
        """Adam on b_dec or log_threshold, in place."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds beside parameters and moments, under unique names; loading copies into them."""


class Backend(Protocol):
    """Computes with the weights it is given; one object a crosscoder, so it may keep what it derives from them.

    It notices every change by itself (`Weights.state`), and never writes what it is not asked to.
    """

    name: str
    """As it is registered."""
    candidates: tuple[str, ...] = ("exact",)
    """The ways to look for active pairs that it has: "exact", perhaps "int8"."""
    asynchronous: bool = False
    """Does the device run behind the host, which then must not wait for a step's loss?"""

    @classmethod
    def fits(cls, weights: Weights) -> str | None:
        """None if it can compute with these weights here, else why not: a predicate ("needs a CUDA device, ...")."""

    def encode(self, weights: Weights, x_BKD: Tensor, candidates: str = "exact") -> SparseCode:
        """The code of activations (B, K, D), as from `Weights.input`."""

    def decode(self, weights: Weights, code: SparseCode) -> Tensor:
        """The reconstruction (B, K, D) of a code."""

    def loss(self, weights: Weights, x_BKD: Tensor, settings: LossSettings) -> LossTerms:
        """The loss of activations (B, K, D), as from `Weights.input`; `total` has a gradient in the parameters."""

    def training(self, weights: Weights, config: TrainConfig, state: AdamState) -> Training:
        """Its part of training. `state` holds Adam's moments."""


class SparseBackend(Protocol):
    """What `differentiable` needs of a backend that computes loss and gradients at once."""

    def sparse_pass(
        self, weights: Weights, x_BKD: Tensor, settings: LossSettings, *, sharding: Sharding = ONE_PROCESS
    ) -> SparsePass:
        """One batch, whatever its density."""

    def gradients(self, weights: Weights, batch: SparsePass) -> tuple[Tensor, Tensor]:
        """dW_enc and dW_dec (F, K, D)."""


def differentiable(backend: SparseBackend, weights: Weights, x_BKD: Tensor, settings: LossSettings) -> LossTerms:
    """The loss of a batch from its sparse code; the gradients are made when they are asked for."""
    batch = backend.sparse_pass(weights, x_BKD, settings)
    found = batch.statistics
    if found.smallest_score is not None:
        weights.update_batch_threshold(found.smallest_score)
    parameters = [getattr(weights, name) for name in PARAMETERS]
    total = _Loss.apply(backend, weights, batch, *parameters)  # type: ignore[no-untyped-call]
    return LossTerms(total, found.loss.reconstruction, found.loss.sparsity, found.loss.preactivation)


class _Loss(torch.autograd.Function):
    """The loss of a `SparsePass`."""

    @staticmethod
    def forward(ctx: Any, backend: SparseBackend, weights: Weights, batch: SparsePass, *parameters: Tensor) -> Tensor:
        ctx.backend, ctx.weights, ctx.batch = backend, weights, batch
        ctx.save_for_backward(*parameters)  # so that a change in between is an error, as everywhere in autograd
        return batch.statistics.loss.total.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        batch: SparsePass = ctx.batch
        ctx.weights.writes.count += 1  # an optimiser is about to
        parameters = ctx.saved_tensors
        found = (*ctx.backend.gradients(ctx.weights, batch), batch.db_enc_F, batch.db_dec_KD, batch.dlog_threshold_F)
        of_parameters = (
            (g * gradient).to(p.dtype) if needed else None
            for g, p, needed in zip(found, parameters, ctx.needs_input_grad[3:], strict=True)
        )
        return None, None, None, *of_parameters
