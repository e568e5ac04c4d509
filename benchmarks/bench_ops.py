"""How long does each of the six operations take, and what should it take on an H100?

Every backend's module `crosscoder.kernels.<operation>.<backend>` is called as its reference is; a backend that hasn't
got the operation in that form is skipped. The model of GPU time beside each figure counts the bytes and FLOPs that the
sparse operation can't do without (bf16 weights and activations, fp32 state), against 600 TFLOP/s in products, 60
elsewhere, and 3.35 TB/s.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from crosscoder import Trainer
from crosscoder.backends.base import StepSettings, Update
from crosscoder.backends.native import NativeBackend, NativeTraining
from crosscoder.code import SparseCode
from crosscoder.kernels.update.native import GradientParts
from crosscoder.penalty import Penalty
from crosscoder.registry import backend_names
from harness.measure import Work, compare, gemms
from harness.results import Recorder
from harness.situation import Shape, Situation, make
from harness.variants import DEFAULT, LEARNING_RATE, SPARSITY

QUICK = [Shape(n_features=2_048, batch=256)]
FULL = [Shape()]
BACKENDS = backend_names()

SETTINGS = StepSettings(1, LEARNING_RATE, LEARNING_RATE, SPARSITY, 0.0, 0)

PRODUCT_RATE, VECTOR_RATE, BANDWIDTH = 600e12, 60e12, 3.35e12


@dataclass(frozen=True)
class Inputs:
    """What the operations work on: one batch, its code, residual and gradient."""

    situation: Situation
    x_BKD: Tensor
    norms_FK: Tensor
    theta_F: Tensor
    h_BF: Tensor
    code: SparseCode
    g_BKD: Tensor
    dh_N: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, situation: Situation) -> Inputs:
        model, x_BKD = situation.model, situation.batches[0]
        code = model.encode(x_BKD)
        residual_BKD = model.decode(code) - x_BKD
        return cls(
            situation=situation,
            x_BKD=x_BKD,
            norms_FK=model.decoder_norms().detach(),
            theta_F=model.threshold.detach(),
            h_BF=model.preactivations(x_BKD).detach(),
            code=code,
            g_BKD=residual_BKD * (2 / (x_BKD.shape[0] * x_BKD.shape[1])),
            dh_N=torch.ones_like(code.values),
        )


def backend_of(ops: ModuleType) -> str:
    """The last part of a module's name."""
    return ops.__name__.rpartition(".")[2]


def native_parts(at: Inputs) -> tuple[Trainer, GradientParts]:
    """A trainer of the model, and what one batch's gradients are made of."""
    trainer = DEFAULT.trainer(at.situation.model)
    result = NativeBackend().sparse_pass(trainer.model.weights(), at.x_BKD, SETTINGS.loss())
    return trainer, result.parts


def encode(ops: ModuleType, at: Inputs) -> Work:
    model = at.situation.model
    if backend_of(ops) != "reference":
        return lambda: model.encode(at.x_BKD, backend=backend_of(ops))
    gate = model.weights().gate
    return lambda: ops.encode(ops.preactivations(at.x_BKD, model.W_enc, model.b_enc), at.norms_FK, at.theta_F, gate)


def decode(ops: ModuleType, at: Inputs) -> Work:
    model = at.situation.model
    return functools.partial(ops.decode, at.code, model.W_dec, model.b_dec)


def transpose(ops: ModuleType, at: Inputs) -> Work:
    return functools.partial(ops.transpose, at.code)


