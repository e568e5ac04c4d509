"""The trainer: it learns, resumes bit for bit, revives dead features, and stops at what is not finite."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.backends import closed_form, native
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.kernels.threshold.reference import sample_tokens
from crosscoder.train.initialization import search_decoder_norm
from crosscoder.train.revival import revive
from crosscoder.train.schedules import lr_factor, sparsity_coefficient
from crosscoder.train.seeds import Purpose, _splitmix64, step_seed

K, D, F, B = 3, 16, 64, 128


def sparse_batch(seed: int, n: int = B) -> torch.Tensor:
    """Tokens that are sums of 3 of 32 directions, the same at all snapshots but the first."""
    generator = torch.Generator().manual_seed(1000)
    directions = torch.nn.functional.normalize(torch.randn(32, D, generator=generator), dim=1)
    generator.manual_seed(seed)
    codes = torch.rand(n, 32, generator=generator) * (torch.rand(n, 32, generator=generator) < 3 / 32)
    x = (codes @ directions)[:, None].repeat(1, K, 1)
    x[:, 0] = 0.1 * torch.randn(n, D, generator=generator)
    return x * D**0.5


def make(**options: Any) -> Trainer:
    settings = {"n_steps": 60, "batch_size": B, "lr": 3e-3, "sparsity_coefficient": 0.1, "revival_every": 20}
    gate = {
        name: options.pop(name) for name in ("gate", "top_k", "threshold_mode", "threshold_sample") if name in options
    }
    model = Crosscoder(CrosscoderConfig(K, D, F, **gate), seed=1)
    return Trainer(model, TrainConfig(**{**settings, **options}))


def train(trainer: Trainer, until: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    while trainer.step_number < until:
        metrics = trainer.step(sparse_batch(trainer.step_number))
    return metrics


def states_equal(a: Trainer, b: Trainer) -> bool:
    same = [torch.equal(value, b.model.state_dict()[name]) for name, value in a.model.state_dict().items()]
    same += [
        torch.equal(value, other) for (_, value), (_, other) in zip(a.engine.tensors(), b.engine.tensors(), strict=True)
    ]
    return all(same)


@pytest.mark.parametrize(
    "options",
    [{}, {"gate": "shared"}, {"gate": "topk", "top_k": 4}, {"gate": "batchtopk", "top_k": 4}],
    ids=["snapshot", "shared", "topk", "batchtopk"],
)
def test_it_learns(options: dict[str, Any]) -> None:
    trainer = make(n_steps=300, **options)
    search_decoder_norm(trainer.model, sparse_batch(0))
    first = trainer.step(sparse_batch(0))
    last = train(trainer, 300)
    assert float(last["explained_variance"][1:].mean()) > 0.6
    assert float(last["explained_variance"][1:].mean()) > float(first["explained_variance"][1:].mean())


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_step_is_torchs_adam_on_the_autograd_gradient(backend: str) -> None:
    trainer = make(revival="none", optimizer_mode="exact", backend=backend)
    train(trainer, 3)  # past the first step, where Adam's update is the gradient's sign
    other = make(revival="none", optimizer_mode="exact", backend=backend)
    train(other, 3)
    factor = lr_factor(trainer.config, 3)
    groups = [
        {"params": [p for name, p in other.model.named_parameters() if name != "log_threshold"]},
        {"params": [other.model.log_threshold], "lr": 3e-3 * factor * 0.1},
    ]
    adam = torch.optim.Adam(groups, lr=3e-3 * factor)
    for name, parameter in other.model.named_parameters():
        moments = other.state[name]
        adam.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": moments["m"], "exp_avg_sq": moments["v"]}
    other.model.zero_grad()
    loss = other.model.loss(
        sparse_batch(3), sparsity_coefficient=sparsity_coefficient(trainer.config, 3), backend="reference"
    )
    loss.total.backward()
    adam.step()
    trainer.step(sparse_batch(3))
    for name, value in other.model.named_parameters():
        torch.testing.assert_close(getattr(trainer.model, name), value, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"threshold_mode": "sampled"}, {"gate": "batchtopk", "top_k": 4}])
@pytest.mark.parametrize("stop", [1, 20, 33])
def test_resume_is_bit_exact(tmp_path: Path, stop: int, options: dict[str, Any]) -> None:
    whole = make(**options)
    train(whole, 60)
    first = make(**options)
    train(first, stop)
    first.save(tmp_path / "checkpoint", {"loader": {"epoch": 3}})
    second = make(**options)
    assert second.resume(tmp_path / "checkpoint") == {"loader": {"epoch": 3}}
    assert second.step_number == stop and states_equal(first, second)
    train(second, 60)
    assert states_equal(whole, second)
    assert not states_equal(first, second)


def test_a_state_goes_into_another_trainer_without_a_file() -> None:
    whole, first, second = make(), make(), make()
    train(whole, 60)
    train(first, 33)
    state = first.state_dict()
    assert state["numbers"]["step"] == 33
    second.load_state_dict(copy.deepcopy(state))
    train(first, 40)  # the state is the first trainer's own: a copy does not move with it
    train(second, 60)
    assert states_equal(whole, second)


@pytest.mark.parametrize("part", ["W_dec.m", "firing_average", "b_enc"])
def test_a_state_of_other_sizes_is_refused_and_changes_nothing(part: str) -> None:
    trainer, untouched = make(), make()
    state = copy.deepcopy(make().state_dict())
    for tensors in (state["model"], state["tensors"]):
        if part in tensors:
            tensors[part] = tensors[part][:-1]  # type: ignore[index]
    state["model"]["b_dec"] += 1
    with pytest.raises(ConfigError, match=re.escape(part)):
        trainer.load_state_dict(state)
    assert states_equal(trainer, untouched)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    trainer = make()
    train(trainer, 2)
    trainer.save(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"lr 0\.003 there, 0\.001 now"):
        make(lr=1e-3).resume(tmp_path / "c")
    with pytest.raises(ConfigError, match="gate 'snapshot' there, 'shared' now"):
        make(gate="shared").resume(tmp_path / "c")
    make(log_every=3, checkpoint_every=7).resume(tmp_path / "c")


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    trainer = make()
    train(trainer, 2)
    trainer.save(tmp_path / "c")
    for name in ("trainer.safetensors", "model.safetensors"):
        file = tmp_path / "c" / name
        good = file.read_bytes()
        for bad in (good[:-7], good[:-3] + bytes([good[-3] ^ 1]) + good[-2:], b""):
            file.write_bytes(bad)
            fresh, untouched = make(), make()
            with pytest.raises(DataError, match=name):
                fresh.resume(tmp_path / "c")
            assert states_equal(fresh, untouched) and fresh.step_number == 0
        file.write_bytes(good)
    with pytest.raises(DataError, match="does not exist"):
        make().resume(tmp_path / "nothing")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_input_names_step_snapshot_and_checkpoint(tmp_path: Path, value: float) -> None:
    trainer = make()
    train(trainer, 5)
    trainer.save(tmp_path / "good")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.snapshot_names = ["step0", "step1", "step512"]
    x = sparse_batch(5)
    x[7, 2, 3] = value
    with pytest.raises(NonFiniteError, match=r"step 5: .*step512; the weights are untouched .*/good"):
        trainer.step(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert trainer.step_number == 5
    trainer.step(sparse_batch(5))


def test_not_finite_loss_is_told_apart_from_the_input() -> None:
    trainer = make()
    with torch.no_grad():
        trainer.model.b_dec[1] = 1e30
    with pytest.raises(NonFiniteError, match=r"the loss is not finite \(snapshot 1\); no checkpoint yet"):
        trainer.step(sparse_batch(0))


def test_revival_restarts_what_is_dead_from_what_is_reconstructed_worst() -> None:
    trainer = make(whitening="none")
    train(trainer, 10)
    model = trainer.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rates = torch.full((F,), 0.5)
    rates[[3, 10]] = 0
    residual = torch.zeros(B, K, D)
    residual[17] = torch.randn(K, D, generator=torch.Generator().manual_seed(0))
    residual[99] = 1e-3 * residual[17].flip(0)
    count = revive(model, trainer.state, residual, rates, 1e-3, 10, torch.Generator().manual_seed(0))
    assert count == 2
    rows = model.W_dec[[3, 10]].detach().flatten(1)
    live = torch.linalg.vector_norm(before["W_dec"].flatten(1), dim=1)[rates > 0].median()
    torch.testing.assert_close(torch.linalg.vector_norm(rows, dim=1), live.expand(2))
    directions = torch.nn.functional.cosine_similarity(rows, -residual[[17, 99]].flatten(1))
    reversed_ = torch.nn.functional.cosine_similarity(rows, -residual[[99, 17]].flatten(1))
    assert max(directions.min(), reversed_.min()) > 0.9999
    assert torch.equal(model.W_enc[[3, 10]], model.W_dec[[3, 10]])
    assert (model.b_enc[[3, 10]] == 0).all()
    assert (model.log_threshold[[3, 10]] == before["log_threshold"][rates > 0].median()).all()
    state = trainer.state["W_dec"]
    assert (state["m"][[3, 10]] == 0).all() and (state["v"][3] > 0).any()
    others = rates > 0
    for name in ("W_dec", "W_enc", "b_enc", "log_threshold"):
        assert torch.equal(model.state_dict()[name][others], before[name][others])


def test_revival_happens_by_default_and_not_when_turned_off() -> None:
    for revival, expected in (("residual", True), ("none", False)):
        trainer = make(n_steps=60, revival=revival)
        with torch.no_grad():
            trainer.model.b_enc[:10] = -100
        train(trainer, 60)
        assert (trainer.n_revived > 0) == expected
        assert bool((trainer.model.b_enc[:10] > -50).all()) == expected


def test_dead_features_are_counted_in_tokens() -> None:
    trainer = make(revival="none", dead_after_tokens=10 * B)
    with torch.no_grad():
        trainer.model.b_enc[:10] = -100
    train(trainer, 9)
    assert int((trainer.silent_tokens_F >= 10 * B).sum()) == 0
    assert int(train(trainer, 12)["dead"]) >= 10


def test_schedules() -> None:
    config = TrainConfig(n_steps=1000, warmup_steps=50, cooldown_fraction=0.2, sparsity_coefficient=0.4)
    assert lr_factor(config, 0) == pytest.approx(1 / 51)
    assert lr_factor(config, 50) == lr_factor(config, 799) == 1
    assert lr_factor(config, 999) == pytest.approx(1 / 32)
    assert all(lr_factor(config, s) > lr_factor(config, s + 1) for s in range(800, 999))
    assert sparsity_coefficient(config, 0) == 0
    assert sparsity_coefficient(config, 50) == pytest.approx(0.2)
    assert sparsity_coefficient(config, 100) == sparsity_coefficient(config, 999) == 0.4
    short = TrainConfig(n_steps=20, warmup_steps=5000, cooldown_fraction=0, sparsity_warmup_fraction=0)
    assert lr_factor(short, 2) == 1 and sparsity_coefficient(short, 0) == short.sparsity_coefficient


def test_the_search_finds_the_best_norm_of_its_grid() -> None:
    model = Crosscoder(CrosscoderConfig(K, D, F))
    x = sparse_batch(0)
    norm = search_decoder_norm(model, x)
    torch.testing.assert_close(model.decoder_norms(), torch.full((F, K), norm))
    assert torch.equal(model.W_enc, model.W_dec)
    with torch.no_grad():
        best = float((model(x) - x).square().mean())
    for factor in (0.8, 1.25):
        other = Crosscoder(CrosscoderConfig(K, D, F))
        with torch.no_grad():
            other.W_dec.copy_(model.W_dec * factor)
            other.W_enc.copy_(other.W_dec)
        with torch.no_grad():
            assert float((other(x) - x).square().mean()) >= best


def test_training_ends() -> None:
    trainer = make(n_steps=2)
    train(trainer, 2)
    with pytest.raises(DataError, match="training is over"):
        trainer.step(sparse_batch(0))


def test_same_seed_same_bits() -> None:
    a, b = make(), make()
    train(a, 25)
    train(b, 25)
    assert states_equal(a, b)


def test_random_numbers_differ_between_steps_purposes_and_seeds() -> None:
    """Also at shifted steps: a sum of multiples gave seed s at step 1,000,003 the numbers of seed s + 1 at step 0."""
    steps = (*range(300), 1_000_002, 1_000_003, 1_000_004, 2_000_006, 2**31, 2**40)
    seeds = (0, 1, 2, 3, 2**31, 2**32, 2**32 + 1, 2**63 - 1)
    drawn = {step_seed(seed, step, purpose) for seed in seeds for step in steps for purpose in Purpose}
    assert len(drawn) == len(seeds) * len(steps) * len(Purpose)
    assert min(drawn) >= 0 and max(drawn) < 2**63
    low = {number % 2**31 for number in drawn}  # as many as Triton's kernels take
    assert len(low) >= len(drawn) - 2


def test_seeds_are_splitmix64s() -> None:
    """Its first numbers from state 1234567, from the reference implementation."""
    state, found = 1234567, []
    for _ in range(3):
        found.append(_splitmix64(state))
        state += 0x9E3779B97F4A7C15
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_trainer_draws_by_its_seed_and_step() -> None:
    drawn: set[int] = set()
    for seed in range(3):
        trainer = make(seed=seed)
        for trainer.step_number in range(50):
            drawn |= {trainer._seed(purpose) for purpose in Purpose}
    assert len(drawn) == 3 * 50 * len(Purpose)
    assert make(seed=2)._seed(Purpose.STEP) == make(seed=2)._seed(Purpose.STEP)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_every_step_samples_other_tokens(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []

    def draw(n: int, share: float, generator: torch.Generator) -> tuple[torch.Tensor, float]:
        tokens, factor = sample_tokens(n, share, generator)
        drawn.append(tokens.sort().values)
        return tokens, factor

    monkeypatch.setattr(closed_form if backend == "reference" else native, "sample_tokens", draw)
    trainer = make(threshold_mode="sampled", threshold_sample=0.125, backend=backend)
    trainer.engine.dense_above = -1.0 if backend == "reference" else 2.0
    train(trainer, 6)
    assert len(drawn) == 6
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_every_step_rounds_with_other_noise(backend: str) -> None:
    """The same low-memory step from the same state, done at two step numbers, differs by its rounding alone."""
    found = []
    for step in (700, 700, 701):
        trainer = make(state="low-memory", backend=backend, n_steps=1000, revival="none")
        trainer.state.last_step_F.fill_(step)  # one step ago: the moments decay alike
        trainer.step_number = step
        trainer.step(sparse_batch(0))
        found.append(trainer.state["W_enc"]["m"].clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert int((found[0].int() - found[2].int()).abs().max()) == 1, "more than the rounding differs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_low_memory_training_begins_from_weights_of_any_dtype(dtype: torch.dtype, backend: str) -> None:
    found = []
    for start in (dtype, torch.float32):
        model = Crosscoder(CrosscoderConfig(K, D, F), seed=1).to(dtype).to(start)  # the same numbers
        trainer = Trainer(model, TrainConfig(n_steps=3, batch_size=B, lr=1e-3, state="low-memory", backend=backend))
        train(trainer, 3)
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert dtypes.pop("W_enc") == dtypes.pop("W_dec") == torch.bfloat16
        assert set(dtypes.values()) == {torch.float32}
        found.append(model.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "reference", "native"])
def test_a_step_that_16_bits_would_lose_is_refused(dtype: torch.dtype, backend: str) -> None:
    model = Crosscoder(CrosscoderConfig(K, D, F)).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"lost to rounding; train model\.float\(\), or use .*low-memory"):
        Trainer(model, TrainConfig(n_steps=3, backend=backend))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    train(Trainer(model.float(), TrainConfig(n_steps=3, batch_size=B, backend=backend)), 3)


def test_float64_weights_are_trained_in_float64() -> None:
    model = Crosscoder(CrosscoderConfig(K, D, F)).double()
    train(Trainer(model, TrainConfig(n_steps=3, batch_size=B)), 3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_batches_of_other_forms_train_to_the_same_bits() -> None:
    trainers = [make() for _ in range(4)]
    for step in range(3):
        x = sparse_batch(step)
        with torch.inference_mode():
            made_there = x + 0
        for trainer, form in zip(trainers, (x, x.numpy(), x.clone().requires_grad_(), made_there), strict=True):
            trainer.step(form)
    for other in trainers[1:]:
        assert states_equal(trainers[0], other)
    with pytest.raises(DataError, match="torch tensor or a numpy array, not list"):
        trainers[0].step(sparse_batch(0).tolist())  # type: ignore[arg-type]


def test_training_under_inference_mode_is_refused_and_changes_nothing() -> None:
    trainer, untouched = make(), make()
    for other in (trainer, untouched):
        train(other, 2)
    with torch.inference_mode():
        with pytest.raises(ConfigError, match=r"training under torch\.inference_mode"):
            trainer.step(sparse_batch(2))
        with pytest.raises(ConfigError, match=r"training under torch\.inference_mode"):
            make()
        converted = Crosscoder(CrosscoderConfig(K, D, F)).double()
    assert states_equal(trainer, untouched) and trainer.step_number == 2
    with pytest.raises(ConfigError, match=r"made under torch\.inference_mode and cannot be trained"):
        Trainer(converted, TrainConfig(n_steps=2))
    with torch.no_grad():
        trainer.step(sparse_batch(2))
    untouched.step(sparse_batch(2))
    assert states_equal(trainer, untouched)


@pytest.mark.parametrize("name", ["b_enc", "b_dec", "log_threshold"])
def test_parameters_of_two_dtypes_are_refused_for_training(name: str) -> None:
    model = Crosscoder(CrosscoderConfig(K, D, F))
    getattr(model, name).data = getattr(model, name).data.double()
    with pytest.raises(ConfigError, match=rf"{name} is torch\.float64, and W_enc torch\.float32"):
        Trainer(model, TrainConfig(n_steps=3))
    train(Trainer(model.float(), TrainConfig(n_steps=3, batch_size=B)), 3)


def test_a_trainer_takes_a_crosscoder_and_a_configuration() -> None:
    model, config = Crosscoder(CrosscoderConfig(2, 4, 8)), TrainConfig(n_steps=2, batch_size=4)
    for wrong in ((config, model), (None, config), (model, {"n_steps": 2})):
        with pytest.raises(ConfigError, match="a trainer takes a Crosscoder and a TrainConfig, in this order, not"):
            Trainer(*wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_torchs_default_dtype_changes_nothing(backend: str) -> None:
    def trained() -> tuple[list[float], Crosscoder]:
        model = Crosscoder(CrosscoderConfig(3, 5, 24), seed=1)
        config = TrainConfig(n_steps=12, batch_size=16, backend=backend, revival_every=4, dead_after_tokens=16)
        trainer = Trainer(model, config)
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randn(16, 3, 5, generator=generator, dtype=torch.float32) for _ in range(12)]
        return [float(trainer.step(x)["loss"]) for x in batches], model.eval()

    losses, model = trained()
    try:
        torch.set_default_dtype(torch.float64)
        again, same = trained()
        code = same.encode(torch.ones(2, 3, 5, dtype=torch.float32), backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert again == losses and torch.equal(model.W_dec, same.W_dec) and same.W_dec.dtype == torch.float32
    assert torch.equal(code.values, model.encode(torch.ones(2, 3, 5), backend=backend).values)
