"""What callers give: every form of the same numbers gives the same values, and what is wrong is one clear error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.crosscoders import GATES, make
from support.triton_device import DEVICE, ON_GPU
from torch import Tensor

from crosscoder import Crosscoder, CrosscoderConfig, SparseCode, definition
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.penalty import LossSettings

SHAPE = (6, 3, 5, 7)
BACKENDS = ["reference", "native", "triton"]
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def crosscoder(backend: str = "native", **options: Any) -> tuple[Crosscoder, Tensor]:
    """A crosscoder and a batch where the backend computes."""
    return make(SHAPE, device="cpu" if backend == "native" else DEVICE, **options)


def calls(model: Crosscoder, backend: str) -> dict[str, Callable[[Any], Tensor]]:
    """Every public call on activations, as one tensor."""
    return {
        "encode": lambda x: model.encode(x, backend=backend).to_dense(),
        "forward": lambda x: model(x).detach(),
        "loss": lambda x: model.loss(x, backend=backend).total.detach(),
        "preactivations": lambda x: model.preactivations(x).detach(),
    }


# ------------------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_is_not_finite_is_named_by_every_call(backend: str, gate: str, value: float) -> None:
    model, x = crosscoder(backend, gate=gate)
    x[2, 1, 3] = x[2, 2, 0] = x[4, 0, 0] = value
    for name, call in calls(model, backend).items():
        if ON_GPU and backend != "native" and name != "encode":
            continue  # nothing waits for the device there: the next test
        with pytest.raises(NonFiniteError, match=r"token 2 at snapshot 1 \(both from 0\), and in 2 of 6 tokens"):
            call(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_nothing_looks_the_loss_and_the_reconstruction_are_not_finite(backend: str, value: float) -> None:
    """As on a GPU: below the check, in the backends themselves."""
    model, x = crosscoder(backend)
    good = model(x).detach()
    x[2, 1, 3] = value
    loss = model.backend(backend).loss(model.weights(), x, LossSettings(0.3)).total
    assert not torch.isfinite(loss)
    found = definition.reconstruction(model.weights(), x).detach()
    assert torch.isnan(found[2]).all(), "at every snapshot: they share one h"
    others = torch.arange(len(x)) != 2
    torch.testing.assert_close(found[others], good[others])


def test_large_numbers_are_finite() -> None:
    model, x = crosscoder()
    x[0] = 3e38  # their sum is not
    assert model.encode(x).n_tokens == len(x)
    with pytest.raises(NonFiniteError, match="token 1 at snapshot 0"):
        model.encode(torch.full(SHAPE[:3], 1e300, dtype=torch.float64).where(torch.arange(6)[:, None, None] == 1, 0.0))


# ------------------------------------------------------------------------------------------- forms of the same numbers


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda x: x.cpu().numpy(),
    "numpy, read-only": lambda x: read_only(x.cpu().numpy()),
    "numpy, backwards in memory": lambda x: x.cpu().numpy()[::-1].copy()[::-1],
    "numpy, big-endian": lambda x: x.cpu().numpy().astype(">f4"),
    "numpy, float64": lambda x: x.cpu().numpy().astype(np.float64),
    "on the CPU": lambda x: x.cpu(),
    "asks for a gradient": lambda x: x.clone().requires_grad_(),
    "not contiguous": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "every second of more": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "float64": lambda x: x.double(),
    "a negated view": lambda x: torch.complex(x, -x).conj().imag,
    "made under inference_mode": torch.inference_mode()(lambda x: x + 0),
    "a parameter": lambda x: torch.nn.Parameter(x.clone()),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_of_the_same_numbers_gives_the_same_values(backend: str, form: str) -> None:
    model, x = crosscoder(backend)
    given = FORMS[form](x)
    for name, call in calls(model, backend).items():
        if name == "loss" and getattr(given, "requires_grad", False) and backend != "reference":
            with pytest.raises(ConfigError, match="no gradient in the activations"):
                call(given)
            continue
        torch.testing.assert_close(call(given), call(x), rtol=1e-6, atol=1e-6, msg=name)


def test_the_definitions_loss_has_a_gradient_in_the_activations() -> None:
    model, x = crosscoder("reference")
    model(x.requires_grad_()).sum().backward()
    assert x.grad is not None and bool((x.grad != 0).any())
    x.grad = None
    model.loss(x, backend="reference").total.backward()
    assert x.grad is not None and bool((x.grad != 0).any())


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a list": (lambda x: x.tolist(), "must be a torch tensor or a numpy array, not list"),
    "sparse": (lambda x: x.to_sparse(), "must be a dense tensor, not torch.sparse_coo"),
    "no memory": (lambda x: x.to("meta"), '"meta" have no values'),
    "whole numbers": (lambda x: x.long(), "must be floating point, not torch.int64"),
    "complex": (lambda x: x.to(torch.complex64), "must be floating point, not torch.complex64"),
    "numpy, whole": (lambda x: x.numpy().astype(np.int32), "must be floating point, not torch.int32"),
    "numpy, objects": (lambda x: x.numpy().astype(object), "must be numbers that torch knows, not object"),
    "numpy, masked": (lambda x: np.ma.masked_less(x.numpy(), 0), "must not be masked"),
    "two axes": (lambda x: x.flatten(1), "expected activations of shape"),
    "one token": (lambda x: x[0], "expected activations of shape"),
    "other width": (lambda x: x[:, :, :-1], "expected activations of shape"),
    "other snapshots": (lambda x: x[:, :1], "expected activations of shape"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_batch_is_one_clear_error(wrong: str) -> None:
    model, x = crosscoder()
    change, message = WRONG[wrong]
    for call in calls(model, "native").values():
        with pytest.raises(DataError, match=message):
            call(change(x))


def test_no_tokens_are_no_error() -> None:
    model, x = crosscoder()
    for backend in ("reference", "native"):
        assert model.encode(x[:0], backend=backend).n_tokens == 0
        assert model(x[:0]).shape == (0, 3, 5)
        assert float(model.loss(x[:0], backend=backend).reconstruction) == 0


# ------------------------------------------------------------------------------------------- without gradients


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_the_values_are_the_same(
    backend: str, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    model, x = make((2, 2, 3, 4), device="cpu" if backend == "native" else DEVICE, shift=1.0)
    expected = {name: call(x) for name, call in calls(model, backend).items()}
    expected["decode"] = model.decode(model.encode(x, backend=backend), backend=backend)
    other = Crosscoder(model.config).to(x.device)
    other.load_state_dict(model.state_dict())
    with mode():
        made_there = Crosscoder(model.config).to(x.device)
        made_there.load_state_dict(model.state_dict())
        for one in (other, made_there):
            found = {name: call(x) for name, call in calls(one, backend).items()}
            code = one.encode(x, backend=backend)
            found["decode"] = one.decode(code, backend=backend)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    twice = Crosscoder(model.config).to(x.device)
    twice.load_state_dict({**model.state_dict(), "W_dec": 2 * model.W_dec.detach()})
    for one in (other, made_there):  # what was kept for the next call serves there, and can be trained
        with torch.no_grad():
            one.W_dec.mul_(2)
        assert torch.equal(one.decode(code, backend=backend), twice.decode(code, backend=backend))
        assert not torch.equal(one.decode(code, backend=backend), expected["decode"])
        one.loss(x, backend=backend).total.backward()
        assert one.W_enc.grad is not None and bool((one.W_enc.grad != 0).any())


@pytest.mark.parametrize("candidates", ["exact", "int8"])
def test_a_crosscoder_loaded_and_converted_under_inference_mode(tmp_path: Path, candidates: str) -> None:
    model, x = crosscoder()
    model.save_pretrained(tmp_path)
    expected = model.encode(x, candidates=candidates).to_dense()
    with torch.inference_mode():
        loaded = Crosscoder.from_pretrained(tmp_path)
        converted = Crosscoder.from_pretrained(tmp_path).double().float()
        for one in (loaded, converted):
            assert torch.equal(one.encode(x, candidates=candidates).to_dense(), expected)
            one.W_dec.data.mul_(2)
            one.weights_changed()
    double = model.decoder_norms() * 2
    for one in (loaded, converted):
        assert torch.equal(one.encode(x, candidates=candidates).to_dense(), one.encode(x).to_dense())
        torch.testing.assert_close(one.decoder_norms(), double)
    loaded.loss(x).total.backward()
    with pytest.raises(ConfigError, match=r"made under torch\.inference_mode and cannot be trained"):
        converted.loss(x)


# ------------------------------------------------------------------------------------------- codes


def with_parts(code: SparseCode, **parts: Any) -> SparseCode:
    names = ("row_offsets", "features", "values", "gates", "n_snapshots", "n_features")
    return SparseCode(**{name: parts.get(name, getattr(code, name)) for name in names})


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_of_other_types_decode_the_same(backend: str) -> None:
    model, x = crosscoder(backend)
    code = model.encode(x, backend=backend)
    expected = model.decode(code, backend=backend)
    arrays = {name: getattr(code, name).cpu().numpy() for name in ("row_offsets", "features", "values", "gates")}
    for given in (
        with_parts(code, **arrays),
        with_parts(code, features=code.features.long(), row_offsets=code.row_offsets.int()),
        with_parts(code, values=code.values.double()),
        with_parts(code, values=code.values.repeat_interleave(2)[::2], gates=code.gates.repeat_interleave(3)[::3]),
        with_parts(code, values=code.values.clone().requires_grad_()),
    ):
        assert torch.equal(model.decode(given, backend=backend), expected)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_what_is_no_code_is_one_clear_error(backend: str) -> None:
    model, x = crosscoder()
    code = model.encode(x)
    n, last = code.n_pairs, len(code.row_offsets) - 1
    assert n > 3
    bad = {
        "row_offsets": [code.row_offsets + 1, code.row_offsets[:0], code.row_offsets.flip(0), code.row_offsets[:last]],
        "features": [code.features + 7, -1 - code.features, code.features[1:], code.features.float()],
        "values": [code.values[1:], code.values[:, None], code.values.to(torch.complex64), code.values.tolist()],
        "gates": [code.gates[1:], code.gates.double()],
    }
    for name, wrong in bad.items():
        for part in wrong:
            with pytest.raises(DataError, match="sparse code"):
                model.decode(with_parts(code, **{name: part}), backend=backend)
    for nothing in (x, code.to_dense().numpy(), None):
        with pytest.raises(DataError, match="decode takes a SparseCode"):
            model.decode(nothing, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="does not fit"):
        model.decode(Crosscoder(CrosscoderConfig(3, 5, 8)).encode(x), backend=backend)


# ------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_weights_that_kernels_would_misread_are_refused(backend: str, name: str) -> None:
    model, x = crosscoder(backend)
    expected = model.encode(x, backend="reference").to_dense()
    matrix = getattr(model, name)
    matrix.data = matrix.data.transpose(0, 2).contiguous().transpose(0, 2)
    for call in (model.encode, model.loss):
        if backend != "reference":
            with pytest.raises(ConfigError, match=f"{name} is not contiguous in memory"):
                call(x, backend=backend)
    torch.testing.assert_close(model.encode(x, backend="reference").to_dense(), expected)
    matrix.data = matrix.data.contiguous().bfloat16()
    if backend != "reference":
        with pytest.raises(ConfigError, match="bring the whole crosscoder to one"):
            model.encode(x, backend=backend)
