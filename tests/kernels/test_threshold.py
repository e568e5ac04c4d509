"""The thresholds' gradient: Triton against the dense reference in float64, C++ on sampled tokens against torch."""

from __future__ import annotations

import pytest
import torch
from support import triton_device
from support.crosscoders import double, make, relative_error
from support.steps import gradients
from support.triton_device import DEVICE

from crosscoder.backends.triton import TritonBackend
from crosscoder.gate import Gate
from crosscoder.kernels.encode.triton import find_candidates
from crosscoder.kernels.threshold import reference as threshold_reference
from crosscoder.kernels.threshold import triton as threshold_triton
from crosscoder.penalty import Penalty

TOLERANCE = 2e-5
"""Products split into bf16 numbers."""
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # interpreter


def test_native_on_sampled_tokens_in_bf16_is_as_good_as_torch_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSCODER_GEMM_DTYPE", "bfloat16")
    model, x = make((256, 3, 40, 200), threshold_mode="sampled", threshold_window=2.0)
    draw = lambda: torch.Generator().manual_seed(7)  # noqa: E731
    expected = gradients(double(model), x.double(), backend="reference", generator=draw())["log_threshold"]
    native = gradients(model, x, backend="native", generator=draw())["log_threshold"]
    rounded = double(model)
    with torch.no_grad():
        for matrix in (rounded.W_enc, rounded.W_dec):
            matrix.copy_(matrix.bfloat16())
    in_bf16 = gradients(rounded, x.bfloat16().double(), backend="reference", generator=draw())["log_threshold"]
    assert relative_error(native, expected) <= 2 * relative_error(in_bf16, expected)


@pytest.mark.parametrize("shape", [(63, 1, 7, 70), (33, 3, 40, 40), (5, 33, 8, 9)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["tanh-quad", "l1"])
def test_triton(shape: tuple[int, int, int, int], shared: bool, kind: str) -> None:
    model, x = triton_device.make(shape)
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
        assert relative_error(actual, expected) < TOLERANCE
        assert expected.abs().max() > 0


@pytest.mark.parametrize("shared", [False, True])
def test_triton_with_bf16_weights_and_the_encoders_products(shared: bool) -> None:
    """Residual and products rounded once to bf16: the window's pairs are the same, their gradients are near."""
    model, x = triton_device.make((63, 3, 40, 70))
    with torch.no_grad():
        for matrix in (model.W_enc, model.W_dec):
            matrix.data = matrix.data.bfloat16()
    exact, penalty = double(model), Penalty("tanh", 4.0, 0.01)
    generator = torch.Generator().manual_seed(4)
    residual = torch.randn(x.shape, generator=generator).to(DEVICE)
    weight_F = torch.rand(70, generator=generator).to(DEVICE)
    tokens = torch.randperm(63, generator=generator)[:40].to(DEVICE)
    norms, theta = model.decoder_norms(), model.threshold
    gate = Gate("one" if shared else "norm")
    backend = TritonBackend()
    with torch.no_grad():
        encoder = backend.rows(model.weights()).encoder(model.weights(), gate)
        kept = find_candidates(x, encoder, gate, keep=True, tokens=tokens).products_nF
        assert kept is not None and kept.dtype == torch.bfloat16
        actual = threshold_triton.threshold_gradient(
            x, residual, model.W_enc, model.W_dec, model.b_enc, norms, theta, weight_F,
            penalty=penalty, scale=0.7, window=2.0, gate=gate, tokens=tokens, products_nF=kept,
        )  # fmt: skip
        h = exact.preactivations(x.double())[tokens]
        rounded = kept.double() + exact.b_enc
        assert relative_error(rounded, h) < 0.02
        unit = torch.ones_like(norms) if shared else norms
        f_BKF = torch.where(rounded[:, None] * unit.T > theta, rounded[:, None], 0.0)
        df_BKF = 0.7 * torch.einsum("bkd,fkd->bkf", residual[tokens].bfloat16().double(), exact.W_dec)
        df_BKF += weight_F.double() * norms.T * penalty.activity_slope(f_BKF * norms.T)
        expected = threshold_reference.threshold_gradient(rounded, unit.double(), theta.double(), df_BKF, 2.0)
    assert relative_error(actual, expected) < 3e-3
