"""What holds for every analysis: its result is saved and loaded as its own type, its record says when it is stale, and
the lists of analyses agree."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explain.planted_run import make_run
from numpy.typing import NDArray

from crosscoder.common.arrays import flatten, layout, load_arrays, restore, save_arrays
from crosscoder.config import StudySettings
from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution import analyses as registry
from crosscoder.evolution.analyses import NAMES, analyses, analysis, listed, names
from crosscoder.evolution.analyses.examples import EXAMPLES
from crosscoder.evolution.analyses.life import LIFE, LifeResult
from crosscoder.evolution.study import Analysis, Study
from crosscoder.runs import Run

DOCS = Path(__file__).parents[2] / "docs" / "evolution.md"


@dataclass(frozen=True)
class Inner:
    curve: NDArray[np.float64]
    n: int


@dataclass(frozen=True)
class Outer:
    inner: Inner
    by_name: dict[str, Inner]
    curves: dict[str, NDArray[np.float64]]
    levels: tuple[float, ...]
    share: float
    sharp: bool
    note: str
    missing: Inner | None
    index: int | None
    known: int | None = 7


def outer() -> Outer:
    first, second = Inner(np.array([0.1, np.nan]), 3), Inner(np.zeros((2, 0)), 0)
    curves = {"b": np.array([1.0]), "a": np.array([2.0])}
    return Outer(first, {"x": first, "y": second}, curves, (0.1, 0.9), float("nan"), True, "log(1 + x)", None, None)


def test_a_result_comes_back_as_its_own_type(tmp_path: Path) -> None:
    saved = outer()
    save_arrays(tmp_path / "a.npz", flatten(saved))
    found = restore(Outer, load_arrays(tmp_path / "a.npz"))
    np.testing.assert_equal(dataclasses.asdict(found), dataclasses.asdict(saved))
    assert type(found.inner) is type(found.by_name["y"]) is Inner and list(found.curves) == ["b", "a"]
    for name in ("levels", "share", "sharp", "note", "missing", "index", "known"):
        assert type(getattr(found, name)) is type(getattr(saved, name)), name
    assert found.by_name["y"].curve.shape == (2, 0)


def test_the_layout_names_every_array() -> None:
    assert layout(Outer) == [
        "inner.curve", "inner.n", "by_name.*.curve", "by_name.*.n", "curves.*", "levels", "share", "sharp", "note",
        "missing.curve", "missing.n", "index", "known",
    ]  # fmt: skip


def test_what_would_not_come_back_is_refused() -> None:
    with pytest.raises(TypeError, match=r"the name 'a\.b' has a point in it"):
        flatten({"curves": {"a.b": np.zeros(1)}})
    with pytest.raises(TypeError, match="note: cannot save object as an array"):
        flatten({"note": object()})
    arrays = flatten(outer())
    del arrays["by_name.x.n"]
    with pytest.raises(DataError, match=r"lack by_name\.x\.n"):
        restore(Outer, arrays)


@pytest.mark.parametrize("name", NAMES)
def test_an_analysis_is_sound(name: str) -> None:
    one = analysis(name)
    assert one.name == name and one.version >= 1
    assert one.definition and not one.definition.endswith(".")
    assert set(one.settings) <= {field.name for field in dataclasses.fields(StudySettings)}
    assert layout(one.result), "its result is a dataclass that can be saved"
    earlier = NAMES[: NAMES.index(name)]
    assert all(needed.name in earlier for needed in one.needs), "what it needs is computed before it"
    compute = typing.get_type_hints(one.compute)
    assert compute["return"] is one.result
    assert one.compute.__doc__ and one.result.__doc__


def test_every_setting_is_read_by_an_analysis() -> None:
    read = {setting for one in analyses() for setting in one.settings}
    assert read == {field.name for field in dataclasses.fields(StudySettings)}


def test_each_analysis_has_a_result_of_its_own_type() -> None:
    assert len({one.result for one in analyses()}) == len(NAMES)


def test_the_docs_list_every_analysis() -> None:
    command = 'python -c "from crosscoder.evolution.analyses import listed; print(listed())"'
    assert listed() in DOCS.read_text(), f"put the table into docs/evolution.md that this prints: {command}"


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="there is no analysis 'lives'; known are examples, life, rotation"):
        analysis("lives")


def test_another_package_adds_an_analysis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peaks.py").write_text(
        "from dataclasses import dataclass\n"
        "import numpy as np\n"
        "from crosscoder.evolution.study import Analysis\n"
        "@dataclass(frozen=True)\n"
        "class PeaksResult:\n    peak: np.ndarray\n"
        "PEAKS = Analysis('peaks', 1, 'where norms are largest', PeaksResult, lambda study: PeaksResult(np.zeros(1)))\n"
    )
    (tmp_path / "peaks-1.dist-info").mkdir()
    (tmp_path / "peaks-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peaks\nVersion: 1\n")
    points = tmp_path / "peaks-1.dist-info" / "entry_points.txt"
    points.write_text(f"[{registry.GROUP}]\npeaks = peaks:PEAKS\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._others.cache_clear()
    try:
        assert names() == (*NAMES, "peaks")
        assert analyses()[-1].definition == "where norms are largest"
        assert "| `peaks` | where norms are largest | - |" in listed()
    finally:
        monkeypatch.undo()
        registry._others.cache_clear()
    assert names() == NAMES


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run") / "run")


def test_words_change_no_result_and_a_version_does(run: Run) -> None:
    computed: list[int] = []

    def compute(study: Study) -> LifeResult:
        computed.append(1)
        return LIFE.compute(study)

    study = Study(run, StudySettings())
    one: Analysis[LifeResult] = dataclasses.replace(LIFE, name="mine", compute=compute)
    first = study.result(one)
    assert isinstance(first, LifeResult) and type(first.cycles.threshold) is float
    reworded = dataclasses.replace(one, definition="the same in other words")
    np.testing.assert_equal(dataclasses.asdict(study.result(reworded)), dataclasses.asdict(first))
    assert len(computed) == 1
    newer = dataclasses.replace(one, version=2)
    assert study.finished(newer) is None
    study.result(newer)
    assert len(computed) == 2
    assert json.loads((run.evolution / "mine.json").read_text())["version"] == 2


def test_a_newer_version_makes_what_needs_it_stale(run: Run) -> None:
    study = Study(run, StudySettings())
    newer = dataclasses.replace(LIFE, needs=(dataclasses.replace(EXAMPLES, version=2),))
    assert study.record(newer)["of"] != study.record(LIFE)["of"]


def test_another_form_of_a_result_is_never_misread(run: Run) -> None:
    @dataclass(frozen=True)
    class More(LifeResult):
        extra: int = 0

    def compute(study: Study) -> More:
        raise AssertionError

    study = Study(run, StudySettings())
    assert study.record(dataclasses.replace(LIFE, result=More))["of"] != study.record(LIFE)["of"]


def test_the_settings_stand_beside_the_results(run: Run) -> None:
    settings = StudySettings(tau=0.25, contexts=9)
    Study(run, settings).save_settings()
    assert Study.of(run).settings == settings
    Study(run, StudySettings()).save_settings()
    assert Study.of(run).settings == StudySettings()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tau": -1}, "tau must lie between 0 and 1, not -1"),
        ({"tau": 1.0}, "tau must lie between 0 and 1, not 1.0"),
        ({"tau": float("nan")}, "tau must lie between 0 and 1, not nan"),
        ({"contexts": -5}, "contexts must be at least 1, not -5"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"neighbours": 0}, "neighbours must be at least 1, not 0"),
        ({"n_probed": -2}, "n_probed must be at least 1, not -2"),
        ({"positions": 0}, "positions must be at least 1, not 0"),
        ({"induction_length": 2}, "induction_length must be at least 3, not 2"),
        ({"complexity_features": -1}, "complexity_features must be at least 0, not -1"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_settings_that_no_analysis_can_use_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        StudySettings(**setting)
    assert str(error.value) == message
