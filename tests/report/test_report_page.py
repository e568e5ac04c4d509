"""The file itself: checks of its input, what it may ask for, what it weighs, that it is reproducible."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import page_synthetic
import pytest
from results_synthetic import Made

from crosscoder.errors import DataError, StorageError
from crosscoder.figures.table import FigureTable
from crosscoder.report.data import Contexts, Features, PageData
from crosscoder.report.page import render, write_page

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)>&lt;\"'\u2028"


def overview_of(page: bytes) -> dict[str, Any]:
    found = re.search(rb'<script type="application/json" id="overview-data">(.*?)</script>', page, re.S)
    assert found is not None
    result: dict[str, Any] = json.loads(found[1])
    return result


def changed(data: PageData, **changes: Any) -> PageData:
    return dataclasses.replace(data, **changes)


def with_features(data: PageData, **changes: Any) -> PageData:
    assert data.features is not None
    return changed(data, features=dataclasses.replace(data.features, **changes))


def with_contexts(data: PageData, **changes: Any) -> PageData:
    assert data.features is not None
    assert data.features.contexts is not None
    return with_features(data, contexts=dataclasses.replace(data.features.contexts, **changes))


@pytest.fixture(scope="module")
def data() -> PageData:
    return page_synthetic.page_data(60, per_feature=3, length=12, vocabulary_size=300)


def test_the_policy_forbids_everything_but_the_pages_own_parts(data: PageData) -> None:
    page = render(data).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; base-uri 'none'; form-action 'none'")
    assert "unsafe" not in policy[1]
    assert "http" not in policy[1]
    assert "<!-- " not in page


def test_same_data_same_bytes(data: PageData) -> None:
    assert render(data) == render(data)


def test_hostile_text_cannot_end_its_element(data: PageData) -> None:
    clean = render(data)
    texts = [HOSTILE] * 300
    hostile = with_contexts(
        changed(data, title=HOSTILE, subtitle=HOSTILE, sentences=[HOSTILE], settings={HOSTILE: HOSTILE}),
        vocabulary=texts,
        documents=[HOSTILE] * 236,
    )
    page = render(hostile)
    for tag in (b"<script", b"</script", b"<img", b"<!--", b"-->"):
        assert page.count(tag) == clean.count(tag), tag
    overview = overview_of(page)
    assert overview["title"] == HOSTILE
    assert overview["settings"] == {HOSTILE: HOSTILE}


def test_quickstart_size_is_at_most_5_mb(small_page: Path) -> None:
    assert small_page.stat().st_size <= 5_000_000


def test_only_title_and_sentences() -> None:
    overview = overview_of(render(PageData(title="t", sentences=["s"], steps=[5])))
    assert overview["figures"] == []
    assert "features" not in overview


def made(data: PageData) -> Made:
    return page_synthetic.made(list(data.steps), features_of(data))


def tables_of(found: Made) -> dict[str, FigureTable]:
    return {table.key: table for table in page_synthetic.tables_of(found)}


def test_figures_appear_only_with_their_numbers(data: PageData) -> None:
    found = made(data)
    only = Made({"induction": found.arrays["induction"]}, steps=found.steps)
    [table] = page_synthetic.tables_of(only)
    assert table.key == "induction" and list(table.columns) == ["snapshot", "step", "gap"]
    np.testing.assert_allclose(table.columns["gap"], found.arrays["induction"]["gap"], rtol=1e-5)


def test_all_figures_are_there_in_the_order_of_the_page(data: PageData) -> None:
    assert tuple(table.key for table in data.tables) == page_synthetic.FIGURE_KEYS
    for table in data.tables:
        assert len({len(column) for column in table.columns.values()}) == 1


def test_histograms_count_every_living_feature(data: PageData) -> None:
    assert data.features is not None
    tables = {table.key: table for table in data.tables}
    alive = np.asarray(data.features.max_norm) > 0

    def counts(key: str) -> int:
        columns = tables[key].columns
        return sum(sum(columns[kind]) for kind in data.features.kind_names if kind in columns)  # type: ignore[union-attr]

    assert counts("lifetimes") == alive.sum()
    assert counts("emergence") == (alive & (np.asarray(data.features.emergence) >= 0)).sum()


def test_lifetimes_count_the_features_that_come_back(data: PageData) -> None:
    assert data.features is not None
    lifetime, alive = np.asarray(data.features.lifetime), np.asarray(data.features.max_norm) > 0
    back = (np.arange(len(lifetime)) % 5 == 0) & (lifetime > 0)
    found = made(data)
    found.arrays["life"]["cycles.revived"] = back
    table = tables_of(found)["lifetimes"]
    counted = np.bincount(np.rint(lifetime[back & alive] * len(data.steps)).astype(int), minlength=len(data.steps) + 1)
    assert table.columns["come back"] == counted.tolist() and counted.sum() > 0
    assert f" {counted.sum():,} of these {alive.sum():,} features disappear and come back." in table.caption


def test_contexts_are_left_out_to_fit_and_the_page_says_so() -> None:
    # enough features that contexts are most of the file
    data = page_synthetic.page_data(400, per_feature=8, length=32, vocabulary_size=2000)
    full, least = render(data), render(with_features(data, contexts=None))
    limit = (len(full) + len(least)) // 2
    page = render(data, max_bytes=limit)
    assert len(least) < len(page) <= limit
    overview = overview_of(page)
    note = re.search(r"at most (\d) a feature", overview["notes"][-1])
    assert note is not None
    assert 1 <= int(note[1]) < 8
    assert len(overview["notes"]) == len(data.notes) + 1
    with pytest.raises(DataError, match="without any contexts"):
        render(data, max_bytes=len(least) - 10_000)


def test_unwritable_place_is_one_clear_error(data: PageData, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_page(data, file / "page.html")


def features_of(data: PageData) -> Features:
    assert data.features is not None
    return data.features


def contexts_of(data: PageData) -> Contexts:
    contexts = features_of(data).contexts
    assert contexts is not None
    return contexts


def norms_with_nan(data: PageData) -> PageData:
    norms = np.array(features_of(data).norms)
    norms[3, 2] = np.nan
    return with_features(data, norms=norms)


def without_contexts_but_bytes(data: PageData) -> PageData:
    nothing = np.zeros((0, 3), dtype=np.int64)
    vocabulary: Any = [b"a"]
    return with_features(data, contexts=Contexts(nothing[:, 0], nothing, nothing * 1.0, vocabulary))


def with_column(data: PageData, column: list[float]) -> PageData:
    """The figure of L0 with other values."""
    *others, l0 = data.tables
    return changed(data, tables=[*others, dataclasses.replace(l0, columns={**l0.columns, "l0": column})])


# what the message must say -> data that does not fit together (60 features, 14 snapshots)
BROKEN: dict[str, Callable[[PageData], PageData]] = {
    "steps must increase": lambda data: changed(data, steps=[0, 5, 5]),
    "steps must be": lambda data: changed(data, steps=[]),
    "sentences": lambda data: changed(data, sentences="one"),
    "features.norms has shape": lambda data: with_features(data, norms=np.zeros((60, 3))),
    "features.norms holds NaN": norms_with_nan,
    "features.norms must lie in": lambda data: with_features(data, norms=features_of(data).norms * 2),
    "leave it None": lambda data: with_features(data, norms=np.zeros((0, 14))),
    "features.max_norm": lambda data: with_features(data, max_norm=np.ones(59)),
    "features.kind must lie": lambda data: with_features(data, kind=np.full(60, 4)),
    "features.kind has dtype": lambda data: with_features(data, kind=np.zeros(60)),
    "features.emergence": lambda data: with_features(data, emergence=np.full(60, 14)),
    "features.peak": lambda data: with_features(data, peak=np.full(60, -1)),
    "features.lifetime": lambda data: with_features(data, lifetime=np.full(60, 1.5)),
    "features.firing_rate": lambda data: with_features(data, firing_rate=np.full((60, 14), -0.1)),
    "features.neighbours must lie": lambda data: with_features(data, neighbours=np.full((60, 8), 60)),
    "given together": lambda data: with_features(data, neighbour_cosines=None),
    "contexts.tokens must lie": lambda data: with_contexts(data, tokens=contexts_of(data).tokens + 300),
    "contexts.activations has shape": lambda data: with_contexts(data, activations=np.zeros((3, 3))),
    "contexts.feature": lambda data: with_contexts(data, feature=contexts_of(data).feature + 60),
    "contexts.document must lie": lambda data: with_contexts(data, documents=["only one"]),
    "stronger than": lambda data: with_contexts(data, activations=contexts_of(data).activations * 2),
    "contexts.vocabulary": without_contexts_but_bytes,
    "columns of the figure 'l0' have different": lambda data: with_column(data, [1.0]),
    "column 'l0' of the figure 'l0' holds NaN or infinity": lambda data: with_column(data, [np.inf] * 14),
    "two figures have one key": lambda data: changed(data, tables=[*data.tables, data.tables[0]]),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_does_not_fit_together_is_named(data: PageData, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as error:
        render(BROKEN[message](data))
    assert "\n" not in str(error.value)


def test_a_split_without_a_turn_is_named_so(data: PageData) -> None:
    def of(drift: float) -> dict[str, FigureTable]:
        found = made(data)
        found.arrays["rotation"]["turning_point.explained_by_lag"] = drift
        return tables_of(found)

    turns, splits = of(0.4), of(0.8)
    assert turns["cosines"].extra["turning"]["name"] == "turning point"
    assert splits["cosines"].extra["turning"]["name"].startswith("best split")
    assert turns["loss"].extra["marks"][0]["label"] == "directions turn"
    assert splits["loss"].extra["marks"][0]["label"] == "best split"
    for key in ("cosines", "loss"):
        assert "turning point" in turns[key].caption and "turning point" not in splits[key].caption
        assert "no sharp turn" in splits[key].caption
    assert "the two phases" in turns["loss"].title and "the two phases" not in splits["loss"].title


def test_without_a_split_nothing_is_marked(data: PageData) -> None:
    found = made(data)
    found.arrays["rotation"]["turning_point.step"] = np.nan
    tables = tables_of(found)
    assert tables["cosines"].extra == {"turning": None} and "White, broken" not in tables["cosines"].caption
    assert tables["loss"].extra == {} and "phase of statistics" not in tables["loss"].caption


def test_the_bigram_distance_stands_beside_its_corrected_one(data: PageData) -> None:
    table, curves = tables_of(made(data))["kl"], made(data).arrays["ngrams"]
    for column, name in (("bigram", "kl_bigram"), ("bigram, corrected", "kl_bigram_corrected")):
        np.testing.assert_allclose(table.columns[column], curves[f"curves.{name}"], rtol=1e-5)
    assert "Miller–Madow" in table.caption
