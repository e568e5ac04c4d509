"""What a run's features do over training: when they are born, turn and die, and what the early phase is.

Results go to `evolution/*.npz` with the definitions that made them; what is there already is not computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

EXAMPLE = "crosscoder evolve runs/quickstart --tau 0.3"


@dataclass(frozen=True)
class EvolveConfig:
    """Options of `crosscoder evolve`."""

    run: tyro.conf.Positional[Path]
    """The run's folder, with a trained crosscoder."""
    only: tuple[str, ...] = ()
    """Just these of: examples life rotation dimensionality neighbours ngrams induction."""
    tau: float = 0.3
    """A feature is present at a snapshot where its decoder norm is above tau times its own maximum."""
    contexts: int = 8
    """Contexts kept for each feature."""
    neighbours: int = 8
    """Neighbours kept for each feature."""
    induction_length: int = 50
    """Random tokens in a sequence that is repeated once, to measure induction."""
    seed: int = 0
    """Seed of bootstrap, nulls and random sequences."""


def run(config: EvolveConfig) -> int:
    """Compute the analyses and write the main figures to `summary.json`."""
    from crosscoder.evolution.study import ANALYSES, Study, StudySettings
    from crosscoder.evolution.summary import main_figures
    from crosscoder.runs import Run

    run = Run(config.run)
    settings = StudySettings(config.tau, config.contexts, config.neighbours, config.induction_length, config.seed)
    study = Study(run, settings)
    run.begin("evolve", config)
    names = config.only or tuple(ANALYSES)
    results = {name: study.result(name) for name in names}
    run.update_summary(main_figures(results, study.snapshots.revisions))
    print(f"evolution: {run.evolution} ({', '.join(names)})")
    return 0
