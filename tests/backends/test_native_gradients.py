"""The C++ path against float64: the loss and every gradient by name, never twice as wrong as dense torch in float32."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from support.crosscoders import GATES, NAMES, RANKED, SHAPES, double, make, relative_error
from support.steps import gradients, no_worse_than_dense

from crosscoder import _core

CASES = [
    case
    for case in itertools.product(GATES, ("tanh-quad", "tanh", "l1"), ("exact", "narrow", "sampled"), (0.0, 0.05))
    if case[0] not in RANKED or case[2:] == ("exact", 0.0)
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gate", "penalty", "mode", "lambda_p"), CASES)
def test_loss_and_gradients(
    shape: tuple[int, int, int, int],
    gate: str,
    penalty: str,
    mode: str,
    lambda_p: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CROSSCODER_GEMM_DTYPE", "float32")  # bf16 products are for candidates, and for `sampled`
    window = 0.1 if mode == "narrow" else 2.0
    model, x = make(shape, gate=gate, penalty=penalty, threshold_mode=mode, threshold_window=window)
    no_worse_than_dense(model, x, preactivation_coefficient=lambda_p)


@pytest.mark.parametrize("gate", GATES)
def test_bf16_products_change_nothing(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a bit: they only name candidates."""
    options = {"threshold_mode": "narrow", "threshold_window": 0.1} if gate not in RANKED else {}
    found = []
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setenv("CROSSCODER_GEMM_DTYPE", dtype)
        model, x = make((70, 3, 40, 700), gate=gate, **options)
        found.append(gradients(model, x, backend="native"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("loss", *NAMES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_in_16_bits(dtype: torch.dtype) -> None:
    model, x = make((33, 3, 16, 101))
    x = x.to(dtype)
    wide = gradients(model, x.float(), backend="native")
    narrow = gradients(model, x, backend="native")
    assert all(torch.equal(wide[name], narrow[name]) for name in wide)


def test_weights_in_bf16() -> None:
    """Sums stay in float32; only the gradients are rounded to bf16 at the end."""
    model, x = make((33, 3, 16, 101), dtype=torch.bfloat16)
    expected = gradients(double(model), x.double(), backend="reference")
    native = gradients(model, x, backend="native")
    assert relative_error(native["loss"], expected["loss"]) < 1e-6
    for name in NAMES:
        assert relative_error(native[name], expected[name]) < 2**-8, name
    found = model.encode(x).to_dense()
    torch.testing.assert_close(found.double(), double(model).encode(x.double()).to_dense(), rtol=1e-4, atol=1e-5)


@example(shape=(1, 1, 1, 67), shift=-0.3, gate="topk", mode="exact", products="float32")
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(1, 64), st.integers(1, 40), st.integers(1, 1100)).filter(
        lambda s: s[0] * s[1] * s[2] * s[3] < 2_000_000 and s[1] * s[2] * s[3] < 300_000
    ),
    shift=st.sampled_from([-100.0, -1.0, -0.3, 0.0, 1.0, 100.0]),
    gate=st.sampled_from(GATES),
    mode=st.sampled_from(["exact", "narrow"]),
    products=st.sampled_from(["float32", "bfloat16"]),
)
def test_any_shape_and_density(
    shape: tuple[int, int, int, int], shift: float, gate: str, mode: str, products: str
) -> None:
    options = {} if gate in RANKED else {"threshold_mode": mode, "threshold_window": 0.1 if mode == "narrow" else 2.0}
    before = os.environ.get("CROSSCODER_GEMM_DTYPE")
    os.environ["CROSSCODER_GEMM_DTYPE"] = products
    try:
        model, x = make(shape, shift=shift, gate=gate, **options)
        no_worse_than_dense(model, x, floor=0.01, slack=3e-6)
    finally:
        os.environ.pop("CROSSCODER_GEMM_DTYPE")
        if before is not None:
            os.environ["CROSSCODER_GEMM_DTYPE"] = before


@pytest.mark.parametrize("level", _core.isa_levels())
def test_every_instruction_set(level: str) -> None:
    """The same tests, in a process that is held to it."""
    result = subprocess.run(
        [sys.executable, "-c", ISA_CHECK],
        env={
            **os.environ,
            "CROSSCODER_ISA": level,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "CROSSCODER_GEMM_DTYPE": "bfloat16",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == level


ISA_CHECK = """
import torch
from crosscoder import _core, Trainer, TrainConfig
from support.crosscoders import GATES, RANKED, make
from support.steps import largest_difference, no_worse_than_dense, trained
for gate in GATES:
    for shape in ((33, 3, 17, 101), (12, 20, 5, 60)):
        for penalty in ("tanh-quad", "l1"):
            options = {"threshold_mode": "narrow", "threshold_window": 0.1} if gate not in RANKED else {}
            model, x = make(shape, gate=gate, penalty=penalty, **options)
            no_worse_than_dense(model, x)
reference = trained("reference", torch.float64)
assert largest_difference(trained("native"), reference) < 1e-5
assert largest_difference(trained("native", candidates="int8"), reference) < 1e-5
assert largest_difference(trained("native", state="low-memory"), reference) < 0.05
print(_core.isa_level())
"""


def test_a_decoder_norm_of_exactly_zero() -> None:
    for gate, penalty in itertools.product(("snapshot", "shared"), ("tanh-quad", "l1")):
        model, x = make((20, 3, 5, 12), gate=gate, penalty=penalty, threshold_mode="narrow", threshold_window=0.1)
        with torch.no_grad():
            model.W_dec[2, 1] = 0
            model.W_dec[4] = 0
        found = gradients(model, x, backend="native")
        assert all(bool(torch.isfinite(found[name]).all()) for name in found)
        no_worse_than_dense(model, x)


def test_a_change_between_loss_and_backward_is_an_error() -> None:
    model, x = make((9, 3, 5, 12))
    loss = model.loss(x, backend="native").total
    with torch.no_grad():
        model.W_dec += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
