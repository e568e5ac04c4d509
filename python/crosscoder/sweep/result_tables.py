"""The results of a sweep as columns: a row a point, a row a point and snapshot, a row a common L0.

Letters: S seeds, G common L0 values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crosscoder.sweep.frontier import Comparison, Frontier, compare
from crosscoder.sweep.points import METHODS

Columns = dict[str, list[Any]]
Record = Mapping[str, Any]
"""What `result.json` of a point holds."""

POINT = ("method", "n_features", "sparsity", "lr", "seed")
FIGURES = (
    "explained_variance_last",
    "l0_last",
    "explained_variance",
    "l0",
    "dead",
    "steps",
    "tokens",
    "activations",
    "n_heldout_tokens",
    "seconds",
)
SCOPES = {"last": ("explained_variance_last", "l0_last"), "all": ("explained_variance", "l0")}
"""The last snapshot, which all methods have, and all snapshots, which the SAE has not."""


def results(records: Sequence[Record]) -> Columns:
    """A row a point. What an SAE has of "all snapshots" is its one: None."""
    rows = sorted(records, key=_order)
    columns: Columns = {name: [record["point"][name] for record in rows] for name in POINT}
    for name in FIGURES:
        columns[name] = [record["figures"][name] for record in rows]
    for name in SCOPES["all"]:
        values = zip(columns[name], columns["method"], strict=True)
        columns[name] = [None if method == "sae" else value for value, method in values]
    return columns


def by_snapshot(records: Sequence[Record]) -> Columns:
    """A row a point and snapshot."""
    columns: Columns = {}
    for record in sorted(records, key=_order):
        measured = record["figures"]["by_snapshot"]
        for name in POINT:
            columns.setdefault(name, []).extend([record["point"][name]] * len(measured["snapshot"]))
        for name, values in measured.items():
            columns.setdefault(name, []).extend(values)
    return columns


def _order(record: Record) -> tuple[Any, ...]:
    point = record["point"]
    return METHODS.index(point["method"]), point["n_features"], point["seed"], point["lr"], point["sparsity"]


def points_of_lines(
    table: Mapping[str, list[Any]], scope: str
) -> dict[tuple[str, int, int], list[tuple[float, float]]]:
    """(method, F, seed) -> (L0, explained variance) of its points, as far as they are known in the scope."""
    explained, l0 = SCOPES[scope]
    lines: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for *line, x, y in zip(*(table[name] for name in ("method", "n_features", "seed", l0, explained)), strict=True):
        if x is not None:
            lines.setdefault((line[0], line[1], line[2]), []).append((x, y))
    return lines


def comparisons(table: Columns) -> dict[tuple[str, int], Comparison]:
    """By scope and F: the methods of `results` at common L0. Only seeds that every method has count."""
    found = {}
    for scope in SCOPES:
        for F in sorted(set(table["n_features"])):
            points: dict[str, dict[int, list[tuple[float, float]]]] = {}
            for (method, size, seed), line in points_of_lines(table, scope).items():
                if size == F:
                    points.setdefault(method, {})[seed] = line
            seeds = sorted(set.intersection(*(set(of_method) for of_method in points.values()))) if points else []
            if len(points) > 1 and seeds:
                found[scope, F] = compare(
                    {
                        method: [Frontier.of(*zip(*of_method[seed], strict=True)) for seed in seeds]
                        for method, of_method in points.items()
                    }
                )
    return found


def at_common_l0(table: Columns) -> Columns:
    """A row a scope, F, common L0 and method: mean and range over the seeds, of the explained variance and of the
    crosscoder's lead over the method (seed by seed)."""
    columns: Columns = {
        name: []
        for name in (
            "scope", "n_features", "l0", "method", "seeds", "explained_variance", "lowest", "highest",
            "crosscoder_lead", "lowest_lead", "highest_lead",
        )
    }  # fmt: skip
    for (scope, F), comparison in comparisons(table).items():
        for method, explained_SG in comparison.explained_SG.items():
            lead_SG = comparison.difference("crosscoder", method)
            for g, l0 in enumerate(comparison.l0_G.tolist()):
                row = [scope, F, l0, method, len(explained_SG), *_spread(explained_SG[:, g]), *_spread(lead_SG[:, g])]
                for name, value in zip(columns, row, strict=True):
                    columns[name].append(value)
    return columns


def _spread(values_S: Any) -> tuple[float, float, float]:
    return float(np.mean(values_S)), float(np.min(values_S)), float(np.max(values_S))
