"""Waiting for the page in a browser."""

from __future__ import annotations

from typing import Any


def settle(page: Any, milliseconds: int = 150) -> None:
    """Wait until the page has done what is due within `milliseconds`, has searched, and has drawn what came of it.

    A search starts 120 after the last key. The page's own timers and frames are waited for, so a busy machine may take
    as long as it needs.
    """
    page.evaluate(
        "milliseconds => new Promise(done => setTimeout(() => requestAnimationFrame("
        "() => requestAnimationFrame(() => setTimeout(done))), milliseconds))",
        milliseconds,
    )
    page.wait_for_function("document.querySelector('#status')?.textContent !== 'searching …'", timeout=60_000)
