"""What this machine has: processor, memory, devices, and which dtype its matrix products are faster in."""

from __future__ import annotations

import functools
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crosscoder.errors import ConfigError

if TYPE_CHECKING:
    import torch

GEMM_SHAPE = (512, 1024, 2048)
"""(M, K, N) of the timed product: large enough to be bound by arithmetic, 2.1 GFLOP."""
GEMM_REPEATS = 5
GEMM_VARIABLE = "CROSSCODER_GEMM_DTYPE"
GEMM_NAMES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Device:
    """Something to compute on."""

    name: str
    """As torch takes it: "cpu", "cuda:0", ..."""
    description: str
    """The product's name."""
    memory_bytes: int
    """In all; 0 if unknown."""
    capability: str
    """CUDA compute capability such as "9.0"; empty for a CPU."""


def cpu_name() -> str:
    """The processor's product name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine()


def cpu_count() -> int:
    """CPUs that this process may run on. What computes takes `kernels.arrays.n_threads` of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> tuple[int, int]:
    """(total, available) memory in bytes, a container's limit taken into account; 0 if unknown."""
    fields: dict[str, int] = {}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields[key] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return 0, 0
    total, available = fields.get("MemTotal", 0), fields.get("MemAvailable", 0)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no cgroup, or no limit ("max")
        return total, available
    return min(total, limit), min(available, max(0, limit - used))


def devices() -> list[Device]:
    """The CPU, then every CUDA device that torch can use."""
    import torch

    found = [Device("cpu", cpu_name(), memory_bytes()[0], "")]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        capability = f"{properties.major}.{properties.minor}"
        found.append(Device(f"cuda:{i}", properties.name, properties.total_memory, capability))
    return found


def faster_gemm_dtype(device: str = "cpu") -> torch.dtype:
    """`torch.float32` or `torch.bfloat16`: whichever this device multiplies matrices faster in.

    Timed once a process: having bf16 instructions does not tell, some CPUs are slower with them. The
    environment variable CROSSCODER_GEMM_DTYPE (float32 or bfloat16) decides instead where it is set; raises
    `ConfigError` if it is something else. Two machines, or two runs on one where both are close, may differ:
    what depends on the choice must record it.
    """
    import torch

    forced = os.environ.get(GEMM_VARIABLE, "")
    if forced:
        if forced not in GEMM_NAMES:
            raise ConfigError(f"{GEMM_VARIABLE}={forced} is not one of {', '.join(GEMM_NAMES)}")
        return torch.float32 if GEMM_NAMES[forced] == "float32" else torch.bfloat16
    rates = gemm_gflops(device)
    return torch.bfloat16 if rates["bfloat16"] > rates["float32"] else torch.float32


@functools.cache
def gemm_gflops(device: str = "cpu") -> dict[str, float]:
    """GFLOP/s of a product of `GEMM_SHAPE` on `device` in "float32" and "bfloat16", the median of several.

    Measured once a process, with torch's present number of threads; some 0.2 s on two cores.
    """
    import torch

    m, k, n = GEMM_SHAPE
    operands = {
        str(dtype).removeprefix("torch."): (
            torch.full((m, k), 0.5, dtype=dtype, device=device),
            torch.full((k, n), 0.5, dtype=dtype, device=device),
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    seconds: dict[str, list[float]] = {name: [] for name in operands}
    with torch.inference_mode():
        for repeat in range(GEMM_REPEATS + 1):  # taking turns: a busy moment then hits both
            for name, (a, b) in operands.items():
                elapsed = _seconds_of_product(a, b)
                if repeat:  # the first one sets things up
                    seconds[name].append(elapsed)
    return {name: 2e-9 * m * k * n / statistics.median(times) for name, times in seconds.items()}


def _seconds_of_product(a: torch.Tensor, b: torch.Tensor) -> float:
    import torch

    start = time.perf_counter()
    torch.mm(a, b)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start
