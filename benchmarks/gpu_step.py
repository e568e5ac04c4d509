"""Time and memory of the Triton step on a GPU: each operation, the whole step, the product, dense autograd.

python benchmarks/gpu_step.py --json benchmarks/results/gpu-step.json        # on a CUDA machine
TRITON_INTERPRET=1 python benchmarks/gpu_step.py --tiny                      # anywhere: does it run?

Every time is the median of several, beside it what benchmarks/gpu_model.py expects of an H100. The sweep over density
gives the time of the sparse and of the dense way, and so the share of pairs at which they cross.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import gpu_model
import torch
import triton

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig
from crosscoder.backends.base import StepSettings
from crosscoder.backends.triton import TritonBackend
from crosscoder.gate import Gate
from crosscoder.hardware import cpu_name
from crosscoder.kernels.decode.triton import residual_and_dots
from crosscoder.kernels.encode.triton import find_candidates, list_pairs
from crosscoder.kernels.transpose.triton import transpose
from crosscoder.train.engines.asynchronous import AsynchronousEngine, room_for

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SIZES = {
    "small": (1024, 8, 256, 8192, "fp32"),
    "medium": (2048, 8, 256, 32_768, "fp32"),
    "pythia-160m": (2048, 32, 768, 98_304, "fp32"),
    "pythia-160m-low-memory": (2048, 32, 768, 98_304, "low-memory"),
    "pythia-6.9b": (2048, 32, 4096, 32_768, "low-memory"),
}
"""(B, K, D, F, state)."""
TINY = {"tiny": (8, 2, 8, 16, "fp32"), "tiny-low-memory": (8, 2, 8, 16, "low-memory")}
DENSITIES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.5)
STATE_BYTES = {"fp32": 14, "low-memory": 4}
"""Bytes a parameter of weights, moments and the encoder's bf16 copy (half of the parameters are the encoder's)."""


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of `work`, by the device's clock where there is one."""
    times = []
    for _ in range(repeats + 2):
        if ON_GPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def model_and_batch(
    B: int, K: int, D: int, F: int, state: str, active: float, **options: Any
) -> tuple[Crosscoder, Any]:
    """A crosscoder on which some `active` features a token are on, and a batch in bf16."""
    # A model of one feature, then parameters made on the device: the host may not have the memory.
    model = Crosscoder(CrosscoderConfig(K, D, 1, **options))
    model.config = replace(model.config, n_features=F)
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    dtype = torch.bfloat16 if state == "low-memory" else torch.float32
    for name in ("W_enc", "W_dec"):
        rows = torch.empty(F, K, D, dtype=dtype, device=DEVICE).normal_(std=(K * D) ** -0.5, generator=generator)
        setattr(model, name, torch.nn.Parameter(rows))
    model.b_dec = torch.nn.Parameter(torch.zeros(K, D, device=DEVICE))
    model.snapshot_scale = torch.ones(K, device=DEVICE)
    x = torch.randn(B, K, D, device=DEVICE, generator=generator).bfloat16()
    # h is normal with deviation 1, decoder norms are near K^-1/2: a bias puts the wanted share above the threshold.
    theta = 0.1
    cut = theta * K**0.5
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - min(active / F, 0.999)))
    model.b_enc = torch.nn.Parameter(torch.full((F,), cut - float(quantile), device=DEVICE))
    model.log_threshold = torch.nn.Parameter(torch.full((F,), theta, device=DEVICE).log())
    return model, x


def engine_of(model: Crosscoder, state: str, B: int, **options: Any) -> AsynchronousEngine:
    return AsynchronousEngine(model, TrainConfig(backend="triton", state=state, batch_size=B, **options))  # type: ignore[arg-type]


def settings(number: int) -> StepSettings:
    """A step that moves nothing much, so that density stays what it is."""
    return StepSettings(number, 1e-9, 1e-9, 0.1, 0.0, seed=number)


