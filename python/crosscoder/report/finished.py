"""Results of other verbs than `evolve` on disk: those that are of the run as it is now, and a note on each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from crosscoder.common.tables import read_table
from crosscoder.evolution.comparison_figures import Comparisons
from crosscoder.evolution.comparisons import finished_comparisons
from crosscoder.evolution.study import Study
from crosscoder.explain.explanation_study import finished_explanations
from crosscoder.explain.figures import Explanations
from crosscoder.files import read_json
from crosscoder.sweep.figures import Sweep
from crosscoder.sweep.sweep import SETTINGS_FILE


def finished(study: Study) -> tuple[list[object], list[str]]:
    """Comparisons, explanations and a sweep, where there are such; and notes on what is left out."""
    run, found, notes = study.run, list[object](), []
    comparisons, stale = finished_comparisons(study)
    found.append(Comparisons(comparisons))
    for name, path in stale.items():
        notes.append(
            f"The comparison with {name} is of an earlier crosscoder or analysis and is left out here; run again: "
            f"crosscoder compare {run.path} {path or f'and the folder of {name}'}."
        )
    if (run.evolution / "explanations.parquet").exists():
        explanations = finished_explanations(study)
        if explanations is None:
            notes.append(
                "The explanations by a language model are of an earlier crosscoder or analysis, whose features had "
                f"other numbers, and are left out here; run again: crosscoder explain {run.path} --help."
            )
        else:
            found.append(Explanations(_plain(explanations)))
    results = run.path / "sweep" / "results.parquet"
    if results.exists():
        if _is_of_store(study):
            found.append(Sweep(_plain(read_table(results, "run crosscoder sweep again"))))
        else:
            notes.append(
                "The sweep beside other dictionaries is of other activations than the run's and is left out here; "
                f"delete {results.parent} and run again: crosscoder sweep {run.path} --help."
            )
    return found, notes


def _plain(table: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: np.asarray(column).tolist() for name, column in table.items()}


def _is_of_store(study: Study) -> bool:
    """Whether the sweep was trained on the run's activations. Its crosscoders are its own, not the run's: training
    that one anew leaves the sweep as it is."""
    settings = study.run.path / "sweep" / SETTINGS_FILE
    record = read_json(settings) if settings.exists() else {}
    wanted = {"store": study.store.identity, "snapshots": study.store.snapshot_names}
    return all(record.get(name) == value for name, value in wanted.items())
