"""Each Triton operation against its dense twin in float64: odd shapes, every dtype, any density, poisoned outputs."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from support.crosscoders import GATES, double, double_code, relative_error, trimmed
from support.triton_device import DEVICE, ON_GPU, make, random_code
from torch import Tensor

from crosscoder.backends.triton import TritonBackend
from crosscoder.code import SparseCode
from crosscoder.gate import Gate
from crosscoder.kernels.decode import reference as decode_reference
from crosscoder.kernels.decode import triton as decode_triton
from crosscoder.kernels.encode import triton as encode_triton
from crosscoder.kernels.threshold import reference as threshold_reference
from crosscoder.kernels.threshold import triton as threshold_triton
from crosscoder.kernels.transpose import reference as transpose_reference
from crosscoder.kernels.transpose import triton as transpose_triton
from crosscoder.model import Crosscoder
from crosscoder.penalty import Penalty

# (B, K, D, F); the interpreter takes some 10 ms a program, a GPU any of these.
SHAPES = [(9, 3, 33, 40), (4, 32, 8, 12), (3, 33, 300, 6), (3, 64, 5, 5)]
WIDE = (63, 1, 7, 1000)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 1e-6
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # interpreter
FEW = examples(max_examples=200 if ON_GPU else 6, deadline=None, derandomize=True)


class TwoHalves:
    """A sum over processes that changes nothing: decode and the pairs' products then are two launches."""

    alone = False
    first = True

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.clone()


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


