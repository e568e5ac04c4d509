"""How long the points of a sweep will take, from a few steps of each kind."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from crosscoder.activations.loader import ActivationLoader
from crosscoder.activations.store import ActivationStore
from crosscoder.config import CrosscoderConfig, TrainConfig
from crosscoder.devices import finish
from crosscoder.model import Crosscoder
from crosscoder.train.initialization import initialize
from crosscoder.train.trainer import Trainer

WARM, TIMED = 10, 6
"""The first steps touch memory for the first time."""
TYPICAL_L0 = 32.0


def seconds_per_step(
    store: ActivationStore, config: CrosscoderConfig, train_config: TrainConfig, device: torch.device
) -> float:
    """The median of a few steps on the store's first batches.

    The start is calibrated, so that about as many features fire as during most of a training; with the default start
    half of them fire at first. Raises what training raises.
    """
    train_config = dataclasses.replace(
        train_config,
        n_steps=max(WARM + TIMED, train_config.n_steps),
        start="calibrated",
        start_l0=TYPICAL_L0,
        revival="none",
    )
    loader = ActivationLoader(store, train_config.batch_size, train_config.seed, device=device)
    model = Crosscoder(config, seed=train_config.seed, device=device)
    scale_K = torch.from_numpy(loader.scale_K).float()
    initialize(model, store.read(0, slice(0, 512)) * scale_K[:, None], train_config)
    trainer = Trainer(model, train_config)
    seconds = []
    for x_BKD in islice(_forever(loader), WARM + TIMED):
        began = time.perf_counter()
        trainer.step(x_BKD, measured=False)
        finish(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM:])


def _forever(loader: ActivationLoader) -> Iterator[Tensor]:
    while True:
        yield from loader
