"""What the tests of the Triton kernels share: the device, models of any shape, poisoned memory, the settings of a step.

Without a GPU the kernels run in Triton's interpreter (tests/conftest.py), some 10 ms a program: shapes are small there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from triton.runtime import interpreter

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig
from crosscoder.code import SparseCode
from crosscoder.train.engines.base import StepSettings

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
LAMBDA, LAMBDA_P = 0.3, 0.05


def _patch_once() -> None:
    """Each call of a jit function by another patches triton.language anew, 3 ms every time; once a module is enough."""
    patch = getattr(interpreter, "_patch_lang", None)
    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if patch is not None and id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    if patch is not None and hasattr(interpreter.InterpretedFunction, "rewrite"):
        interpreter.InterpretedFunction.__call__ = call


if not ON_GPU:
    _patch_once()


def make(shape: tuple[int, int, int, int], seed: int = 0, **options: Any) -> tuple[Crosscoder, Tensor]:
    """A float32 crosscoder whose norms, biases and thresholds all differ, and a batch; `shape` is (B, K, D, F)."""
    B, K, D, F = shape
    if options.get("gate") in ("topk", "batchtopk"):
        options.setdefault("top_k", min(3, F))
    model = Crosscoder(CrosscoderConfig(K, D, F, **options), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.W_dec *= torch.rand(F, K, 1, generator=generator) + 0.3
        model.W_enc += 0.1 * torch.randn(model.W_enc.shape, generator=generator)
        model.b_enc += 0.1 * torch.randn(F, generator=generator)
        model.b_dec += 0.1 * torch.randn(K, D, generator=generator)
        model.log_threshold += 0.5 * torch.randn(F, generator=generator)
    return model.to(DEVICE), torch.randn(B, K, D, generator=generator).to(DEVICE)


def double(model: Crosscoder) -> Crosscoder:
    """The same numbers in float64."""
    copy = Crosscoder(model.config).to(DEVICE).double()
    copy.load_state_dict(model.state_dict())
    return copy.train(model.training)


def random_code(shape: tuple[int, int, int], density: float, seed: int, spare: int = 0) -> SparseCode:
    """Any code (B, K, F); its buffers are `spare` longer than its pairs, and filled with what must not be used."""
    B, K, F = shape
    generator = torch.Generator().manual_seed(seed)
    on_BF = torch.rand(B, F, generator=generator) < density
    rows, features = on_BF.nonzero(as_tuple=True)
    n = len(rows)
    open_NK = torch.rand(n, K, generator=generator) < 0.6
    open_NK[torch.arange(n), torch.randint(K, (n,), generator=generator)] = True
    code = SparseCode.from_pairs(rows, features, torch.rand(n, generator=generator) + 0.1, open_NK, torch.Size((B, F)))

    def extend(values: Tensor, filler: float) -> Tensor:
        return torch.cat([values, values.new_full((spare,), filler)]).to(DEVICE)

    return SparseCode(
        code.row_offsets.to(DEVICE), extend(code.features, 0), extend(code.values, float("nan")),
        extend(code.gates, 0), K, F,
    )  # fmt: skip


def trimmed(code: SparseCode) -> SparseCode:
    """Without what is beyond the last pair."""
    n = int(code.row_offsets[-1])
    return SparseCode(
        code.row_offsets, code.features[:n], code.values[:n], code.gates[:n], code.n_snapshots, code.n_features
    )


def train_config(**options: Any) -> TrainConfig:
    """What the engine reads of a TrainConfig."""
    settings = {
        "optimizer_mode": "exact", "state": "fp32", "clip_norm": None, "decoder_norm_limit": None, "batch_size": 64,
    }  # fmt: skip
    return cast(TrainConfig, SimpleNamespace(**(settings | options)))


def settings(number: int = 0, **options: Any) -> StepSettings:
    values = {
        "lr": 1e-3, "threshold_lr": 1e-4, "sparsity_coefficient": LAMBDA, "preactivation_coefficient": 0.0, "seed": 5,
    }  # fmt: skip
    return StepSettings(number, **(values | options))  # type: ignore[arg-type]


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, memory that torch hands out uninitialised is full of NaN (or of large numbers)."""
    originals = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    new_empty = Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max // 3)

    torch.empty = lambda *a, **k: poison(originals["empty"](*a, **k))
    torch.empty_like = lambda *a, **k: poison(originals["empty_like"](*a, **k))
    Tensor.new_empty = lambda *a, **k: poison(new_empty(*a, **k))  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.empty, torch.empty_like = originals["empty"], originals["empty_like"]
        Tensor.new_empty = new_empty  # type: ignore[method-assign]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected element."""
    if not expected.numel():
        return 0.0
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))
