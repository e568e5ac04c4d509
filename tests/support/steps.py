"""Steps of training for the tests: gradients by name, short trainings, and the bound that every fast path must keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from support.crosscoders import NAMES, RANKED, double, relative_error
from torch import Tensor

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.backends.base import StepSettings, StepStatistics
from crosscoder.backends.closed_form import DensePass, Gradients
from crosscoder.penalty import LossSettings

LAMBDA, LAMBDA_P = 0.3, 0.05
SHAPE = (64, 3, 20, 101)


def settings(number: int = 0, **options: Any) -> StepSettings:
    """What the trainer tells an engine at step `number`, or as `options` say."""
    values = {
        "lr": 1e-3, "threshold_lr": 1e-4, "sparsity_coefficient": LAMBDA, "preactivation_coefficient": 0.0, "seed": 5,
    }  # fmt: skip
    return StepSettings(number, **(values | options))  # type: ignore[arg-type]


def gradients(model: Crosscoder, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """Loss and gradients by name, as float64; zeros where a parameter has none."""
    model.zero_grad()
    loss = model.loss(x, **{"sparsity_coefficient": LAMBDA, **options})
    loss.total.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {"loss": loss.total.detach().double(), **{name: gradient.double() for name, gradient in found.items()}}


@dataclass(frozen=True)
class StepResult(StepStatistics):
    """What the closed form gives for one batch."""

    gradients: Gradients = None  # type: ignore[assignment]


def loss_and_gradients(model: Crosscoder, x: Tensor, **options: Any) -> StepResult:
    """The closed form on all features at once: the same loss as `model.loss`, and its gradient in every parameter."""
    weights = model.weights()
    dense = DensePass(weights, weights.input(x), LossSettings(**{"sparsity_coefficient": LAMBDA, **options}))
    ((_, gradients),) = dense.gradients()
    figures = (dense.loss, dense.residual_BKD, dense.open_K, dense.fired_F, dense.smallest_score)
    return StepResult(*figures, gradients=gradients)


def batches(shape: tuple[int, int, int, int], n: int) -> list[Tensor]:
    """Batches whose dimensions differ in size."""
    B, K, D, _ = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (1 + torch.arange(D) % 3) / 2
    return [torch.randn(B, K, D, generator=generator) * sizes for _ in range(n)]


def trained(backend: str, dtype: torch.dtype = torch.float32, steps: int = 12, **options: Any) -> Trainer:
    """A trainer after `steps` of 200 steps, on the same batches whatever the backend."""
    shape = options.pop("shape", SHAPE)
    names = ("gate", "top_k", "threshold_mode", "threshold_window", "penalty")
    config = {name: options.pop(name) for name in names if name in options}
    if config.get("gate") in RANKED:
        config.setdefault("top_k", 4)
    model = Crosscoder(CrosscoderConfig(*shape[1:], **config), seed=1).to(dtype)
    chosen = {"n_steps": 200, "batch_size": shape[0], "lr": 3e-3, "sparsity_coefficient": 0.1, "revival": "none"}
    trainer = Trainer(model, TrainConfig(**{**chosen, "backend": backend, **options}))
    for x in batches(shape, steps):
        trainer.step(x)
    return trainer


def largest_difference(a: Trainer, b: Trainer) -> float:
    """Largest difference between two parameters of the same name."""
    other = dict(b.model.named_parameters())
    return max(
        float((p.detach().double() - other[name].detach().double()).abs().max())
        for name, p in a.model.named_parameters()
    )


def same_bits(a: Trainer, b: Trainer) -> bool:
    """Whether parameters and the optimiser's state are the same, bit for bit."""
    states = zip(a.engine.tensors(), b.engine.tensors(), strict=True)
    parameters = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in parameters) and all(torch.equal(p, q) for (_, p), (_, q) in states)


def no_worse_than_dense(model: Crosscoder, x: Tensor, floor: float = 0.0, slack: float = 3e-7, **options: Any) -> None:
    """The native loss and gradients are at most twice as far from float64 as dense torch in float32, and `slack`.

    `floor`, as a share of the loss: what a gradient is measured against where it is smaller (a sum may cancel). With
    one or two tokens dense torch can be exact by luck, so tiny shapes want more slack.
    """
    draw = lambda: torch.Generator().manual_seed(7)  # noqa: E731 - all three draw the same tokens
    expected = gradients(double(model), x.double(), backend="reference", generator=draw(), **options)
    dense = gradients(model, x, backend="reference", generator=draw(), **options)
    native = gradients(model, x, backend="native", generator=draw(), **options)
    scale = floor * float(expected["loss"]) + 1e-30
    for name in ("loss", *NAMES):
        bound = 2 * relative_error(dense[name], expected[name], scale) + slack
        assert relative_error(native[name], expected[name], scale) <= bound, name
