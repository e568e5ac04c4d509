"""What a run's features do over training: when they are born, turn and die, and what the early phase is.

Results go to `evolution/*.npz` with the definitions that made them; what is there already is not computed again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from crosscoder.config import StudySettings
from crosscoder.evolution.analyses import names
from crosscoder.runs import writes_run

EXAMPLE = "crosscoder evolve runs/quickstart --tau 0.3"
AS_BEFORE = ("study",)
"""Options that are as in the last call on the run where they are left out."""
README = """# Results of the analyses

`NAME.npz` holds the arrays of analysis NAME; `NAME.json` says what they rest on. In Python:

    from crosscoder.evolution.analyses.life import LIFE
    from crosscoder.evolution.study import Study
    from crosscoder.runs import Run

    life = Study.of(Run("path/to/the/run")).result(LIFE)

`settings.yaml` holds the settings of the last `crosscoder evolve`. "(ours)" marks what is not a definition of the
paper's (arXiv 2509.17196).

{analyses}
"""


@dataclass(frozen=True)
class EvolveConfig:
    """Options of `crosscoder evolve`."""

    run: tyro.conf.Positional[Path]
    """The run's folder, with a trained crosscoder."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(help=f"Just these of: {' '.join(names())}.")] = ()
    device: str = "auto"
    """Where it computes: auto (the GPU if there is one), cpu, cuda or cuda:N."""
    study: StudySettings = field(default_factory=StudySettings)


@writes_run
def run(config: EvolveConfig) -> int:
    """Compute the analyses and write the main figures to `summary.json`."""
    from crosscoder.devices import announced
    from crosscoder.evolution.analyses import analyses, analysis, listed
    from crosscoder.evolution.study import Study
    from crosscoder.files import write_text
    from crosscoder.runs import Run

    run, device = Run(config.run), announced(config.device)
    chosen = tuple(map(analysis, config.only)) or analyses()
    study = Study(run, config.study, device)
    run.begin("evolve", config, device)
    study.save_settings()
    write_text(run.evolution / "README.md", README.format(analyses=listed()))
    figures: dict[str, Any] = {}
    for one in chosen:
        figures |= one.summary(study.result(one), study.snapshots.revisions)
    run.update_summary(figures)
    print(f"evolution: {run.evolution} ({', '.join(one.name for one in chosen)})")
    return 0
