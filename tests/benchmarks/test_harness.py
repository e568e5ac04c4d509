"""What the benchmarks stand on: situations as described, an opponent that computes the same, honest figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from support.steps import loss_and_gradients

from crosscoder import CrosscoderConfig, TrainConfig
from harness import memory
from harness.measure import GEMM_NAMES, Timing, compare, gemms
from harness.opponents import DenseCrosscoder, DenseTrainer
from harness.results import Recorder
from harness.situation import Shape, make
from harness.variants import DEFAULT, SPARSITY, choices, step_variants

TINY = Shape(n_snapshots=4, d_model=16, n_features=128, batch=96, l0=9.0)


class Bench:
    """As much of pytest-benchmark as `compare` uses."""

    def pedantic(self, work: object, setup: object, rounds: int, warmup_rounds: int, iterations: int) -> None:
        for _ in range(warmup_rounds + rounds):
            setup()  # type: ignore[operator]
            for _ in range(iterations):
                work()  # type: ignore[operator]


@pytest.mark.parametrize("l0", [0.5, 9.0, 64.0, 128.0])
def test_situation_has_the_l0_asked_for(l0: float) -> None:
    shape = TINY.but(l0=l0)
    situation = make(shape)
    active = [situation.model.encode(x).n_pairs / shape.batch for x in situation.batches]
    assert sum(active) / len(active) == pytest.approx(l0, rel=0.12)


def test_situation_is_realistic_and_repeatable() -> None:
    situation = make(TINY)
    norms = situation.model.decoder_norms().detach()
    assert float(norms.min()) > 0
    assert float(norms.std() / norms.mean()) > 0.2
    facts = situation.facts()
    assert facts["l0_a_snapshot"] < 0.9 * facts["pairs_a_token"]  # gates differ between snapshots
    code = situation.model.encode(situation.batches[0])
    count = torch.bincount(code.features, minlength=TINY.n_features)
    assert int(count.max()) > 3 * max(1, int(count.min()))
    for x in situation.batches:
        torch.testing.assert_close(torch.linalg.vector_norm(x, dim=2).mean(), torch.tensor(4.0), rtol=0.1, atol=0)
    again = make(TINY)
    assert torch.equal(again.batches[1], situation.batches[1])
    for name, parameter in situation.model.named_parameters():
        assert torch.equal(dict(again.model.named_parameters())[name], parameter), name


def test_dense_opponent_computes_the_same_loss_and_gradients() -> None:
    situation = make(TINY)
    model, x = situation.model.double(), situation.batches[0].double()
    ours = loss_and_gradients(model, x, sparsity_coefficient=SPARSITY)
    dense = DenseCrosscoder(model, SPARSITY)
    loss = dense(x)
    loss.backward()
    torch.testing.assert_close(loss.detach(), ours.loss.total, rtol=1e-12, atol=0)
    for name, gradient in ours.gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(getattr(dense, name).grad, gradient, rtol=0, atol=1e-11 * scale, msg=name)


def test_dense_opponent_trains() -> None:
    situation = make(TINY)
    trainer = DenseTrainer(DenseCrosscoder(situation.model, SPARSITY), lr=1e-2)
    losses = [float(trainer.step(situation.batches[0])) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    timings = compare(Bench(), "b", contenders, rounds=3)
    assert calls == ["a", "c", "b"] * 4
    assert {len(timing.seconds) for timing in timings.values()} == {3}


def test_recorder_replaces_a_case_and_counts_in_the_faster_product(tmp_path: Path) -> None:
    recorder = Recorder("question", tmp_path, quick=True, device="cpu")
    fp32, bf16 = GEMM_NAMES
    timings = {fp32: Timing((2.0, 4.0, 3.0)), bf16: Timing((6.0, 1.5, 5.0)), "step": Timing((9.0, 6.0, 12.0))}
    recorder.add("case", timings, l0=1.0)
    recorder.add("other")
    recorder.add("case", timings, l0=2.0)
    entries = json.loads(recorder.path.read_text())
    assert [entry["case"] for entry in entries] == ["case", "other"]
    case = entries[0]
    assert case["l0"] == 2.0
    step = case["contenders"]["step"]
    assert (step["median"], step["low"], step["gemms"], step["gemms_low"]) == (9.0, 6.0, 3.0, 4.0)
    assert {"device", "cpu", "threads", "torch", "commit", "load_average"} <= case["environment"].keys()
    assert recorder.path.name.startswith("question-") and recorder.path.name.endswith("-quick.json")


def test_products_have_the_shape_of_the_encoder() -> None:
    products = gemms(TINY)
    assert products.keys() == GEMM_NAMES.keys()
    for name, work in products.items():
        result = work()
        assert isinstance(result, torch.Tensor)
        assert (result.shape, result.dtype) == ((TINY.batch, TINY.n_features), GEMM_NAMES[name])
        assert float(result[0, 0]) == 0.25 * TINY.n_snapshots * TINY.d_model


def test_variants_come_from_the_configuration_classes() -> None:
    assert choices(TrainConfig, "state")[0] == "fp32"
    assert choices(TrainConfig, "lr") == choices(TrainConfig, "no_such_option") == ()
    variants = step_variants("cpu")
    assert variants[0] == DEFAULT
    names = [variant.name for variant in variants]
    default = CrosscoderConfig(1, 1, 1).threshold_mode
    others = {f"threshold {mode}" for mode in choices(CrosscoderConfig, "threshold_mode") if mode != default}
    assert {"backend reference"} | others <= set(names) and len(others) == 2
    assert len(names) == len(set(names))
    situation = make(TINY)
    for variant in variants:
        trainer = variant.trainer(situation.model)
        trainer.step(situation.batches[0])
        assert trainer.model is not situation.model
        for option, value in variant.model.items():
            assert getattr(trainer.model.config, option) == value
        for option, value in variant.train.items():
            assert getattr(trainer.config, option) == value


def test_counted_state_is_weights_and_moments_without_gradients() -> None:
    situation = make(TINY)
    trainer = DEFAULT.trainer(situation.model)
    before = memory.state_bytes(trainer)
    trainer.step(situation.batches[0])
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert before == pytest.approx(12 * parameters, rel=0.01)
    assert memory.state_bytes(trainer) == pytest.approx(12 * parameters, rel=0.01)
    dense = DenseTrainer(DenseCrosscoder(situation.model, SPARSITY), lr=1e-4)
    dense.step(situation.batches[0])
    assert dense.model.W_enc.grad is not None
    assert memory.state_bytes(dense) == pytest.approx(12 * parameters, rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_peak_memory_sees_what_the_dense_step_takes() -> None:
    shape = Shape(n_snapshots=4, d_model=32, n_features=2_048, batch=512, l0=10.0)
    dense_tensor = 4 * shape.batch * shape.n_snapshots * shape.n_features
    dense = memory.measure(shape, memory.DENSE, threads=1)
    assert dense["state"] == pytest.approx(12 * dense["parameters"], rel=0.01)
    assert 3 * dense_tensor < dense["beyond"] < 16 * dense_tensor
    # At so small a size what the allocator keeps is several bytes a parameter; the peak is some 400.
    assert 12 < dense["at_rest_a_parameter"] < 0.2 * dense["peak"] / dense["parameters"]
