"""The page in a real Chromium, offline. Each test also fails on console errors, page errors and requests "
"(see conftest)."""

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
from support.browser import settle

from crosscoder.figures.spec import Lines
from crosscoder.figures.table import FigureTable
from crosscoder.report.data import Contexts, PageData
from crosscoder.report.page import write_page

pytestmark = pytest.mark.browser

Visit = Callable[..., Any]
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 2,
}


@pytest.fixture(scope="session")
def told_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PageData]:
    """A page whose features fire on known words."""
    data = page_synthetic.page_data(300, per_feature=0)
    assert data.features is not None
    kind = np.zeros(300, dtype=int)
    kind[100:] = 1
    kind[299] = 2
    features = dataclasses.replace(data.features, kind=kind, max_activation=np.full(300, 8.0))
    words = ["<eos>", " Pres", "idency", " the", " war", "\n", " peace", " 1863"]
    contexts = Contexts(
        feature=np.array([10, 11, 120, 120, 130]),
        tokens=np.array([[3, 1, 2, 5], [3, 1, 2, 6], [4, 3, 6, -1], [3, 4, 5, 6], [7, 3, 4, 6]]),
        activations=np.array([[0, 0, 8.0, 1], [0, 0, 0, 8.0], [8.0, 0, 0, 0], [0, 4.0, 0, 0], [8.0, 0, 0, 0]]),
        vocabulary=words,
        document=np.array([0, 0, 1, 1, -1]),
        documents=["1801-a", "1863-b"],
        position=np.array([0, 5, 9, 2, -1]),
    )
    data = dataclasses.replace(data, features=dataclasses.replace(features, contexts=contexts))
    path = tmp_path_factory.mktemp("told") / "page.html"
    write_page(data, path)
    return path, data


def shown(page: Any) -> list[int]:
    """Features in the list, from the top."""
    found: list[int] = page.evaluate(
        "[...document.querySelectorAll('.rows .row:not([hidden])')]"
        ".sort((a, b) => a.getAttribute('aria-rowindex') - b.getAttribute('aria-rowindex')).map(row => "
        "+row.dataset.feature)"
    )
    return found


def number_listed(page: Any) -> int:
    return int(page.get_attribute("#grid", "aria-rowcount")) - 1


def sparkline(row: Any) -> list[float]:
    """Relative norms as drawn: the curve's height in its 18 units, rounded to a tenth of one."""
    path = row.locator(".spark-line").get_attribute("d")
    return [(20 - float(point.split()[1])) / 18 for point in re.split("[ML]", path)[1:]]


def search(page: Any, text: str) -> None:
    page.fill("#search", text)
    settle(page)


def test_overview_shows_everything(visit: Visit, small_page: Path) -> None:
    with visit(small_page) as page:
        assert page.inner_text("h1") == "Features of a small language model through its training"
        assert page.locator(".findings li").count() == 5
        assert page.locator(".facts > div").count() == 10
        for key in page_synthetic.FIGURE_KEYS:
            assert page.locator(f"#plot-{key} svg.cc-plot").count() >= 1, key
            assert page.inner_text(f"#figure-{key} .badge") in ("paper", "ours", "paper + ours", "standard")
        page.click(".settings summary")
        assert "per_snapshot" in page.inner_text(".settings-grid")
        # nothing is wider than the window
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_tick_labels_do_not_overlap(visit: Visit, small_page: Path) -> None:
    overlapping = """() => {
      const bad = [];
      let groups = 0;
      for (const group of document.querySelectorAll('[aria-label$="-axis tick label"]')) {
        groups += 1;
        const boxes = [...group.children].map((node) => node.getBoundingClientRect());
        boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b) => {
          const apart = a.left >= b.right || b.left >= a.right || a.top >= b.bottom || b.top >= a.bottom;
          if (!apart) bad.push(group.textContent);
        }));
      }
      return [groups, bad];
    }"""
    for options in ({}, PHONE):
        with visit(small_page, **options) as page:
            for mode in ("log", "linear"):
                page.click(f"#axis-{mode}")
                groups, bad = page.evaluate(overlapping)
                assert groups > 20
                assert bad == []


