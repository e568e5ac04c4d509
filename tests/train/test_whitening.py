"""The encoder's coordinates in training: they change what is learned first, never what is computed."""

from __future__ import annotations

import math

import pytest
import torch
from support import triton_device
from support.crosscoders import double, relative_error
from support.steps import loss_and_gradients

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.penalty import LossSettings
from crosscoder.precision import full_precision
from crosscoder.train.whitening import matched_encoder, whiten, whitening_mix

B, K, D, F = 200, 5, 12, 30


def drifting(n_tokens: int = B, seed: int = 0) -> torch.Tensor:
    """Snapshots that differ little from their neighbours, as in training."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, 1, D, generator=g) + 0.2 * torch.randn(n_tokens, K, D, generator=g).cumsum(1)
    return x + 3 * torch.randn(K, D, generator=torch.Generator().manual_seed(9))


def model_of(seed: int = 0, gate: str = "snapshot") -> Crosscoder:
    model = Crosscoder(CrosscoderConfig(K, D, F, gate=gate), seed=seed)  # type: ignore[arg-type]
    with torch.no_grad():
        g = torch.Generator().manual_seed(seed)
        for parameter in (model.W_enc, model.W_dec):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
        model.b_enc.copy_(0.1 * torch.randn(F, generator=g))
    return model


def test_whitened_snapshots_are_uncorrelated_and_equally_strong() -> None:
    x = drifting(4000).double()
    mix = whitening_mix(x)
    assert torch.allclose(mix, mix.T)
    y = torch.einsum("kl,bld->bkd", mix, x - x.mean(dim=0)).transpose(0, 1).flatten(1)
    covariance = y @ y.T / y.shape[1]
    before = (x - x.mean(dim=0)).transpose(0, 1).flatten(1)
    before = before @ before.T / before.shape[1]
    off = covariance - torch.diag(covariance.diagonal())
    condition = torch.linalg.cond(covariance)
    assert condition < 3 < 30 < torch.linalg.cond(before)
    assert off.abs().max() < 0.3 * covariance.diagonal().mean()


@pytest.mark.parametrize(
    "x",
    [torch.ones(20, K, D), torch.full((20, K, D), math.nan), torch.zeros(0, K, D), torch.randn(1, K, D)],
    ids=["constant", "nan", "empty", "one token"],
)
def test_nothing_to_whiten_leaves_activations_alone(x: torch.Tensor) -> None:
    assert torch.equal(whitening_mix(x), torch.eye(K, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_mix_changes_coordinates_and_nothing_else(backend: str) -> None:
    x, model = drifting(), model_of()
    before = model.encode(x, backend=backend)
    weights = model.W_enc.detach().clone()
    whiten(model, x)
    assert model.is_mixed and not torch.allclose(weights, model.W_enc, atol=0.1)
    after = model.encode(x, backend=backend)
    assert torch.equal(before.features, after.features) and torch.equal(before.gates, after.gates)
    assert torch.allclose(before.values, after.values, atol=1e-4)
    model.set_snapshot_mix(torch.eye(K))
    assert not model.is_mixed and torch.allclose(weights, model.W_enc, atol=1e-5)


def test_saved_and_folded_crosscoders_read_activations_as_they_are(tmp_path) -> None:
    x, model = drifting(), model_of()
    whiten(model, x)
    expected = model.encode(x, backend="reference")
    model.save_pretrained(tmp_path / "saved")
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    for other, data in (
        (Crosscoder.from_pretrained(tmp_path / "saved"), x),
        (model.fold_scales(scale), x / scale[:, None]),
    ):
        assert not other.is_mixed
        found = other.encode(data, backend="reference")
        assert torch.equal(found.features, expected.features)
        assert torch.allclose(found.values, expected.values, atol=1e-4)


def test_a_state_dict_carries_the_mix() -> None:
    x, model = drifting(), model_of()
    whiten(model, x)
    other = Crosscoder(model.config)
    other.load_state_dict(model.state_dict())
    assert other.is_mixed and torch.equal(other.preactivations(x), model.preactivations(x))
    other.load_state_dict(model_of().unmixed_state())  # the format of finished crosscoders
    assert not other.is_mixed


def test_16_bit_weights_keep_the_mix_in_float32() -> None:
    x, model = drifting(), model_of()
    whiten(model, x)
    mix = model.snapshot_mix.clone()
    model.to(torch.bfloat16)
    assert model.snapshot_mix.dtype == torch.float32 and torch.equal(model.snapshot_mix, mix)


@pytest.mark.parametrize("gate", ["snapshot", "shared"])
def test_gradients_under_a_mix_are_autograds(gate: str) -> None:
    x, model = drifting().double(), model_of(gate=gate).double()
    whiten(model, x)
    options = {"sparsity_coefficient": 0.2, "preactivation_coefficient": 0.01}
    model.loss(x, **options, backend="reference").total.backward()
    result = loss_and_gradients(model, x, **options)
    for name, gradient in result.gradients.items():
        expected = getattr(model, name).grad
        assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12), name


def test_engines_agree_while_the_encoder_is_mixed() -> None:
    x = drifting()
    models = {}
    for backend in ("reference", "native"):
        trainer = Trainer(model_of(), TrainConfig(n_steps=6, batch_size=B, lr=1e-2, warmup_steps=1, backend=backend))
        for step in range(6):
            trainer.step(drifting(seed=step))
        assert trainer.model.is_mixed
        models[backend] = trainer.model
    for name, value in models["reference"].state_dict().items():
        assert torch.allclose(value, models["native"].state_dict()[name], atol=2e-3), name
    assert torch.allclose(models["reference"](x), models["native"](x), atol=2e-2)


def test_the_papers_way_leaves_the_encoder_alone() -> None:
    trainer = Trainer(model_of(), TrainConfig(n_steps=2, batch_size=B, whitening="none"))
    trainer.step(drifting())
    assert not trainer.model.is_mixed


def test_one_snapshot_is_not_mixed() -> None:
    trainer = Trainer(Crosscoder(CrosscoderConfig(1, D, F)), TrainConfig(n_steps=2, batch_size=B))
    trainer.step(drifting()[:, :1])
    assert not trainer.model.is_mixed


def test_a_resumed_run_goes_on_in_the_same_coordinates(tmp_path) -> None:
    config = TrainConfig(n_steps=6, batch_size=B, lr=1e-2, warmup_steps=1)
    whole, first = Trainer(model_of(), config), Trainer(model_of(), config)
    for step in range(3):
        whole.step(drifting(seed=step))
        first.step(drifting(seed=step))
    first.save(tmp_path / "checkpoint")
    second = Trainer(model_of(seed=1), config)
    second.resume(tmp_path / "checkpoint")
    for step in range(3, 6):
        whole.step(drifting(seed=step))
        second.step(drifting(seed=step))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_matched_encoder_finds_its_feature_among_correlated_snapshots() -> None:
    x, model = drifting(5000), model_of()
    direction = torch.zeros(1, K, D)
    direction[0, -1, 0] = 1.0  # there at the last snapshot only
    assert torch.equal(matched_encoder(model, direction), direction)
    whiten(model, x)
    rows = matched_encoder(model, direction)
    read = model.encoder_input(x - x.mean(dim=0)).flatten(1)
    signal = (model.encoder_input(direction).flatten(1) * rows.flatten(1)).sum()
    assert torch.allclose(signal, torch.tensor(1.0), atol=1e-5)  # as long as the decoder is along itself
    noise = (read @ rows.flatten()).std()
    tied = (x - x.mean(dim=0)).flatten(1) @ direction.flatten()
    assert noise < 0.5 * tied.std()


def near_copies(n_tokens: int = 96, n_snapshots: int = 32, seed: int = 0) -> torch.Tensor:
    """A bf16 batch whose snapshots differ by hundredths, as neighbouring checkpoints do."""
    g = torch.Generator().manual_seed(seed)
    steps = 0.03 * torch.randn(n_tokens, n_snapshots, 16, generator=g).cumsum(1)
    return (torch.randn(n_tokens, 1, 16, generator=g) + steps).bfloat16()


def worst_direction(actual: torch.Tensor, expected: torch.Tensor, mix: torch.Tensor) -> float:
    """The largest relative error of a whitened batch (B, K, D) along one of the mix's own directions."""
    _, directions = torch.linalg.eigh(mix.double())
    along = lambda y: torch.einsum("kl,bkd->lbd", directions, y.double()).flatten(1).norm(dim=1)  # noqa: E731
    return float((along(actual - expected) / along(expected)).max())


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_a_batch_in_16_bits_is_whitened_as_in_float64(backend: str) -> None:
    """What the encoder reads in a step and in `encode`: within 1e-5 in every direction, though some are amplified ten
    times and are differences of numbers that agree in two digits."""
    x = near_copies(12 if backend == "triton" else 96)  # the interpreter is slow
    model = Crosscoder(CrosscoderConfig(32, 16, 12), seed=0).to(triton_device.DEVICE if backend == "triton" else "cpu")
    x = x.to(model.W_enc.device)
    whiten(model, x)
    mix = model.snapshot_mix.double()
    assert torch.linalg.cond(mix) > 30
    exact = torch.einsum("kl,bld->bkd", mix, x.double())
    assert worst_direction(mix.bfloat16() @ x, exact, mix) > 0.01  # what it was in 16 bits
    assert model.encoder_input(x).dtype == torch.float32
    found = [model.encoder_input(x)]
    if backend != "reference":  # which reads just that
        weights = model.weights()
        given = x if backend == "triton" else weights.input(x)
        parts = model.backend(backend).sparse_pass(weights, given, LossSettings(0.3)).parts
        found.append(parts.read_BKD if backend == "triton" else parts.x_BKD)
    for read in found:
        assert worst_direction(read, exact, mix) < 1e-5
    code, expected = model.encode(x, backend=backend), double(model).encode(x.double(), backend="reference")
    assert torch.equal(code.features, expected.features) and torch.equal(code.gates, expected.gates)
    assert relative_error(code.values, expected.values) < 1e-5


