"""Figures that are made from results alone: their numbers, as SVG, in a real Chromium, and left out where not run."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import results_synthetic
from matplotlib.figure import Figure
from results_synthetic import Made
from support.browser import settle

from crosscoder.evolution.analyses import analyses
from crosscoder.figures.spec import Bars, Heat, Lines, Listing, Scatter
from crosscoder.figures.table import MOST_POINTS, FigureTable, drawn
from crosscoder.report.assemble import page_of, parts
from crosscoder.report.data import PageData, StepMark
from crosscoder.report.draw import draw
from crosscoder.report.figures import save_figures
from crosscoder.report.page import write_page

Visit = Callable[..., Any]
SECTIONS = list(dict.fromkeys(part.section for part in parts()))
STABILITY, TYPES = "Stability across runs", "Feature types"
MADE_ELSEWHERE = {"norms", "explained_variance", "l0"}
"""Figures of results that are not made up here (see page_synthetic.py), beside those of whole analyses."""


@pytest.fixture(scope="module")
def results() -> Made:
    return results_synthetic.results()


@pytest.fixture(scope="module")
def tables(results: Made) -> dict[str, FigureTable]:
    return results.figures


def page_with(tables: dict[str, FigureTable]) -> PageData:
    return PageData(
        "Analyses",
        [],
        results_synthetic.STEPS.tolist(),
        tables=list(tables.values()),
        leads={TYPES: "Types were told."},
        marks=[StepMark(20, "warm-up ends")],
    )


def columns_of(table: FigureTable) -> set[str]:
    """Every column that the figure's spec names."""
    spec = table.spec
    if isinstance(spec, Lines):
        series = [item for panel in spec.panels for item in panel.series]
        where = {column for panel in spec.panels for column in panel.where or {}}
        ends = {end for item in series for end in (item.low, item.high) if end}
        return {spec.x, *(item.column for item in series), *where, *ends, *([spec.split] if spec.split else [])}
    if isinstance(spec, Bars):
        return {spec.x, *(item.column for item in spec.series), *spec.down}
    if isinstance(spec, Scatter):
        return {spec.x, spec.y, *([spec.group] if spec.group else []), *spec.details}
    if isinstance(spec, Heat):
        return {spec.x, spec.y, *(measure.column for measure in spec.measures), *spec.details}
    assert isinstance(spec, Listing)
    return {spec.bar, *(field.column for field in spec.fields), *([spec.text] if spec.text else [])}


def test_every_maker_has_a_figure_with_the_columns_it_names(tables: dict[str, FigureTable]) -> None:
    known = results_synthetic.results().arrays
    missing = [one.page for one in analyses() if one.page is not None and one.name not in known]
    made = sum(len(part.figures) for part in parts()) - sum(len(part.figures) for part in missing)
    assert len(tables) == made - len(MADE_ELSEWHERE) and not MADE_ELSEWHERE & tables.keys()
    for table in tables.values():
        assert table.section in SECTIONS
        assert columns_of(table) <= set(table.columns), table.key
        assert len({len(column) for column in table.columns.values()}) == 1, table.key


def test_what_was_not_run_has_no_figure() -> None:
    assert Made({}).figures == {}
    alone = Made({"life": results_synthetic.results().arrays["life"]})
    assert list(alone.figures) == [
        "emergence", "lifetimes", "turnover", "sharedness", "rates", "births_by_threshold", "thresholds",
    ]  # fmt: skip


