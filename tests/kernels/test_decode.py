"""Decode, alone and with the residual and the pairs' products: C++ and Triton against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from support import triton_device
from support.crosscoders import SHAPES, double_code, make, relative_error, trimmed
from torch import Tensor

from crosscoder.kernels.decode import native as native_decode
from crosscoder.kernels.decode import reference as reference_decode
from crosscoder.kernels.decode import triton as triton_decode

TOLERANCE = 1e-6
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # interpreter


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_native(shape: tuple[int, int, int, int], weights: torch.dtype) -> None:
    model, x = make(shape, dtype=weights)
    code = model.encode(x, backend="native")
    W_dec, b_dec = model.W_dec.detach(), model.b_dec.detach().float()
    decoded = native_decode.decode(code, W_dec, b_dec)
    residual = native_decode.decode(code, W_dec, b_dec, x)
    expected = reference_decode.decode(double_code(code), W_dec.double(), b_dec.double())
    torch.testing.assert_close(decoded.double(), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(residual.double(), expected - x, rtol=1e-5, atol=2e-6)


class TwoHalves:
    """A sum over processes that changes nothing: decode and the pairs' products then are two launches."""

    alone = False
    first = True

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.clone()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((9, 3, 33, 40), torch.float32), ((9, 3, 33, 40), torch.bfloat16), ((2, 33, 300, 6), torch.float32)],
)
def test_triton_residual_and_dots(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    B, K, _, F = shape
    model, x = triton_device.make(shape)
    code = triton_device.random_code((B, K, F), 0.3, seed=1, spare=7)
    W, b = model.W_dec.detach().to(dtype), model.b_dec.detach()
    fused = triton_decode.residual_and_dots(code, W, b, x)
    all_pairs = triton_decode.residual_and_dots(code, W, b, x, closed=True)
    alone = triton_decode.decode(code, W, b)
    halves = triton_decode.residual_and_dots(code, W, b, x, sharding=TwoHalves())
    exact = double_code(trimmed(code))
    expected = reference_decode.decode(exact, W.double(), b.double())
    residual = expected - x.double()
    assert relative_error(alone, expected) < TOLERANCE
    assert relative_error(fused.residual_BKD, residual) < TOLERANCE
    assert relative_error(fused.square_sum, residual.square().sum()) < TOLERANCE
    assert torch.equal(fused.open_K, exact.open_gates().sum(dim=0))
    products = torch.einsum("bkd,fkd->bfk", residual, W.double())[exact.rows(), exact.features.long()]
    n = exact.n_pairs
    for part in ("residual_BKD", "open_K"):
        assert torch.equal(getattr(halves, part), getattr(fused, part)), part
    assert torch.equal(halves.dots_NPK[:n], fused.dots_NPK[:n])
    assert relative_error(halves.square_sum, fused.square_sum) < TOLERANCE
    assert relative_error(all_pairs.dots_NPK[:n].sum(dim=1), products) < TOLERANCE
    assert relative_error(fused.dots_NPK[:n].sum(dim=1), products * exact.open_gates()) < TOLERANCE


def test_triton_of_an_empty_batch() -> None:
    model, _ = triton_device.make((4, 3, 8, 20))
    code = triton_device.random_code((0, 3, 20), 0.5, seed=0)
    assert triton_decode.decode(code, model.W_dec, model.b_dec).shape == (0, 3, 8)
