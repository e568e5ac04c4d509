"""Whole steps on a CPU against the reference in float64: the paths by density, the bits, the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.crosscoders import GATES, RANKED, make
from support.steps import SHAPE, batches, largest_difference, same_bits, trained

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.backends import native
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


def test_backends_that_do_not_fit_are_refused() -> None:
    model = Crosscoder(CrosscoderConfig(2, 4, 8)).double()
    with pytest.raises(ConfigError, match="needs float32 or bfloat16 weights on a CPU"):
        Trainer(model, TrainConfig(backend="native"))
    with pytest.raises(ConfigError, match="backend must be one of"):
        model.encode(torch.zeros(1, 2, 4), backend="cuda")
    assert Trainer(model, TrainConfig()).engine.name == "reference"
    assert Trainer(model.float(), TrainConfig()).engine.name == "native"


def test_low_memory_resumes_bit_for_bit(tmp_path: Any) -> None:
    whole = trained("native", state="low-memory", candidates="int8", steps=9)
    first = trained("native", state="low-memory", candidates="int8", steps=4)
    first.save(tmp_path / "c")
    second = trained("native", state="low-memory", candidates="int8", steps=0)
    second.resume(tmp_path / "c")
    for x in batches(SHAPE, 9)[4:]:
        second.step(x)
    assert same_bits(whole, second)


@pytest.mark.parametrize("density", [-1.0, 0.3, 2.0], ids=["dense", "as it comes", "sparse"])
@pytest.mark.parametrize("candidates", ["exact", "int8"])
def test_a_write_before_the_first_step_is_noticed_whichever_way_it_goes(candidates: str, density: float) -> None:
    """The dense way refreshes only what is derived from rows that it changes: here most features never fire."""
    trainer = trained("native", steps=0, candidates=candidates)
    trainer.engine.dense_above = density
    model = trainer.model
    with torch.no_grad():
        for matrix in (model.W_enc, model.W_dec):
            matrix.mul_(1 + torch.rand(len(matrix), 1, 1, generator=torch.Generator().manual_seed(4)))
        model.b_enc[10:] = -100
    (x,) = batches(SHAPE, 1)
    trainer.step(x)
    with torch.no_grad():
        model.b_enc.zero_()
    code, expected = model.encode(x, backend="native", candidates=candidates), model.encode(x, backend="reference")
    assert abs(code.n_pairs - expected.n_pairs) <= 2
    torch.testing.assert_close(code.to_dense(), expected.to_dense(), rtol=1e-4, atol=2e-3)
    rows = model.backend("native").rows(model.weights(), "int8" if candidates == "int8" else None)  # type: ignore[attr-defined]
    torch.testing.assert_close(rows.norms_FK, model.decoder_norms().detach(), rtol=1e-6, atol=0)
