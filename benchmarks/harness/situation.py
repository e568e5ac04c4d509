"""The situations that are measured: activations that are sums of planted features, and a crosscoder of a given L0.

Everything follows from the shape and a seed. Nothing is trained: the crosscoder's features are the planted ones,
with some noise, so that decoder norms vary over snapshots and features, firing rates differ by an order of
magnitude, features fire together as in the data, and the mean number of active features is what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from crosscoder import Crosscoder, CrosscoderConfig
from crosscoder.evolution.planted import PlantedConfig, PlantedDictionary

MOST_PLANTED = 2_048
RATE_OFFSET = 0.25
"""Rates fall as 1 / (rank + RATE_OFFSET F): the most frequent feature fires five times as often as the rarest."""
LEAST_STRENGTH = 0.03
CHUNK = 2_048


@dataclass(frozen=True)
class Shape:
    """Sizes of one case."""

    n_snapshots: int = 8
    """K."""
    d_model: int = 256
    """D."""
    n_features: int = 8_192
    """F."""
    batch: int = 1_024
    """B."""
    l0: float = 20.0
    """Active features a token: pairs with a gate open at one snapshot or more."""

    def __str__(self) -> str:
        return f"K{self.n_snapshots}-D{self.d_model}-F{self.n_features}-B{self.batch}-L{self.l0:g}"

    def but(self, **changes: float) -> Shape:
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Situation:
    """A crosscoder and the batches it is fed with."""

    shape: Shape
    model: Crosscoder
    batches: list[Tensor]
    """(B, K, D) each, scaled to a mean norm of sqrt(D) at every snapshot."""

    def feed(self) -> Iterator[Tensor]:
        """The batches, again and again."""
        return cycle(self.batches)

    def facts(self) -> dict[str, float]:
        """What there is to do in one batch."""
        code = self.model.encode(self.batches[0])
        gates = int(code.open_gates().sum())
        return {
            "pairs_a_token": code.n_pairs / code.n_tokens,
            "l0_a_snapshot": gates / code.n_tokens / code.n_snapshots,
            "touched_features": len(torch.unique(code.features)),
        }


def planted_dictionary(shape: Shape, seed: int = 0) -> PlantedDictionary:
    n_true = min(MOST_PLANTED, max(64, shape.n_features // 2))
    return PlantedDictionary(
        PlantedConfig(
            n_snapshots=shape.n_snapshots,
            d_model=shape.d_model,
            n_features=n_true,
            l0=min(20.0, n_true / 8),
            turning_point=shape.n_snapshots // 2,
            zipf_offset=n_true / 8,
            seed=seed,
        )
    )


def planted_batches(truth: PlantedDictionary, batch: int, count: int, seed: int = 0) -> list[Tensor]:
    """`count` batches (B, K, D), scaled so that the mean norm is sqrt(D) at every snapshot."""
    generator = torch.Generator().manual_seed(seed)
    samples = [truth.sample(batch, generator) for _ in range(count)]
    norm_K = torch.stack([torch.linalg.vector_norm(x, dim=2).mean(dim=0) for x in samples]).mean(dim=0)
    scale_K1 = (math.sqrt(truth.config.d_model) / norm_K)[:, None]
    return [x * scale_K1 for x in samples]


@torch.no_grad()
def make(shape: Shape, *, n_batches: int = 2, device: str = "cpu", seed: int = 0, **options: Any) -> Situation:
    """The situation of `shape`; `options` are those of `CrosscoderConfig` (threshold_mode, gate, ...)."""
    truth = planted_dictionary(shape, seed)
    batches = planted_batches(truth, shape.batch, n_batches, seed)
    config = CrosscoderConfig(shape.n_snapshots, shape.d_model, shape.n_features, **options)
    model = Crosscoder(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    planted_F = torch.arange(shape.n_features) % truth.config.n_features
    for rows in _chunks(shape.n_features):
        true_F = planted_F[rows]
        direction_FKD = truth.directions[true_F]
        wrong_FKD = torch.randn(direction_FKD.shape, generator=generator) / math.sqrt(shape.d_model)
        direction_FKD = torch.nn.functional.normalize(direction_FKD + 0.3 * wrong_FKD, dim=2)
        size_F = torch.randn(len(true_F), generator=generator).mul_(0.3).exp_()
        strength_FK = truth.strengths[true_F].clamp_min(LEAST_STRENGTH) * size_F[:, None]
        W_FKD = direction_FKD * strength_FK[:, :, None]
        model.W_dec[rows] = W_FKD
        # The encoder reads a feature's magnitude off its own direction.
        model.W_enc[rows] = W_FKD / W_FKD.square().sum(dim=(1, 2), keepdim=True)
    model.log_threshold += 0.3 * torch.randn(shape.n_features, generator=generator)
    calibrate(model, torch.cat(batches), shape.l0, generator)
    return Situation(shape, model.to(device), [x.to(device) for x in batches])


@torch.no_grad()
def calibrate(model: Crosscoder, x_BKD: Tensor, l0: float, generator: torch.Generator) -> None:
    """Set b_enc such that `l0` features a token are active on `x_BKD`, each feature at its own rate."""
    F, B = model.config.n_features, len(x_BKD)
    count_F = (_rates(F, l0, generator) * B + torch.rand(F, generator=generator, dtype=torch.float64)).long()
    count_F.clamp_(0, B)
    gate = model.weights().gate
    cut_F = gate.cut(model.threshold, gate.scale(model.decoder_norms()))
    x_BX = x_BKD.flatten(1)
    for rows in _chunks(F):
        h_FB = (model.W_enc[rows].flatten(1) @ x_BX.T).sort(dim=1, descending=True).values
        ends = torch.full((len(h_FB), 1), 1.0)
        h_FB = torch.cat([h_FB[:, :1] + ends, h_FB, h_FB[:, -1:] - ends], dim=1)
        count = count_F[rows, None]
        between_F = (h_FB.gather(1, count) + h_FB.gather(1, count + 1)).squeeze(1) / 2
        model.b_enc[rows] = cut_F[rows] - between_F


def _chunks(n_features: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, n_features)) for start in range(0, n_features, CHUNK)]


def _rates(n_features: int, l0: float, generator: torch.Generator) -> Tensor:
    """(F,) firing rates, each at most 1, that sum to `l0`, in random order."""
    rank_F = torch.randperm(n_features, generator=generator).double()
    weight_F = 1 / (rank_F + RATE_OFFSET * n_features)
    low, high = 0.0, float(1 / weight_F.min())
    for _ in range(60):
        middle = (low + high) / 2
        if (middle * weight_F).clamp_max(1).sum() < l0:
            low = middle
        else:
            high = middle
    return (high * weight_F).clamp_max(1)