@pytest.mark.parametrize("setting", ["high", "medium", "autocast"])
def test_whitening_does_not_depend_on_what_torch_is_told_of_precision(setting: str) -> None:
    x, model = near_copies().float(), Crosscoder(CrosscoderConfig(32, 16, 40), seed=0)
    expected = whitening_mix(x)
    whiten(model, x)
    read = model.encoder_input(x)
    before = torch.get_float32_matmul_precision()
    try:
        if setting != "autocast":
            torch.set_float32_matmul_precision(setting)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting == "autocast"):
            assert (x[0] @ x[1].T).dtype == (torch.bfloat16 if setting == "autocast" else torch.float32)
            assert torch.equal(whitening_mix(x), expected)
            assert torch.equal(model.encoder_input(x), read)
            assert (x[0] @ x[1].T).dtype == (torch.bfloat16 if setting == "autocast" else torch.float32)
        assert torch.get_float32_matmul_precision() == (before if setting == "autocast" else setting)
    finally:
        torch.set_float32_matmul_precision(before)


def test_precision_is_guarded_where_only_torchs_newer_setting_was_written() -> None:
    flags = torch.backends.cuda.matmul
    if not hasattr(flags, "fp32_precision"):
        pytest.skip("this torch has one setting")
    before = flags.fp32_precision
    try:
        flags.fp32_precision = "tf32"
        with full_precision(torch.device("cpu")):
            assert flags.fp32_precision == "ieee"
        assert flags.fp32_precision == "tf32"
    finally:
        flags.fp32_precision = before
