"""The page: one HTML file with style, scripts and data inside, that asks the network for nothing.

Scripts and styles are inline and allowed by their SHA-256 in a Content-Security-Policy of `default-src 'none'`; data
are inert elements (JSON, and gzip in base64) that no browser executes, and reach the document as text only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from crosscoder.errors import DataError
from crosscoder.figures.spec import plain
from crosscoder.files import write_bytes
from crosscoder.report.blocks import Blocks
from crosscoder.report.contexts import write_contexts
from crosscoder.report.data import Features, PageData
from crosscoder.report.validate import check

MAX_BYTES = 60_000_000

_STYLES = ("base.css", "overview.css", "behaviour.css", "browser.css", "feature.css")
_HEAD_SCRIPT = "theme.js"
_LIBRARIES = ("vendor/d3-7.9.2.min.js", "vendor/plot-0.6.17.umd.min.js")
_SCRIPTS = (
    "dom.js",
    "format.js",
    "decode.js",
    "store.js",
    "search.js",
    "axis.js",
    "zoom.js",
    "plots.js",
    "controls.js",
    "kinds.js",
    "overview.js",
    "sparkline.js",
    "filters.js",
    "table.js",
    "contexts.js",
    "feature.js",
    "browser.js",
    "keyboard.js",
    "app.js",
)
# Plot puts this style element into every figure; the class name is set in assets/plots.js
_PLOT_STYLE = """:where(.cc-plot) {
  --plot-background: white;
  display: block;
  height: auto;
  height: intrinsic;
  max-width: 100%;
}
:where(.cc-plot text),
:where(.cc-plot tspan) {
  white-space: pre;
}"""


@cache
def _asset(name: str) -> str:
    return (resources.files("crosscoder.report") / "assets" / name).read_text(encoding="utf-8")


def _source_hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def _application() -> str:
    """All own scripts in one strict function scope."""
    parts = "\n".join(_asset(name) for name in _SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}\n}})();\n'


def _inert_json(value: Any) -> str:
    """JSON that no HTML parser can mistake for markup, whatever its strings hold."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain_settings(value: Any) -> Any:
    """Settings as JSON: mappings and lists stay, numbers stay, anything else becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain_settings(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_settings(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)
    return str(value)


def _describe_features(features: Features, blocks: Blocks, budget: int) -> tuple[dict[str, Any], str | None]:
    """Store every array; returns how the page finds them, and what was left out of the contexts."""
    norms = np.asarray(features.norms)
    rate = np.asarray(features.firing_rate)
    most = rate.max(axis=1)
    arrays = {
        "norms": blocks.add_linear(norms, 0.0, 1.0),
        "rates": blocks.add_linear(rate / np.where(most > 0, most, 1)[:, None], 0.0, 1.0, keep_positive=True),
        "rate": blocks.add_raw(most, "float32"),
        "maxNorm": blocks.add_raw(np.asarray(features.max_norm), "float32"),
        "maxActivation": blocks.add_raw(np.asarray(features.max_activation), "float32"),
        "kind": blocks.add_raw(np.asarray(features.kind), "uint8"),
        "emergence": blocks.add_raw(np.asarray(features.emergence), "int16"),
        "peak": blocks.add_raw(np.asarray(features.peak), "int16"),
        "lifetime": blocks.add_raw(np.asarray(features.lifetime), "float32"),
    }
    if features.neighbours is not None and features.neighbour_cosines is not None:
        arrays["neighbours"] = blocks.add_raw(np.asarray(features.neighbours), "int32")
        arrays["neighbourCosines"] = blocks.add_linear(np.asarray(features.neighbour_cosines), -1.0, 1.0)
    described: dict[str, Any] = {
        "count": int(norms.shape[0]),
        "kindNames": list(features.kind_names),
        "kindCounts": np.bincount(np.asarray(features.kind), minlength=len(features.kind_names)).tolist(),
        "threshold": features.presence_threshold,
        "neighbourNote": features.neighbour_note,
        "arrays": arrays,
    }
    left_out = None
    if features.contexts is not None:
        described["contexts"], left_out = write_contexts(
            features.contexts, np.asarray(features.max_activation), most, blocks, budget - blocks.n_bytes
        )
    return described, left_out


def render(data: PageData, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of the page.

    Contexts are left out, the weakest first, until the file fits in `max_bytes`; the page then says so.
    Raises `DataError` where `data` does not fit together, or where the file is too large without contexts.
    """
    check(data)
    head_script, application, style = _asset(_HEAD_SCRIPT), _application(), "\n".join(map(_asset, _STYLES))
    libraries = [_asset(name) for name in _LIBRARIES]
    scripts = [head_script, *libraries, application]
    if any("</script" in text.lower() or "<!--" in text for text in scripts) or "</style" in style.lower():
        raise AssertionError("an asset holds the end of its own element")
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; "
        f"script-src {' '.join(map(_source_hash, scripts))}; "
        f"style-src {_source_hash(style)} {_source_hash(_PLOT_STYLE)}"
    )
    blocks = Blocks()
    overview: dict[str, Any] = {
        "title": data.title,
        "subtitle": data.subtitle,
        "sentences": list(data.sentences),
        "leads": dict(data.leads),
        "marks": [{"step": mark.step, "label": mark.label} for mark in data.marks],
        "facts": [[fact.label, fact.value, fact.explanation] for fact in data.facts],
        "settings": _plain_settings(data.settings),
        "notes": list(data.notes),
        "steps": [int(step) for step in data.steps],
        "figures": [
            {
                "key": table.key,
                "group": table.section,
                "title": table.title,
                "definition": table.definition,
                "caption": table.caption,
                "columns": table.columns,
                "spec": None if table.spec is None else plain(table.spec),
                "extra": table.extra,
                "wide": table.wide,
            }
            for table in data.tables
        ],
    }
    if data.features is not None:
        taken = sum(map(len, scripts)) + len(style) + len(_inert_json(overview)) + 20_000
        overview["features"], left_out = _describe_features(data.features, blocks, max_bytes - taken)
        if left_out is not None:
            overview["notes"].append(left_out)

    before, after = _asset("template.html").split("<!-- blocks -->")
    for name, text in {
        "title": html.escape(data.title),
        "policy": html.escape(policy, quote=False),
        "style": style,
        "head_script": head_script,
        "libraries": "\n".join(f"<script>{library}</script>" for library in libraries),
        "overview": _inert_json(overview),  # has no "<", so no marker either, like the escaped title
        "application": application,
    }.items():
        before = before.replace(f"<!-- {name} -->", text, 1)
    page = before.encode(errors="replace") + blocks.html + after.encode()
    if len(page) > max_bytes:
        raise DataError(
            f"page: {len(page):,} bytes without any contexts, more than the {max_bytes:,} allowed; show fewer features"
        )
    return page


def write_page(data: PageData, path: Path, max_bytes: int = MAX_BYTES) -> None:
    """Write `data` as one self-contained HTML file, atomically. Raises `DataError`, `StorageError`."""
    write_bytes(path, render(data, max_bytes))