def measure(name: str, size: tuple[int, int, int, int, str], repeats: int) -> list[dict[str, Any]]:
    """One row an operation."""
    B, K, D, F, state = size
    active = min(40.0, F / 8)
    model, x = model_and_batch(B, K, D, F, state, active, threshold_mode="sampled", threshold_window=4.0)
    engine = engine_of(model, state, B)
    numbers = iter(range(10**9))
    engine.step(x, settings(next(numbers)))
    engine.settle()
    backend, gate = cast(TritonBackend, model.backend("triton")), Gate.for_loss(model.config)
    rows = backend.rows(model.weights())
    weights = rows.encoder(model.weights(), gate)
    candidates = find_candidates(x, weights, gate)
    capacity = room_for(int(candidates.count))
    encoded = list_pairs(x, weights, gate, candidates, capacity)
    code = encoded.code
    n_pairs = int(code.row_offsets[-1])
    x_bf16, W = x.flatten(1), rows.bf16(model.weights()).detach().flatten(1)
    out = torch.empty(B, F, dtype=torch.bfloat16, device=DEVICE)

    def product() -> None:
        torch.mm(x_bf16, W.T, out=out)

    works: dict[str, Callable[[], object]] = {
        "the product alone": product,
        "encode: candidates": lambda: find_candidates(x, weights, gate),
        "encode: exact scores and code": lambda: list_pairs(x, weights, gate, candidates, capacity),
        "transpose": lambda: transpose(code),
        "decode + residual + dots": lambda: residual_and_dots(code, model.W_dec, model.b_dec, x),
        "whole step": lambda: engine.step(x, settings(next(numbers))),
    }
    rows = []
    for work, function in works.items():
        if ON_GPU:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        row = {"size": name, "B": B, "K": K, "D": D, "F": F, "state": state, "pairs": n_pairs, "what": work}
        with torch.no_grad():
            row["seconds"] = seconds(function, repeats)
        if ON_GPU:
            row["peak_extra_bytes"] = torch.cuda.max_memory_allocated() - before
        rows.append(row)
    case = gpu_model.Case(B, K, D, F, active=n_pairs / B, low_memory=state == "low-memory")
    rows.append({"size": name, "what": "H100 by the model", "seconds": {a.name: a.seconds() for a in case.loads()}})
    return rows


def autograd(size: tuple[int, int, int, int, str], repeats: int) -> float:
    """Dense torch autograd and torch.optim.Adam on the same batch, float32."""
    B, K, D, F, _ = size
    model, x = model_and_batch(B, K, D, F, "fp32", min(40.0, F / 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-9)

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        model.loss(x, sparsity_coefficient=0.1).total.backward()
        optimizer.step()

    return seconds(work, repeats)


def crossover(size: tuple[int, int, int, int, str], densities: tuple[float, ...], repeats: int) -> list[dict[str, Any]]:
    """Sparse and dense way at each density."""
    B, K, D, F, state = size
    rows = []
    for density in densities:
        model, x = model_and_batch(B, K, D, F, state, density * F, threshold_mode="sampled", threshold_window=4.0)
        row: dict[str, Any] = {"density": density, "chosen": None}
        for way, share in (("sparse", 1.0), ("dense", 0.0)):
            engine = engine_of(model, state, B)
            chosen = engine.dense_above
            engine.dense_above = share
            numbers = iter(range(10**9))

            def step(engine: AsynchronousEngine = engine, numbers: Any = numbers, x: Any = x) -> None:
                engine.step(x, settings(next(numbers)))

            try:
                row[way] = seconds(step, repeats)
            except torch.cuda.OutOfMemoryError:
                row[way] = None
            row["chosen"] = "dense" if (engine._last_count or 0) > chosen * B * F else "sparse"
        rows.append(row)
        print(row, flush=True)
    return rows


def fits(size: tuple[int, int, int, int, str], gradients: bool = False) -> bool:
    """Weights, state (and dense tensors) fit the device."""
    if not ON_GPU:
        return True
    B, K, D, F, state = size
    needed = 2 * F * K * D * (16 if gradients else STATE_BYTES[state])
    needed += 5 * 4 * B * K * F if gradients else 6 * 4 * B * K * D
    return needed < 0.9 * torch.cuda.get_device_properties(0).total_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes that the interpreter can do")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not ON_GPU and not (options.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        sys.exit("no CUDA device: only --tiny runs here, with TRITON_INTERPRET=1 set")
    repeats = 1 if options.tiny else options.repeats
    sizes = TINY if options.tiny else SIZES
    rows: list[dict[str, Any]] = []
    for name, size in sizes.items():
        if not fits(size):
            print(f"{name}: left out, it does not fit the device's memory", flush=True)
            continue
        new = measure(name, size, repeats)
        if fits(size, gradients=True):
            new.append({"size": name, "what": "dense autograd + Adam", "seconds": autograd(size, repeats)})
        for row in new:
            print(row, flush=True)
        rows += new
        if ON_GPU:
            torch.cuda.empty_cache()
    densities = (0.1, 0.5) if options.tiny else DENSITIES
    sweep = crossover(next(iter(sizes.values())), densities, repeats)
    device = torch.cuda.get_device_name() if ON_GPU else f"{cpu_name()}, Triton's interpreter: times mean nothing"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    document = {
        "device": device, "torch": torch.__version__, "triton": triton.__version__, "commit": commit, "rows": rows,
        "density": sweep,
    }  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
