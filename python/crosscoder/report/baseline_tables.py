"""The crosscoder beside other dictionaries: explained variance against L0.

Letters: P points of a frontier.
"""

from __future__ import annotations

from crosscoder.figures.spec import Axis, Lines, Panel, Series
from crosscoder.figures.table import Column, FigureTable, plain_column
from crosscoder.report.results import Results
from crosscoder.report.sections import CROSSCODER
from crosscoder.sweep.frontier import Frontier
from crosscoder.sweep.points import METHODS
from crosscoder.sweep.result_tables import SCOPES

LABELS = {"crosscoder": "crosscoder", "sae": "SAE on the last snapshot", "chain": "chain of SAEs"}


def frontier(results: Results) -> FigureTable | None:
    """The frontiers of a sweep, at the last snapshot and over all of them."""
    table = results.tables.get("sweep")
    if table is None or not table["method"]:
        return None
    columns: dict[str, Column] = {name: [] for name in ("scope", "frontier", "l0", *METHODS)}
    rows = range(len(table["method"]))
    for scope, (explained, l0) in SCOPES.items():
        for method, F, seed in sorted({(table["method"][r], table["n_features"][r], table["seed"][r]) for r in rows}):
            mine = [r for r in rows if (table["method"][r], table["n_features"][r], table["seed"][r]) ==
                    (method, F, seed) and table[l0][r] is not None]  # fmt: skip
            found = Frontier.of([table[l0][r] for r in mine], [table[explained][r] for r in mine])
            n = len(found.l0_P)
            columns["scope"] += [scope] * n
            columns["frontier"] += [f"{LABELS[method]}, F = {F:,}, seed {seed}"] * n
            columns["l0"] += plain_column(found.l0_P)
            for other in METHODS:
                columns[other] += plain_column(found.explained_P) if other == method else [None] * n
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
        CROSSCODER,
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
