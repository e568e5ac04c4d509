"""Comparisons and sweeps on disk: shown where they are of the run as it is now, else a note says what to run again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from explain.planted_run import make_run

from crosscoder import Crosscoder, weights
from crosscoder.common.tables import write_table
from crosscoder.config import StudySettings
from crosscoder.evolution.comparison_figures import Comparisons
from crosscoder.evolution.comparisons import finished_comparisons, save_comparison
from crosscoder.evolution.stability import Stability, compare_dictionaries
from crosscoder.evolution.study import Study
from crosscoder.files import read_json, write_json
from crosscoder.report.finished import finished
from crosscoder.runs import Run
from crosscoder.sweep.figures import Sweep


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(make_run(tmp_path / "run"), StudySettings())


def changed(run: Run) -> Study:
    """The study of the run with another crosscoder."""
    model = Crosscoder.from_pretrained(run.crosscoder)
    with torch.no_grad():
        model.W_dec += 0.01
    weights.save(model.config, model.state_dict(), run.crosscoder)
    return Study(run, StudySettings())


def found(seed: int) -> Stability:
    first, second = (torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(seed + n)) for n in (0, 100))
    return compare_dictionaries(first, second, np.zeros(8), np.zeros(8))


def test_runs_of_one_name_keep_their_comparisons(study: Study, tmp_path: Path) -> None:
    others = []
    for place in ("a", "b"):
        shutil.copytree(study.run.path, tmp_path / place / "seed1")
        others.append(changed(Run(tmp_path / place / "seed1")))
    others[1] = changed(others[1].run)  # another dictionary than a/seed1's
    first, second = found(1), found(2)
    paths = [save_comparison(one, study, other, {}) for one, other in zip((first, second), others, strict=True)]
    assert [path.name for path in paths] == ["seed1.npz", "seed1-2.npz"]
    current, stale = finished_comparisons(study)
    assert stale == {} and list(current) == ["seed1", "seed1-2"]
    for name, kept in zip(current, (first, second), strict=True):
        np.testing.assert_array_equal(current[name].matching.nearest, kept.matching.nearest)
    assert [read_json(path.with_suffix(".json"))["other"] for path in paths] == [
        str(other.run.path.resolve()) for other in others
    ]  # fmt: skip

    # again, trained anew: in its own place
    again = found(3)
    assert save_comparison(again, study, changed(others[1].run), {}) == paths[1]
    np.testing.assert_array_equal(finished_comparisons(study)[0]["seed1-2"].matching.nearest, again.matching.nearest)
    # moved: it is the same run
    (tmp_path / "c").mkdir()
    shutil.move(others[0].run.path, tmp_path / "c" / "seed1")
    moved = Study(Run(tmp_path / "c" / "seed1"), StudySettings())
    assert save_comparison(found(4), study, moved, {}) == paths[0]


def test_a_stale_comparison_is_named_with_its_path(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.run.path, tmp_path / "elsewhere" / "seed1")
    other = changed(Run(tmp_path / "elsewhere" / "seed1"))
    save_comparison(found(1), study, other, {})
    [comparisons], notes = finished(study)
    assert isinstance(comparisons, Comparisons) and list(comparisons.by_run) == ["seed1"] and notes == []
    [comparisons], [note] = finished(changed(study.run))
    assert comparisons == Comparisons({})
    assert note.endswith(f"crosscoder compare {study.run.path} {other.run.path.resolve()}.")
    assert "The comparison with seed1 is of an earlier crosscoder" in note


def test_a_sweep_of_other_activations_is_left_out(study: Study) -> None:
    folder = study.run.path / "sweep"
    write_table(folder / "results.parquet", {"method": ["sae"], "l0_last": [3.0]})
    shared = {"store": study.store.identity, "snapshots": study.store.snapshot_names}
    write_json(folder / "settings.json", shared)
    [_, sweep], notes = finished(study)
    assert sweep == Sweep({"method": ["sae"], "l0_last": [3.0]}) and notes == []
    assert finished(changed(study.run))[0][1:] == [sweep], "its crosscoders are its own"
    for other in ({"store": 1}, {"snapshots": ["step0"]}):
        write_json(folder / "settings.json", {**shared, **other})
        found, [note] = finished(study)
        assert found == [Comparisons({})] and "The sweep beside other dictionaries is of other activations" in note
        assert f"crosscoder sweep {study.run.path}" in note
