"""Training on a ghost of a GPU: all on the device, nobody waits in a step, and the numbers are the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.crosscoders import relative_error
from support.ghost import Ghost, Machine, ghost_machine
from torch import Tensor

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.train.engines.asynchronous import AsynchronousEngine
from crosscoder.train.initialization import initialize

B, K, D, F = 6, 2, 5, 9
EVENT = "event @ train/engines/asynchronous.py:wait"
"""The one thing in a step that the host waits for: how many pairs the step before had, which is known when that step's
encoder is through, and the device has the rest of it to do."""
CODE = {"repeat_interleave @ code.py:rows", "index @ train/joining.py:add", "index @ train/joining.py:_pairs"}
REPAIRS = CODE | {
    "_local_scalar_dense @ inputs.py:require_finite",
    "_local_scalar_dense @ kernels/encode/triton.py:encode", "_local_scalar_dense @ kernels/encode/triton.py:trimmed",
    "_local_scalar_dense @ train/joining.py:take", "nonzero @ train/joining.py:_pairs",
    "_to_copy @ train/joining.py:_pairs", "_local_scalar_dense @ train/joining.py:_pairs",
    "_local_scalar_dense @ train/revival.py:revive", "nonzero @ train/revival.py:revive",
    "_to_copy @ train/revival.py:revive", "index @ train/revival.py:revive",
    "index @ backends/adam_state.py:restart_rows", "nonzero @ backends/adam_state.py:restart_rows",
}  # fmt: skip
"""Joining and revival, every 250 steps, and the eight batches before: codes have the length of what they hold."""

# The interpreter warns of what hashes are meant to do.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Sparse:UserWarning"),
]

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "threshold_mode": "exact", "threshold_window": 4.0, "whitening": "none", "optimizer_mode": "exact",
        "preactivation_coefficient": 0.1,
    },
    "sampled": {"threshold_mode": "sampled", "threshold_window": 1.0, "gate": "shared", "penalty": "l1"},
    "topk": {"gate": "topk", "top_k": 3, "penalty": "tanh"},
    "batchtopk": {"gate": "batchtopk", "top_k": 3},
    "limits": {"clip_norm": 0.1, "decoder_norm_limit": 0.5, "start": "calibrated", "start_l0": 3.0},
    "low-memory": {"state": "low-memory", "preactivation_coefficient": 0.1, "clip_norm": 0.1},
}  # fmt: skip


@pytest.fixture
def machine() -> Iterator[Machine]:
    with ghost_machine() as machine:
        yield machine


def trainer_of(device: str, options: dict[str, Any], n_steps: int = 1000, **more: Any) -> tuple[Trainer, list[Tensor]]:
    """A trainer whose crosscoder was initialized on the device, and batches on the host (pinned for a GPU)."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(B, K, D, generator=generator) for _ in range(8)]
    own = CrosscoderConfig.__dataclass_fields__
    config = CrosscoderConfig(K, D, F, **{name: value for name, value in options.items() if name in own})
    given = {name: value for name, value in options.items() if name not in own}
    train = TrainConfig(n_steps=n_steps, batch_size=B, lr=1e-3, warmup_steps=1, **{**given, **more})
    low = train.state == "low-memory"
    model = Crosscoder(config, seed=0, device=device, dtype=torch.bfloat16 if low else torch.float32)
    initialize(model, batches[0].to(device), train)
    return Trainer(model, train), batches


