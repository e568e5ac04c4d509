"""The fused step on a CPU: update, its modes, its paths by density, its bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.crosscoders import GATES, RANKED, make
from support.steps import SHAPE, batches, largest_difference, same_bits, trained

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.backends import native
from crosscoder.backends.adam_state import MATRICES, dequantize_m, dequantize_v, quantize_m, quantize_v
from crosscoder.errors import ConfigError
from crosscoder.train.engines import engine as engine_module

CASES: list[dict[str, Any]] = [
    *({"gate": gate} for gate in GATES),
    {"threshold_mode": "narrow", "threshold_window": 0.1},
    {"threshold_mode": "sampled"},
    {"preactivation_coefficient": 0.05},
    {"clip_norm": 0.05},
    {"decoder_norm_limit": 0.2, "gate": "topk"},
    {"penalty": "l1"},
]


@pytest.mark.parametrize("mode", ["exact", "lazy"])
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_both_ways_are_the_reference_in_float64(
    path: str, options: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSCODER_GEMM_DTYPE", "float32")
    monkeypatch.setattr(native, "DENSE_ABOVE", 2.0 if path == "sparse" else -1.0)
    reference = trained("reference", torch.float64, optimizer_mode=mode, **options)
    assert largest_difference(trained("native", optimizer_mode=mode, **options), reference) < 1e-5
    start = Crosscoder(reference.model.config, seed=1)
    moved = (reference.model.W_dec.float() - start.W_dec).abs().max()
    assert float(moved) > 1e-2, "nothing was trained: this compares nothing"


def test_the_path_follows_the_density_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    dense_pass = engine_module.DensePass
    for shift in (-100.0, 100.0):
        model, x = make((40, 2, 16, 300), shift=shift)
        trainer = Trainer(model, TrainConfig(n_steps=10, batch_size=40))
        monkeypatch.setattr(engine_module, "DensePass", lambda *a: taken.append(True) or dense_pass(*a))
        n_before = len(taken)
        density = model.encode(x).n_pairs / (40 * 300)
        trainer.step(x)
        assert (len(taken) > n_before) == (density > native.DENSE_ABOVE)
    assert len(taken) == 1


def test_lazy_moments_decay_over_the_steps_that_were_skipped() -> None:
    """A feature silent for n steps and back has the moments of an exact Adam that saw zeros, though not its weights."""
    lazy = trained("native", steps=0, gate="topk", optimizer_mode="lazy")
    exact = trained("native", steps=0, gate="topk", optimizer_mode="exact")
    first, other = batches(SHAPE, 2)
    for trainer in (lazy, exact):
        trainer.step(first)
    fired = lazy.state.last_step_F > 0
    assert fired.any() and not fired.all()
    with torch.no_grad():  # both go on from the same weights, with the fired features silenced
        for name, value in lazy.model.named_parameters():
            dict(exact.model.named_parameters())[name].copy_(value)
        bias = lazy.model.b_enc[fired].clone()
        for trainer in (lazy, exact):
            trainer.model.b_enc[fired] = -1e4
    for trainer in (lazy, exact):
        for _ in range(5):
            trainer.step(other)
    assert bool((lazy.state.last_step_F[fired] == 1).all())
    elapsed = 5
    for name in MATRICES:
        m, v = lazy.state[name]["m"][fired], lazy.state[name]["v"][fired]
        torch.testing.assert_close(m * 0.9**elapsed, exact.state[name]["m"][fired], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(v * 0.999**elapsed, exact.state[name]["v"][fired], rtol=1e-4, atol=1e-12)
    assert bias.shape == lazy.model.b_enc[fired].shape


def test_clipping_is_torchs() -> None:
    model, x = make(SHAPE)
    config = TrainConfig(
        n_steps=100, batch_size=64, clip_norm=0.01, optimizer_mode="exact", sparsity_coefficient=0.1, whitening="none"
    )
    twin = Crosscoder(model.config)
    twin.load_state_dict(model.state_dict())
    metrics = Trainer(model, config).step(x)
    twin.loss(x, sparsity_coefficient=0.0, backend="reference").total.backward()  # lambda is still 0 at the first step
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    torch.testing.assert_close(torch.as_tensor(metrics["gradient_norm"]).float(), norm, rtol=1e-5, atol=0)


def test_the_norm_limit_holds_and_keeps_a_features_profile() -> None:
    limited = trained("native", decoder_norm_limit=0.3, steps=8)
    norms = limited.model.decoder_norms()
    assert float(norms.amax()) <= 0.3 * (1 + 1e-5)
    assert float((norms.amax(dim=1) > 0.29).float().mean()) > 0.1, "the limit never mattered"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold_mode": "narrow", "threshold_window": 0.1},
        {"gate": "batchtopk"},
        {"candidates": "int8", "gate": "topk"},
        {"state": "low-memory"},
        {"preactivation_coefficient": 0.05},
    ],
    ids=str,
)
def test_same_bits_whatever_the_number_of_threads(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "DENSE_ABOVE", 2.0)  # torch's own float32 products depend on the threads
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(trained("native", shape=(150, 3, 30, 600), steps=6, **options))
    finally:
        torch.set_num_threads(before)
    assert same_bits(found[0], found[1]) and same_bits(found[1], found[2])


@pytest.mark.parametrize("shift", [-1e3, 1e3])
@pytest.mark.parametrize("gate", GATES)
def test_no_pair_or_all_pairs(gate: str, shift: float) -> None:
    model, x = make((8, 3, 5, 12), gate=gate, shift=shift)
    trainer = Trainer(model, TrainConfig(n_steps=10, batch_size=8))
    metrics = trainer.step(x)
    expected = 0.0 if shift < 0 else 12.0 if gate not in RANKED else 6.0
    assert float(torch.as_tensor(metrics["l0_union"])) == expected
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("gate", GATES)
def test_an_empty_batch(gate: str) -> None:
    model, x = make((8, 3, 5, 12), gate=gate)
    for backend in ("native", "reference"):
        assert float(model.loss(x[:0], backend=backend).total) == 0
        assert model.encode(x[:0], backend=backend).n_pairs == 0
        assert model.decode(model.encode(x[:0]), backend=backend).shape == (0, 3, 5)


class TestLowMemory:
    def test_bytes_a_parameter(self) -> None:
        trainer = trained("native", state="low-memory", shape=(16, 2, 300, 400), steps=1)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        held = sum(t.numel() * t.element_size() for t in trainer.model.parameters())
        held += sum(t.numel() * t.element_size() for _, t in trainer.engine.tensors())
        assert trainer.model.W_enc.dtype == trainer.model.W_dec.dtype == torch.bfloat16
        assert held / parameters < 4.2

    @pytest.mark.parametrize("width", [1, 20, 256, 300, 513])
    def test_quantisation_keeps_size_and_sign(self, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(50, 2, width, generator=generator) * torch.logspace(-6, 0, 50)[:, None, None]
        m = dequantize_m(*quantize_m(values))
        v = dequantize_v(*quantize_v(values.square()))
        scale = values.abs().amax(dim=2, keepdim=True)  # blocks are at most as large
        assert float(((m - values).abs() / scale).max()) < 1.1 / 127
        assert float(((v.sqrt() - values.abs()).abs() / scale).max()) < 1.1 / 255
        assert bool((v > 0).all()), "a second moment that is not 0 must not become 0"
        zeros = torch.zeros(3, 2, width)
        assert not dequantize_m(*quantize_m(zeros)).any() and not dequantize_v(*quantize_v(zeros)).any()

    @pytest.mark.parametrize("shape", [SHAPE, (40, 2, 300, 70)])
    def test_it_stays_close_to_float32_without_a_bias(self, shape: tuple[int, int, int, int]) -> None:
        full = trained("reference", torch.float64, steps=40, shape=shape)
        for backend in ("native", "reference"):
            low = trained(backend, steps=40, shape=shape, state="low-memory")
            for name in MATRICES:
                moved = getattr(full.model, name) - getattr(Crosscoder(full.model.config, seed=1), name)
                difference = getattr(low.model, name).double() - getattr(full.model, name)
                assert float(difference.abs().mean()) < 0.4 * float(moved.abs().mean()), (backend, name)
                assert abs(float(difference.mean())) < 0.01 * float(moved.abs().mean()), (backend, name)

    def test_it_resumes_bit_for_bit(self, tmp_path: Any) -> None:
        whole = trained("native", state="low-memory", candidates="int8", steps=9)
        first = trained("native", state="low-memory", candidates="int8", steps=4)
        first.save(tmp_path / "c")
        second = trained("native", state="low-memory", candidates="int8", steps=0)
        second.resume(tmp_path / "c")
        for x in batches(SHAPE, 9)[4:]:
            second.step(x)
        assert same_bits(whole, second)


def test_backends_that_do_not_fit_are_refused() -> None:
    model = Crosscoder(CrosscoderConfig(2, 4, 8)).double()
    with pytest.raises(ConfigError, match="needs float32 or bfloat16 weights on a CPU"):
        Trainer(model, TrainConfig(backend="native"))
    with pytest.raises(ConfigError, match="backend must be one of"):
        model.encode(torch.zeros(1, 2, 4), backend="cuda")
    assert Trainer(model, TrainConfig()).engine.name == "reference"
    assert Trainer(model.float(), TrainConfig()).engine.name == "native"
