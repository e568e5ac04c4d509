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

from crosscoder.errors import DataError, StorageError
from crosscoder.report.data import Contexts, Cosines, Features, Figures, PageData
from crosscoder.report.page import render, write_page
from crosscoder.report.tables import FIGURE_KEYS, figure_tables

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


def test_figures_appear_only_with_their_numbers() -> None:
    figures = Figures(l0=np.array([1.0, np.nan]), births=np.array([1, 2]), deaths=np.array([0, 1]))
    tables = figure_tables(PageData(title="t", sentences=[], steps=[0, 10], figures=figures))
    assert [table.key for table in tables] == ["turnover", "l0"]
    assert tables[1].columns == {"snapshot": [0, 1], "step": [0, 10], "l0": [1.0, None]}


def test_all_figures_are_there_in_the_order_of_the_page(data: PageData) -> None:
    tables = figure_tables(data)
    assert tuple(table.key for table in tables) == FIGURE_KEYS
    for table in tables:
        assert len({len(column) for column in table.columns.values()}) == 1


def test_histograms_count_every_living_feature(data: PageData) -> None:
    assert data.features is not None
    tables = {table.key: table for table in figure_tables(data)}
    alive = np.asarray(data.features.max_norm) > 0

    def counts(key: str) -> int:
        columns = tables[key].columns
        return sum(sum(columns[kind]) for kind in data.features.kind_names if kind in columns)  # type: ignore[union-attr]

    assert counts("lifetimes") == alive.sum()
    assert counts("emergence") == (alive & (np.asarray(data.features.emergence) >= 0)).sum()


def test_lifetimes_count_the_features_that_come_back(data: PageData) -> None:
    assert data.features is not None
    assert "come back" not in {table.key: table for table in figure_tables(data)}["lifetimes"].columns
    lifetime, alive = np.asarray(data.features.lifetime), np.asarray(data.features.max_norm) > 0
    back = (np.arange(len(lifetime)) % 7 == 0) & (lifetime > 0)
    table = {one.key: one for one in figure_tables(with_features(data, revived=back))}["lifetimes"]
    counted = np.bincount(np.rint(lifetime[back & alive] * len(data.steps)).astype(int), minlength=len(data.steps) + 1)
    assert table.columns["come back"] == counted.tolist() and counted.sum() > 0
    assert f" {counted.sum():,} of these {alive.sum():,} features disappear and come back." in table.caption
    with pytest.raises(DataError, match="features.revived has dtype float64, expected booleans"):
        render(with_features(data, revived=back.astype(np.float64)))


def test_captions_can_be_replaced_and_examples_chosen(data: PageData) -> None:
    figures = dataclasses.replace(data.figures, captions={"l0": "Mine."}, norm_examples=[3, 5])
    tables = {table.key: table for table in figure_tables(changed(data, figures=figures))}
    assert tables["l0"].caption == "Mine."
    assert set(tables["norms"].columns["feature"]) <= {None, 3, 5}


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
    "figures.l0 has shape": lambda data: changed(data, figures=Figures(l0=np.zeros(3))),
    "figures.kl_bigram holds infinity": lambda data: changed(data, figures=Figures(kl_bigram=np.full(14, np.inf))),
    "births and figures.deaths": lambda data: changed(data, figures=Figures(births=np.zeros(14, dtype=int))),
    "figures.cosines.mean": lambda data: changed(data, figures=Figures(cosines=Cosines(np.ones((3, 3))))),
    "figures.captions has the key 'nope'": lambda data: changed(data, figures=Figures(captions={"nope": ""})),
    "figures.entropies": lambda data: changed(data, figures=Figures(entropies={"x": float("nan")})),
    "figures.norm_examples": lambda data: changed(data, figures=Figures(norm_examples=[60])),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_does_not_fit_together_is_named(data: PageData, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as error:
        render(BROKEN[message](data))
    assert "\n" not in str(error.value)


def test_a_split_without_a_turn_is_named_so(data: PageData) -> None:
    turning = data.figures.turning_point
    assert turning is not None

    def of(sharp: bool) -> dict[str, Any]:
        figures = dataclasses.replace(data.figures, turning_point=dataclasses.replace(turning, sharp=sharp))
        return {table.key: table for table in figure_tables(dataclasses.replace(data, figures=figures))}

    turns, splits = of(True), of(False)
    assert turns["cosines"].extra["turning"]["name"] == "turning point"
    assert splits["cosines"].extra["turning"]["name"].startswith("best split")
    assert turns["loss"].extra["marks"][0]["label"] == "directions turn"
    assert splits["loss"].extra["marks"][0]["label"] == "best split"
    for key in ("cosines", "loss"):
        assert "turning point" in turns[key].caption and "turning point" not in splits[key].caption
        assert "no sharp turn" in splits[key].caption


def test_the_bigram_distance_stands_beside_its_corrected_one(data: PageData) -> None:
    kl = data.figures.kl_bigram
    assert kl is not None
    [table] = [table for table in figure_tables(data) if table.key == "kl"]
    assert "bigram, corrected" not in table.columns and "Corrected" not in table.caption
    figures = dataclasses.replace(data.figures, kl_bigram_corrected=kl - 0.04)
    [table] = [table for table in figure_tables(dataclasses.replace(data, figures=figures)) if table.key == "kl"]
    np.testing.assert_allclose(table.columns["bigram, corrected"], kl - 0.04, rtol=1e-5)
    assert "Miller–Madow" in table.caption
