"""gather_rows and float32_to_bfloat16 against numpy, at every instruction-set level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import floats
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import python_at

from crosscoder import _core

DTYPES = {"fp32": np.float32, "bf16": np.uint16, "fp16": np.uint16}


def random_source(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    bits = 32 if dtype == "fp32" else 16
    integers = rng.integers(0, 1 << bits, shape, dtype=np.uint32 if dtype == "fp32" else np.uint16)
    return integers.view(np.float32) if dtype == "fp32" else integers


def expected_rows(source: np.ndarray, index: np.ndarray, scale: float, dtype: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return floats.widened(source[index], dtype) * np.float32(scale)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("scale", [1.0, 0.37, -5.0])
def test_every_half_is_widened_exactly(dtype: str, scale: float) -> None:
    source = floats.all_halves()[None]
    out = np.full((1, 1, 1 << 16), np.nan, dtype=np.float32)
    _core.gather_rows(source, np.zeros(1, np.int64), scale, out, 0, dtype)
    assert floats.same_floats(out[0], expected_rows(source, np.zeros(1, np.int64), scale, dtype))


@pytest.mark.parametrize("dtype", list(DTYPES))
@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 20),
    width=st.sampled_from(floats.SIZES),
    n=st.integers(0, 30),
    n_snapshots=st.integers(1, 4),
    n_threads=st.integers(1, 3),
    seed=st.integers(0, 1 << 16),
)
def test_gather_writes_its_snapshot_and_nothing_else(
    dtype: str, rows: int, width: int, n: int, n_snapshots: int, n_threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    source = random_source(rng, dtype, (rows, width))
    index = rng.integers(0, rows, n)
    k = int(rng.integers(0, n_snapshots))
    out = np.full((n, n_snapshots, width), 7.5, dtype=np.float32)
    _core.gather_rows(source, index, 1.7, out, k, dtype, n_threads)
    assert floats.same_floats(out[:, k], expected_rows(source, index, 1.7, dtype))
    assert np.all(np.delete(out, k, axis=1) == 7.5)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_number_of_threads_changes_nothing(dtype: str) -> None:
    rng = np.random.default_rng(3)
    source = random_source(rng, dtype, (500, 257))
    index = rng.integers(0, 500, 1999)  # enough for several threads to start
    outs = [np.zeros((1999, 1, 257), dtype=np.float32) for _ in range(3)]
    for out, n_threads in zip(outs, (1, 2, 5), strict=True):
        _core.gather_rows(source, index, 0.1, out, 0, dtype, n_threads)
    assert floats.same_floats(outs[0][:, 0], expected_rows(source, index, 0.1, dtype))
    assert outs[0].tobytes() == outs[1].tobytes() == outs[2].tobytes()


def test_source_may_be_a_read_only_memory_map(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    values = rng.standard_normal((40, 24)).astype(np.float16)
    (tmp_path / "rows").write_bytes(b"\0" * 64 + values.tobytes())
    source = np.memmap(tmp_path / "rows", np.float16, "r", offset=64, shape=(40, 24))
    index = np.arange(39, -1, -1)
    out = np.empty((40, 1, 24), dtype=np.float32)
    _core.gather_rows(source, index, 1.0, out, 0, "fp16")
    assert np.array_equal(out[:, 0], values[::-1].astype(np.float32))


def test_every_corner_is_rounded_to_nearest_even() -> None:
    rng = np.random.default_rng(5)
    random_bits = rng.integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    ties = ((rng.integers(0, 1 << 16, 10_000, dtype=np.uint32) << 16) | 0x8000).view(np.float32)
    values = np.concatenate([floats.FP32_CORNERS, random_bits, ties])
    out = np.zeros(values.shape, dtype=np.uint16)
    _core.float32_to_bfloat16(values, out, 2)
    assert np.array_equal(out, floats.narrowed(values))
    assert np.array_equal(np.isnan(floats.widened(out, "bf16")), np.isnan(values))


@pytest.mark.parametrize("size", floats.SIZES)
def test_rounding_touches_no_more_than_its_output(size: int) -> None:
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    padded = np.full(size + 16, 0xABCD, dtype=np.uint16)
    _core.float32_to_bfloat16(values, padded[:size])
    assert np.array_equal(padded[:size], floats.narrowed(values))
    assert np.all(padded[size:] == 0xABCD)


def test_rounding_back_and_forth_is_the_identity_on_bfloat16() -> None:
    bits = floats.all_halves()
    values = floats.widened(bits, "bf16").reshape(256, 256)
    out = np.empty((256, 256), dtype=np.uint16)
    _core.float32_to_bfloat16(values, out)
    quiet = np.where(np.isnan(values).ravel(), bits | 0x40, bits)
    assert np.array_equal(out.ravel(), quiet)


def test_all_levels_give_the_same_bits() -> None:
    results = {}
    for isa in _core.isa_levels():
        run = python_at(isa, floats.__file__)
        assert run.returncode == 0, run.stderr
        level, fingerprint = run.stdout.split()
        assert level == isa
        results[isa] = int(fingerprint)
    assert set(results.values()) == {floats.fingerprint()}, results


GOOD: dict[str, Any] = {
    "source": np.zeros((10, 4), np.uint16),
    "index": np.zeros(3, np.int64),
    "scale": 1.0,
    "out": np.zeros((3, 2, 4), np.float32),
    "snapshot": 0,
    "dtype": "bf16",
    "n_threads": 1,
}


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def misaligned() -> np.ndarray:
    return np.zeros(81, np.uint8)[1:].view(np.uint16).reshape(10, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"source": [[1]]}, TypeError, "source must be a numpy array, not list"),
        ({"source": np.zeros((10, 4), np.float32)}, ValueError, "source must be uint16, not float32"),
        ({"source": np.zeros((10, 4), ">u2")}, ValueError, "source must be uint16, not >u2"),
        ({"source": np.zeros(4, np.uint16)}, ValueError, r"source must have shape \(T, D\), not \(4,\)"),
        ({"source": np.zeros((4, 10), np.uint16).T}, ValueError, "source must be C-contiguous"),
        ({"source": misaligned()}, ValueError, "source must be aligned"),
        ({"dtype": "fp32"}, ValueError, "source must be float32, not uint16"),
        ({"dtype": "fp16", "source": np.zeros((10, 4))}, ValueError, "source must be uint16 or float16, not"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of fp32, bf16, fp16, not int8"),
        ({"index": np.zeros(3, np.int32)}, ValueError, "index must be int64, not int32"),
        ({"index": np.zeros((3, 1), np.int64)}, ValueError, r"index must have shape \(n,\), not \(3, 1\)"),
        ({"index": np.zeros(6, np.int64)[::2]}, ValueError, "index must be C-contiguous"),
        ({"index": np.array([0, 9, 10])}, IndexError, r"index\[2\] is 10, but source has 10 rows"),
        ({"index": np.array([0, -1, 10])}, IndexError, r"index\[1\] is -1, but source has 10 rows"),
        ({"out": np.zeros((3, 2, 4))}, ValueError, "out must be float32, not float64"),
        ({"out": np.zeros((3, 2, 5), np.float32)}, ValueError, r"out has shape \(3, 2, 5\), but index has 3"),
        ({"out": np.zeros((2, 2, 4), np.float32)}, ValueError, r"out has shape \(2, 2, 4\), but index has 3"),
        ({"out": np.zeros((3, 8), np.float32)}, ValueError, r"out must have shape \(n, K, D\), not \(3, 8\)"),
        ({"out": read_only(np.zeros((3, 2, 4), np.float32))}, ValueError, "out must be writable"),
        ({"snapshot": 2}, IndexError, "snapshot is 2, but out has 2 of them"),
        ({"snapshot": -1}, IndexError, "snapshot is -1, but out has 2 of them"),
        ({"scale": float("nan")}, ValueError, "scale must be finite in float32, not nan"),
        ({"scale": 1e39}, ValueError, "scale must be finite in float32"),
        ({"n_threads": 0}, ValueError, "n_threads must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_gather_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        _core.gather_rows(**{**GOOD, **change})


def test_nothing_is_written_for_an_index_out_of_range() -> None:
    out = np.full((3, 2, 4), 7.5, np.float32)
    with pytest.raises(IndexError):
        _core.gather_rows(**{**GOOD, "out": out, "index": np.array([1, 2, 10])})
    assert np.all(out == 7.5)


@pytest.mark.parametrize(
    ("src", "out", "message"),
    [
        (np.zeros(4), np.zeros(4, np.uint16), "src must be float32, not float64"),
        (np.zeros(4, np.float32), np.zeros(4, np.int16), "out must be uint16, not int16"),
        (np.zeros(4, np.float32), np.zeros(5, np.uint16), r"out has shape \(5,\), but src \(4,\)"),
        (np.zeros(8, np.float32)[::2], np.zeros(4, np.uint16), "src must be C-contiguous"),
        (np.zeros(4, np.float32), read_only(np.zeros(4, np.uint16)), "out must be writable"),
    ],
)
def test_wrong_arguments_of_rounding_are_named(src: np.ndarray, out: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        _core.float32_to_bfloat16(src, out)
