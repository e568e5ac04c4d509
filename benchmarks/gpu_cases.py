"""What benchmarks/gpu_run.py works on: sizes, crosscoders on which a wanted share of features is on, clocks, results.

Letters: B tokens, K snapshots, D width, F features.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig
from crosscoder.backends.base import StepSettings
from crosscoder.train.engines.asynchronous import AsynchronousEngine

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
THRESHOLD, WINDOW = 0.1, {"narrow": 0.02, "sampled": 4.0, "exact": 4.0}


@dataclass(frozen=True)
class Size:
    """A step's size."""

    B: int
    K: int
    D: int
    F: int
    state: str

    @property
    def active(self) -> float:
        """Features a token that are on."""
        return min(40.0, self.F / 256)


SIZES = {
    "6.9b-low-memory": Size(2048, 32, 4096, 32_768, "low-memory"),
    "160m-fp32": Size(2048, 32, 768, 98_304, "fp32"),
    "160m-low-memory": Size(2048, 32, 768, 98_304, "low-memory"),
    "medium-fp32": Size(2048, 8, 256, 32_768, "fp32"),
}
TINY = {name: Size(8, 2, 8, 64, size.state) for name, size in SIZES.items()}


class Results:
    """One JSON line a result, on disk at once: what is stopped loses nothing. No part stops the rest."""

    def __init__(self, path: Path, budget: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self._path, self._budget, self._began = path, budget, time.monotonic()
        self.failed: list[str] = []

    def tell(self, **row: Any) -> None:
        row["at_seconds"] = round(time.monotonic() - self._began, 1)
        line = json.dumps(row, default=str)
        with self._path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line[:600], flush=True)

    def check(self, name: str, good: bool, **row: Any) -> None:
        """A result that is right or wrong; a wrong one makes the whole run fail in the end."""
        self.tell(part=name, good=good, **row)
        if not good:
            self.failed.append(name)

    def part(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        """Run one part, unless the time is up."""
        if time.monotonic() - self._began > self._budget:
            self.tell(part=name, left_out=f"the budget of {self._budget:g} seconds is used up")
            return
        try:
            work(self, *arguments)
        except Exception as error:
            self.failed.append(name)
            self.tell(part=name, failed=f"{type(error).__name__}: {error}"[:500], trace=traceback.format_exc()[-1500:])
        if ON_GPU:
            torch.cuda.empty_cache()


def milliseconds(work: Callable[[], object], repeats: int = 5, warm: int = 2) -> dict[str, float]:
    """Median, lowest and highest time, by the device's clock where there is one."""
    times = []
    repeats, warm = (repeats, warm) if ON_GPU else (1, 0)
    for number in range(repeats + warm):
        if ON_GPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            took = start.elapsed_time(end)
        else:
            began = time.perf_counter()
            work()
            took = 1e3 * (time.perf_counter() - began)
        if number >= warm:
            times.append(took)
    return {"median": statistics.median(times), "low": min(times), "high": max(times)}


def host_milliseconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Time until the host has the work behind it, the device being idle before."""
    times = []
    for _ in range(repeats if ON_GPU else 1):
        synchronize()
        began = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def model_and_batch(size: Size, active: float, **options: Any) -> tuple[Crosscoder, Tensor]:
    """A crosscoder on which some `active` features a token are on, and a batch in bf16.

    Features fire at rates that fall off by rank, and are stronger at some snapshots than at others, so that a pair's
    gates are not all open.
    """
    B, K, D, F = size.B, size.K, size.D, size.F
    # A model of one feature, then parameters made on the device: the host may not have the memory.
    model = Crosscoder(CrosscoderConfig(K, D, 1, **options)).to(DEVICE)
    model.config = replace(model.config, n_features=F)
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    dtype = torch.bfloat16 if size.state == "low-memory" else torch.float32
    strength_FK = torch.rand(F, K, 1, device=DEVICE, generator=generator).mul_(1.5).add_(0.25)
    for name in ("W_enc", "W_dec"):
        W = torch.empty(F, K, D, dtype=dtype, device=DEVICE).normal_(std=(K * D) ** -0.5, generator=generator)
        if name == "W_dec":
            for first in range(0, F, 4096):
                W[first : first + 4096] *= strength_FK[first : first + 4096].to(dtype)
        setattr(model, name, torch.nn.Parameter(W))
    rate_F = 1 / (torch.arange(F, device=DEVICE) + 0.25 * F)
    rate_F = (rate_F / rate_F.sum() * active).clamp(1e-6, 0.9)
    # h is normal with deviation 1: this bias puts the wanted share above the threshold at the strongest snapshot.
    z_F = torch.distributions.Normal(0.0, 1.0).icdf(1 - rate_F.double()).float()
    largest_F = strength_FK.amax(dim=(1, 2)) * K**-0.5
    model.b_enc = torch.nn.Parameter(THRESHOLD / largest_F - z_F)
    model.log_threshold = torch.nn.Parameter(torch.full((F,), THRESHOLD, device=DEVICE).log())
    x_BKD = torch.randn(B, K, D, device=DEVICE, generator=generator).bfloat16()
    return model, x_BKD


def train_config(size: Size, **options: Any) -> TrainConfig:
    """Of a step that moves nothing much, so that density stays what it is."""
    return TrainConfig(backend="triton", state=size.state, batch_size=size.B, **options)  # type: ignore[arg-type]


def engine_of(model: Crosscoder, size: Size, **options: Any) -> AsynchronousEngine:
    return AsynchronousEngine(model, train_config(size, **options))


def settings(number: int, lr: float = 1e-9) -> StepSettings:
    return StepSettings(number, lr, lr, 0.1, 0.0, seed=number)
