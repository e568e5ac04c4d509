"""The section of tasks: in a real Chromium, as SVG, and refused where it does not fit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import page_synthetic
import pytest
from playwright.sync_api import expect

from crosscoder.errors import DataError
from crosscoder.report.behaviour import TASK_FIGURES
from crosscoder.report.data import PageData
from crosscoder.report.figures import save_figures
from crosscoder.report.findings import task_finding
from crosscoder.report.page import render, write_page
from crosscoder.report.tables import figure_tables

Visit = Callable[..., Any]
KEYS = [f"{kind}--induction" for kind in TASK_FIGURES]


@pytest.fixture(scope="module")
def data() -> PageData:
    return page_synthetic.with_tasks(page_synthetic.page_data(300, per_feature=2))


@pytest.fixture(scope="module")
def page_path(data: PageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("behaviour") / "page.html"
    write_page(data, path)
    return path


def table(data: PageData, key: str) -> dict[str, list[Any]]:
    return dict(next(table.columns for table in figure_tables(data) if table.key == key))


def test_tables_hold_the_numbers(data: PageData) -> None:
    task = data.tasks[0]
    keys = [figure.key for figure in figure_tables(data) if "--" in figure.key]
    assert keys == [*KEYS, "ability--sva-across-rc"], "a task at chance has nothing but its accuracy"
    caption = next(figure.caption for figure in figure_tables(data) if figure.key == "circuit--induction")
    assert "the 100 strongest alone: integrated gradients 0.93, attribution patching 0.90." in caption
    assert caption.endswith("Completeness error of integrated gradients: 1.71%.")
    circuit = table(data, "circuit--induction")
    n, K = task.attribution.shape
    assert circuit["feature"] == np.repeat(task.features, K).tolist()
    known = np.tile(task.above_chance, n)
    assert [value is None for value in circuit["share"]] == (~known).tolist()
    np.testing.assert_allclose(
        np.array(circuit["attribution"], dtype=float)[known], task.attribution.ravel()[known], rtol=1e-5
    )
    dominance = table(data, "dominance--induction")
    series = [name for name in dominance if name.startswith(("feature", "other"))]
    last = [dominance[name][-1] for name in series]
    assert sum(last) == pytest.approx(1, abs=1e-5) and dominance[series[0]][0] is None
    carriers = table(data, "carriers--induction")
    assert carriers["attribution"] == sorted(carriers["attribution"], reverse=True)
    best = carriers["feature"][0]
    contexts = data.features.contexts  # type: ignore[union-attr]
    row = int(np.flatnonzero(contexts.feature == best)[0])  # type: ignore[union-attr]
    assert carriers["token"][0] == contexts.vocabulary[contexts.tokens[row][contexts.activations[row].argmax()]]  # type: ignore[union-attr]


def test_every_figure_of_a_task_is_drawn(visit: Visit, page_path: Path) -> None:
    with visit(page_path) as page:
        assert [text for text in page.locator(".group > h2").all_inner_texts() if text.startswith("Behaviour")] == [
            "Behaviour: induction",
            "Behaviour: sva-across-rc",
        ]
        for key in KEYS[:-1]:
            assert page.locator(f"#plot-{key} svg.cc-plot").count() >= 1, key
        assert page.locator("#plot-ability--sva-across-rc svg.cc-plot").count() == 2
        assert page.locator("#plot-carriers--induction li").count() == 12
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.click("#figure-ablation--induction button:text('data')")
        assert "drop_low" in page.inner_text("#data-dialog thead")


def test_the_heat_map_shows_another_measure_and_opens_features(visit: Visit, data: PageData, page_path: Path) -> None:
    with visit(page_path) as page:
        cells = "#plot-circuit--induction svg.cc-plot [aria-label='cell'] rect"
        assert page.locator(cells).count() == 12 * len(data.steps)
        before = page.locator(cells).evaluate_all("cells => cells.map((cell) => cell.getAttribute('fill'))")
        page.select_option("#measure-circuit--induction", label="attribution")
        after = page.locator(cells).evaluate_all("cells => cells.map((cell) => cell.getAttribute('fill'))")
        assert before != after
        task = data.tasks[0]
        cell = page.locator(cells).nth(5 * len(data.steps) + len(data.steps) - 1)
        cell.hover()
        tip = page.locator("#plot-circuit--induction [aria-label='tip']").text_content()
        assert f"feature {task.features[5]}" in tip and "RelIE" in tip
        cell.click()
        expect(page).to_have_url(re.compile(rf"#feature={task.features[5]}$"))


def test_ablation_curves_follow_the_controls(visit: Visit, data: PageData, page_path: Path) -> None:
    with visit(page_path) as page:
        plot = "#plot-ablation--induction"
        lines = f"{plot} svg.cc-plot [aria-label='line'] path"
        assert page.locator(f"{plot} .legend li").all_inner_texts() == [
            "top k", "k random, matched", "random, as active as the top k",
        ]  # fmt: skip
        assert page.locator(lines).count() == 6
        page.select_option("#mode-ablation--induction", index=1)
        assert page.locator(lines).count() == 4, "restoring has two sets"
        assert "faithfulness" in page.locator(f"{plot} svg.cc-plot").first.text_content()
        page.select_option("#k-ablation--induction", label="10")
        assert "of 10 features" in page.inner_text(plot)
        first = int(np.flatnonzero(data.tasks[0].above_chance)[0])
        page.select_option("#snapshot-ablation--induction", label=f"{data.steps[first]:,}")
        assert f"at step {data.steps[first]:,}" in page.inner_text(plot)
        page.click("#axis-linear")  # redrawn: the choices stay
        assert page.input_value("#k-ablation--induction") == "10" and "of 10 features" in page.inner_text(plot)


def test_carriers_lead_to_their_features(visit: Visit, data: PageData, page_path: Path) -> None:
    with visit(page_path) as page:
        first = page.locator("#plot-carriers--induction a.carrier").first
        feature = table(data, "carriers--induction")["feature"][0]
        assert first.get_attribute("href") == f"#feature={feature}" and first.locator("mark").count() == 1
        first.click()
        expect(page).to_have_title(re.compile(rf"Feature {feature}\b"))


def test_on_a_phone_nothing_is_wider_than_the_window(visit: Visit, page_path: Path) -> None:
    with visit(page_path, viewport={"width": 390, "height": 800}) as page:
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_svg_and_csv(data: PageData, tmp_path: Path) -> None:
    written = [path.name for path in save_figures(data, tmp_path) if "--" in path.name]
    assert written == [f"{key}.svg" for key in [*KEYS, "ability--sva-across-rc"]]
    assert (tmp_path / "ablation--induction.csv").read_text().startswith("snapshot,ablation,set,k,")


def test_one_snapshot_above_chance_and_no_features(data: PageData, tmp_path: Path, visit: Visit) -> None:
    task = data.tasks[0]
    last = len(data.steps) - 1
    only = np.arange(last + 1) == last
    kept = task.curves["snapshot"] == last
    one = dataclasses.replace(
        task, above_chance=only, dominant=np.where(only, task.dominant, -1),
        curves={name: values[kept] for name, values in task.curves.items()},
    )  # fmt: skip
    data = dataclasses.replace(data, tasks=[one])
    assert len(save_figures(data, tmp_path)) > 5
    write_page(data, tmp_path / "page.html")
    with visit(tmp_path / "page.html") as page:
        assert page.locator("#plot-dominance--induction [aria-label='bar'] rect").count() >= 1
    alone = dataclasses.replace(data, features=None, figures=dataclasses.replace(data.figures, norm_examples=None))
    write_page(alone, tmp_path / "alone.html")
    with visit(tmp_path / "alone.html", wait=False) as page:
        assert page.locator("#plot-carriers--induction li").count() == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": np.zeros(3)}, r"tasks\['induction'\].accuracy has shape \(3,\)"),
        ({"share": np.zeros((12, 2))}, "share has shape"),
        ({"name": "a b"}, "name must be of letters"),
        ({"features": np.arange(12) + 295}, "features must lie in"),
        ({"attribution": np.full((12, 14), np.nan)}, "attribution holds NaN"),
        ({"curves": {}}, "curves is empty"),
    ],
)
def test_what_does_not_fit_is_named(data: PageData, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(dataclasses.replace(data, tasks=[dataclasses.replace(data.tasks[0], **change)]))


def test_two_tasks_of_one_name(data: PageData) -> None:
    with pytest.raises(DataError, match="two tasks have one name"):
        render(dataclasses.replace(data, tasks=[data.tasks[0]] * 2))


def test_findings_follow_the_figures() -> None:
    figures: dict[str, Any] = {
        "clean_accuracy": {"step0": 0.5, "step10": 0.7, "step100": 0.9},
        "above_chance": ["step10", "step100"],
        "disrupt_top50": 0.8,
        "disrupt_random50": 0.02,
        "by_ablation": {"resample": {"k_for_80_percent": {"step10": 12, "step100": 30}}},
    }
    sentence = task_finding({"task": "induction", "figures": figures})
    assert "at 2 of 3 snapshots, from step10 on (90% right at step100)" in sentence
    assert "costs 80% of the metric, 50 random ones matched in rate and norm 2%" in sentence
    assert "12 to 30 features keep 80%" in sentence
    chance = task_finding({"task": "ioi", "figures": {**figures, "above_chance": []}})
    assert chance.startswith("The model does not do ioi at any snapshot: accuracy 50% to 90%")
    few = task_finding({"task": "ioi", "figures": {**figures, "disrupt_top50": None}})
    assert few.endswith("fewer than 50 features take part.")
