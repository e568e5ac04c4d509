"""Comparisons of a run with others on disk: `comparison/OTHER.npz` with `OTHER.json` beside it, as analyses are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosscoder.evolution.arrays import Arrays, flatten, load_arrays, save_arrays
from crosscoder.evolution.stability import Stability
from crosscoder.evolution.study import Study
from crosscoder.files import make_folder, read_json, write_json

DEFINITION = (
    "Features present at the last snapshot, matched one to one so that the sum of cosines of their decoders there is "
    "the largest; stable from 0.7 on; beside random directions of the same second moments; emergence of stable pairs."
)


def save_comparison(name: str, found: Stability, study: Study, other: Study, settings: Mapping[str, Any]) -> Path:
    """Write what comparing `study` with the run `name` found; the path of the arrays. Raises `StorageError`."""
    path = make_folder(study.run.comparison) / f"{name}.npz"
    described = path.with_suffix(".json")
    # Without its record first: a kill between the two writes must not leave new arrays under an old description.
    described.unlink(missing_ok=True)
    save_arrays(path, flatten(found))
    of, of_other = (one.record("life")["of"] for one in (study, other))
    write_json(
        described,
        {
            "comparison": name,
            "definition": DEFINITION,
            "settings": dict(settings),
            "of": {"run": of, "other": of_other},
        },
    )
    return path


def finished_comparisons(study: Study) -> tuple[dict[str, Arrays], list[str]]:
    """Other run -> what comparing found; and the runs whose comparison is of an earlier crosscoder or definition.

    Whether the other run has changed since is not looked at: it may be anywhere.
    """
    current: dict[str, Arrays] = {}
    stale: list[str] = []
    of = study.record("life")["of"]
    for path in sorted(study.run.comparison.glob("*.npz")):
        described = path.with_suffix(".json")
        record = read_json(described) if described.exists() else {}
        if record.get("definition") == DEFINITION and record["of"]["run"] == of:
            current[path.stem] = load_arrays(path)
        else:
            stale.append(path.stem)
    return current, stale
