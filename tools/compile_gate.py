"""Compiles every kernel for GPUs that need not be there, as a training step would launch it, and looks at the result.

python tools/compile_gate.py                      # sm_80, sm_90 and sm_100, all variants
python tools/compile_gate.py --arch 90 --size 160m --variant plain --json gate.json

The engine takes steps on tensors without memory (torch's "meta" device) at the sizes of the paper's dictionaries; each
launch is compiled instead of run, with the arguments' types, alignments and constants that it really has. The table
tells registers, spills, shared memory and instructions, and for `update_rows` how many of them a parameter takes.

A kernel fails if it spills more than `SPILL_LIMIT`, if it needs more shared memory than the device has, if it has a
product but no tensor-core instruction, if the low-memory update takes more than `INSTRUCTIONS_A_PARAMETER`, or if it
has grown by more than `GROWTH` against the table of the same Triton in benchmarks/results/compile-gate.json. Exit
status 1 if one fails. Another Triton: `PYTHONPATH=/folder/of/that/triton python tools/compile_gate.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, parameters
from crosscoder.backends.base import StepSettings
from crosscoder.backends.triton import TritonBackend, sparse_pass
from crosscoder.penalty import LossSettings
from crosscoder.train.engines import asynchronous
from sass import Program

SIZES = {"160m": (2048, 32, 768, 98_304), "6.9b": (2048, 32, 4096, 32_768)}
"""(B, K, D, F) of the paper's largest dictionaries of Pythia-160M and Pythia-6.9B."""
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one block may use."""
SPILL_LIMIT = 16
"""Bytes a thread: a value or two that wait in the first-level cache cost nothing that could be measured."""
INSTRUCTIONS_A_PARAMETER = 60
"""Of `update_rows` with 8-bit moments on sm_90, in blocks that end where rows do."""
GROWTH = 1.05
"""Instructions, against the committed table."""
COMMITTED = Path(__file__).parents[1] / "benchmarks" / "results" / "compile-gate.json"
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
    products: int
    """Matrix products in its source, which want tensor cores."""
    a_parameter: float | None = None
    """`update_rows`: instructions a parameter and thread, without those of the pairs."""
    a_pair: float | None = None
    """`update_rows`: instructions a pair and parameter."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is, whatever came of it."""
        return self.arch, self.size, self.kernel, self.constants, self.variant

    def faults(self, before: Compiled | None = None) -> list[str]:
        """What is wrong with it; `before`: as it was when the table was committed."""
        found = []
        if self.spill_bytes > SPILL_LIMIT:
            found.append(f"spills ({self.spill_bytes} bytes, {self.spill_instructions} instructions)")
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared_bytes} bytes of shared memory, {SHARED_LIMIT[self.arch]} are there")
        if self.products and not self.tensor_core:
            found.append("a product without tensor-core instructions")
        if (
            self.a_parameter is not None
            and self.arch == 90
            and "EIGHT_BIT=1" in self.constants
            and "EVEN=1" in self.constants
            and self.a_parameter > INSTRUCTIONS_A_PARAMETER
        ):
            found.append(f"{self.a_parameter:.1f} instructions a parameter, at most {INSTRUCTIONS_A_PARAMETER}")
        if before is not None and self.instructions > GROWTH * before.instructions:
            found.append(f"{self.instructions} instructions, {before.instructions} in the committed table")
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
    with patch.object(asynchronous, "HostCopy", _FixedCount), patch.object(parameters, "as_tensor", lambda x: x):
        engine = asynchronous.AsynchronousEngine(model_of(size, **options), train)
        if dense:
            engine.dense_above = 0.0
        engine.step(x, StepSettings(1000, 5e-5, 5e-6, 0.3, preactivation, seed=7))


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
    program = Program.parse(sass)
    names = program.names
    a_parameter, a_pair = None, None
    if kernel.metadata.name == "update_rows":
        a_parameter, a_pair = update_work(program, constants)
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
        instructions=len(program.addresses),
        tensor_core=sum(count for name, count in names.items() if re.match(r"(HMMA|HGMMA|IMMA|IGMMA|UTC\w*MMA)", name)),
        products=kernel.asm["ttir"].count("tt.dot"),
        a_parameter=a_parameter,
        a_pair=a_pair,
    )


