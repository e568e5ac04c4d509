"""How each method is trained. Every training is `crosscoder.train.run.train` in a folder of its own, and resumes there.

Letters: K snapshots.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from crosscoder.activations.store import ActivationStore
from crosscoder.config import CrosscoderConfig, CrosscoderOptions, TrainConfig
from crosscoder.configfile import plain
from crosscoder.model import Crosscoder
from crosscoder.sweep.budget import chain_steps
from crosscoder.sweep.points import Method, Point
from crosscoder.train.run import train, training_seconds


@dataclasses.dataclass(frozen=True)
class Part:
    """One training of a point: over the snapshots that it reads, for so many steps, in a folder below the point's."""

    snapshots: tuple[str, ...]
    n_steps: int
    folder: str
    warm: bool
    """Begins with the weights of the part before."""


def parts_of(method: Method, snapshots: list[str], n_steps: int) -> list[Part]:
    """The trainings that make up a point, in order."""
    match method:
        case "crosscoder":
            return [Part(tuple(snapshots), n_steps, ".", False)]
        case "sae":
            return [Part((snapshots[-1],), n_steps, ".", False)]
    steps = chain_steps(n_steps, len(snapshots))
    return [Part((name,), steps[k], f"snapshot-{k:02d}", k > 0) for k, name in enumerate(snapshots)]


def train_config(point: Point, part: Part, base: TrainConfig) -> TrainConfig:
    """`base` with the point's lambda, learning rate and seed and the part's steps.

    A warm-started SAE is sparse already, so lambda does not rise from 0 again, and it keeps its features: reviving one
    would put another feature under the index that the chain follows (and in so few steps it costs explained variance).
    All else is as for a fresh one.
    """
    config = dataclasses.replace(
        base, n_steps=part.n_steps, lr=point.lr, sparsity_coefficient=point.sparsity, seed=point.seed
    )
    return dataclasses.replace(config, sparsity_warmup_fraction=0.0, revival="none") if part.warm else config


def train_point(
    point: Point,
    store: ActivationStore,
    options: CrosscoderOptions,
    base: TrainConfig,
    folder: Path,
    device: torch.device,
) -> tuple[list[Crosscoder], float]:
    """Train, or finish training, a point in `folder`; returns its crosscoders for raw activations, one for each part,
    and the seconds that their steps took.

    A warm start is exact: each SAE of the chain begins with `unfold_scales()` of the one before, the same weights in
    units of scaled activations. Raises what `train` raises.
    """
    models: list[Crosscoder] = []
    seconds = 0.0
    parts = parts_of(point.method, store.snapshot_names, base.n_steps)
    for number, part in enumerate(parts, start=1):
        config = CrosscoderConfig(len(part.snapshots), store.d_model, point.n_features, **plain(options))
        models.append(
            train(
                store.select(part.snapshots),
                config,
                train_config(point, part, base),
                folder / part.folder,
                start=models[-1].unfold_scales() if part.warm else None,
                device=device,
                title=f"{point.method} {part.snapshots[0]} ({number}/{len(parts)})" if len(parts) > 1 else point.method,
            )
        )
        seconds += training_seconds(folder / part.folder)
    return models, seconds
