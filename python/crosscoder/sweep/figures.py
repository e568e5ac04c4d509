"""What a sweep (`crosscoder sweep`) adds to the page: the crosscoder beside other dictionaries.

Letters: P points of a frontier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crosscoder.figures.results import Part, Results
from crosscoder.figures.spec import Axis, Lines, Panel, Series
from crosscoder.figures.table import Column, FigureTable, plain_column
from crosscoder.sweep.frontier import Frontier
from crosscoder.sweep.points import LABELS, METHODS
from crosscoder.sweep.result_tables import SCOPES, comparisons, points_of_lines

SECTION = "The crosscoder and its baselines"


@dataclass(frozen=True)
class Sweep:
    """The table of a sweep."""

    columns: Mapping[str, list[Any]]
    """As `tables.results` has them."""


def frontier(found: Sweep, results: Results) -> FigureTable | None:
    """The frontiers of a sweep, at the last snapshot and over all of them."""
    if not found.columns["method"]:
        return None
    table = found.columns
    columns: dict[str, Column] = {name: [] for name in ("scope", "frontier", "l0", *METHODS)}
    for scope in SCOPES:
        for (method, F, seed), points in sorted(points_of_lines(table, scope).items()):
            line = Frontier.of(*zip(*points, strict=True))
            n = len(line.l0_P)
            columns["scope"] += [scope] * n
            columns["frontier"] += [f"{LABELS[method]}, F = {F:,}, seed {seed}"] * n
            columns["l0"] += plain_column(line.l0_P)
            for other in METHODS:
                columns[other] += plain_column(line.explained_P) if other == method else [None] * n
    titles = {"last": "the last snapshot", "all": "all snapshots"}
    panels = [
        Panel(
            Axis("explained variance"),
            [Series(name, LABELS[name]) for name in METHODS if any(
                value is not None for value, where in zip(columns[name], columns["scope"], strict=True)
                if where == scope)],
            titles[scope],
            {"scope": scope},
        )
        for scope in SCOPES
        if scope in columns["scope"]
    ]  # fmt: skip
    return FigureTable(
        "frontier",
        "Explained variance against L0, beside its baselines",
        "both",
        "Each line is what a method reaches over values of λ and learning rates, the points that no other of its own "
        "beats. All read the same activations: the chain (an SAE for each snapshot, warm-started from that before, as "
        "SAE-Track does) as many as the crosscoder, the SAE the same tokens at the last snapshot alone (the paper's "
        "baseline). Up and left is better.",
        columns,
        Lines(panels, x="l0", x_axis=Axis("L0, active features a token", scale="log"), split="frontier"),
        wide=True,
    )


def leads(sweep: Sweep, results: Results) -> str:
    """The crosscoder's lead at common L0, averaged over them, with its range."""
    table = sweep.columns
    leads_by = {"last": {"sae": "an SAE trained on it alone"}, "all": {"chain": "a chain of warm-started SAEs"}}
    parts, seeds = [], len(set(table["seed"]))
    found = comparisons({name: list(column) for name, column in table.items()})
    for (scope, _), comparison in found.items():
        for method, words in leads_by.get(scope, {}).items():
            if method in comparison.explained_SG and len(comparison.l0_G):
                lead = 100 * comparison.difference("crosscoder", method)
                where = "of the last snapshot's variance" if scope == "last" else "of all snapshots' variance"
                parts.append(
                    f"{abs(lead.mean()):.1f} points {'more' if lead.mean() >= 0 else 'less'} {where} than {words} "
                    f"({lead.min():+.1f} to {lead.max():+.1f} over L0 {comparison.l0_G[0]:.0f} to "
                    f"{comparison.l0_G[-1]:.0f})"
                )
    if not parts:
        return ""
    sure = "one seed, so without an interval" if seeds == 1 else f"{seeds} seeds"
    return f"At the same L0 the crosscoder explains {', and '.join(parts)}; {sure}."


PART = Part(Sweep, SECTION, (frontier,), (leads,))
