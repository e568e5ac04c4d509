"""Every backend through every public call: the numbers of float64, the same errors, and every write noticed."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from support.crosscoders import GATES, NAMES, RANKED, double, relative_error
from support.steps import LAMBDA_P, gradients
from support.triton_device import make

from crosscoder import Crosscoder, TrainConfig, Trainer, backends, registry
from crosscoder.backends.reference import ReferenceBackend
from crosscoder.errors import ConfigError
from crosscoder.train.initialization import initialize

BACKENDS = ("reference", "native", "triton")
SHAPE = (9, 3, 5, 6)
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_code_loss_and_every_gradient_are_those_of_float64(backend: str, gate: str) -> None:
    model, x = make(SHAPE, gate=gate)
    exact = double(model)
    code, expected = model.encode(x, backend=backend), exact.encode(x.double())
    assert torch.equal(code.features, expected.features) and torch.equal(code.gates, expected.gates)
    assert relative_error(model.decode(code, backend=backend), exact.decode(expected)) < 2e-6
    options = {"preactivation_coefficient": 0.0 if gate in RANKED else LAMBDA_P}
    found, wanted = gradients(model, x, backend=backend, **options), gradients(exact, x.double(), **options)
    for name in ("loss", *NAMES):
        assert relative_error(found[name], wanted[name]) < 5e-6, name


def test_triton_computes_the_loss_it_is_asked_for() -> None:
    model, x = make(SHAPE)
    assert "_Loss" in str(model.loss(x, backend="triton").total.grad_fn)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_write_is_noticed(backend: str) -> None:
    model, x = make(SHAPE)

    def check(change: str) -> None:
        code, expected = model.encode(x, backend=backend), double(model).encode(x.double())
        assert torch.equal(code.features, expected.features) and torch.equal(code.gates, expected.gates), change
        loss = model.loss(x, backend=backend).total
        assert relative_error(loss, double(model).loss(x.double()).total) < 2e-6, change

    check("none")
    with torch.no_grad():
        model.W_dec[:3] *= 4
        model.W_enc *= -2
    check("in place")
    model.load_state_dict(make(SHAPE, seed=5)[0].state_dict())
    check("state dict")
    model.loss(x, backend=backend).total.backward()
    torch.optim.Adam(model.parameters(), lr=0.2, fused=True).step()
    check("fused optimiser, gradients kept")
    model.zero_grad()
    check("gradients gone")
    model.W_enc.data = model.W_enc.data * -1
    check("assigned")
    model.W_dec.data.mul_(3)
    model.weights_changed()
    check("data in place, told")


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_start_searched_after_the_trainer_was_made_is_trained_from(backend: str) -> None:
    """With whitening "none" nothing else writes the weights before the first step."""
    losses = []
    for first in ("trainer", "start"):
        model, x = make(SHAPE)
        config = TrainConfig(n_steps=9, batch_size=9, backend=backend, whitening="none", revival="none")
        if first == "start":
            initialize(model, x, config)
        trainer = Trainer(model, config)
        trainer.engine.dense_above = 1.0
        if first == "trainer":
            initialize(model, x, config)
        losses.append([float(trainer.step(x)["loss"]) for _ in range(3)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("call", ["encode", "decode", "loss", "trainer"])
@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        ("nonsense", torch.float32, "backend must be one of auto, reference, native, triton"),
        ("native", torch.float64, 'backend "native" needs float32 or bfloat16 weights on a CPU'),
        ("triton", torch.float64, 'backend "triton" needs float32 or bfloat16 weights'),
        ("triton", torch.float32, 'backend "triton" needs weights on a CUDA device.*TRITON_INTERPRET=1'),
    ],
)
def test_the_same_error_in_every_call(
    call: str, backend: str, dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = make(SHAPE, device="cpu")
    code, model = model.encode(x, backend="reference"), model.to(dtype)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    calls = {
        "encode": lambda: model.encode(x, backend=backend),
        "decode": lambda: model.decode(code, backend=backend),
        "loss": lambda: model.loss(x, backend=backend),
        "trainer": lambda: Trainer(model, TrainConfig(backend=backend)),
    }
    with pytest.raises(ConfigError, match=message):
        calls[call]()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_candidates_that_a_backend_has_not_are_refused(backend: str) -> None:
    model, x = make(SHAPE)
    with pytest.raises(ConfigError, match=f'backend "{backend}" has no candidates "int8"'):
        model.encode(x, backend=backend, candidates="int8")
    with pytest.raises(ConfigError, match=f'backend "{backend}" has no candidates "int8"'):
        Trainer(model, TrainConfig(backend=backend, candidates="int8"))
    with pytest.raises(ConfigError, match="candidates must be one of exact, int8"):
        model.encode(x, backend=backend, candidates="nonsense")


class Mine(ReferenceBackend):
    """A third party's."""

    name = "mine"


@pytest.fixture
def registered() -> Iterator[str]:
    registry.register("mine", f"{__name__}:Mine")
    yield "mine"
    registry.unregister("mine")


def test_a_third_party_adds_a_backend(registered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, __name__, type("Module", (), {"Mine": Mine}))
    model, x = make(SHAPE)
    assert torch.equal(model.encode(x, backend="mine").values, model.encode(x, backend="reference").values)
    trainer = Trainer(model, TrainConfig(n_steps=2, backend="mine"))
    trainer.step(x)
    assert trainer.engine.name == "mine" and isinstance(model.backend("mine"), Mine)
    with pytest.raises(ConfigError, match="already"):
        registry.register("native", "somewhere:Else")
    assert isinstance(model, Crosscoder)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> str:
    """As where Triton is not installed, and one more automatic backend's module does not exist either."""
    monkeypatch.setitem(registry._entries, "triton", "no_such_module_at_all:Triton")
    monkeypatch.setitem(registry._entries, "gone", "no_such_module_at_all:Gone")
    monkeypatch.setattr(registry, "_automatic", ["gone", "native", "triton"])
    return "gone"


def test_auto_passes_over_what_cannot_be_loaded(not_installed: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = make(SHAPE, device="cpu")
    assert backends.choose("auto", model.weights()) == "native"
    assert Trainer(model, TrainConfig(n_steps=2)).engine.name == "native"
    assert torch.equal(model.encode(x).features, model.encode(x, backend="native").features)
    assert backends.choose("auto", model.double().weights()) == "reference"
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match='backend "gone" cannot be loaded.*no_such_module_at_all'):
        backends.choose(not_installed, model.weights())


def test_auto_loads_nothing_behind_the_first_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    load = registry.load
    monkeypatch.setattr(backends, "load", lambda name: asked.append(name) or load(name))
    assert backends.choose("auto", make(SHAPE, device="cpu")[0].weights()) == "native"
    assert set(asked) == {"native"}


def test_auto_says_why_cuda_weights_go_to_the_reference(not_installed: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No GPU is needed for a choice: the weights only say that they lie on one."""
    matrix = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, is_contiguous=lambda: True)
    on_gpu = SimpleNamespace(W_enc=matrix, W_dec=matrix)
    assert backends.choose("auto", on_gpu) == "reference"  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert 'backend "triton" cannot be loaded' in said and 'backend "gone" cannot be loaded' in said
    assert "going on in dense torch" in said and '"native"' not in said
