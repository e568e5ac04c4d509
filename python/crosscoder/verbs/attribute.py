"""Which features carry a task, at every snapshot: attribution, ablation, and who takes over from whom.

Tasks: induction, induction-text, ioi, sva-simple, sva-across-pp, sva-within-rc, sva-across-rc, or a file of your own
(FILE.jsonl, a line a pair: {"clean": ..., "corrupted": ..., "right": ..., "wrong": ...}; answers are one token). A task
that the model cannot do at a snapshot is reported as at chance there, and not attributed. Results go to
`attribution/TASK/*.parquet`, main figures to `summary.json`, and the page gets a section. If it is killed, the same
command goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from crosscoder.config import AttributionSettings
from crosscoder.runs import writes_run

if TYPE_CHECKING:
    from crosscoder.runs import Run

EXAMPLE = "crosscoder attribute runs/quickstart --task induction"
AS_BEFORE = ("study",)
"""Options that are as in the last call on the run where they are left out."""


@dataclass(frozen=True)
class AttributeConfig:
    """Options of `crosscoder attribute`."""

    run: tyro.conf.Positional[Path]
    """The run's folder, with a trained crosscoder."""
    task: tuple[str, ...]
    """One task or several, by name, or files of your own (.jsonl)."""
    resume: bool = True
    """Keep what is computed already. Without, the task is computed anew; what is there is replaced at the end."""
    device: str = "auto"
    """Where it computes: auto (the GPU if there is one), cpu, cuda or cuda:N."""
    study: AttributionSettings = field(default_factory=AttributionSettings)


@writes_run
def run(config: AttributeConfig) -> int:
    """Study each task, write the main figures to `summary.json`, and make the page again where there is one."""
    from crosscoder.attribution.attribution_study import AttributionStudy
    from crosscoder.devices import announced
    from crosscoder.errors import ConfigError
    from crosscoder.runs import Run

    if not config.task:
        raise ConfigError("name a task: --task induction")
    run, device = Run(config.run), announced(config.device)
    study = AttributionStudy(run, config.study, device)
    tasks = [study.task(name) for name in config.task]  # what cannot work is refused before any work is done
    run.begin("attribute", config, device)
    for name, task in zip(config.task, tasks, strict=True):
        figures = study.compute(name, resume=config.resume)["figures"]
        run.update_summary({"attribution": {**run.summary().get("attribution", {}), task.name: figures}})
        print(describe(task.name, figures))
        print(f"results: {study.folder(task.name)}")
    _update_page(run, config.device)
    return 0


def describe(name: str, figures: dict[str, Any]) -> str:
    """What was found of a task, in lines for the terminal. Accuracy comes first."""
    accuracy = figures["clean_accuracy"]
    lines = [f"\n{name}: accuracy by snapshot " + ", ".join(f"{step} {value:.2f}" for step, value in accuracy.items())]
    above = figures["above_chance"]
    if not above:
        return "\n".join([*lines, f"the model does not do {name} at any snapshot: at chance, so nothing is attributed"])
    lines.append(f"above chance at {len(above)} of {len(accuracy)} snapshots: {', '.join(above)}")
    if figures["disrupt_top50"] is not None:
        other = figures["disrupt_random50"]
        random = "(there are not as many)" if other is None else f"{other:.1%}"
        lines.append(
            f"ablating the top 50 features costs {figures['disrupt_top50']:.1%} of the metric, matched random 50 "
            f"{random} ({figures['ablation']} ablation)"
        )
    for ablation, found in figures["by_ablation"].items():
        sizes = ", ".join(f"{step} {k or 'none'}" for step, k in found["k_for_80_percent"].items())
        lines.append(f"features that keep 80 % of the metric, {ablation} ablation: {sizes}")
    correlations = figures["rank_correlation_with_exact"]
    shown = ", ".join(
        f"{method.replace('_', ' ')} {value:.2f}" for method, value in correlations.items() if value is not None
    )
    lines.append(f"completeness error of integrated gradients {figures['ig_completeness_error']:.1%}")
    lines.append(f"rank correlation with exact ablation: {shown or 'not measured'}")
    return "\n".join(lines)


def _update_page(run: Run, device: str) -> None:
    from crosscoder.verbs import report

    if run.page.exists():
        report.run(report.ReportConfig(run.path, device))
    else:
        print(f"the run has no page yet; make it with: crosscoder report {run.path}")
