"""Compiles every kernel for GPUs that need not be there, as a training step would launch it, and looks at the result.

python tools/compile_gate.py                      # sm_80, sm_90 and sm_100, all variants
python tools/compile_gate.py --arch 90 --size 160m --variant plain --json gate.json

The engine takes steps on tensors without memory (torch's "meta" device) at the sizes of the paper's dictionaries; each
launch is compiled instead of run, with the arguments' types, alignments and constants that it really has. The
table tells registers, spills, shared memory and instructions. A kernel fails if it spills, if it needs more shared
memory than the device has, or if it has a product but no tensor-core instruction. Exit status 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig
from crosscoder.backends.base import StepSettings
from crosscoder.backends.triton import TritonBackend, sparse_pass
from crosscoder.penalty import LossSettings
from crosscoder.train.engines import asynchronous

SIZES = {"160m": (2048, 32, 768, 98_304), "6.9b": (2048, 32, 4096, 32_768)}
"""(B, K, D, F) of the paper's largest dictionaries of Pythia-160M and Pythia-6.9B."""
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one block may use."""
WITH_PRODUCT = ("threshold_tiles",)
PAIRS = 82_000
"""Pairs of a batch, as a step has them at 40 active features a token."""
EXACT: dict[str, Any] = {"threshold_mode": "exact", "threshold_window": 4.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": EXACT,
    "exact-adam": {"optimizer_mode": "exact", "x": torch.float32, **EXACT},
    "all-options": {"clip_norm": 1.0, "decoder_norm_limit": 1.0, "preactivation": 0.01, "penalty": "tanh", **EXACT},
    "shared-narrow": {"gate": "shared", "threshold_mode": "narrow", "threshold_window": 0.1, "penalty": "l1"},
    "sampled": {"threshold_mode": "sampled", "threshold_window": 4.0, "x": torch.float16},
    "topk": {"gate": "topk", "top_k": 40},
    "dense": {"dense": True},
}
"""What a step may be asked for; each is tried with fp32 state (160m) or low-memory state (6.9b)."""


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled."""

    arch: int
    size: str
    variant: str
    kernel: str
    constants: str
    warps: int
    registers: int
    spill_bytes: int
    spill_instructions: int
    shared_bytes: int
    instructions: int
    tensor_core: int

    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.spill_bytes or self.spill_instructions:
            found.append(f"spills ({self.spill_bytes} bytes, {self.spill_instructions} instructions)")
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared_bytes} bytes of shared memory, {SHARED_LIMIT[self.arch]} are there")
        if self.kernel in WITH_PRODUCT and not self.tensor_core:
            found.append("a product without tensor-core instructions")
        return found


class _Driver:
    """Stands in for a GPU's driver: names the architecture, and never runs anything."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are cached a device

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def recorded(arch: int, found: dict[str, tuple[Any, str]]) -> Iterator[None]:
    """Within, launches compile for `arch` and collect in `found`, by their key, as (compiled kernel, constants)."""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        constants = {name: value for name, value in options.items() if name.isupper() and len(name) > 1}
        text = " ".join(f"{name}={int(value)}" for name, value in constants.items())
        found.setdefault(kernel.hash, (kernel, text))
        return kernel

    driver.set_active(_Driver(arch))
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


class _FixedCount:
    """In place of the host's copy of a number on the device."""

    def __init__(self, _device: torch.device) -> None:
        self.value = PAIRS

    def send(self, _value: torch.Tensor) -> None:
        pass

    def wait(self) -> int:
        return self.value

    def peek(self) -> int:
        return -1


def model_of(size: str, **options: Any) -> Crosscoder:
    """A crosscoder without memory, and the Triton backend for it, though no device is here."""
    _, K, D, F = SIZES[size]
    model = Crosscoder(CrosscoderConfig(K, D, F, **options), seed=None).to("meta")
    if size != "160m":
        for matrix in (model.W_enc, model.W_dec):
            matrix.data = matrix.data.to(torch.bfloat16)
    backend = TritonBackend()
    model.backend = lambda *_: backend  # type: ignore[method-assign, assignment]
    return model


