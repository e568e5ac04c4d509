"""Closed-form gradients, the composition of the operations, and autograd must agree (docs/method.md, section 3)."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from support import crosscoders
from support.crosscoders import GATES, NAMES, RANKED, double, relative_error
from support.steps import LAMBDA, LAMBDA_P, gradients, loss_and_gradients

from crosscoder import Crosscoder, CrosscoderConfig
from crosscoder.backends.closed_form import DensePass
from crosscoder.kernels.decode.reference import decode
from crosscoder.kernels.threshold.reference import threshold_gradient
from crosscoder.penalty import LossSettings, Penalty

SHAPES = [(63, 1, 7, 50), (33, 3, 16, 101), (17, 33, 5, 40), (9, 64, 3, 31)]
make = partial(crosscoders.make, dtype=torch.float64)
autograd = partial(gradients, backend="reference")


# The ranked gates have no threshold: no threshold modes, no l_pre.
CASES = [
    case
    for case in itertools.product(GATES, ["tanh-quad", "tanh", "l1"], ["exact", "narrow", "sampled"], [0.0, LAMBDA_P])
    if case[0] not in RANKED or case[2:] == ("exact", 0.0)
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gate", "penalty", "mode", "lambda_p"), CASES)
def test_closed_form_equals_autograd(
    shape: tuple[int, int, int, int], gate: str, penalty: str, mode: str, lambda_p: float
) -> None:
    window = 0.1 if mode == "narrow" else 2.0
    model, x = make(shape, gate=gate, penalty=penalty, threshold_mode=mode, threshold_window=window)
    draw = lambda: torch.Generator().manual_seed(7)  # noqa: E731 - both draw the same tokens in mode "sampled"
    expected = autograd(model, x, preactivation_coefficient=lambda_p, generator=draw())
    loss = model.loss(x, sparsity_coefficient=LAMBDA, preactivation_coefficient=lambda_p)
    result = loss_and_gradients(
        model, x, sparsity_coefficient=LAMBDA, preactivation_coefficient=lambda_p, generator=draw()
    )
    for part in ("total", "reconstruction", "sparsity", "preactivation"):
        torch.testing.assert_close(getattr(result.loss, part), getattr(loss, part), rtol=1e-12, atol=1e-14)
    for name, gradient in result.gradients.items():
        assert relative_error(gradient, expected[name]) <= 1e-9, name
    if gate not in RANKED:
        assert expected["log_threshold"].abs().max() > 0, "the window is empty: this compares nothing"


def test_autograd_equals_the_formula_written_out() -> None:
    """The straight-through gradient against a direct transcription with Python loops."""
    for gate in ("snapshot", "shared"):
        model, x = make((5, 3, 4, 6), gate=gate, threshold_mode="exact", threshold_window=2.0)
        actual = autograd(model, x)
        B, K, F, c, s, eps = 5, 3, 6, 4.0, 0.01, 2.0
        W, n, theta = model.W_dec.detach(), model.decoder_norms().detach(), model.threshold.detach()
        h = (x.flatten(1) @ model.W_enc.detach().flatten(1).T) + model.b_enc.detach()
        unit = n if gate == "snapshot" else torch.ones_like(n)
        f = torch.zeros(B, K, F, dtype=torch.float64)
        for b, k, j in itertools.product(range(B), range(K), range(F)):
            f[b, k, j] = h[b, j] if h[b, j] * unit[j, k] > theta[j] else 0.0
        residual = torch.einsum("bkf,fkd->bkd", f, W) + model.b_dec.detach() - x
        g = 2 * residual / (B * K)
        p = torch.tanh(c * f * n.T).sum(dim=(0, 1)) / (B * K)
        a = LAMBDA * (1 + 2 * p / s) / (B * K)
        expected = torch.zeros(F, dtype=torch.float64)
        for b, k, j in itertools.product(range(B), range(K), range(F)):
            if abs(h[b, j] * unit[j, k] - theta[j]) < eps / 2 and h[b, j] > 0:
                t = torch.tanh(c * f[b, k, j] * n[j, k])
                df = g[b, k] @ W[j, k] + a[j] * c * n[j, k] * (1 - t**2)
                expected[j] -= df * theta[j] ** 2 / (eps * unit[j, k])
        torch.testing.assert_close(actual["log_threshold"], expected, rtol=1e-11, atol=1e-14)


def test_autograd_equals_finite_differences() -> None:
    """Every parameter but the thresholds: their gradient is a straight-through estimate, not a derivative."""
    for gate, penalty in itertools.product(GATES, ["tanh-quad", "l1"]):
        model, x = make((6, 3, 4, 9), gate=gate, penalty=penalty)
        lambda_p = 0.0 if gate in RANKED else LAMBDA_P
        expected = autograd(model, x, preactivation_coefficient=lambda_p)
        generator = torch.Generator().manual_seed(1)
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            parameter, step = getattr(model, name), 1e-7
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter += sign * step * direction
                    losses.append(model.loss(x, sparsity_coefficient=LAMBDA, preactivation_coefficient=lambda_p).total)
                    parameter -= sign * step * direction
            numeric = (losses[0] - losses[1]) / (2 * step)
            torch.testing.assert_close(numeric, (expected[name] * direction).sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gate", ["snapshot", "shared"])
@pytest.mark.parametrize("penalty", ["tanh-quad", "tanh", "l1"])
def test_the_operations_compose_to_the_gradients(gate: str, penalty: str) -> None:
    """The sparse step of docs/method.md, operation by operation, gives what autograd gives."""
    model, x = make((33, 3, 16, 101), gate=gate, penalty=penalty, threshold_mode="exact", threshold_window=2.0)
    expected = autograd(model, x)
    form, terms = Penalty.of(model.config), x.shape[0] * x.shape[1]
    with torch.no_grad():
        norms, theta = model.decoder_norms(), model.threshold
        code = model.encode(x)
        g = 2 * (decode(code, model.W_dec, model.b_dec) - x) / terms
        f_NK = code.values[:, None] * code.open_gates()
        n_NK, feature_N = norms[code.features.long()], code.features.long()
        p = torch.zeros_like(theta).index_add_(0, feature_N, form.activity(f_NK * n_NK).sum(1)) / terms
        weight = LAMBDA * form.total_slope(p) / terms
        df_NK = torch.einsum("bkd,fkd->bfk", g, model.W_dec)[code.rows(), feature_N] + weight[
            feature_N, None
        ] * n_NK * form.activity_slope(f_NK * n_NK)
        dh_N = (df_NK * code.open_gates()).sum(1)
        dh_BF = torch.zeros(len(x), len(theta), dtype=x.dtype).index_put((code.rows(), feature_N), dh_N)
        dW_enc, db_enc = torch.einsum("bf,bkd->fkd", dh_BF, x), dh_BF.sum(dim=0)
        dW_dec, db_dec = torch.einsum("bkf,bkd->fkd", code.to_dense(), g), g.sum(dim=0)
        dn = torch.zeros_like(norms).index_add_(
            0, feature_N, weight[feature_N, None] * f_NK * form.activity_slope(f_NK * n_NK)
        )
        dW_dec += (dn / norms)[:, :, None] * model.W_dec
        f_BKF = code.to_dense()
        df_BKF = torch.einsum("bkd,fkd->bkf", g, model.W_dec) + (weight[:, None] * norms).T * form.activity_slope(
            f_BKF * norms.T
        )
        dlog_threshold = threshold_gradient(
            model.preactivations(x), model.weights().gate.units(norms), theta, df_BKF, 2.0
        )
    actual = {
        "W_enc": dW_enc,
        "W_dec": dW_dec,
        "b_enc": db_enc,
        "b_dec": db_dec,
        "log_threshold": dlog_threshold,
    }
    for name in NAMES:
        assert relative_error(actual[name], expected[name]) <= 1e-9, name


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("penalty", ["tanh-quad", "l1"])
def test_a_decoder_norm_of_exactly_zero(gate: str, penalty: str) -> None:
    """Written naively, the penalty's and the threshold's gradients are 0/0 there."""
    model, x = make((20, 3, 5, 12), gate=gate, penalty=penalty)
    with torch.no_grad():
        model.W_dec[2, 1] = 0
        model.W_dec[4] = 0
    expected = autograd(model, x)
    result = loss_and_gradients(model, x, sparsity_coefficient=LAMBDA)
    assert torch.isfinite(result.loss.total)
    for name, gradient in result.gradients.items():
        assert torch.isfinite(gradient).all(), name
        assert relative_error(gradient, expected[name]) <= 1e-9, name


def test_sampled_threshold_gradient_is_unbiased() -> None:
    model, x = make((64, 3, 8, 40), threshold_mode="sampled", threshold_window=4.0)
    exact_model = Crosscoder(CrosscoderConfig(3, 8, 40, threshold_mode="exact", threshold_window=4.0)).double()
    exact_model.load_state_dict(model.state_dict())
    exact = loss_and_gradients(exact_model, x, sparsity_coefficient=LAMBDA).gradients.log_threshold
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            loss_and_gradients(model, x, sparsity_coefficient=LAMBDA, generator=generator).gradients.log_threshold
            for _ in range(400)
        ]
    )
    assert draws.std(dim=0).max() > 0, "every draw is the same: nothing was sampled"
    z = (draws.mean(dim=0) - exact) / (draws.std(dim=0) / len(draws) ** 0.5).clamp_min(1e-30)
    assert z.abs().max() < 4.5
    assert z.square().mean() < 2


def test_empty_batch_no_active_and_all_active() -> None:
    model, x = make((8, 3, 5, 12))
    empty = loss_and_gradients(model, x[:0], sparsity_coefficient=LAMBDA)
    assert empty.loss.total == 0 and all(bool((g == 0).all()) for _, g in empty.gradients.items())
    for bias, pairs in ((-1e3, 0), (1e3, 8 * 12)):
        with torch.no_grad():
            model.b_enc.fill_(bias)
        expected = autograd(model, x)
        result = loss_and_gradients(model, x, sparsity_coefficient=LAMBDA)
        assert int(result.fired_F.sum()) == pairs
        for name, gradient in result.gradients.items():
            assert relative_error(gradient, expected[name]) <= 1e-9, name


def test_float32_is_no_worse_than_autograd() -> None:
    """The error against float64 is at most twice that of dense autograd in the same dtype."""
    for gate, seed in itertools.product(GATES, range(3)):
        exact_model, x = make((63, 8, 16, 100), seed=seed, gate=gate)
        x = x.float().double()
        model = Crosscoder(exact_model.config)
        model.load_state_dict(exact_model.state_dict())
        exact_model.load_state_dict(model.state_dict())
        exact = autograd(exact_model, x)
        dense = autograd(model, x.float())
        ours = dict(loss_and_gradients(model, x.float(), sparsity_coefficient=LAMBDA).gradients.items())
        for name in NAMES:
            scale = exact[name].abs().max().clamp_min(1e-30)
            bound = 2 * (dense[name] - exact[name]).abs().max() / scale + 1e-7
            assert (ours[name] - exact[name]).abs().max() / scale <= bound, (gate, name)


@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_dense_products_in_bf16_are_near_those_in_float64(mode: str) -> None:
    """As on a GPU with bf16 weights: the same gates, since h is made of two products; all else rounded to bf16 once."""
    model, x = crosscoders.make((64, 3, 20, 101), threshold_mode=mode, threshold_window=2.0)
    for matrix in (model.W_enc, model.W_dec):
        matrix.data = matrix.data.bfloat16()
    exact = double(model)

    def dense_pass(of: Crosscoder, narrow: bool) -> DensePass:
        settings = LossSettings(LAMBDA, LAMBDA_P, torch.Generator().manual_seed(3))
        return DensePass(of.weights(), of.check_input(x), settings, 37, narrow=narrow)

    narrow, wide = dense_pass(model, True), dense_pass(exact, False)
    assert torch.equal(narrow.open_K, wide.open_K) and torch.equal(narrow.fired_F, wide.fired_F)
    assert relative_error(torch.cat(narrow._h, dim=1), torch.cat(wide._h, dim=1)) < 1e-4
    assert relative_error(narrow.loss.total, wide.loss.total) < 1e-3
    for (_, actual), (_, expected) in zip(narrow.gradients(), wide.gradients(), strict=True):
        for name, gradient in expected.items():
            assert relative_error(getattr(actual, name), gradient) < 2e-2, name