@pytest.mark.parametrize(("shape", "gate"), [*itertools.product(SHAPES, GATES), (WIDE, "snapshot"), (WIDE, "topk")])
def test_encode(shape: tuple[int, int, int, int], gate: str) -> None:
    model, x = make(shape, gate=gate)
    code = triton_code(model, x)
    assert code.n_pairs > 0
    assert_same_code(code, double(model).encode(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_dtypes(dtype: torch.dtype) -> None:
    model, x = make((9, 3, 33, 70))
    x = x.to(dtype)
    assert_same_code(triton_code(model, x), double(model).encode(x.double()))


def test_encode_with_bf16_weights() -> None:
    model, x = make((9, 3, 33, 70))
    model.W_enc.data = model.W_enc.data.bfloat16()
    expected = double(model).encode(x.double())
    assert_same_code(triton_code(model, x), expected)


def test_gates_do_not_depend_on_the_rounding_of_the_product() -> None:
    """Thresholds put just under and just over many exact h: bf16 would not tell them apart."""
    model, x = make((40, 2, 40, 30), gate="shared")
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
def test_encode_all_or_nothing(log_threshold: float, share: float | None) -> None:
    model, x = make((33, 2, 8, 40), gate="shared")
    with torch.no_grad():
        model.log_threshold.fill_(log_threshold)
        if share is None:
            model.b_enc.fill_(100.0)
    code = triton_code(model, x)
    assert code.n_pairs == (33 * 40 if share is None else 0)
    assert_same_code(code, double(model).encode(x.double()))


def test_empty_batch() -> None:
    model, x = make((4, 3, 8, 20))
    code = triton_code(model, x[:0])
    assert code.n_pairs == 0 and code.n_tokens == 0
    assert decode_triton.decode(code, model.W_dec, model.b_dec).shape == (0, 3, 8)
    assert int(transpose_triton.transpose(code).feature_offsets[-1]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_are_not_finite_have_no_pairs(dtype: torch.dtype) -> None:
    model, x = make((4, 2, 8, 20))
    x = x.to(dtype)
    x[1, 0, 3], x[2, 1, 0] = float("nan"), float("inf")
    counts = triton_code(model, x).row_offsets.diff().tolist()
    assert counts[1] == counts[2] == 0 and min(counts[0], counts[3]) > 0


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((9, 3, 33, 40), torch.float32), ((9, 3, 33, 40), torch.bfloat16), ((2, 33, 300, 6), torch.float32)],
)
def test_decode_residual_and_dots(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    B, K, _, F = shape
    model, x = make(shape)
    code = random_code((B, K, F), 0.3, seed=1, spare=7)
    W, b = model.W_dec.detach().to(dtype), model.b_dec.detach()
    fused = decode_triton.residual_and_dots(code, W, b, x)
    all_pairs = decode_triton.residual_and_dots(code, W, b, x, closed=True)
    alone = decode_triton.decode(code, W, b)
    halves = decode_triton.residual_and_dots(code, W, b, x, sharding=TwoHalves())
    exact = double_code(trimmed(code))
    expected = decode_reference.decode(exact, W.double(), b.double())
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


@FEW
@given(
    st.integers(0, 70), st.sampled_from([1, 3, 33]), st.integers(1, 300), st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    st.integers(0, 3),
)  # fmt: skip
def test_transpose(B: int, K: int, F: int, density: float, spare: int) -> None:
    code = random_code((B, K, F), density, seed=B, spare=spare)
    actual = transpose_triton.transpose(code)
    expected = transpose_reference.transpose(trimmed(code))
    n = int(code.row_offsets[-1])
    assert torch.equal(actual.feature_offsets, expected.feature_offsets)
    assert torch.equal(actual.tokens[:n], expected.tokens)
    assert torch.equal(actual.order[:n], expected.order)


@FEW
@given(st.integers(1, 40), st.sampled_from([1, 3]), st.integers(1, 40), st.integers(1, 40), st.sampled_from([0, 1, 20]))
def test_encode_any_shape(B: int, K: int, D: int, F: int, threshold: int) -> None:
    model, x = make((B, K, D, F), seed=F)
    with torch.no_grad():
        model.log_threshold += threshold - 3
    assert_same_code(triton_code(model, x), double(model).encode(x.double()))


@pytest.mark.parametrize("shape", [(63, 1, 7, 70), (33, 3, 40, 40), (5, 33, 8, 9)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["tanh-quad", "l1"])
def test_threshold_gradient(shape: tuple[int, int, int, int], shared: bool, kind: str) -> None:
    model, x = make(shape)
    penalty = Penalty(kind, 4.0, 0.01)
    generator = torch.Generator().manual_seed(4)
    residual = torch.randn(x.shape, generator=generator).to(DEVICE)
    weight_F = torch.rand(shape[3], generator=generator).to(DEVICE)
    tokens = torch.randperm(shape[0], generator=generator)[: max(1, shape[0] // 2)].to(DEVICE)
    for subset in (None, tokens):
        with torch.no_grad():
            actual = threshold_triton.threshold_gradient(
                x, residual, model.W_enc, model.W_dec, model.b_enc, model.decoder_norms(), model.threshold, weight_F,
                penalty=penalty, scale=0.7, window=2.0, gate=Gate("one" if shared else "norm"), tokens=subset,
            )  # fmt: skip
        with torch.no_grad():
            exact = double(model)
            some = slice(None) if subset is None else subset
            h, norms, theta = exact.preactivations(x.double()), exact.decoder_norms(), exact.threshold
            unit = torch.ones_like(norms) if shared else norms
            f_BKF = torch.where(h[:, None] * unit.T > theta, h[:, None], 0.0)
            df_BKF = 0.7 * torch.einsum("bkd,fkd->bkf", residual.double(), exact.W_dec)
            df_BKF += weight_F.double() * norms.T * penalty.activity_slope(f_BKF * norms.T)
            expected = threshold_reference.threshold_gradient(h[some], unit, theta, df_BKF[some], 2.0)
        assert relative_error(actual, expected) < 2 * TOLERANCE
        assert expected.abs().max() > 0


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
        by_feature = transpose_reference.transpose(tall)
        assert torch.equal(matrix.offsets, by_feature.feature_offsets)
        assert torch.equal(listed_rows, by_feature.tokens)
        assert torch.equal(listed_columns, tall.features[by_feature.order])
        return
    actual, expected = transpose_triton.transpose(tall), transpose_reference.transpose(tall)
    assert torch.equal(actual.order, expected.order)
