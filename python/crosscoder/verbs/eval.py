"""Evaluate a run's crosscoder on its held-out activations.

Explained variance in both definitions and L0, by snapshot; features that never fire; and how much of the language
model's loss is recovered when the reconstruction stands in the place of the activation, by snapshot.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from crosscoder.errors import ConfigError
from crosscoder.runs import writes_run

if TYPE_CHECKING:
    from crosscoder.activations.store import ActivationStore
    from crosscoder.metrics import Evaluation
    from crosscoder.model import Crosscoder
    from crosscoder.runs import Run

EXAMPLE = "crosscoder eval runs/quickstart"
AS_BEFORE = ("loss_tokens",)
"""Options that are as in the last call on the run where they are left out."""


@dataclass(frozen=True)
class EvalConfig:
    """Options of `crosscoder eval`."""

    run: tyro.conf.Positional[Path]
    """The run's folder, with a trained crosscoder."""
    batch_size: int = 512
    """Tokens in a batch."""
    loss_tokens: int = 8_192
    """Held-out tokens on which the language model's loss is measured; 0 leaves it out."""
    device: str = "auto"
    """Where it computes: auto (the GPU if there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if self.loss_tokens < 0:
            raise ConfigError(f"loss_tokens must be 0 or more, not {self.loss_tokens}")


@writes_run
def run(config: EvalConfig) -> int:
    """Evaluate and write the figures to `summary.json`."""
    from crosscoder.devices import announced
    from crosscoder.evaluation import evaluate
    from crosscoder.model import Crosscoder
    from crosscoder.progress import warn
    from crosscoder.runs import Run

    run, device = Run(config.run), announced(config.device)
    weights = run.require(run.crosscoder, f"train it first: crosscoder train {config.run} --help")
    model: Crosscoder = Crosscoder.from_pretrained(weights, map_location=device)
    store = run.store("heldout")
    result = evaluate(model, store, config.batch_size)
    run.begin("eval", config, device)
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
            "explained_variance_by_norm": {
                "ordinary": result.ordinary_explained_variance,
                "bands": [dataclasses.asdict(band) for band in result.bands],
            },
            "l0": {
                "mean": result.l0,
                "by_snapshot": dict(zip(store.snapshot_names, result.l0_K, strict=True)),
                "union": result.l0_union,
            },
            "never_fired_fraction": result.never_fired_fraction,
            "language_model_loss": None,  # an earlier one may be another crosscoder's; measured below
        }
    )
    print(f"explained variance {result.explained_variance:.4f} on {result.n_tokens:,} held-out tokens")
    _tell_norms(result)
    constant = [
        name for name, value in zip(store.snapshot_names, result.explained_variance_K, strict=True) if value is None
    ]
    if constant:
        warn(
            f"all tokens have the same activations at {', '.join(constant)}: no explained variance there, and none of "
            "it in the overall one"
        )
    print(f"L0 {result.l0:.1f} a snapshot, {result.l0_union:.1f} in union")
    print(f"features that never fired: {result.never_fired_fraction:.2%}")
    if config.loss_tokens:
        _measure_loss(run, model, store, config.loss_tokens)
    return 0


def _tell_norms(result: Evaluation) -> None:
    """A line where the overall figure says little of the ordinary tokens."""
    ordinary, huge = result.ordinary_explained_variance, result.bands[-1]
    if huge.n and ordinary is not None:
        share = 1 - huge.n / sum(band.n for band in result.bands)
        print(
            f"  {ordinary:.4f} on the {share:.2%} of the tokens whose norm is under {huge.low:g} times "
            "the median, around their own mean"
        )


def _measure_loss(run: Run, crosscoder: Crosscoder, store: ActivationStore, n_tokens: int) -> None:
    """The loss recovered, into `summary.json`; where the language model is not at hand that is told, and no error."""
    from crosscoder.activations.tokens import TokenSet
    from crosscoder.attribution.recovered import describe, recovered_loss
    from crosscoder.errors import DataError
    from crosscoder.progress import warn

    try:
        remedy = "the language model's loss needs the run's tokens and snapshots"
        run.require(run.snapshots_file, remedy)
        snapshots = run.snapshots()
        tokens = TokenSet.load(run.require(run.tokens("heldout"), remedy))
        if snapshots.site != "residual":
            raise DataError(f"the crosscoder reads {snapshots.site}, and only the residual stream can be replaced")
        found = recovered_loss(crosscoder, snapshots, tokens, store, n_tokens)
    except DataError as error:
        warn(f"language-model loss not measured: {error}")
        return
    run.update_summary({"language_model_loss": found.to_dict()})
    print("\n".join(describe(found, range(store.n_snapshots))))
