"""Compare a run's crosscoder with another run's of the same snapshots (another seed): is the dictionary stable?

Features present at the last snapshot are matched one to one by the cosine of their decoders there; then the matched
features' emergence is compared. Needs `crosscoder evolve --only life` of both runs. `crosscoder report RUN`
shows what was found, of all runs that RUN was compared with.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from crosscoder.runs import writes_run

if TYPE_CHECKING:
    from crosscoder.evolution.study import Study

EXAMPLE = "crosscoder compare runs/quickstart runs/seed1"
AS_BEFORE = ("seed",)
"""Options that are as in the last call on the run where they are left out."""


@dataclass(frozen=True)
class CompareConfig:
    """Options of `crosscoder compare`."""

    run: tyro.conf.Positional[Path]
    """The run's folder, with a trained crosscoder. The result goes to `comparison/OTHER.npz` in it (`OTHER-2.npz` for
    another run whose folder has the same name), where `crosscoder report` finds it."""
    other: tyro.conf.Positional[Path]
    """The other run's folder. Its analysis is brought up to date if it is not; nothing else is written there."""
    seed: int = 0
    """Seed of the nulls."""
    device: str = "auto"
    """Where it computes: auto (the GPU if there is one), cpu, cuda or cuda:N."""


@writes_run
def run(config: CompareConfig) -> int:
    """Match the two dictionaries and write the main figures to `summary.json`."""
    from crosscoder.devices import announced
    from crosscoder.errors import ConfigError
    from crosscoder.evolution.study import Study
    from crosscoder.runs import Run

    run, other = Run(config.run), Run(config.other)
    if run.path.resolve() == other.path.resolve():
        raise ConfigError(f"{config.run} would be compared with itself; name another run")
    device = announced(config.device)
    studies = Study.of(run, device), Study.of(other, device)
    with _holding(studies[1]):
        return _compare(config, *studies)


def _holding(other: Study) -> AbstractContextManager[None]:
    """Nobody changes the other run meanwhile; where it is only read, several comparisons go beside each other."""
    from crosscoder.evolution.analyses.life import LIFE
    from crosscoder.locks import working_on

    return working_on(other.run.path, "compare", together=other.finished(LIFE) is not None)


def _compare(config: CompareConfig, *studies: Study) -> int:
    from crosscoder.errors import ConfigError, DataError
    from crosscoder.evolution.analyses.life import LIFE
    from crosscoder.evolution.comparisons import save_comparison, summary
    from crosscoder.evolution.stability import STABLE, compare_dictionaries

    runs = [study.run for study in studies]
    sites = [(found.revisions, found.layer, found.site) for found in (run.snapshots() for run in runs)]
    if sites[0] != sites[1]:
        raise DataError(
            f"{config.run} and {config.other} have different snapshots, layers or sites, so their features cannot be "
            "compared"
        )
    lives = [study.result(LIFE).cycles for study in studies]
    taus = [life.threshold for life in lives]
    if taus[0] != taus[1]:
        raise ConfigError(
            f"the presence threshold is tau = {taus[0]:g} in {config.run} and {taus[1]:g} in {config.other}; analyse "
            f"one again with the other's: crosscoder evolve {config.other} --only life --tau {taus[0]:g}"
        )
    runs[0].begin("compare", config, studies[0].device)
    found = compare_dictionaries(
        *(study.decoders for study in studies),
        *(life.emergence for life in lives),
        take_first=lives[0].present[:, -1],
        take_second=lives[1].present[:, -1],
        seed=config.seed,
    )
    path = save_comparison(found, studies[0], studies[1], {"seed": config.seed, "tau": taus[0]})
    compared = runs[0].summary().get("stability", {})
    runs[0].update_summary({"stability": {**compared, path.stem: summary(found)}})
    print(f"comparison: {path}; shown by crosscoder report {runs[0].path}")
    print(
        f"{found.share_stable:.1%} of {min(found.n_first, found.n_second):,} features have a match of cosine "
        f"{STABLE:g} or more (random directions: {found.share_stable_null:.1%})"
    )
    print(
        f"emergence of {found.n_pairs:,} matched pairs: {found.emergence_same:.1%} at the same snapshot (permuted: "
        f"{found.emergence_same_null:.1%}), {found.emergence_within_one:.1%} within one "
        f"({found.emergence_within_one_null:.1%}), rank correlation {found.emergence_correlation:.3f}"
    )
    return 0
