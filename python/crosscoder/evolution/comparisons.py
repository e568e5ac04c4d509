"""Comparisons of a run with others on disk: `comparison/OTHER.npz` with `OTHER.json` beside it, as analyses are.

OTHER is the name of the other run's folder; of a second folder of that name OTHER-2, and so on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

from crosscoder.common.arrays import layout, load_result, record_beside, save_described
from crosscoder.evolution.analyses.life import LIFE
from crosscoder.evolution.stability import STABLE, Stability
from crosscoder.evolution.study import Study
from crosscoder.evolution.summary import finite
from crosscoder.files import make_folder, read_json, reading

VERSION = 1
"""To be raised when the same inputs give another comparison: those of other versions are stale."""
DEFINITION = (
    "Features present at the last snapshot, matched one to one so that the sum of cosines of their decoders there is "
    f"the largest; stable from {STABLE:g} on; beside random directions of the same second moments; emergence of stable "
    "pairs."
)


def save_comparison(found: Stability, study: Study, other: Study, settings: Mapping[str, Any]) -> Path:
    """Write what comparing `study` with `other` found; the path of the arrays, whose stem is the comparison's name.
    Raises `StorageError`."""
    of, of_other = (one.record(LIFE)["of"] for one in (study, other))
    folder, other_path = make_folder(study.run.comparison), other.run.path.resolve()
    path = folder / f"{_free_name(folder, other_path, of_other)}.npz"
    record = {
        "comparison": path.stem,
        "other": str(other_path),
        "version": VERSION,
        "definition": DEFINITION,
        "settings": dict(settings),
        "of": {"run": of, "other": of_other, "arrays": layout(Stability)},
    }
    save_described(path, found, record)
    return path


def _free_name(folder: Path, other: Path, of_other: str) -> str:
    """The name of the comparison with the run at `other`: that of its folder, numbered where this name is taken by
    another run. One that was moved or copied since is no other run, nor is one whose record does not say."""

    def free(name: str) -> bool:
        described = folder / f"{name}.json"
        record = read_json(described) if described.exists() else {}
        return bool(record.get("other", str(other)) == str(other) or record["of"]["other"] == of_other)

    return next(filter(free, chain([other.name], (f"{other.name}-{number}" for number in count(2)))))


def finished_comparisons(study: Study) -> tuple[dict[str, Stability], dict[str, str | None]]:
    """Name -> what comparing found; and name -> path of the other run where this is of an earlier crosscoder or
    version (None where the record does not say it).

    Whether the other run has changed since is not looked at: it may be anywhere.
    """
    current: dict[str, Stability] = {}
    stale: dict[str, str | None] = {}
    wanted = (VERSION, study.record(LIFE)["of"], layout(Stability))
    for path in sorted(study.run.comparison.glob("*.npz"), key=lambda path: path.stem):
        record = record_beside(path)
        with reading(path.with_suffix(".json")):
            rests_on = record.get("of", {})
            is_current = (record.get("version"), rests_on.get("run"), rests_on.get("arrays")) == wanted
        if is_current:
            current[path.stem] = load_result(Stability, path)
        else:
            stale[path.stem] = record.get("other")
    return current, stale


def summary(found: Stability) -> dict[str, Any]:
    """Main figures of a comparison with another crosscoder, for `summary.json`."""
    names = [field.name for field in dataclasses.fields(found) if field.type in ("int", "float")]
    return {
        **{name: finite(getattr(found, name)) for name in names},
        "loss": found.matching.loss,
        "n_cut": found.matching.n_cut,
        "candidates": found.matching.candidates,
    }
