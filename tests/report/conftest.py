"""A real Chromium for the page's tests, and pages to open in it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def _missing(what: str) -> None:
    """Skip on a developer's machine; in CI a test that cannot run is a failure."""
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(f"browser tests need {what}")
    pytest.skip(f"browser tests need {what}")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        _missing("playwright: pip install playwright")
    if CHROMIUM is None:
        _missing("chromium: apt-get install chromium")
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Callable[..., Any]:
    """`with visit(path, hash="#feature=3", ...) as page:` fails on any console error, page error or "
    "request elsewhere."""

    @contextmanager
    def opened(path: Path, address: str = "", *, wait: bool = True, **options: Any) -> Iterator[Any]:
        options.setdefault("viewport", {"width": 1400, "height": 860})
        context = chromium.new_context(offline=True, **options)
        page = context.new_page()
        troubles: list[str] = []
        requests: list[str] = []
        page.on(
            "console",
            lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri() + address)
        if wait:
            page.wait_for_selector('#view-features[data-ready="true"]', state="attached", timeout=60_000)
        yield page
        context.close()
        assert troubles == []
        elsewhere = [url for url in requests if not url.startswith((path.as_uri(), "blob:null/"))]
        assert elsewhere == []

    return opened


@pytest.fixture(scope="session")
def small_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import page_synthetic

    from crosscoder.report.page import write_page

    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(page_synthetic.page_data(2048), path)
    return path
