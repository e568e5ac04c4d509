"""A gate: which pairs (token, feature) are on, and at which snapshots. Source: docs/method.md, section 1.

Every gate compares a strength h u with something. It is on for h u > theta_f, or, for gates by rank, where h u is among
the largest. This is the one place that knows the names of `CrosscoderConfig.gate`; everything else asks a `Gate` for
its properties.

Letters: B tokens, K snapshots, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.config import CrosscoderConfig

Unit = Literal["norm", "one", "largest norm"]


@dataclass(frozen=True)
class Gate:
    """What decides whether a pair is on; made by `of`."""

    unit: Unit
    """What h is multiplied by before it is compared: the feature's decoder norm at each snapshot ("norm"), nothing
    ("one"), or its largest decoder norm ("largest norm")."""
    top_k: int = 0
    """0: compared with a threshold. Otherwise the `top_k` largest positive strengths of each token are on, or ..."""
    whole_batch: bool = False
    """... the B x `top_k` largest of the batch."""
    window: float = 0.0
    """Width of a narrow window around the threshold: a code for training also lists the pairs with
    h u > theta - window / 2, whose gates may all be closed. 0: none."""
    above: bool = False
    """A code for training also lists every pair with h >= theta, for the preactivation loss."""

    @classmethod
    def of(cls, config: CrosscoderConfig, *, training: bool = True) -> Gate:
        """The gate of `config`. BatchTopK has one in training, and at inference a threshold for all features."""
        match config.gate:
            case "snapshot":
                return cls("norm")
            case "shared":
                return cls("one")
            case "batchtopk" if not training:
                return cls("largest norm")
        assert config.top_k is not None  # CrosscoderConfig checks it
        return cls("largest norm", top_k=config.top_k, whole_batch=config.gate == "batchtopk")

    @classmethod
    def for_loss(cls, config: CrosscoderConfig, *, training: bool = True, above: bool = False) -> Gate:
        """The same, whose code lists all pairs that the loss's gradient needs; `above`: with the preactivation loss."""
        gate = cls.of(config, training=training)
        narrow = gate.learned and config.threshold_mode == "narrow"
        return cls(gate.unit, gate.top_k, gate.whole_batch, config.threshold_window if narrow else 0.0, above)

    @property
    def ranked(self) -> bool:
        """Are the largest strengths on, rather than those above a threshold?"""
        return self.top_k > 0

    @property
    def learned(self) -> bool:
        """Is there a threshold a feature, which is trained?"""
        return self.unit != "largest norm"

    @property
    def by_snapshot(self) -> bool:
        """May a pair be on at some snapshots and off at others?"""
        return self.unit == "norm"

    @property
    def shared(self) -> bool:
        """Is h itself compared?"""
        return self.unit == "one"

    def units(self, norms_FK: Tensor) -> Tensor:
        """u (F, K): what h is multiplied by."""
        if self.unit == "norm":
            return norms_FK
        return self.scale(norms_FK)[:, None].expand_as(norms_FK)

    def scale(self, norms_FK: Tensor) -> Tensor:
        """max_k u (F,): a positive h times this is the strength at the snapshot where it is largest."""
        return norms_FK.new_ones(len(norms_FK)) if self.unit == "one" else norms_FK.amax(dim=1)

    def cut(self, theta_F: Tensor, scale_F: Tensor) -> Tensor:
        """(F,): no h below this is listed by a gate with a threshold; infinite where no h is large enough.

        `scale_F` as from `scale`.
        """
        import torch

        level_F = theta_F - self.window / 2
        cut_F = torch.where(scale_F > 0, level_F / torch.where(scale_F > 0, scale_F, 1.0), torch.inf)
        return torch.minimum(cut_F, theta_F) if self.above else cut_F
