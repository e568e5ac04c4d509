"""Each C++ operation against its dense twin in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.crosscoders import GATES, SHAPES, double, double_code, make

from crosscoder import _core
from crosscoder.backends.native import NativeBackend
from crosscoder.kernels.arrays import array, code_arrays
from crosscoder.kernels.decode import native as native_decode
from crosscoder.kernels.decode import reference as reference_decode
from crosscoder.kernels.transpose import native as native_transpose
from crosscoder.kernels.transpose import reference as reference_transpose


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("products", ["fp32", "bf16", "int8"])
def test_encode(shape: tuple[int, int, int, int], gate: str, products: str) -> None:
    model, x = make(shape, gate=gate)
    code = NativeBackend().encode(model.weights(), x, products=products)
    expected = double(model).encode(x.double())
    assert torch.equal(code.row_offsets, expected.row_offsets)
    assert torch.equal(code.features, expected.features) and torch.equal(code.gates, expected.gates)
    torch.testing.assert_close(code.values.double(), expected.values, rtol=1e-5, atol=1e-6)
    assert (code.features.dtype, code.row_offsets.dtype, code.gates.dtype) == (torch.int32, torch.int64, torch.int64)


def test_batchtopk_at_inference_uses_its_threshold() -> None:
    model, x = make((40, 3, 16, 200), gate="batchtopk")
    model.batch_threshold.fill_(0.3)
    model.eval()
    code, expected = model.encode(x, backend="native"), double(model).encode(x.double())
    assert 0 < code.n_pairs < 40 * 200
    assert torch.equal(code.features, expected.features) and torch.equal(code.gates, expected.gates)


def test_folded_crosscoders_read_raw_activations() -> None:
    model, x = make((40, 3, 16, 200))
    scale = torch.tensor([1.0, 5.0, 0.05])
    folded = model.fold_scales(scale)
    code, expected = folded.encode(x / scale[:, None]), model.encode(x)
    agreeing = torch.isin(code.rows() * 200 + code.features, expected.rows() * 200 + expected.features).float().mean()
    assert float(agreeing) > 0.999
    torch.testing.assert_close(folded.decode(code), model.decode(code) / scale[:, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outliers", [1.0, 40.0])
def test_int8_finds_nearly_all_pairs(outliers: float) -> None:
    """Recall of at least 0.9999, also where some dimensions are far larger than the rest, as in trained models."""
    model, x = make((600, 4, 64, 2000), shift=-1.2)
    x[:, :, :2] *= outliers
    with torch.no_grad():
        model.W_enc[:, :, :2] /= outliers
    exact_code = model.encode(x)
    int8_code = model.encode(x, candidates="int8")
    keys = [code.rows() * 2000 + code.features for code in (exact_code, int8_code)]
    assert 5e3 < len(keys[0]) < 2e5
    found = torch.isin(keys[0], keys[1], assume_unique=True)
    assert int((~found).sum()) <= max(1, int(1e-4 * len(keys[0])))
    assert torch.equal(exact_code.values[found], int8_code.values), "scores must be exact"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_decode(shape: tuple[int, int, int, int], weights: torch.dtype) -> None:
    model, x = make(shape, dtype=weights)
    code = model.encode(x, backend="native")
    W_dec, b_dec = model.W_dec.detach(), model.b_dec.detach().float()
    decoded = native_decode.decode(code, W_dec, b_dec)
    residual = native_decode.decode(code, W_dec, b_dec, x)
    expected = reference_decode.decode(double_code(code), W_dec.double(), b_dec.double())
    torch.testing.assert_close(decoded.double(), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(residual.double(), expected - x, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [*SHAPES, (3000, 2, 4, 90)])
def test_transpose(shape: tuple[int, int, int, int]) -> None:
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
