"""Transpose, from tokens to features: C++ and Triton against the reference, and arrays that are no code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.crosscoders import SHAPES, make, trimmed
from support.triton_device import DEVICE, FEW, ON_GPU, random_code

from crosscoder import _core
from crosscoder.code import SparseCode
from crosscoder.kernels.arrays import array, code_arrays
from crosscoder.kernels.transpose import native as native_transpose
from crosscoder.kernels.transpose import reference as reference_transpose
from crosscoder.kernels.transpose import triton as triton_transpose

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # interpreter


@pytest.mark.parametrize("shape", [*SHAPES, (3000, 2, 4, 90)])
def test_native(shape: tuple[int, int, int, int]) -> None:
    model, x = make(shape)
    code = model.encode(x)
    found, expected = native_transpose.transpose(code), reference_transpose.transpose(code)
    assert torch.equal(found.feature_offsets, expected.feature_offsets)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.order, expected.order)


def test_arrays_that_are_no_code_are_refused() -> None:
    model, x = make((9, 3, 5, 12))
    code = model.encode(x)
    good = code_arrays(code)
    too_large = np.full_like(good[1], 12)
    for bad in (
        (good[0][:-1].copy(), *good[1:]),
        (good[0], too_large, *good[2:]),
        (good[0], -too_large, *good[2:]),
        (good[0][::-1].copy(), *good[1:]),
        (*good[:4], 65, 12),
    ):
        with pytest.raises(ValueError, match="not a sparse code"):
            _core.transpose(bad, 1)
    with pytest.raises(ValueError, match="values must be float32"):
        _core.transpose((*good[:2], good[2].astype(np.float64), *good[3:]), 1)
    with pytest.raises(ValueError, match=r"W_dec must have shape \(12, 3, 5\), not \(11, 3, 5\)"):
        out = torch.empty(9, 3, 5)
        _core.decode(good, array(model.W_dec[:11]), array(model.b_dec), None, array(out), 1)
    with pytest.raises(ValueError, match="n_threads must be at least 1"):
        _core.transpose(good, 0)


@FEW
@given(
    st.integers(0, 70), st.sampled_from([1, 3, 33]), st.integers(1, 300), st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    st.integers(0, 3),
)  # fmt: skip
def test_triton(B: int, K: int, F: int, density: float, spare: int) -> None:
    code = random_code((B, K, F), density, seed=B, spare=spare)
    actual = triton_transpose.transpose(code)
    expected = reference_transpose.transpose(trimmed(code))
    n = int(code.row_offsets[-1])
    assert torch.equal(actual.feature_offsets, expected.feature_offsets)
    assert torch.equal(actual.tokens[:n], expected.tokens)
    assert torch.equal(actual.order[:n], expected.order)


def test_the_matrix_of_bits_orders_more_rows_than_one_chunk_holds() -> None:
    """Rows beyond 1,024 are in further chunks of words."""
    code = random_code((3, 1, 5000), 0.05, seed=6)
    wide = SparseCode(code.row_offsets, code.features, code.values, code.gates, 1, 5000)
    dense = wide.to_dense()[:, 0].T.contiguous()  # (5000, 3): tokens become features
    rows, features = dense.nonzero(as_tuple=True)
    open_N1 = torch.ones(len(rows), 1, dtype=torch.bool, device=DEVICE)
    tall = SparseCode.from_pairs(rows, features, dense[rows, features], open_N1, dense.shape)
    if not ON_GPU:  # 5,000 programs: only the matrix itself in the interpreter
        from crosscoder.kernels.device import BitMatrix

        matrix = BitMatrix(5000, 3, DEVICE)
        words = torch.zeros(matrix.n_words * 32, 3, dtype=torch.int64)
        words[:5000] = dense != 0
        bits = (words.view(-1, 32, 3) << torch.arange(32)[:, None]).sum(dim=1)
        matrix.bits.copy_(torch.where(bits >= 2**31, bits - 2**32, bits))
        matrix.count()
        listed_rows, listed_columns = matrix.pairs(tall.n_pairs)
        by_feature = reference_transpose.transpose(tall)
        assert torch.equal(matrix.offsets, by_feature.feature_offsets)
        assert torch.equal(listed_rows, by_feature.tokens)
        assert torch.equal(listed_columns, tall.features[by_feature.order])
        return
    actual, expected = triton_transpose.transpose(tall), reference_transpose.transpose(tall)
    assert torch.equal(actual.order, expected.order)


def test_triton_of_an_empty_batch() -> None:
    assert int(triton_transpose.transpose(random_code((0, 3, 20), 0.5, seed=0)).feature_offsets[-1]) == 0
