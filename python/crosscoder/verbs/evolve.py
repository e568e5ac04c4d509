"""What a run's features do over training: when they are born, turn and die, and what the early phase is.

Results go to `evolution/*.npz` with the definitions that made them; what is there already is not computed again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from crosscoder.config import StudySettings

EXAMPLE = "crosscoder evolve runs/quickstart --tau 0.3"


@dataclass(frozen=True)
class EvolveConfig:
    """Options of `crosscoder evolve`."""

    run: tyro.conf.Positional[Path]
    """The run's folder, with a trained crosscoder."""
    only: tuple[str, ...] = ()
    """Just these of: examples life rotation dimensionality kind_dimensionality neighbours ngrams induction positions
    types complexity probes latent_scaling."""
    study: StudySettings = field(default_factory=StudySettings)


def run(config: EvolveConfig) -> int:
    """Compute the analyses and write the main figures to `summary.json`."""
    from crosscoder.evolution.analyses import ANALYSES
    from crosscoder.evolution.study import Study
    from crosscoder.evolution.summary import main_figures
    from crosscoder.runs import Run

    run = Run(config.run)
    study = Study(run, config.study)
    run.begin("evolve", config)
    names = config.only or tuple(ANALYSES)
    results = {name: study.result(name) for name in names}
    run.update_summary(main_figures(results, study.snapshots.revisions))
    print(f"evolution: {run.evolution} ({', '.join(names)})")
    return 0