def take_step(size: str, variant: str) -> None:
    """One step of the engine on tensors without memory."""
    options = dict(VARIANTS[variant])
    B, K, D, _ = SIZES[size]
    train = TrainConfig(
        optimizer_mode=options.pop("optimizer_mode", "lazy"), state="fp32" if size == "160m" else "low-memory",
        batch_size=B, clip_norm=options.pop("clip_norm", None),
        decoder_norm_limit=options.pop("decoder_norm_limit", None),
    )  # fmt: skip
    preactivation, dense = options.pop("preactivation", 0.0), options.pop("dense", False)
    x = torch.empty(B, K, D, dtype=options.pop("x", torch.bfloat16), device="meta")
    copy = asynchronous.HostCopy
    asynchronous.HostCopy = _FixedCount  # type: ignore[assignment, misc]
    try:
        engine = asynchronous.AsynchronousEngine(model_of(size, **options), train)
        if dense:
            engine.dense_above = 0.0
        engine.step(x, StepSettings(1000, 5e-5, 5e-6, 0.3, preactivation, seed=7))
    finally:
        asynchronous.HostCopy = copy  # type: ignore[misc]


def operations(size: str) -> None:
    """What a step has fused, as `decode` and the backward pass of `loss` launch it."""
    B, K, D, _ = SIZES[size]
    model = model_of(size)
    backend, weights = cast(TritonBackend, model.backend()), model.weights()
    x = torch.empty(B, K, D, device="meta")
    batch = sparse_pass(weights, x, backend.rows(weights), LossSettings(0.3), lambda _: PAIRS)
    assert batch is not None
    backend.gradients(weights, batch)
    backend.decode(weights, batch.parts.code)


def nvidia_tool(name: str) -> str:
    """One of the tools in Triton's own package."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else name


def examine(arch: int, owner: tuple[str, str], found: tuple[Any, str]) -> Compiled:
    """Registers, spills and instructions, from the binary; `owner` is (size, variant)."""
    (size, variant), (kernel, constants) = owner, found
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [nvidia_tool("cuobjdump"), flag, file.name], check=True, capture_output=True, text=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    names = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9]*)", sass, flags=re.MULTILINE))
    return Compiled(
        arch=arch,
        size=size,
        variant=variant,
        kernel=kernel.metadata.name,
        constants=constants,
        warps=kernel.metadata.num_warps,
        registers=int(numbers.get("REG", 0)),
        spill_bytes=int(numbers.get("STACK", 0)) + int(numbers.get("LOCAL", 0)),
        spill_instructions=names["STL"] + names["LDL"],
        shared_bytes=kernel.metadata.shared,
        instructions=sum(names.values()),
        tensor_core=sum(count for name, count in names.items() if re.match(r"(HMMA|HGMMA|IMMA|IGMMA|UTC\w*MMA)", name)),
    )


def gate(arches: list[int], sizes: list[str], variants: list[str], workers: int = 2) -> list[Compiled]:
    """Everything compiled once; a kernel that several variants launch alike counts for the first."""
    rows: list[Compiled] = []
    for arch in arches:
        found: dict[str, tuple[Any, str]] = {}
        owners: dict[str, tuple[str, str]] = {}
        with recorded(arch, found):
            for size in sizes:
                for variant in variants:
                    if variant == "operations":
                        operations(size)
                    else:
                        take_step(size, variant)
                    for key in found:
                        owners.setdefault(key, (size, variant))
        with ThreadPoolExecutor(workers) as pool:
            rows += pool.map(examine, [arch] * len(found), [owners[key] for key in found], found.values())
    return rows


COLUMNS = (
    "arch", "size", "variant", "kernel", "warps", "registers", "spill_bytes", "spill_instructions", "shared_bytes",
    "instructions", "tensor_core",
)  # fmt: skip


def table(rows: list[Compiled]) -> str:
    """The rows as text."""
    lines = [COLUMNS, *([str(getattr(row, column)) for column in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT), choices=sorted(SHARED_LIMIT))
    parser.add_argument("--size", nargs="+", default=list(SIZES), choices=list(SIZES))
    names = [*VARIANTS, "operations"]
    parser.add_argument("--variant", nargs="+", default=names, choices=names)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: there is nothing to compile; unset it")
    rows = gate(options.arch, options.size, options.variant)
    print(table(rows))
    if options.json:
        document = {"triton": triton.__version__, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    failed = [(row, fault) for row in rows for fault in row.faults()]
    for row, fault in failed:
        print(f"sm_{row.arch} {row.size} {row.variant} {row.kernel}({row.constants}): {fault}", file=sys.stderr)
    print(f"{len(rows)} kernels, {len(failed)} faults")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
