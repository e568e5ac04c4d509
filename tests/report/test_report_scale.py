"""98,304 features at 32 snapshots, the paper's largest dictionary: size of the file, use in a browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import page_synthetic
import pytest

from crosscoder.report.data import PageData
from crosscoder.report.page import write_page

N_FEATURES = 98_304
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def large_data() -> PageData:
    steps = page_synthetic.PAPER_STEPS
    return page_synthetic.page_data(N_FEATURES, steps, per_feature=4, vocabulary_size=50_304)


@pytest.fixture(scope="module")
def large_page(large_data: PageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "page.html"
    write_page(large_data, path)
    return path


def test_size(large_page: Path) -> None:
    size = large_page.stat().st_size
    print(f"\n{N_FEATURES:,} features: {size / 1e6:.1f} MB")
    assert size <= 60_000_000


@pytest.mark.browser
def test_browser(large_data: PageData, large_page: Path, visit: Callable[..., Any]) -> None:
    with visit(large_page) as page:
        paints = page.evaluate("performance.getEntriesByType('paint').map(e => [e.name, Math.round(e.startTime)])")
        print(f"\nfirst paint at {N_FEATURES:,} features: {paints} ms")
        page.click("#tab-features")
        assert page.get_attribute("#grid", "aria-rowcount") == str(N_FEATURES + 1)
        page.click('[data-sort="id"]')
        page.evaluate("document.querySelector('.scroller').scrollTop = 1e9")
        page.wait_for_selector(f'.row[data-feature="{N_FEATURES - 1}"]')
        assert page.locator(".rows .row").count() < 60
        # 8 bits a norm at this size
        assert large_data.features is not None
        for feature in range(N_FEATURES - 5, N_FEATURES):
            path = page.get_attribute(f'.row[data-feature="{feature}"] .spark-line', "d")
            drawn = [(20 - float(point.split()[1])) / 18 for point in re.split("[ML]", path)[1:]]
            np.testing.assert_allclose(drawn, large_data.features.norms[feature], atol=0.006)
        page.click('[data-sort="id"]')
        page.wait_for_selector(f'.row[data-feature="{N_FEATURES - 1}"][aria-rowindex="2"]')
        page.fill("#search", "president")
        page.locator("#status", has_text=" of 98,304 features").wait_for(timeout=60_000)
        assert 0 < int(page.get_attribute("#grid", "aria-rowcount")) - 1 < N_FEATURES
        page.keyboard.press("Enter")
        page.wait_for_selector(".context")
        assert "resident" in page.inner_text(".context-list").lower()
        assert page.locator("*").count() < 5_000