def update(ops: ModuleType, at: Inputs) -> Work:
    """Gradients of both weights and Adam's step on them."""
    model = at.situation.model
    if backend_of(ops) == "native":
        trainer, parts = native_parts(at)
        weights, training = trainer.model.weights(), trainer.engine._training
        assert isinstance(training, NativeTraining)
        options = training._options(Update(SETTINGS, lazy=True, norm_limit=None))
        parameters = (weights.W_enc, weights.W_dec, weights.b_enc)
        return lambda: ops.update_rows(parts, parts.encoder_bias(), *parameters, trainer.state, training._rows, options)
    if backend_of(ops) != "reference":
        raise TypeError("its update is part of a whole step (benchmarks/gpu_run.py)")
    optimizer = torch.optim.Adam([model.W_enc, model.W_dec], lr=LEARNING_RATE, fused=True)

    def work() -> None:
        dh_BF = at.dh_N.new_zeros(at.code.n_tokens, at.code.n_features)
        dh_BF[at.code.rows(), at.code.features.long()] = at.dh_N
        model.W_enc.grad = torch.einsum("bf,bkd->fkd", dh_BF, at.x_BKD)
        model.W_dec.grad = torch.einsum("bkf,bkd->fkd", at.code.to_dense(), at.g_BKD)
        optimizer.step()

    return work


def threshold(ops: ModuleType, at: Inputs) -> Work:
    """The exact mode, with the product that gives df on every pair."""
    model = at.situation.model
    if backend_of(ops) == "native":
        _, parts = native_parts(at)
        return lambda: ops.threshold_gradient(
            at.x_BKD,
            parts.residual_BKD,
            parts.code,
            parts.order,
            model.W_enc,
            model.b_enc,
            model.W_dec,
            tokens=None,
            dtype=torch.float32,
            weight_F=torch.ones_like(at.theta_F),
            norms_FK=at.norms_FK,
            theta_F=at.theta_F,
            penalty=Penalty.of(model.config),
            gate=model.weights().gate,
            window=4.0,
        )
    gradient = ops.threshold_gradient

    def work() -> object:
        df_BKF = torch.einsum("bkd,fkd->bkf", at.g_BKD, model.W_dec)
        return gradient(at.h_BF, at.norms_FK, at.theta_F, df_BKF, model.config.threshold_window)

    return work


OPERATIONS: dict[str, Callable[[ModuleType, Inputs], Work]] = {
    work.__name__: work for work in (encode, decode, transpose, update, threshold)
}


def modelled(operation: str, shape: Shape, n_pairs: int, n_touched: int) -> dict[str, float]:
    """FLOPs, bytes and seconds on an H100."""
    row = shape.n_snapshots * shape.d_model
    weights, batch, gathered = 2 * row * shape.n_features, 2 * shape.batch * row, 2 * n_pairs * row
    product, pairs = 2 * shape.batch * row * shape.n_features, 16 * n_pairs
    flop, nbytes = {
        "encode": (product, weights + batch + pairs),
        "decode": (gathered, gathered + 2 * batch + pairs),
        "transpose": (0, 2 * pairs),
        # Each pair adds a row of x to dW_enc and one of g to dW_dec; weights and both moments are read and written.
        "update": (2 * gathered, 2 * gathered + 2 * 12 * 2 * row * n_touched),
        "threshold": (product, weights + batch + 2 * shape.batch * shape.n_features),
    }[operation]
    rate = PRODUCT_RATE if operation in ("encode", "threshold") else VECTOR_RATE
    return {"flop": flop, "bytes": nbytes, "h100_seconds": max(flop / rate, nbytes / BANDWIDTH)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
@torch.no_grad()
def test_operation(
    benchmark: Any, case: Shape, operation: str, backend: str, device: str, rounds: int, recorder: Recorder
) -> None:
    if backend == "triton" and not device.startswith("cuda"):
        pytest.skip("interpreted kernels say nothing about speed")
    name = f"crosscoder.kernels.{operation}.{backend}"
    situation = make(case, device=device)
    try:
        work = OPERATIONS[operation](importlib.import_module(name), Inputs.of(situation))
        work()
    except (ImportError, AttributeError, TypeError) as error:
        pytest.skip(f"{name} has no operation that is called as its reference is: {error}")
    subject = f"{operation}, {backend}"
    timings = compare(benchmark, subject, {**gemms(case, device), subject: work}, rounds, device=device)
    facts = situation.facts()
    pairs = round(facts["pairs_a_token"] * case.batch)
    model = modelled(operation, case, pairs, int(facts["touched_features"]))
    entry = recorder.add(f"{case} {subject}", timings, shape=case.to_dict(), model=model, **facts)
    benchmark.extra_info["gemms"] = round(entry["contenders"][subject]["gemms"], 3)
