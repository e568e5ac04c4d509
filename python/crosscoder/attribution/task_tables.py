"""The results of a task as tables: one row an observation, in parquet.

`prompts` (the pairs as text), `metric` (snapshot, prompt), `attributions` (snapshot, feature), `by_prompt` (snapshot,
prompt, feature), `curves` (snapshot, ablation, k). Snapshots at chance have rows in `metric` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crosscoder.attribution.ablation import Curves
from crosscoder.attribution.gradients import METHODS
from crosscoder.attribution.snapshot import Attributed, SnapshotResult
from crosscoder.attribution.task import Task
from crosscoder.common.statistics import ratio_interval
from crosscoder.common.tables import Table
from crosscoder.config import AttributionSettings


def task_tables(
    task: Task, tokenizer: Any, revisions: Sequence[str], parts: Sequence[SnapshotResult], settings: AttributionSettings
) -> dict[str, Table]:
    """All tables of a task, from its snapshots (see `measure_snapshot`)."""
    known = [(name, one.attributed) for name, one in zip(revisions, parts, strict=True) if one.attributed is not None]
    return {
        "prompts": _prompts(task, tokenizer),
        "metric": _joined([_metric(name, one) for name, one in zip(revisions, parts, strict=True)]),
        "attributions": _joined([_attributions(name, part, task) for name, part in known]),
        "by_prompt": _joined([_by_prompt(name, part) for name, part in known]),
        "curves": _joined(
            [
                _curves(name, part.curves[ablation], ablation, settings)
                for name, part in known
                for ablation in settings.ablations
            ]
        ),
    }


def _joined(tables: Sequence[Table]) -> Table:
    if not tables:
        return {}
    return {name: np.concatenate([np.asarray(table[name]) for table in tables]) for name in tables[0]}


def _prompts(task: Task, tokenizer: Any) -> Table:
    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens)))

    return {
        "prompt": np.arange(len(task), dtype=np.int32),
        "split": ["train" if index < task.n_train else "test" for index in range(len(task))],
        "clean": [text(example.clean[1:]) for example in task.examples],
        "corrupted": [text(example.corrupted[1:]) for example in task.examples],
        "right": [text([example.right]) for example in task.examples],
        "wrong": [text([example.wrong]) for example in task.examples],
    }


def _metric(revision: str, part: SnapshotResult) -> Table:
    n = len(part.metric)
    return {
        "snapshot": [revision] * n,
        "prompt": np.arange(n, dtype=np.int32),
        "clean": part.metric,
        "corrupted": part.corrupted,
    }


def _attributions(revision: str, part: Attributed, task: Task) -> Table:
    """Means over the train prompts; exact effects are NaN where they were not measured."""
    feature, place = np.unique(part.feature, return_inverse=True)
    table: Table = {"snapshot": [revision] * len(feature), "feature": feature}
    for name in METHODS:
        sums = np.bincount(place, part.values[name], minlength=len(feature))
        table[name] = (sums / task.n_train).astype(np.float32)
    row = np.searchsorted(feature, part.listed)
    for name in ("resample", "zero"):
        table[f"exact_{name}"] = np.full(len(feature), np.nan, dtype=np.float32)
        table[f"exact_{name}"][row] = part.exact[name]
    table["n_prompts"] = np.bincount(place, minlength=len(feature)).astype(np.int32)
    table["firing_rate"] = part.firing_rate[feature]
    return table


def _by_prompt(revision: str, part: Attributed) -> Table:
    table: Table = {"snapshot": [revision] * len(part.prompt), "prompt": part.prompt, "feature": part.feature}
    return table | {name: part.values[name] for name in METHODS}


def _curves(revision: str, curves: Curves, ablation: str, settings: AttributionSettings) -> Table:
    """A row for each size and set: drop, faithfulness and completeness, with intervals over prompts.

    Sets are the top k, k random features matched in rate and norm, and random features that are as active as the top k.
    """
    clean_P, empty_P = curves.clean, curves.empty
    sets = (
        ("top", curves.disrupt, curves.restore),
        ("random", curves.disrupt_random, curves.restore_random),
        ("active", curves.disrupt_active, None),
    )
    rows: list[dict[str, Any]] = []
    for column, (kind, disrupted, restored) in enumerate(sets):
        for row, k in enumerate(curves.k.tolist()):
            disrupted_P = _over_sets(disrupted[row])
            if not np.isfinite(disrupted_P).all():
                continue
            found: dict[str, Any] = {"snapshot": revision, "ablation": ablation, "set": kind, "k": k}
            found["active"] = float(curves.active[row, column])
            found["disrupt"] = float(disrupted_P.mean())
            drop = ratio_interval(clean_P - disrupted_P, clean_P, settings.seed)
            found["drop"], found["drop_low"], found["drop_high"] = drop
            found["completeness"] = float((disrupted_P.mean() - empty_P.mean()) / (clean_P - empty_P).mean())
            found["restore"], faithfulness = np.nan, (np.nan, np.nan, np.nan)
            if restored is not None:
                restored_P = _over_sets(restored[row])
                found["restore"] = float(restored_P.mean())
                faithfulness = ratio_interval(restored_P - empty_P, clean_P - empty_P, settings.seed)
            found["faithfulness"], found["faithfulness_low"], found["faithfulness_high"] = faithfulness
            rows.append(found)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _over_sets(metric: np.ndarray) -> np.ndarray:
    """(P,): mean over the sets of features where there are several."""
    return metric if metric.ndim == 1 else np.asarray(metric.mean(axis=0))