def test_log_and_linear_step_axis(visit: Visit, small_page: Path) -> None:
    labels = '#plot-l0 [aria-label="x-axis tick label"] text'
    ticks = f"[...document.querySelectorAll('{labels}')].map(node => node.textContent)"
    with visit(small_page) as page:
        assert page.evaluate(ticks) == ["0", "1", "10", "100", "1k"]
        before = page.get_attribute("#plot-l0 [aria-label=line] path", "d")
        page.click("#axis-linear")
        assert page.evaluate(ticks) == ["0", "200", "400", "600", "800", "1k"]
        assert page.get_attribute("#plot-l0 [aria-label=line] path", "d") != before
        assert page.get_attribute("#axis-linear", "aria-pressed") == "true"
        page.keyboard.press("l")
        assert page.get_attribute("#plot-l0 [aria-label=line] path", "d") == before


def drag(page: Any, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drag over a drawing, from and to shares of its width and height."""
    page.locator(selector).scroll_into_view_if_needed()
    box = page.locator(selector).bounding_box()
    place = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*place[0])
    page.mouse.down()
    page.mouse.move((place[0][0] + place[1][0]) / 2, (place[0][1] + place[1][1]) / 2)
    page.mouse.move(*place[1])
    page.mouse.up()
    settle(page, 0)


def tick_labels(page: Any, selector: str, axis: str) -> list[str]:
    found: list[str] = page.locator(f'{selector} [aria-label="{axis}-axis tick label"] text').all_text_contents()
    return found


def test_a_drag_zooms_along_the_ways_it_goes_and_a_double_click_shows_all(visit: Visit, small_page: Path) -> None:
    plot = "#plot-l0 svg.cc-plot"
    with visit(small_page) as page:
        before = tick_labels(page, plot, "x"), tick_labels(page, plot, "y")
        drag(page, plot, (0.5, 0.4), (0.8, 0.41))  # across: the steps alone
        assert tick_labels(page, plot, "x") != before[0] and tick_labels(page, plot, "y") == before[1]
        assert "0" not in tick_labels(page, plot, "x") and len(tick_labels(page, plot, "x")) >= 2
        page.dblclick(plot)
        settle(page, 0)
        assert (tick_labels(page, plot, "x"), tick_labels(page, plot, "y")) == before
        drag(page, plot, (0.5, 0.2), (0.505, 0.5))  # along: the values alone
        assert tick_labels(page, plot, "x") == before[0] and tick_labels(page, plot, "y") != before[1]
        page.click("#axis-linear")  # what is shown stays, on the other axis
        assert "0" not in tick_labels(page, plot, "y")


def test_zoom_of_bands_and_no_click_after_a_drag(visit: Visit, small_page: Path) -> None:
    bars = "#plot-emergence svg.cc-plot"
    with visit(small_page) as page:
        assert tick_labels(page, bars, "x")[0] == "0"
        drag(page, bars, (0.5, 0.5), (0.8, 0.52))
        assert page.evaluate("location.hash") == "", "a drag is no click on a bar"
        shown = tick_labels(page, bars, "x")
        assert 2 < len(shown) < len(page_synthetic.SHORT_STEPS) and shown[0] == "32"
        drag(page, "#plot-cosines svg.cc-plot", (0.2, 0.2), (0.5, 0.5))
        assert page.locator("#plot-cosines [aria-label=cell] rect").count() < 14 * 14 / 3


def test_zoom_by_buttons(visit: Visit, small_page: Path) -> None:
    plot = "#plot-dimensionality svg.cc-plot"
    with visit(small_page) as page:
        before = tick_labels(page, plot, "x")
        page.focus("#figure-dimensionality button:text('zoom')")
        page.keyboard.press("Enter")
        page.keyboard.press("Shift+Tab")
        for button in ("Zoom in", "Move right"):
            page.locator(f'#figure-dimensionality [aria-label^="{button}:"]').press("Enter")
        zoomed = tick_labels(page, plot, "x")
        assert zoomed != before
        assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Move right")
        page.locator('#figure-dimensionality [aria-label^="Show all"]').press("Enter")
        assert tick_labels(page, plot, "x") == before


def test_a_line_names_its_feature_and_opens_it(visit: Visit, small_page: Path) -> None:
    with visit(small_page) as page:
        panel = page.locator("#plot-norms svg.cc-plot").nth(1)
        panel.scroll_into_view_if_needed()
        box = panel.bounding_box()
        for share in np.linspace(0.1, 0.9, 60):  # somewhere down this line of places lies an example
            page.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + share * box["height"])
            settle(page, 0)
            tip = panel.locator("[aria-label=tip]").text_content() or ""
            if "feature " in tip:
                break
        named = re.search(r"feature (\d+)", tip)
        assert named is not None
        page.mouse.down()
        page.mouse.up()
        expect(page).to_have_url(re.compile(rf"#feature={named[1]}$"))


def test_dark_mode(visit: Visit, small_page: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    with visit(small_page, color_scheme="light") as page:
        light = page.evaluate(background)
        page.click("#theme")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        dark = page.evaluate(background)
        assert dark != light
        page.reload()
        assert page.evaluate(background) == dark  # the choice is kept
    with visit(small_page, color_scheme="dark") as page:
        assert page.evaluate(background) == dark
        assert page.get_attribute("#theme", "aria-pressed") == "true"


def test_numbers_behind_a_figure(visit: Visit, small_page: Path) -> None:
    with visit(small_page) as page:
        page.click("#figure-l0 button:text('data')")
        assert page.locator("#data-dialog tbody tr").count() == 14
        with page.expect_download() as download:
            page.click("#data-dialog a")
        lines = Path(download.value.path()).read_text().splitlines()
        assert download.value.suggested_filename == "l0.csv"
        assert lines[0] == "snapshot,step,l0"
        assert len(lines) == 15
        page.keyboard.press("Escape")
        assert not page.is_visible("#data-dialog")


def test_decoded_numbers_are_those_that_were_written(visit: Visit, told_page: tuple[Path, PageData]) -> None:
    path, data = told_page
    assert data.features is not None
    with visit(path, "#features") as page:
        page.click('[data-sort="id"]')
        page.evaluate("document.querySelector('.scroller').scrollTop = 100 * 36")
        settle(page)
        for feature in (100, 107):
            row = page.locator(f'.row[data-feature="{feature}"]')
            emergence = data.features.emergence[feature]
            assert row.locator(".cell-emergence").inner_text() == (
                "–" if emergence < 0 else f"{data.steps[emergence]:,}"
            )
            assert row.locator(".cell-peak").inner_text() == f"{data.steps[data.features.peak[feature]]:,}"
            assert row.locator(".cell-lifetime").inner_text() == f"{round(100 * data.features.lifetime[feature])} %"
            np.testing.assert_allclose(sparkline(row), data.features.norms[feature], atol=0.006)
            assert float(row.locator(".cell-maxNorm").inner_text()) == pytest.approx(
                data.features.max_norm[feature], rel=5e-3
            )


def test_sorting(visit: Visit, told_page: tuple[Path, PageData]) -> None:
    path, data = told_page
    assert data.features is not None
    keys = {
        "maxNorm": data.features.max_norm, "peak": data.features.peak, "lifetime": data.features.lifetime,
        "rate": np.asarray(data.features.firing_rate).max(axis=1), "id": np.arange(300),
    }  # fmt: skip
    with visit(path, "#features") as page:
        for key, values in keys.items():
            page.click(f'[data-sort="{key}"]')
            ways = [page.get_attribute(f".head .cell-{key}", "aria-sort")]
            descending = ways[0] == "descending"
            for _ in range(2):
                # float32 as stored; ties in order of id
                by = np.asarray(values, dtype=np.float32)
                expected = np.lexsort((np.arange(300), -by if descending else by))
                assert shown(page)[:15] == expected[:15].tolist(), (key, descending)
                page.click(f'[data-sort="{key}"]')
                descending = not descending
        missing = np.flatnonzero(np.asarray(data.features.emergence) < 0).tolist()
        assert missing
        for _ in range(2):  # features without emergence come last either way
            page.click('[data-sort="emergence"]')
            page.focus("#grid")
            page.keyboard.press("End")
            settle(page)
            assert shown(page)[-len(missing) :] == missing


def test_filters(visit: Visit, told_page: tuple[Path, PageData]) -> None:
    path, data = told_page
    assert data.features is not None
    with visit(path, "#features") as page:
        assert number_listed(page) == 300
        page.click('[data-kind="initialization"]')
        assert number_listed(page) == 100
        page.click('[data-kind="dead"]')
        assert number_listed(page) == 101
        assert page.is_disabled('[data-kind="other"]')
        page.click("#reset")
        page.click("#ranges-button")
        page.fill("#range-lifetime-min", "50")
        assert number_listed(page) == (np.asarray(data.features.lifetime) >= 0.5).sum()
        page.fill("#range-lifetime-max", "50")
        assert number_listed(page) == (np.asarray(data.features.lifetime) == 0.5).sum()
        page.fill("#range-lifetime-min", "")
        page.fill("#range-lifetime-max", "")
        page.fill("#range-emergence-min", "64")
        page.fill("#range-emergence-max", "128")
        steps = np.where(data.features.emergence >= 0, np.asarray(data.steps)[data.features.emergence], -1)
        assert number_listed(page) == ((steps >= 64) & (steps <= 128)).sum()
        page.fill("#range-maxNorm-min", "1000")
        assert number_listed(page) == 0
        assert page.inner_text(".nothing") == "No feature passes these filters."
        page.click("#reset")
        assert number_listed(page) == 300


def test_search(visit: Visit, told_page: tuple[Path, PageData]) -> None:
    path, _ = told_page
    with visit(path, "#features") as page:
        search(page, "presiDENCY")  # cut into two tokens, of which 10 fires on one and 11 on neither
        assert shown(page) == [10]
        page.select_option("#scope", "anywhere")
        settle(page)
        assert sorted(shown(page)) == [10, 11]
        page.select_option("#scope", "firing")
        search(page, "war")
        assert shown(page) == [120]
        search(page, "the war")
        assert shown(page) == [120]
        search(page, "ware")
        assert shown(page) == []
        search(page, "12")  # a number: that feature first, then those that begin with it
        assert shown(page)[0] == 12
        assert sorted(shown(page)) == [12, *range(120, 130)]
        search(page, '"1863"')
        assert shown(page) == [130]
        search(page, '"e"')
        assert sorted(shown(page)) == [10, 11]  # "idency" and " peace"; the others do not fire on their "the"


def test_feature_panel(visit: Visit, told_page: tuple[Path, PageData]) -> None:
    path, data = told_page
    assert data.features is not None
    assert data.features.neighbours is not None
    with visit(path, "#feature=120") as page:
        page.wait_for_selector(".context")
        expect(page.locator("#panel h2")).to_have_text("Feature 120")
        expect(page).to_have_title(re.compile("^Feature 120"))
        assert page.locator("#panel svg.cc-plot").count() == 2
        assert page.locator(".context").count() == 2
        first = page.locator(".context").first
        assert first.locator(".document").inner_text() == "1863-b · token 9"
        assert first.locator(".strength").inner_text() == "8"
        assert first.locator(".tok").count() == 3  # the padding is not shown
        assert page.locator(".context .tok.on").all_inner_texts() == [" war", " war"]
        assert page.locator(".context").nth(1).locator(".text").inner_text() == "the war↵\n peace"
        page.hover(".tok.on")
        assert page.locator("#tooltip > *").all_inner_texts() == ['" war"', "8"]
        links = page.locator(".neighbours a")
        cosines = [float(text) for text in page.locator(".cosine-value").all_inner_texts()]
        np.testing.assert_allclose(cosines, data.features.neighbour_cosines[120], atol=0.006)
        assert [link.get_attribute("href") for link in links.all()] == [
            f"#feature={other}" for other in data.features.neighbours[120]
        ]
        target = int(data.features.neighbours[120, 1])
        links.nth(1).click()
        expect(page.locator("#panel h2")).to_have_text(f"Feature {target}")
        page.go_back()
        expect(page.locator("#panel h2")).to_have_text("Feature 120")
        page.click(".chips button")
        settle(page)
        assert shown(page) == [120]
        page.click("#close-panel")
        expect(page.locator("#panel")).to_be_hidden()
        page.go_back()
        expect(page.locator("#panel h2")).to_have_text("Feature 120")


def test_feature_without_contexts_and_feature_that_does_not_exist(
    visit: Visit, told_page: tuple[Path, PageData]
) -> None:
    path, _ = told_page
    with visit(path, "#feature=299") as page:
        page.locator("#panel", has_text="no contexts for this feature").wait_for()
    with visit(path, "#feature=300") as page:
        expect(page.locator("#panel")).to_be_hidden()
        expect(page.locator("#status")).to_contain_text("no feature 300")


def test_keyboard(visit: Visit, told_page: tuple[Path, PageData]) -> None:
    path, _ = told_page
    with visit(path) as page:
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "search"
        page.keyboard.type("12", delay=20)
        settle(page)
        page.keyboard.press("Enter")
        expect(page.locator("#panel h2")).to_have_text("Feature 12")
        order = shown(page)
        page.keyboard.press("j")
        expect(page.locator("#panel h2")).to_have_text(f"Feature {order[1]}")
        page.keyboard.press("ArrowDown")
        expect(page.locator("#panel h2")).to_have_text(f"Feature {order[2]}")
        page.keyboard.press("k")
        expect(page.locator("#panel h2")).to_have_text(f"Feature {order[1]}")
        expect(page).to_have_url(re.compile(rf"#feature={order[1]}$"))
        page.keyboard.press("Escape")
        expect(page.locator("#panel")).to_be_hidden()
        assert page.evaluate("document.activeElement.id") == "grid"
        page.keyboard.press("End")
        active = page.get_attribute("#grid", "aria-activedescendant")
        assert int(page.get_attribute(f"#{active}", "data-feature")) == order[-1]
        page.keyboard.press("Enter")
        expect(page.locator("#panel h2")).to_have_text(f"Feature {order[-1]}")
        page.keyboard.press("?")
        assert page.is_visible("#help-dialog")
        page.keyboard.press("Escape")
        assert not page.is_visible("#help-dialog")
        assert page.is_visible("#panel")  # the first Escape was the dialog's
        page.keyboard.press("/")
        page.keyboard.press("Escape")  # empties the search
        settle(page)
        assert number_listed(page) == 300
        page.keyboard.press("Escape")  # leaves it
        page.keyboard.press("o")
        assert page.is_visible("h1")
        page.keyboard.press("f")
        assert page.is_visible("#grid")


def test_a_bar_of_the_histogram_lists_its_features(visit: Visit, told_page: tuple[Path, PageData]) -> None:
    path, data = told_page
    assert data.features is not None
    with visit(path) as page:
        bars = page.locator("#plot-emergence svg")
        box = bars.bounding_box()
        bars.click(position={"x": box["width"] * 0.62, "y": box["height"] * 0.6})
        assert page.is_visible("#grid")
        low = page.input_value("#range-emergence-min")
        assert low == page.input_value("#range-emergence-max")
        born = np.asarray(data.steps)[data.features.emergence]
        assert number_listed(page) == ((born == int(low)) & (data.features.emergence >= 0)).sum() > 0


def test_phone(visit: Visit, told_page: tuple[Path, PageData]) -> None:
    path, _ = told_page
    with visit(path, **PHONE) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.tap("#tab-features")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.tap(".rows .row >> nth=2")
        page.wait_for_selector("#panel h2")
        close = page.locator("#close-panel").bounding_box()
        assert close["x"] + close["width"] <= 390
        page.tap("#close-panel")
        expect(page.locator("#panel")).to_be_hidden()
        assert page.is_visible("#grid")


def test_names_and_roles(visit: Visit, told_page: tuple[Path, PageData]) -> None:
    path, _ = told_page
    unnamed = """() => [...document.querySelectorAll('button, a, input, select')].filter((node) => {
      const label = node.getAttribute('aria-label') ?? (node.labels?.[0]?.textContent || node.textContent);
      return !label || !label.trim();
    }).map((node) => node.outerHTML)"""
    with visit(path, "#feature=120") as page:
        page.wait_for_selector(".context")
        assert page.evaluate(unnamed) == []
        assert page.get_attribute("#grid", "role") == "grid"
        assert page.locator('.head [role="columnheader"]').count() == int(page.get_attribute("#grid", "aria-colcount"))
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "skip"


HOSTILE = [
    "<script>alert(1)</script>",
    "</script>",
    "<img src=x onerror=alert(2)>",
    "<!--",
    '"><b>',
    "\u202egnp",
    "\u0000",
]


def hostile(table: FigureTable) -> FigureTable:
    """With markup in its caption and in a label."""
    table = dataclasses.replace(table, caption=HOSTILE[2])
    if table.key != "loss":
        return table
    assert isinstance(table.spec, Lines)
    [panel] = table.spec.panels
    spec = dataclasses.replace(table.spec, panels=[dataclasses.replace(panel, rules={HOSTILE[0]: 3.0})])
    return dataclasses.replace(table, spec=spec)


def test_hostile_text_is_shown_as_text(visit: Visit, tmp_path: Path) -> None:
    data = page_synthetic.page_data(20, per_feature=0)
    assert data.features is not None
    n = len(HOSTILE)
    contexts = Contexts(
        feature=np.array([4]),
        tokens=np.arange(n)[None],
        activations=np.linspace(1, 0.2, n)[None],
        vocabulary=HOSTILE,
        document=np.array([0]),
        documents=[HOSTILE[0]],
    )
    features = dataclasses.replace(
        data.features,
        contexts=contexts,
        max_activation=np.ones(20),
        kind_names=("initialization", "<b>emergent</b>", "dead", "other"),
        neighbour_note=HOSTILE[2],
    )
    tables = [hostile(table) for table in data.tables]
    data = dataclasses.replace(
        data,
        title=HOSTILE[0],
        subtitle=HOSTILE[2],
        sentences=HOSTILE[:5],
        notes=[HOSTILE[1]],
        settings={HOSTILE[0]: {HOSTILE[2]: HOSTILE[1]}},
        features=features,
        tables=tables,
    )
    path = tmp_path / "page.html"
    write_page(data, path)
    with visit(path) as page:
        assert page.inner_text("h1") == HOSTILE[0]
        assert page.title() == HOSTILE[0]
        assert page.inner_text(".findings li >> nth=2") == HOSTILE[2]
        assert page.inner_text("#figure-l0 figcaption") == HOSTILE[2]
        assert HOSTILE[0] in page.inner_text("#plot-loss")
        page.click(".settings summary")
        assert page.inner_text(".settings-grid dt") == HOSTILE[2]
        page.evaluate("location.hash = 'feature=4'")
        page.wait_for_selector(".context")
        texts = page.locator(".context .tok").all_inner_texts()
        assert texts[:5] == HOSTILE[:5]
        assert texts[5:] == ["\\u202egnp", "␀"]
        assert page.inner_text(".context .document") == HOSTILE[0]
        search(page, "<IMG src")
        assert shown(page) == [4]
        assert page.locator("img, b, iframe").count() == 0


def test_a_page_without_features_or_figures(visit: Visit, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page(PageData(title="Only words", sentences=["One."], steps=[0]), path)
    with visit(path, wait=False) as page:
        assert page.inner_text("h1") == "Only words"
        assert not page.is_visible("#tab-features")
        for key in ("/", "f", "j", "Enter", "Escape", "l", "d"):
            page.keyboard.press(key)
        assert page.is_visible("h1")


def test_without_decompression_the_page_says_so(visit: Visit, small_page: Path, chromium: Any) -> None:
    context = chromium.new_context(offline=True)
    context.add_init_script("delete window.DecompressionStream")
    page = context.new_page()
    page.goto(small_page.as_uri())
    page.wait_for_selector("#status.failed", state="attached")
    assert page.locator(".findings li").count() == 5
    page.click("#tab-features")
    assert re.search("newer", page.inner_text("#status"))
    context.close()


def test_a_truncated_file_says_so(visit: Visit, small_page: Path, tmp_path: Path) -> None:
    whole = small_page.read_bytes()
    path = tmp_path / "page.html"
    path.write_bytes(whole[: int(len(whole) * 0.7)])
    with visit(path, wait=False) as page:
        page.wait_for_selector("#status.failed", state="attached")
        assert page.locator(".findings li").count() == 5
