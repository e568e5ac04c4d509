"""xxh3_64 against published values, over every kind of buffer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from levels import python_at

from crosscoder import _core


def test_known_values() -> None:
    # As the reference library gives them (python-xxhash 4.1, xxHash 0.8.4).
    assert _core.xxh3_64(b"") == 0x2D06800538D394C2
    assert _core.xxh3_64(b"a") == 0xE6C632B61E964E1F
    assert _core.xxh3_64(b"abc") == 0x78AF5F94892F3950


def test_a_flipped_bit_changes_it_at_every_length_class() -> None:
    for size in (1, 3, 8, 16, 17, 128, 129, 240, 241, 1024, 5000):
        data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
        before = _core.xxh3_64(data)
        data[size // 2] ^= 1
        assert _core.xxh3_64(data) != before


LEVELS = """
import numpy as np
from crosscoder import _core

data = np.random.default_rng(0).integers(0, 256, 1 << 18, dtype=np.uint8)
sizes = [0, 1, 3, 4, 8, 9, 16, 17, 128, 129, 240, 241, 1023, 1024, 1025, 4096, 100_003, 1 << 18]
print(_core.isa_level(), [_core.xxh3_64(data[start : start + size]) for size in sizes for start in (0, 1)])
"""


def test_all_levels_give_the_same() -> None:
    found = {}
    for isa in _core.isa_levels():
        run = python_at(isa, "-c", LEVELS)
        assert run.returncode == 0, run.stderr
        level, values = run.stdout.split(maxsplit=1)
        assert level == isa
        found[isa] = values
    assert len(set(found.values())) == 1, found


def test_buffers_of_the_same_bytes_agree(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((30, 7))
    (tmp_path / "values").write_bytes(values.tobytes())
    mapped = np.memmap(tmp_path / "values", np.float64, "r", shape=(30, 7))
    expected = _core.xxh3_64(values.tobytes())
    for buffer in (values, values.data, bytearray(values.tobytes()), mapped, values.view(np.uint8)):
        assert _core.xxh3_64(buffer) == expected


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="^data must be C-contiguous"):
        _core.xxh3_64(np.zeros((4, 4))[:, ::2])
    with pytest.raises(TypeError, match="^data must have the buffer protocol .* not str"):
        _core.xxh3_64("text")  # type: ignore[arg-type]
