"""The results of a task's attribution study, as they are read again.

Letters: K snapshots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscoder.attribution.attribution_study import CIRCUIT, RESULTS
from crosscoder.attribution.circuits import Circuit
from crosscoder.common.arrays import load_result
from crosscoder.common.tables import read_table
from crosscoder.errors import DataError
from crosscoder.files import read_json, reading
from crosscoder.runs import Run


@dataclass(frozen=True)
class TaskResult:
    """What a task's attribution study found. Snapshots at chance hold 0 in the arrays of the circuit."""

    record: Mapping[str, Any]
    """As `results.json` has it."""
    circuit: Circuit
    """Without features where the task is at chance everywhere."""
    curves: Mapping[str, NDArray[Any]]
    """Columns of the ablation curves, a row a (snapshot, ablation, set, k); "snapshot" is an index."""

    @property
    def name(self) -> str:
        return str(self.record["task"])

    @property
    def note(self) -> str:
        """What the task is, in a sentence without its full stop."""
        return str(self.record["note"])

    @property
    def n_prompts(self) -> int:
        return int(self.record["n_prompts"])

    @property
    def metric(self) -> str:
        """ "logit-difference" or "probability-difference"."""
        return str(self.record["settings"]["metric"])

    @property
    def figures(self) -> Mapping[str, Any]:
        """The main figures, as `attribution.summary` makes them."""
        figures: Mapping[str, Any] = self.record["figures"]
        return figures

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """(K,) share of prompts answered right."""
        return self._curve("clean_accuracy")

    @property
    def clean(self) -> NDArray[np.float64]:
        """(K,) mean metric on the clean prompts."""
        return self._curve(self.metric.replace("-", "_"))

    @property
    def corrupted(self) -> NDArray[np.float64]:
        """(K,) mean metric on the corrupted prompts."""
        return self._curve("corrupted_metric")

    @property
    def above_chance(self) -> NDArray[np.bool_]:
        """(K,)"""
        return np.isin(list(self.figures["clean_accuracy"]), self.figures["above_chance"])

    @property
    def fidelity(self) -> Mapping[str, float | None]:
        """Method -> rank correlation of its attributions with exact ablation, over `n_exact` features."""
        fidelity: Mapping[str, float | None] = self.figures["rank_correlation_with_exact"]
        return fidelity

    @property
    def n_exact(self) -> int:
        return int(self.figures["n_exact"])

    @property
    def completeness_error(self) -> float | None:
        """Of integrated gradients, a share."""
        error: float | None = self.figures["ig_completeness_error"]
        return error

    def _curve(self, name: str) -> NDArray[np.float64]:
        return np.array(list(self.figures[name].values()), dtype=np.float64)


def finished_tasks(run: Run, revisions: Sequence[str]) -> list[TaskResult]:
    """The tasks of a run whose study is complete, by name.

    Raises `DataError` naming a damaged file, or with the remedy where one is of other snapshots than `revisions`.
    """
    return [
        _load(path.parent, run, list(revisions)) for path in sorted((run.path / "attribution").glob(f"*/{RESULTS}"))
    ]


def _load(folder: Path, run: Run, revisions: list[str]) -> TaskResult:
    record = read_json(folder / RESULTS, task=str, figures=dict)
    with reading(folder / RESULTS):
        found = list(record["figures"]["clean_accuracy"])
    if found != revisions:
        raise DataError(
            f"{folder} was computed from other snapshots than the run has; run again: crosscoder attribute {run.path} "
            f"--task {record['task']}"
        )
    path = folder / "curves.parquet"
    curves = read_table(path, "run crosscoder attribute again with --no-resume")
    if curves:
        with reading(path):
            curves["snapshot"] = np.array([revisions.index(name) for name in curves["snapshot"]])
    return TaskResult(record, load_result(Circuit, folder / CIRCUIT), curves)
