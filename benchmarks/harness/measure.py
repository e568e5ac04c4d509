"""Times that can be compared: contenders take turns, so that a busy moment hits all; ratios are of one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harness.situation import Shape

Work = Callable[[], object]
GEMM_NAMES = {"one GEMM, fp32": torch.float32, "one GEMM, bf16": torch.bfloat16}


@dataclass(frozen=True)
class Timing:
    """The times of one contender."""

    seconds: tuple[float, ...]
    """In the order of the rounds."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        return {"median": self.median, "low": min(self.seconds), "high": max(self.seconds), "rounds": len(self.seconds)}


def seconds_of(work: Work, device: str = "cpu") -> float:
    """Wall time of one call, until the device is done."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(
    benchmark: Any, subject: str, contenders: Mapping[str, Work], rounds: int, *, device: str = "cpu"
) -> dict[str, Timing]:
    """Time every contender once a round, after one round that is not counted.

    pytest-benchmark runs the rounds and shows the `subject` in its table; the others go before it in each round.
    """
    others = {name: work for name, work in contenders.items() if name != subject}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}

    def run_others() -> None:
        for name, work in others.items():
            seconds[name].append(seconds_of(work, device))

    def run_subject() -> None:
        seconds[subject].append(seconds_of(contenders[subject], device))

    benchmark.pedantic(run_subject, setup=run_others, rounds=rounds, warmup_rounds=1, iterations=1)
    counted = slice(1, None) if len(seconds[subject]) > 1 else slice(None)  # --benchmark-disable: one round in all
    return {name: Timing(tuple(values[counted])) for name, values in seconds.items()}


def gemms(shape: Shape, device: str = "cpu") -> dict[str, Work]:
    """The one product (B, K D) x (K D, F) that no step can do without, in fp32 and in bf16, as contenders.

    As `crosscoder.hardware` times it: both operands contiguous and ready in their dtype.
    """
    inner = shape.n_snapshots * shape.d_model
    works: dict[str, Work] = {}
    for name, dtype in GEMM_NAMES.items():
        a = torch.full((shape.batch, inner), 0.5, dtype=dtype, device=device)
        b = torch.full((inner, shape.n_features), 0.5, dtype=dtype, device=device)
        works[name] = lambda a=a, b=b: torch.mm(a, b)  # type: ignore[misc]
    return works
