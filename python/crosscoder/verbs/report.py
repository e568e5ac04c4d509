"""Make the page of a run: one HTML file that works offline, and every figure as SVG and CSV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from crosscoder.runs import writes_run

EXAMPLE = "crosscoder report runs/quickstart"


@dataclass(frozen=True)
class ReportConfig:
    """Options of `crosscoder report`."""

    run: tyro.conf.Positional[Path]
    """The run's folder, evaluated and analysed."""
    device: str = "auto"
    """Where an analysis is brought up to date that is not: auto (the GPU if there is one), cpu, cuda or cuda:N."""


@writes_run
def run(config: ReportConfig) -> int:
    """Write `report.html` and `figures/`, and print what was found."""
    from crosscoder.devices import announced
    from crosscoder.report.assemble import assemble
    from crosscoder.report.figures import save_figures
    from crosscoder.report.page import write_page
    from crosscoder.runs import Run

    run, device = Run(config.run), announced(config.device)
    data = assemble(run, device)
    run.begin("report", config, device)
    write_page(data, run.page)
    save_figures(data, run.figures)
    run.update_summary({"page": run.page.name, "findings": list(data.sentences)})
    print()
    for sentence in data.sentences:
        print(f"- {sentence}")
    print(f"\npage: {run.page.resolve()}")
    return 0
