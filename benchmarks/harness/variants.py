"""Which ways of training this version of the package has, read from its own configuration classes.

A benchmark names no option that may not exist: it asks here, so that it measures a new backend, optimiser mode or
start the day it appears.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Any

import torch

import crosscoder.config
from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.errors import CrosscoderError
from crosscoder.registry import backend_names
from harness import situation

SPARSITY = 0.3
LEARNING_RATE = 1e-6
"""So small that L0 is the same at the end of a measurement as at its start."""


def choices(config: type, option: str) -> tuple[str, ...]:
    """What `option` of a configuration class may be; empty if there is no such option (or it is free)."""
    hint = typing.get_type_hints(config, vars(crosscoder.config)).get(option)
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


@dataclass(frozen=True)
class Variant:
    """One way to take a step: what differs from the package's defaults."""

    name: str
    train: dict[str, Any] = field(default_factory=dict)
    """Options of `TrainConfig`."""
    model: dict[str, Any] = field(default_factory=dict)
    """Options of `CrosscoderConfig`."""
    dense_above: float | None = None
    """The density above which the engine takes its dense way, where it is not to choose."""

    def config(self, **more: Any) -> TrainConfig:
        """For measuring steps: full lambda from the first step, no revival, a learning rate that moves nothing."""
        options: dict[str, Any] = {
            "n_steps": 1_000_000,
            "lr": LEARNING_RATE,
            "warmup_steps": 0,
            "sparsity_coefficient": SPARSITY,
            "sparsity_warmup_fraction": 0.0,
            "revival": "none",
        }
        return TrainConfig(**{**options, **self.train, **more})

    def trainer(self, model: Crosscoder) -> Trainer:
        """A trainer of a copy of `model`."""
        copy = Crosscoder(CrosscoderConfig(**{**model.config.to_dict(), **self.model})).to(model.W_enc.device)
        copy.load_state_dict(model.state_dict())
        trainer = Trainer(copy, self.config())
        if self.dense_above is not None:
            trainer.engine.dense_above = self.dense_above
        return trainer


DEFAULT = Variant("step")
"""`Trainer.step` with the package's defaults."""


def backends(device: str) -> list[str]:
    """The backends, apart from "auto", that take a step here (an interpreted one does not count)."""
    names = list(backend_names())
    return [name for name in names if (name != "triton" or device.startswith("cuda")) and _runs(name, device)]


def step_variants(device: str) -> list[Variant]:
    """The default step, then one variant for each other value of each option that decides how a step is computed."""
    defaults = TrainConfig()
    variants = [DEFAULT]
    variants += [Variant(f"backend {name}", {"backend": name}) for name in backends(device)]
    for option in ("optimizer_mode", "state", "candidates", "whitening"):
        for value in choices(TrainConfig, option):
            if value != getattr(defaults, option):
                variants.append(Variant(f"{option} {value}", {option: value}))
    for value in choices(CrosscoderConfig, "threshold_mode"):
        if value != CrosscoderConfig(1, 1, 1).threshold_mode:
            variants.append(Variant(f"threshold {value}", model={"threshold_mode": value, "threshold_window": 4.0}))
    return variants


def forced_densities() -> list[Variant]:
    """The default step forced to be dense and to be sparse."""
    return [Variant("forced dense", dense_above=-1.0), Variant("forced sparse", dense_above=2.0)]


def _runs(backend: str, device: str) -> bool:
    tiny = situation.make(situation.Shape(3, 16, 64, 32, 4.0), n_batches=1, device=device)
    try:
        Variant(backend, {"backend": backend}).trainer(tiny.model).step(tiny.batches[0])
    except (CrosscoderError, ImportError):
        return False
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return True
