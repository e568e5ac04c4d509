"""What a training step takes and gives, whoever computes it.

Letters: B tokens, K snapshots, D width of one activation, F features, N pairs (token, feature).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from crosscoder.penalty import LossTerms
from crosscoder.train.state import AdamState


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


class Engine(Protocol):
    """Computes steps for one crosscoder, in place: its parameters and `state`."""

    name: str
    """"reference", "native" or "triton"."""
    asynchronous: bool
    """Is the host not to wait for a step's loss?"""
    dense_above: float
    """The density (share of all pairs of token and feature) above which a step goes the dense way."""
    state: AdamState

    def step(self, x_BKD: Tensor, settings: StepSettings) -> StepStatistics:
        """Loss, gradients and update for one batch.

        Where the loss is not finite, parameters and state are left as they were; the caller finds out from the
        statistics. Raises `DataError` on a wrong shape.
        """

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds beside the parameters, under unique names; loading copies into them."""

    def parameters_changed(self) -> None:
        """Somebody else wrote the parameters: forget what was derived from them."""

    def settle(self) -> None:
        """Make sure that the last step is done. Call it before parameters, state or statistics are read for good."""

    def pending_error(self, *, wait: bool = False) -> int | None:
        """The first step whose loss was not finite, as far as the host knows by now (or shall `wait` to know).

        For engines whose steps go on after the host has left; others tell by the loss itself, and this is None.
        """

    def clear_error(self) -> None:
        """Updates take effect again after such a step."""
