"""Pieces of the page without a browser: vendored files, quantisation, token text, blocks."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from importlib import resources

import numpy as np
import pytest

from crosscoder.common import svg
from crosscoder.common.byte_text import byte_level_text
from crosscoder.report.blocks import Blocks
from crosscoder.report.contexts import sort_contexts, top_tokens
from crosscoder.report.data import Contexts
from crosscoder.report.draw import KIND_COLOURS
from crosscoder.report.quantise import linear_codes

VENDOR = resources.files("crosscoder.report") / "assets" / "vendor"
ENTRIES = json.loads((VENDOR / "VENDOR.json").read_text())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_vendored_file_is_the_published_one(entry: dict[str, str]) -> None:
    data = (VENDOR / entry["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    assert entry["version"].encode() in data[:100]
    assert "Permission to use, copy, modify" in (VENDOR / entry["license_file"]).read_text()


def test_every_vendored_script_is_accounted_for() -> None:
    scripts = {file.name for file in VENDOR.iterdir() if file.name.endswith(".js")}
    assert scripts == {entry["file"] for entry in ENTRIES}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (3.0, 250.0)])
def test_quantisation_error_is_within_its_bound(bits: int, low: float, high: float) -> None:
    values = np.random.default_rng(0).uniform(low, high, 10_000)
    values[:2] = low, high
    codes = linear_codes(values, low, high, bits)
    bound = (high - low) / (2 * (2**bits - 1))
    decoded = low + codes * ((high - low) / (2**bits - 1))
    error = np.abs(decoded - values)
    assert error.max() <= bound * (1 + 1e-9)
    assert error.max() > bound / 2  # the bound is tight: fewer bits would fail
    np.testing.assert_array_equal(decoded[:2], [low, high])


def test_quantisation_clips_and_keeps_what_fires() -> None:
    assert linear_codes(np.array([-2.0, 5.0]), 0.0, 1.0, 8).tolist() == [0, 255]
    assert linear_codes(np.array([0.0, 1e-9, 0.5]), 0.0, 1.0, 8, keep_positive=True).tolist() == [0, 1, 128]
    assert linear_codes(np.array([2.0, 2.0]), 2.0, 2.0, 8).tolist() == [0, 0]
    with pytest.raises(ValueError, match="bits"):
        linear_codes(np.zeros(1), 0.0, 1.0, 12)


def test_byte_level_text() -> None:
    assert byte_level_text("ĠPresident") == " President"
    assert byte_level_text("Ċ") == "\n"
    assert byte_level_text("ĉ") == "\t"
    assert byte_level_text("cafÃ©") == "café"
    assert byte_level_text("âĢ") == "\\xe2\\x80"
    assert byte_level_text("<|endoftext|>") == "<|endoftext|>"
    assert byte_level_text("日本") == "日本"


def test_blocks_hold_what_was_put_in() -> None:
    blocks = Blocks("b")
    array = np.arange(-5, 5).reshape(2, 5)
    description = blocks.add_raw(array, "int16")
    assert description == {"block": "b-0", "type": "int16", "shape": [2, 5]}
    text = re.fullmatch(rb'<script type="application/octet-stream" id="b-0">([A-Za-z0-9+/=]+)</script>\n', blocks.html)
    assert text is not None
    data = gzip.decompress(base64.b64decode(text[1]))
    np.testing.assert_array_equal(np.frombuffer(data, "<i2").reshape(2, 5), array)
    assert blocks.n_bytes == len(blocks.html)


def test_contexts_are_sorted_renumbered_and_scaled() -> None:
    contexts = Contexts(
        feature=np.array([7, 2, 7]),
        tokens=np.array([[4, 4, 1], [4, 0, -1], [1, 4, 3]]),
        activations=np.array([[0.0, 10.0, 5.0], [0.001, 2.0, 9.0], [0.0, 0.0, 4.0]]),
        vocabulary=["a", "b", "unused", "d", "e"],
        document=np.array([0, -1, 0]),
        documents=["x"],
    )
    maximum = np.zeros(8)
    maximum[[2, 7]] = 2.0, 10.0
    out = sort_contexts(contexts, maximum)
    assert out.feature.tolist() == [2, 7, 7]
    assert out.rank.tolist() == [0, 0, 1]
    assert out.vocabulary == ["e", "b", "a", "d"]
    assert out.tokens.tolist() == [[0, 2, 4], [0, 0, 1], [1, 0, 3]]
    # scaled by each feature's maximum; what is active stays active; the padding is silent
    assert out.codes.tolist() == [[1, 255, 0], [0, 255, 128], [0, 0, 102]]
    assert out.document.tolist() == [-1, 0, 0]
    assert out.position.tolist() == [-1, -1, -1]
    assert top_tokens(out, 8).tolist() == [-1, -1, 2, -1, -1, -1, -1, 0]


def test_svg_and_page_have_one_palette() -> None:
    assets = resources.files("crosscoder.report") / "assets"
    light = (assets / "base.css").read_text().split("}")[0]
    page = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light))
    assert [page[f"c{index}"] for index in range(1, 6)] == list(svg.COLOURS)
    assert (page["ink"], page["muted"], page["c-dead"]) == (svg.INK, svg.MUTED, svg.GREY)
    kinds = re.search(r"KIND_COLOURS = \{ (.*?) \}", (assets / "plots.js").read_text())
    assert kinds is not None
    named = dict(re.findall(r'(\w+): "var\(--([\w-]+)\)"', kinds[1]))
    assert {name: page[colour] for name, colour in named.items()} == KIND_COLOURS
