"""Encode: C++ and Triton against the dense reference in float64, and the rows that they derive from the weights."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import triton_device
from support.crosscoders import GATES, SHAPES, double, make, relative_error
from support.steps import trained
from support.triton_device import FEW, SMALL_SHAPES
from torch import Tensor

from crosscoder.backends.native import NativeBackend
from crosscoder.backends.triton import TritonBackend
from crosscoder.code import SparseCode
from crosscoder.kernels.encode import triton as encode_triton
from crosscoder.kernels.encode.rows import EncoderRows
from crosscoder.model import Crosscoder

WIDE = (63, 1, 7, 1000)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 1e-6
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # interpreter


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("products", ["fp32", "bf16", "int8"])
def test_native(shape: tuple[int, int, int, int], gate: str, products: str) -> None:
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


def test_the_derived_rows_follow_every_change_of_the_weights() -> None:
    model, x = make((40, 3, 16, 200))
    for change in ("in place", "state_dict", "native", "reference", "assigned", "cast"):
        before = model.encode(x, backend="native").to_dense()
        if change == "in place":
            with torch.no_grad():
                model.W_enc[:50] *= -1
        elif change == "state_dict":
            model.load_state_dict(make((1, 3, 16, 200), seed=5)[0].state_dict())
        elif change in ("native", "reference"):  # fused optimisers do not count versions
            loss = model.loss(x, backend=change).total
            model.encode(x, backend="native")
            loss.backward()
            model.encode(x, backend="native")
            torch.optim.Adam(model.parameters(), lr=0.1, fused=True).step()
            model.zero_grad()
        elif change == "assigned":
            model.W_enc.data = torch.randn(model.W_enc.shape, generator=torch.Generator().manual_seed(3)) * 0.2
        else:
            model = model.to(torch.bfloat16)
        after = model.encode(x, backend="native").to_dense()
        assert not torch.equal(before, after), change
        expected = double(model).encode(x.double()).to_dense()
        torch.testing.assert_close(after.double(), expected, rtol=1e-4, atol=1e-5)


def test_rows_are_the_same_however_they_were_made() -> None:
    """Made from the whole of the weights or refreshed row by row in training: a resumed run must not differ."""
    trainer = trained("native")
    backend = trainer.model.backend("native")
    assert isinstance(backend, NativeBackend)
    kept = backend.rows(trainer.model.weights())
    made = EncoderRows(trainer.model.W_enc, trainer.model.W_dec, kept.products)
    made.refresh(trainer.model.weights())
    for a, b in zip(kept.arrays(), made.arrays(), strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a == b).all()


def triton_code(model: Crosscoder, x: Tensor) -> SparseCode:
    """The code of activations in their own dtype."""
    backend, weights = TritonBackend(), model.weights()
    with torch.no_grad():
        return encode_triton.encode(x, backend.rows(weights).encoder(weights, weights.gate), weights.gate)


def assert_same_code(actual: SparseCode, expected: SparseCode) -> None:
    """The same pairs and gates, values to float32's rounding."""
    for name in ("row_offsets", "features", "gates"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert relative_error(actual.values, expected.values) < TOLERANCE


@pytest.mark.parametrize(("shape", "gate"), [*product(SMALL_SHAPES, GATES), (WIDE, "snapshot"), (WIDE, "topk")])
def test_triton(shape: tuple[int, int, int, int], gate: str) -> None:
    model, x = triton_device.make(shape, gate=gate)
    code = triton_code(model, x)
    assert code.n_pairs > 0
    assert_same_code(code, double(model).encode(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_dtypes(dtype: torch.dtype) -> None:
    model, x = triton_device.make((9, 3, 33, 70))
    x = x.to(dtype)
    assert_same_code(triton_code(model, x), double(model).encode(x.double()))


def test_triton_with_bf16_weights() -> None:
    model, x = triton_device.make((9, 3, 33, 70))
    model.W_enc.data = model.W_enc.data.bfloat16()
    expected = double(model).encode(x.double())
    assert_same_code(triton_code(model, x), expected)


def test_gates_do_not_depend_on_the_rounding_of_the_product() -> None:
    """Thresholds put just under and just over many exact h: bf16 would not tell them apart."""
    model, x = triton_device.make((40, 2, 40, 30), gate="shared")
    with torch.no_grad():
        h_BF = double(model).preactivations(x.double())
        theta = h_BF.sort(dim=0).values[30]
        model.log_threshold.copy_((theta.clamp_min(1e-3) * (1 + 2e-5)).log())
        below = triton_code(model, x)
        assert_same_code(below, double(model).encode(x.double()))
        model.log_threshold.copy_((theta.clamp_min(1e-3) * (1 - 2e-5)).log())
        above = triton_code(model, x)
        assert_same_code(above, double(model).encode(x.double()))
    assert int((theta > 1e-3).sum()) == above.n_pairs - below.n_pairs > 10


@pytest.mark.parametrize(("log_threshold", "share"), [(-30.0, None), (30.0, 0.0)])
def test_triton_all_or_nothing(log_threshold: float, share: float | None) -> None:
    model, x = triton_device.make((33, 2, 8, 40), gate="shared")
    with torch.no_grad():
        model.log_threshold.fill_(log_threshold)
        if share is None:
            model.b_enc.fill_(100.0)
    code = triton_code(model, x)
    assert code.n_pairs == (33 * 40 if share is None else 0)
    assert_same_code(code, double(model).encode(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_are_not_finite_have_no_pairs(dtype: torch.dtype) -> None:
    model, x = triton_device.make((4, 2, 8, 20))
    x = x.to(dtype)
    x[1, 0, 3], x[2, 1, 0] = float("nan"), float("inf")
    counts = triton_code(model, x).row_offsets.diff().tolist()
    assert counts[1] == counts[2] == 0 and min(counts[0], counts[3]) > 0


@FEW
@given(st.integers(1, 40), st.sampled_from([1, 3]), st.integers(1, 40), st.integers(1, 40), st.sampled_from([0, 1, 20]))
def test_triton_any_shape(B: int, K: int, D: int, F: int, threshold: int) -> None:
    model, x = triton_device.make((B, K, D, F), seed=F)
    with torch.no_grad():
        model.log_threshold += threshold - 3
    assert_same_code(triton_code(model, x), double(model).encode(x.double()))


def test_triton_of_an_empty_batch() -> None:
    model, x = triton_device.make((4, 3, 8, 20))
    code = triton_code(model, x[:0])
    assert code.n_pairs == 0 and code.n_tokens == 0