def on_host(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: t.cpu() if isinstance(t, Tensor) else torch.tensor(t) for name, t in tensors.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps(machine: Machine, options: dict[str, Any]) -> None:
    """Sparse and dense steps: no tensor elsewhere (the machine raises), no wait but the event, and the CPU's losses."""
    trainer, batches = trainer_of("cuda", options)
    host, _ = trainer_of("cpu", options)
    assert trainer.engine.name == "triton" and host.engine.name == "native"
    sent = [x.pin_memory().to("cuda", non_blocking=True) for x in batches]
    for step in range(4):
        trainer.engine.dense_above = 1.0 if step < 3 else 0.0
        machine.watch.clear()
        metrics = trainer.step(sent[step], measured=step > 0)
        if step > 0:  # the first looks for the whitening
            assert set(machine.watch.waits) <= {EVENT}, machine.watch.waited()
        assert not machine.watch.unordered
        assert machine.watch.launches["update_rows"] >= 1
        expected = on_host(host.step(batches[step]))
        if step > 0:
            exact = options.get("state") != "low-memory"  # else each backend rounds with its own random numbers
            for name, value in on_host(metrics).items():
                tolerance = (1e-4 if exact else 0.2) if name not in ("l0", "l0_union", "dead") else 0.2
                assert relative_error(value, expected[name]) < tolerance, (step, name, value, expected[name])
    for tensor in (*trainer.model.state_dict().values(), *trainer.state_dict()["tensors"].values()):
        assert isinstance(tensor, Ghost) or not tensor.ndim  # a count


def test_a_step_without_metrics_waits_for_the_step_before_alone(machine: Machine) -> None:
    trainer, batches = trainer_of("cuda", {"whitening": "none"})
    trainer.engine.dense_above = 1.0
    sent = [x.pin_memory().to("cuda", non_blocking=True) for x in batches]
    trainer.step(sent[0], measured=False)
    machine.watch.clear()
    engine = trainer.engine
    assert isinstance(engine, AsynchronousEngine) and engine._sent is not None
    trainer.step(sent[1], measured=False)
    assert machine.watch.waits == {EVENT: 1} and engine._sent is not None


@pytest.mark.parametrize("state", ["fp32", "low-memory"])
def test_joining_and_revival(machine: Machine, state: str) -> None:
    """Those every few steps: what they wait for is listed, nothing is summed in the order of threads, and they do what
    they do on the CPU."""
    options = {"revival_every": 3, "revival_rate": 0.5, "joining_cosine": 0.9, "state": state}
    trainer, batches = trainer_of("cuda", options, n_steps=20)
    host, _ = trainer_of("cpu", options, n_steps=20)
    trainer.step(batches[0].to("cuda"))
    host.step(batches[0])
    machine.watch.clear()
    for x in batches[1:4]:
        trainer.step(x.pin_memory().to("cuda", non_blocking=True), measured=False)
        host.step(x)
    assert set(machine.watch.waits) <= REPAIRS | {EVENT}, machine.watch.waited()
    assert not machine.watch.unordered
    assert trainer.n_revived == host.n_revived > 0


def test_a_model_on_the_second_device(tmp_path: Path) -> None:
    """Whatever the current device is: kernels, events and buffers are where the weights are."""
    with ghost_machine(n_devices=2) as machine:
        trainer, batches = trainer_of("cuda:1", {})
        x = batches[0].to("cuda:1")
        for step in range(3):
            trainer.engine.dense_above = 1.0 if step < 2 else 0.0
            trainer.step(x)
        assert machine.device_now == 0
        assert {t.device for t in trainer.state_dict()["tensors"].values()} == {torch.device("cuda:1")}
        model = trainer.model
        code = model.encode(x)
        assert model.decode(code).device == x.device
        model.loss(x).total.backward()
        assert model.W_dec.grad is not None and model.W_dec.grad.device == x.device
        trainer.save(tmp_path / "checkpoint")
        trainer.resume(tmp_path / "checkpoint")


def test_loss_and_inference(machine: Machine) -> None:
    """encode, decode, loss and its gradients on the device: those of the reference on the CPU."""
    trainer, batches = trainer_of("cuda", {"whitening": "none"})
    model, x = trainer.model, batches[0]
    host = Crosscoder(model.config)
    host.load_state_dict({name: t.cpu() for name, t in model.state_dict().items()})
    code, expected = model.encode(x.to("cuda")), host.encode(x, backend="reference")
    assert torch.equal(code.features.cpu(), expected.features) and torch.equal(code.gates.cpu(), expected.gates)
    assert relative_error(model.decode(code).cpu(), host.decode(expected, backend="reference")) < 1e-5
    for some, where in ((model, "auto"), (host, "reference")):
        some.loss(x.to(some.W_enc.device), backend=where).total.backward()
    for (name, ours), theirs in zip(model.named_parameters(), host.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert relative_error(ours.grad.cpu(), theirs.grad) < 1e-4, name


def test_a_checkpoint_goes_on_with_the_same_bits(machine: Machine, tmp_path: Path) -> None:
    options = {"state": "low-memory", "revival_every": 3, "revival_rate": 0.5}
    whole, batches = trainer_of("cuda", options, n_steps=20)
    sent = [x.to("cuda") for x in batches]
    for x in sent[:2]:
        whole.step(x, measured=False)
    whole.save(tmp_path / "checkpoint")
    again, _ = trainer_of("cuda", options, n_steps=20)
    again.resume(tmp_path / "checkpoint")
    for trainer in (whole, again):
        for x in sent[2:4]:
            trainer.step(x, measured=False)
    first, second = whole.state_dict(), again.state_dict()
    assert first["numbers"] == second["numbers"]
    for part in ("model", "tensors"):
        for name, tensor in first[part].items():  # type: ignore[literal-required]
            assert torch.equal(tensor.cpu(), second[part][name].cpu()), name  # type: ignore[literal-required]