def test_numbers_are_those_of_the_results(results: Made, tables: dict[str, FigureTable]) -> None:
    kind = results.arrays["life"]["cycles.kind"]
    types = results.arrays["types"]["features.type"]
    assert tables["types"].columns["emergent"] == np.bincount(types[kind == 1], minlength=6).tolist()
    assert sum(tables["sharedness"].columns["initialization"]) == (kind == 0).sum()
    cosines = results.arrays["rotation"]["to_final"][kind == 1]
    assert tables["to_final"].columns["emergent"][0] is None, "no feature is known there"
    assert tables["to_final"].columns["emergent, q90"][3] == pytest.approx(np.nanquantile(cosines[:, 3], 0.9), rel=1e-5)
    points = tables["complexity"]
    entropy = results.arrays["complexity"]["entropy.here"]
    np.testing.assert_allclose(points.columns["entropy, nats"], entropy[points.columns["feature"]], rtol=1e-5)
    assert points.columns["step"] == results.steps[
        results.arrays["life"]["cycles.emergence"][points.columns["feature"]]
    ].tolist()  # fmt: skip
    assert "Spearman 0.40 (95 % interval 0.30 to 0.50, p = 0.01 by permutation, 60 all features)" in points.caption
    medians = tables["type_medians"].columns["median"]
    assert medians == sorted(medians)
    frontier = tables["frontier"].columns
    last = [value for value, scope in zip(frontier["sae"], frontier["scope"], strict=True) if scope == "last"]
    assert [value for value in last if value is not None] == pytest.approx([0.79, 0.89, 0.94])
    assert all(value is None for value, scope in zip(frontier["sae"], frontier["scope"], strict=True) if scope == "all")


def test_types_are_compared_two_by_two(results: Made, tables: dict[str, FigureTable]) -> None:
    table = tables["type_pairs"]
    assert table.columns["types"] == [
        "single-token, induction", "previous-token, induction", "single-token, previous-token",
    ]  # fmt: skip
    assert table.columns["p, Holm"] == [0.003, 0.04, 0.3] and table.columns["p"] == [0.001, 0.02, 0.3]
    assert table.columns["delta"] == [-0.7, -0.4, -0.1] and "looking at 3 pairs" in table.caption
    nothing = {name: array[:0] for name, array in results.arrays["types"].items() if name.startswith("emergent.pair")}
    assert "type_pairs" not in Made({"types": {**results.arrays["types"], **nothing}}).figures


def test_disagreements_have_the_numbers_of_their_pairs(results: Made, tables: dict[str, FigureTable]) -> None:
    columns, probes = tables["disagreements"].columns, results.arrays["probes"]
    assert columns["feature"] == [6, 0, 3] and columns["what"] == ["hidden", "hidden", "hollow"]
    assert columns["step"] == results.steps[[1, 3, 4]].tolist()
    np.testing.assert_allclose(columns["AUC"], probes["areas.auc"][[2, 0, 1], [1, 3, 4]], rtol=1e-5)
    scaling = results.arrays["latent_scaling"]
    assert tables["latent_scaling"].columns["shrunk"] == scaling["shrunk"].sum(axis=0).tolist()


def test_births_have_a_band(results: Made, tables: dict[str, FigureTable]) -> None:
    columns, births = tables["rates"].columns, results.arrays["life"]["cycles.births"]
    assert columns["births, low"][0] is None, "there is no step before"
    assert columns["births, low"][2] == pytest.approx(0.9 * births[2] / np.log10(9 / 2), rel=1e-5)
    for low, value, high in list(zip(*(columns[f"births{end}"] for end in (", low", "", ", high")), strict=True))[1:]:
        assert low <= value <= high
    assert "90% interval of the births" in tables["rates"].caption


def test_kinds_by_themselves_have_their_null(results: Made, tables: dict[str, FigureTable]) -> None:
    table, found = tables["kind_dimensionality"], results.arrays["kind_dimensionality"]
    assert isinstance(table.spec, Lines) and [panel.title for panel in table.spec.panels] == [
        "initialization", "emergent",
    ]  # fmt: skip
    for kind in ("initialization", "emergent"):
        np.testing.assert_allclose(table.columns[kind], found[f"rate_within.{kind}"], rtol=1e-5)
        np.testing.assert_allclose(table.columns[f"{kind}, null"], found[f"null_within.{kind}"], rtol=1e-5)