def update_work(program: Program, constants: str) -> tuple[float, float | None]:
    """Instructions of `update_rows` a parameter, and a pair and parameter, in each thread of its one warp.

    A warp goes through SPAN blocks of LANES elements of two matrices; what is outside that loop counts for all of them.
    """
    value = {name: int(number) for name, number in (word.split("=") for word in constants.split())}
    parameters = 2 * value["LANES"] / 32
    blocks = program.outermost()
    if not value["DENSE"] and len(blocks) == 1 and not program.inside(blocks[0]):
        blocks = []  # one block only: the loop that is left is the pairs'
    pairs = program.outermost() if not blocks else [loop for block in blocks for loop in program.inside(block)]
    once = program.straight() / (value["SPAN"] if blocks else 1)
    a_pair = sum(map(program.body, pairs)) / value["PAIRS"] / parameters if pairs and not value["DENSE"] else None
    return round((once + sum(map(program.body, blocks))) / parameters, 2), a_pair and round(a_pair, 2)


def gate(arches: list[int], sizes: list[str], variants: list[str], workers: int = 1) -> list[Compiled]:
    """Everything compiled once; a kernel that several variants launch alike counts for the first."""
    parts = [(arch, size, variants) for arch in arches for size in sizes]
    if workers == 1 or len(parts) == 1:
        return [row for part in parts for row in _gate(*part)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [row for rows in pool.map(_gate, *zip(*parts, strict=True)) for row in rows]


def _gate(arch: int, size: str, variants: list[str]) -> list[Compiled]:
    found: dict[str, tuple[Any, str]] = {}
    owners: dict[str, tuple[str, str]] = {}
    with recorded(arch, found):
        for variant in variants:
            if variant == "operations":
                operations(size)
            else:
                take_step(size, variant)
            for key in found:
                owners.setdefault(key, (size, variant))
    return [examine(arch, owners[key], kernel) for key, kernel in found.items()]


COLUMNS = (
    "arch", "size", "variant", "kernel", "warps", "registers", "spill_bytes", "spill_instructions", "shared_bytes",
    "instructions", "tensor_core", "a_parameter", "a_pair",
)  # fmt: skip


def table(rows: list[Compiled]) -> str:
    """The rows as text."""
    cell = lambda row, column: "" if getattr(row, column) is None else str(getattr(row, column))  # noqa: E731
    lines = [COLUMNS, *([cell(row, column) for column in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    padded = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in padded)


def committed(path: Path = COMMITTED) -> dict[str, list[Compiled]]:
    """The committed table: rows by the version of Triton."""
    if not path.exists():
        return {}
    return {
        version: [Compiled(**row) for row in document["rows"]]
        for version, document in json.loads(path.read_text())["triton"].items()
    }


def write(path: Path, rows: list[Compiled]) -> None:
    """Rows of this Triton into a table, in place of those that it had before."""
    document = json.loads(path.read_text()) if path.exists() else {"triton": {}}
    document["triton"][triton.__version__] = {"torch": torch.__version__, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT), choices=sorted(SHARED_LIMIT))
    parser.add_argument("--size", nargs="+", default=list(SIZES), choices=list(SIZES))
    names = [*VARIANTS, "operations"]
    parser.add_argument("--variant", nargs="+", default=names, choices=names)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write the rows here as well, beside those of other Tritons")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: there is nothing to compile; unset it")
    before = {row.key: row for row in committed().get(triton.__version__, [])}
    rows = gate(options.arch, options.size, options.variant, options.jobs)
    print(table(rows))
    if options.json:
        write(options.json, rows)
    failed = [(row, fault) for row in rows for fault in row.faults(before.get(row.key))]
    for row, fault in failed:
        print(f"sm_{row.arch} {row.size} {row.variant} {row.kernel}({row.constants}): {fault}", file=sys.stderr)
    if not before:
        print(f"{COMMITTED.name} has no table of Triton {triton.__version__}: growth is not looked at", file=sys.stderr)
    print(f"Triton {triton.__version__}: {len(rows)} kernels, {len(failed)} faults")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
