"""The analyses of `crosscoder evolve`: each module holds one, with all that is its own.

That is: the type of its result, how it is computed, its part of `summary.json`, its sentences and its figures. Their
order here is the order of the page, of `--only` and of docs/evolution.md. Another package adds an analysis with an
entry point of the group "crosscoder.analyses".

Names are at hand without importing an analysis, and with it torch.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from crosscoder.errors import ConfigError

if TYPE_CHECKING:
    from crosscoder.evolution.study import Analysis

NAMES = (
    "examples",
    "life",
    "rotation",
    "change",
    "dimensionality",
    "kind_dimensionality",
    "neighbours",
    "ngrams",
    "induction",
    "positions",
    "types",
    "complexity",
    "probes",
    "latent_scaling",
)
"""Ours. Analysis `life` is `LIFE` of the module `life`."""
GROUP = "crosscoder.analyses"
"""Entry points of other packages: NAME = "package.module:ANALYSIS"."""


@cache
def _others() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in NAMES}


def names() -> tuple[str, ...]:
    """Of all analyses, those of other packages last."""
    return (*NAMES, *_others())


def analysis(name: str) -> Analysis[Any]:
    """The analysis of that name. Raises `ConfigError` if there is none."""
    if name in NAMES:
        found: Analysis[Any] = getattr(importlib.import_module(f"{__name__}.{name}"), name.upper())
        return found
    if name in _others():
        other: Analysis[Any] = _others()[name].load()
        return other
    raise ConfigError(f"there is no analysis {name!r}; known are {', '.join(names())}")


def analyses() -> tuple[Analysis[Any], ...]:
    """All of them, in order."""
    return tuple(analysis(name) for name in names())


def listed() -> str:
    """All analyses as a Markdown table: for docs/evolution.md and the README beside a run's results."""
    rows = [f"| `{one.name}` | {one.definition} | {', '.join(one.settings) or '-'} |" for one in analyses()]
    return "\n".join(["| analysis | what it computes | settings |", "|---|---|---|", *rows])