def test_comparisons_have_the_numbers_of_each_run(results: Made, tables: dict[str, FigureTable]) -> None:
    found, kind = results.comparisons["seed2"], results.arrays["life"]["cycles.kind"]
    taking = np.isfinite(found["matching.nearest"])
    emergence = results.arrays["life"]["cycles.emergence"]

    def of(key: str, **values: Any) -> dict[str, np.ndarray]:
        columns = {name: np.array(column, dtype=object) for name, column in tables[key].columns.items()}
        chosen = np.all([columns[name] == value for name, value in values.items()], axis=0)
        return {name: column[chosen] for name, column in columns.items()}

    emergent = of("matched_cosines", run="seed2", kind="emergent")
    assert emergent["features"][0] == (taking & (kind == 1)).sum() and sum(emergent["matched"]) == pytest.approx(1)
    stable = (found["matching.cosine"] >= 0.7)[taking & (kind == 1)].mean()
    assert emergent["matched"][emergent["cosine"] > 0.7].sum() == pytest.approx(stable, abs=1e-4)
    assert emergent["null"][emergent["cosine"] > 0.4].sum() == 0 < emergent["null"][6] + emergent["null"][7]
    assert "seed2: among the 16 nearest of cosine 0.5 or more, which costs at most 0.0012" in tables[
        "matched_cosines"
    ].caption  # fmt: skip
    share = of("matched_share", run="seed2", cosine=0.7)
    assert share["matched"] == pytest.approx([float(found["share_stable"])], rel=1e-5)
    assert share["nearest"] == pytest.approx([(found["matching.nearest"] >= 0.7).sum() / taking.sum()], rel=1e-5)
    late = of("matched_by_emergence", run="seed2", snapshot=4)
    assert late["matched"] == [0] and late["null"] == [0] and late["features"] == [(taking & (emergence == 4)).sum()]
    assert of("matched_by_emergence", run="seed2", snapshot=2)["matched"] == [1]
    moved = of("matched_emergence", snapshot=2)
    assert moved["share, seed2"].tolist() == [0, 0, 0, 1, 0, 0]
    assert moved["pairs, seed2"][3] == (taking & (emergence == 2)).sum()
    assert set(of("matched_emergence", snapshot=4)["share, seed2"]) == {None}, "a row of no pairs has no shares"


def test_a_run_may_have_the_name_of_a_column() -> None:
    names = ("snapshot", "other_step")
    plain, odd = (results_synthetic.results(compared=compared).figures for compared in (("seed1", "seed2"), names))
    for old, new in zip(("seed1", "seed2"), names, strict=True):
        for column in ("share", "pairs"):
            values = plain["matched_emergence"].columns[f"{column}, {old}"]
            assert odd["matched_emergence"].columns[f"{column}, {new}"] == values
    for column in ("snapshot", "step", "other_snapshot", "other_step"):
        assert odd["matched_emergence"].columns[column] == plain["matched_emergence"].columns[column]


def test_a_kind_without_a_null_has_none_drawn(results: Made) -> None:
    found, kind = results.comparisons["seed1"], results.arrays["life"]["cycles.kind"]
    found = {**found, "nearest_null": np.where(kind == 0, np.nan, found["nearest_null"])}
    columns = Made(results.arrays, comparisons={"seed1": found}).figures["matched_cosines"].columns
    null = {kind: [value for value, of in zip(columns["null"], columns["kind"], strict=True) if of == kind]
            for kind in ("initialization", "emergent")}  # fmt: skip
    assert set(null["initialization"]) == {None} and sum(null["emergent"]) == pytest.approx(1)
    assert None not in columns["matched"]


def test_a_comparison_without_features_has_no_figure(results: Made) -> None:
    nobody = {
        **results.comparisons["seed1"],
        "matching.nearest": np.full(60, np.nan),
        "emergence_pairs": np.zeros((6, 6), dtype=np.int64),
    }
    alone = Made(results.arrays, comparisons={"seed1": nobody})
    assert {table.key for table in alone.figures.values() if table.section == STABILITY} == {"matched_by_emergence"}


def test_at_most_so_many_features_are_drawn_and_the_figure_says_so() -> None:
    few, sentence = drawn(np.arange(7))
    assert few.tolist() == list(range(7)) and sentence == "All 7 features are drawn."
    many, sentence = drawn(np.arange(98_304))
    assert len(set(many.tolist())) == MOST_POINTS and many.max() > 90_000
    assert sentence.startswith("2,000 of 98,304 features are drawn, chosen at random")
    table = results_synthetic.results(5000).figures["complexity"]
    assert len(table.columns["feature"]) == MOST_POINTS and "2,000 of" in table.caption


def test_sections_come_in_the_order_of_the_story(tables: dict[str, FigureTable]) -> None:
    results = results_synthetic.results().results
    groups = [table.section for table in page_of(results, parts()).tables]
    assert list(dict.fromkeys(groups)) == [name for name in SECTIONS if name in groups]
    assert len(list(groupby(groups))) == len(set(groups)), "a section is one piece"
    assert groups.index("Complexity") < groups.index("Honesty of the norm") and tables["explanations"].section in groups


