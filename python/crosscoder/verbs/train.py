"""Train a crosscoder on a run's stored activations.

A killed training goes on from its last checkpoint when the same command is run again, to the same weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from crosscoder.config import CrosscoderOptions, TrainConfig
from crosscoder.runs import writes_run

if TYPE_CHECKING:
    import torch

    from crosscoder.activations.live import LiveSource
    from crosscoder.activations.store import ActivationStore
    from crosscoder.runs import Run

EXAMPLE = "crosscoder train runs/pythia --n-features 24576 --config paper"


@dataclass(frozen=True)
class TrainVerbConfig:
    """Options of `crosscoder train`. `--config paper` and `--config paper-6.9b` are the paper's settings."""

    run: tyro.conf.Positional[Path]
    """The run's folder, with activations from `crosscoder collect`."""
    n_features: int
    """F: size of the dictionary."""
    crosscoder: CrosscoderOptions = field(default_factory=CrosscoderOptions)
    train: TrainConfig = field(default_factory=TrainConfig)
    live: bool = False
    """Run the language model's snapshots while training instead of reading stored activations; needs the tokens and the
    snapshots of the run, and memory for all of them (crosscoder plan says how much)."""
    device: str = "auto"
    """Where the crosscoder is trained, and with --live where the language model runs: auto (the GPU if there is one),
    cpu, cuda or cuda:N."""
    resume: bool = True
    """Go on from the last checkpoint; with --no-resume, start again from nothing. The old training is kept until the
    new one has its first checkpoint."""


@writes_run
def run(config: TrainVerbConfig) -> int:
    """Train, or finish training, and write `crosscoder/`."""
    from crosscoder.config import CrosscoderConfig
    from crosscoder.configfile import plain
    from crosscoder.devices import announced
    from crosscoder.files import read_json
    from crosscoder.runs import Run
    from crosscoder.train.run import RECORD_FILE, told_threshold, train

    run, device = Run(config.run), announced(config.device)
    store = _live(config, run, device) if config.live else _stored(config, run)
    crosscoder = CrosscoderConfig(store.n_snapshots, store.d_model, config.n_features, **plain(config.crosscoder))
    begin = functools.partial(run.begin, "train", config, device)
    train(store, crosscoder, config.train, run.path, device=device, resume=config.resume, begin=begin)
    trained = read_json(run.crosscoder / RECORD_FILE)["trained"]
    run.update_summary(
        {
            "n_snapshots": store.n_snapshots,
            "n_features": config.n_features,
            "n_train_tokens": store.n_tokens,
            "dead_fraction": trained["dead_features"] / config.n_features,
            "revived_features": trained["revived_features"],
        }
    )
    line = told_threshold(trained)
    if line:
        print(line)
    print(f"crosscoder: {run.crosscoder}")
    return 0


def _stored(config: TrainVerbConfig, run: Run) -> ActivationStore:
    store = run.store("train")
    store.require_complete()
    return store


def _live(config: TrainVerbConfig, run: Run, device: torch.device) -> LiveSource:
    from crosscoder.activations.live import LiveSource
    from crosscoder.activations.tokens import TokenSet
    from crosscoder.train.run import batch_dtype

    remedy = f"make them: crosscoder collect {config.run} --tokens-only --help"
    tokens = TokenSet.load(run.require(run.tokens("train"), remedy))
    return LiveSource(
        run.snapshots(),
        tokens,
        config.train.batch_size,
        config.train.seed,
        device=str(device),
        dtype=batch_dtype(config.train, device),
    )
