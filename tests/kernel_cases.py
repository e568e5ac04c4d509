"""Crosscoders and batches for the tests of the kernels, and the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer

NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "log_threshold")
SHAPES = [(63, 1, 7, 50), (33, 3, 16, 1000), (17, 32, 5, 41), (9, 33, 3, 31), (5, 64, 2, 70)]
RANKED = ("topk", "batchtopk")
GATES = ("snapshot", "shared", *RANKED)
LAMBDA = 0.3
SHAPE = (64, 3, 20, 101)


def make(
    shape: tuple[int, int, int, int],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shift: float = 0.0,
    **options: Any,
) -> tuple[Crosscoder, Tensor]:
    """A crosscoder whose norms, thresholds and biases differ, and a batch; `shift` is added to b_enc."""
    B, K, D, F = shape
    if options.get("gate") in RANKED:
        options.setdefault("top_k", min(6, F))
    generator = torch.Generator().manual_seed(seed)
    model = Crosscoder(CrosscoderConfig(K, D, F, **options), seed=seed)
    with torch.no_grad():
        model.W_dec *= torch.rand(F, K, 1, generator=generator) + 0.3
        model.W_enc += 0.1 * torch.randn(model.W_enc.shape, generator=generator)
        model.b_enc += 0.1 * torch.randn(F, generator=generator) + shift
        model.b_dec += 0.1 * torch.randn(K, D, generator=generator)
        model.log_threshold += 0.5 * torch.randn(F, generator=generator)
    return model.to(dtype), torch.randn(B, K, D, generator=generator)


def exact(model: Crosscoder) -> Crosscoder:
    """The same crosscoder in float64."""
    copy = Crosscoder(model.config).double()
    copy.load_state_dict(model.state_dict())
    return copy.train(model.training)


def gradients(model: Crosscoder, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """Loss and gradients by name, in float64."""
    model.zero_grad()
    loss = model.loss(x, sparsity_coefficient=LAMBDA, **options)
    loss.total.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {"loss": loss.total.detach().double(), **{name: gradient.double() for name, gradient in found.items()}}


def error(actual: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """Largest deviation relative to the largest element, or to `floor` where that is larger."""
    if not expected.numel():
        return 0.0
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(floor))


@contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor that torch makes without filling it holds NaN (or the largest integer) meanwhile."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def batches(shape: tuple[int, int, int, int], n: int) -> list[Tensor]:
    """Batches whose dimensions differ in size."""
    B, K, D, _ = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (1 + torch.arange(D) % 3) / 2
    return [torch.randn(B, K, D, generator=generator) * sizes for _ in range(n)]


def trained(backend: str, dtype: torch.dtype = torch.float32, steps: int = 12, **options: Any) -> Trainer:
    shape = options.pop("shape", SHAPE)
    names = ("gate", "top_k", "threshold_mode", "threshold_window", "penalty")
    config = {name: options.pop(name) for name in names if name in options}
    if config.get("gate") in RANKED:
        config.setdefault("top_k", 4)
    model = Crosscoder(CrosscoderConfig(*shape[1:], **config), seed=1).to(dtype)
    settings = {"n_steps": 200, "batch_size": shape[0], "lr": 3e-3, "sparsity_coefficient": 0.1, "revival": "none"}
    trainer = Trainer(model, TrainConfig(**{**settings, "backend": backend, **options}))
    for x in batches(shape, steps):
        trainer.step(x)
    return trainer


def largest_difference(a: Trainer, b: Trainer) -> float:
    other = dict(b.model.named_parameters())
    return max(
        float((p.detach().double() - other[name].detach().double()).abs().max())
        for name, p in a.model.named_parameters()
    )


def same_bits(a: Trainer, b: Trainer) -> bool:
    states = zip(a.engine.tensors(), b.engine.tensors(), strict=True)
    parameters = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in parameters) and all(torch.equal(p, q) for (_, p), (_, q) in states)


def no_worse_than_dense(model: Crosscoder, x: Tensor, floor: float = 0.0, slack: float = 3e-7, **options: Any) -> None:
    """The native loss and gradients are at most twice as far from float64 as dense torch in float32, and `slack`.

    `floor`, as a share of the loss: what a gradient is measured against where it is smaller (a sum may cancel). With
    one or two tokens dense torch can be exact by luck, so tiny shapes want more slack.
    """
    draw = lambda: torch.Generator().manual_seed(7)  # noqa: E731 - all three draw the same tokens
    expected = gradients(exact(model), x.double(), backend="reference", generator=draw(), **options)
    dense = gradients(model, x, backend="reference", generator=draw(), **options)
    with poisoned():
        native = gradients(model, x, backend="native", generator=draw(), **options)
    scale = floor * float(expected["loss"]) + 1e-30
    for name in ("loss", *NAMES):
        bound = 2 * error(dense[name], expected[name], scale) + slack
        assert error(native[name], expected[name], scale) <= bound, name