def test_svg_and_csv(tables: dict[str, FigureTable], tmp_path: Path) -> None:
    written = save_figures(page_with(tables), tmp_path)
    assert {path.stem for path in written} == set(tables)
    header = (tmp_path / "frontier.csv").read_text().splitlines()[0]
    assert header == "scope,frontier,l0,crosscoder,sae,chain"


def drawing(table: FigureTable) -> Any:
    figure = Figure()
    draw(figure, table)
    return figure


def test_svg_lines_of_several_runs_are_told_apart(tables: dict[str, FigureTable]) -> None:
    for key in ("matched_cosines", "matched_share", "matched_by_emergence"):
        for axes in drawing(tables[key]).axes:
            legend = {text.get_text(): handle.get_marker() for text, handle in zip(
                axes.get_legend().get_texts(), axes.get_legend().legend_handles, strict=True)}  # fmt: skip
            assert legend["seed1"] != legend["seed2"], key
            drawn = [line.get_marker() for line in axes.lines if len(line.get_xdata())]
            assert drawn.count(legend["seed1"]) == drawn.count(legend["seed2"]) == len(drawn) / 2 > 0, key
    one = results_synthetic.results(compared=("seed1",)).figures
    for table in (one["matched_share"], tables["frontier"]):  # each line has a series of its own
        for axes in drawing(table).axes:
            drawn = [line for line in axes.lines if np.isfinite(line.get_ydata()).any()]
            assert {line.get_marker() for line in axes.lines} == {"o"}
            assert len(axes.get_legend().get_texts()) == len(drawn) > 1


def test_svg_heat_maps_show_every_measure(tables: dict[str, FigureTable]) -> None:
    panels = [axes for axes in drawing(tables["matched_emergence"]).axes if axes.images]
    assert len(panels) == 2
    for name, axes in zip(("share, seed1", "share, seed2"), panels, strict=True):
        values = [np.nan if value is None else value for value in tables["matched_emergence"].columns[name]]
        np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan).ravel(), values)
        assert axes.images[0].colorbar.ax.get_ylabel() == name
    cosines = tables["cosines"]
    assert isinstance(cosines.spec, Heat)
    assert [axes.images[0].colorbar.ax.get_ylabel() for axes in drawing(cosines).axes if axes.images] == [
        measure.label for measure in cosines.spec.measures
    ]  # fmt: skip


@pytest.mark.browser
def test_in_the_browser(visit: Visit, tables: dict[str, FigureTable], tmp_path: Path) -> None:
    write_page(page_with(tables), tmp_path / "page.html")
    with visit(tmp_path / "page.html", wait=False) as page:
        for table in tables.values():
            what = "li" if isinstance(table.spec, Listing) else "svg.cc-plot"
            assert page.locator(f"#plot-{table.key} {what}").count() >= 1, table.key
        assert page.locator(".group > h2").all_inner_texts() == [name for name in SECTIONS if any(
            table.section == name for table in tables.values())]  # fmt: skip
        assert page.inner_text(".section-lead") == "Types were told."
        marks = page.locator("#plot-rates .step-mark")
        assert marks.count() == 1 and page.text_content("#plot-rates .step-label") == "warm-up ends"
        # the mark stands at step 20 of log(1 + step)
        frame = [float(page.locator(f"#plot-rates [aria-label='x-axis tick label'] text >> nth={n}").evaluate(
            "node => node.transform.baseVal[0].matrix.e")) for n in (0, -1)]  # fmt: skip
        share = (float(marks.get_attribute("x1")) - frame[0]) / (frame[1] - frame[0])
        assert share == pytest.approx(np.log1p(20) / np.log1p(1000), abs=0.01)
        dots = page.locator("#plot-explained_complexity [aria-label=dot] circle")
        dots.nth(3).scroll_into_view_if_needed()
        dots.nth(3).hover(force=True)
        settle(page, 0)
        tip = page.locator("#plot-explained_complexity [aria-label=tip]").text_content()
        assert re.search(r"feature \d+", tip) and "<b>word</b>" in tip
        assert page.locator(".plot b").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
