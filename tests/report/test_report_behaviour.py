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

from crosscoder.attribution.figures import sentence
from crosscoder.attribution.finished import TaskResult
from crosscoder.figures.results import Results
from crosscoder.report.data import PageData
from crosscoder.report.figures import save_figures
from crosscoder.report.page import write_page

Visit = Callable[..., Any]
KEYS = [f"{kind}--induction" for kind in ("ability", "circuit", "dominance", "ablation", "carriers")]


@pytest.fixture(scope="module")
def tasks() -> list[TaskResult]:
    return page_synthetic.tasks(300, page_synthetic.SHORT_STEPS)


@pytest.fixture(scope="module")
def data(tasks: list[TaskResult]) -> PageData:
    return page_synthetic.with_tasks(page_synthetic.page_data(300, per_feature=2), tasks)


@pytest.fixture(scope="module")
def page_path(data: PageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("behaviour") / "page.html"
    write_page(data, path)
    return path


def table(data: PageData, key: str) -> dict[str, list[Any]]:
    return dict(next(table.columns for table in data.tables if table.key == key))


def test_tables_hold_the_numbers(data: PageData, tasks: list[TaskResult]) -> None:
    task = tasks[0]
    keys = [figure.key for figure in data.tables if "--" in figure.key]
    assert keys == [*KEYS, "ability--sva-across-rc"], "a task at chance has nothing but its accuracy"
    caption = next(figure.caption for figure in data.tables if figure.key == "circuit--induction")
    assert "the 100 strongest alone: integrated gradients 0.93, attribution patching 0.90." in caption
    assert caption.endswith("Completeness error of integrated gradients: 1.71%.")
    circuit = table(data, "circuit--induction")
    n, K = task.circuit.attribution.shape
    assert circuit["feature"] == np.repeat(task.circuit.features, K).tolist()
    known = np.tile(task.above_chance, n)
    assert [value is None for value in circuit["share"]] == (~known).tolist()
    np.testing.assert_allclose(
        np.array(circuit["attribution"], dtype=float)[known], task.circuit.attribution.ravel()[known], rtol=1e-5
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


def test_the_heat_map_shows_another_measure_and_opens_features(
    visit: Visit, data: PageData, tasks: list[TaskResult], page_path: Path
) -> None:
    with visit(page_path) as page:
        cells = "#plot-circuit--induction svg.cc-plot [aria-label='cell'] rect"
        assert page.locator(cells).count() == 12 * len(data.steps)
        before = page.locator(cells).evaluate_all("cells => cells.map((cell) => cell.getAttribute('fill'))")
        page.select_option("#measure-circuit--induction", label="attribution")
        after = page.locator(cells).evaluate_all("cells => cells.map((cell) => cell.getAttribute('fill'))")
        assert before != after
        task = tasks[0]
        cell = page.locator(cells).nth(5 * len(data.steps) + len(data.steps) - 1)
        cell.hover()
        tip = page.locator("#plot-circuit--induction [aria-label='tip']").text_content()
        assert f"feature {task.circuit.features[5]}" in tip and "RelIE" in tip
        cell.click()
        expect(page).to_have_url(re.compile(rf"#feature={task.circuit.features[5]}$"))


def test_ablation_curves_follow_the_controls(
    visit: Visit, data: PageData, tasks: list[TaskResult], page_path: Path
) -> None:
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
        first = int(np.flatnonzero(tasks[0].above_chance)[0])
        page.select_option("#snapshot-ablation--induction", label=f"{data.steps[first]:,}")
        assert f"at step {data.steps[first]:,}" in page.inner_text(plot)
        page.click("#axis-linear")  # redrawn: the choices stay
        assert page.input_value("#k-ablation--induction") == "10" and "of 10 features" in page.inner_text(plot)


def test_carriers_lead_to_their_features(
    visit: Visit, data: PageData, tasks: list[TaskResult], page_path: Path
) -> None:
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


@pytest.mark.slow
def test_one_snapshot_above_chance_and_no_contexts(tasks: list[TaskResult], tmp_path: Path, visit: Visit) -> None:
    task, K = tasks[0], len(page_synthetic.SHORT_STEPS)
    only = np.arange(K) == K - 1
    kept = task.curves["snapshot"] == K - 1
    one = dataclasses.replace(
        page_synthetic.with_accuracy(task, task.accuracy, only),
        circuit=dataclasses.replace(task.circuit, dominant=np.where(only, task.circuit.dominant, -1)),
        curves={name: values[kept] for name, values in task.curves.items()},
    )
    for name, per_feature in (("page.html", 2), ("alone.html", 0)):
        data = page_synthetic.with_tasks(page_synthetic.page_data(300, per_feature=per_feature), [one])
        assert len(save_figures(data, tmp_path / name.split(".")[0])) > 5
        write_page(data, tmp_path / name)
        with visit(tmp_path / name) as page:
            assert page.locator("#plot-dominance--induction [aria-label='bar'] rect").count() >= 1
            assert page.locator("#plot-carriers--induction li").count() == 12


def test_findings_follow_the_figures() -> None:
    figures: dict[str, Any] = {
        "clean_accuracy": {"step0": 0.5, "step10": 0.7, "step100": 0.9},
        "above_chance": ["step10", "step100"],
        "disrupt_top50": 0.8,
        "disrupt_random50": 0.02,
        "by_ablation": {"resample": {"k_for_80_percent": {"step10": 12, "step100": 30}}},
    }

    def told(name: str, **changes: Any) -> str:
        record = {"task": name, "figures": {**figures, **changes}}
        return sentence(dataclasses.replace(page_synthetic.tasks(300, [0, 10, 100])[0], record=record), Results([], []))

    found = told("induction")
    assert "at 2 of 3 snapshots, from step10 on (90% right at step100)" in found
    assert "costs 80% of the metric, 50 random ones matched in rate and norm 2%" in found
    assert "12 to 30 features keep 80%" in found
    chance = told("ioi", above_chance=[])
    assert chance.startswith("The model does not do ioi at any snapshot: accuracy 50% to 90%")
    assert told("ioi", disrupt_top50=None).endswith("fewer than 50 features take part.")
