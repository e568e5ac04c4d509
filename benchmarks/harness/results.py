"""Results as data: one JSON file a question, processor and size; each entry says where and when it was measured."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import crosscoder
from crosscoder.files import make_folder, write_text
from crosscoder.hardware import cpu_name, gemm_gflops
from harness.measure import GEMM_NAMES, Timing

FOLDER = Path(__file__).resolve().parents[1] / "results"


def environment(device: str = "cpu") -> dict[str, Any]:
    """The machine, the versions, the commit and how busy the machine is."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name(),
        "cpu": cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "gemm_gflops": {name: round(rate, 1) for name, rate in gemm_gflops(device).items()},
        "crosscoder": crosscoder.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


class Recorder:
    """Writes what one benchmark file finds to `folder/<question>-<device>.json` (`-quick` for quick sizes).

    An entry replaces the earlier one of the same case, so that a part can be measured again.
    """

    def __init__(self, question: str, folder: Path, *, quick: bool, device: str) -> None:
        self.device = device
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self.path = make_folder(folder) / f"{question}-{slug}{'-quick' if quick else ''}.json"

    def add(self, case: str, timings: Mapping[str, Timing] | None = None, **figures: Any) -> dict[str, Any]:
        """Record a case; each contender also as a multiple of the one product, the faster of those in `timings`.

        "gemms" compares medians, "gemms_low" the fastest rounds, which other work on the machine disturbs least.
        """
        contenders = {name: timing.to_dict() for name, timing in (timings or {}).items()}
        products = [contenders[name] for name in GEMM_NAMES if name in contenders]
        for statistic, key in (("median", "gemms"), ("low", "gemms_low")):
            floor = min((product[statistic] for product in products), default=None)
            for entry in contenders.values() if floor else ():
                entry[key] = entry[statistic] / floor
        entry = {"case": case, **figures, "contenders": contenders, "environment": environment(self.device)}
        entries = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else []
        entries = [old for old in entries if old["case"] != case] + [entry]
        entries.sort(key=lambda old: str(old["case"]))
        write_text(self.path, json.dumps(entries, indent=2, allow_nan=False) + "\n")
        return entry


def _commit() -> str:
    """The commit measured, with "+" behind it if files differ from it; empty outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=FOLDER.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return commit + ("+" if changed else "")
