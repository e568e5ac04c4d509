"""Evaluate a run's crosscoder on its held-out activations.

Explained variance in both definitions and L0, by snapshot; firing rates; features that never fire.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

EXAMPLE = "crosscoder eval runs/quickstart"


@dataclass(frozen=True)
class EvalConfig:
    """Options of `crosscoder eval`."""

    run: tyro.conf.Positional[Path]
    """The run's folder, with a trained crosscoder."""
    batch_size: int = 512
    """Tokens in a batch."""


def run(config: EvalConfig) -> int:
    """Evaluate and write the figures to `summary.json`."""
    from crosscoder.activations.store import ActivationStore
    from crosscoder.evaluation import evaluate
    from crosscoder.model import Crosscoder
    from crosscoder.runs import Run

    run = Run(config.run)
    weights = run.require(run.crosscoder, f"train it first: crosscoder train {config.run} --help")
    folder = run.require(run.activations("heldout"), f"collect first: crosscoder collect {config.run} --help")
    model: Crosscoder = Crosscoder.from_pretrained(weights)
    store = ActivationStore.open(folder).without_skipped()
    run.begin("eval", config)
    result = evaluate(model, store, config.batch_size)
    run.update_summary(
        {
            "n_heldout_tokens": result.n_tokens,
            "explained_variance": {
                "overall": result.explained_variance,
                "by_snapshot": dict(zip(store.snapshot_names, result.explained_variance_K, strict=True)),
                "mean_of_ratios_by_snapshot": dict(
                    zip(store.snapshot_names, result.explained_variance_mean_of_ratios_K, strict=True)
                ),
            },
            "l0": {
                "mean": result.l0,
                "by_snapshot": dict(zip(store.snapshot_names, result.l0_K, strict=True)),
                "union": result.l0_union,
            },
            "never_fired_fraction": result.never_fired_fraction,
        }
    )
    print(f"explained variance {result.explained_variance:.4f} on {result.n_tokens:,} held-out tokens")
    print(f"L0 {result.l0:.1f} a snapshot, {result.l0_union:.1f} in union")
    print(f"features that never fired: {result.never_fired_fraction:.2%}")
    return 0
