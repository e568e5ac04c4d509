"""The authors' package, llamascopium, as an opponent: its environment, its variants, a process to take steps with.

`harness.peer_worker` runs in that environment; its docstring says what is patched at run time, and why.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crosscoder import Crosscoder
from harness.variants import LEARNING_RATE, SPARSITY

FOLDER = Path(__file__).resolve().parents[1] / ".peer"
REQUIREMENTS = ("llamascopium==2.0.0b34", "transformer-lens<4")
"""transformer-lens 4 removed a name that the package imports; it does not exclude that version itself."""
WORKER = Path(__file__).with_name("peer_worker.py")

GLIBC = {
    # Tensors of hundreds of MB come from the heap and stay there, instead of being mapped and zeroed at every step.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True)
class PeerVariant:
    """One way to run the package."""

    dtype: str = "bf16"
    """Of autocast: "bf16", the package's default, or "fp32", which turns it off."""
    metrics: bool = True
    """The package's metrics of every step, on by default."""
    patches: tuple[str, ...] = ()
    """Beside those that training needs: see `harness.peer_worker`."""
    malloc: str = ""
    """"" as it is, "glibc" tuned, or "jemalloc"."""

    def __str__(self) -> str:
        parts = [
            self.dtype,
            "" if self.metrics else "no metrics",
            *self.patches,
            self.malloc and f"{self.malloc} tuned",
        ]
        return "llamascopium " + ", ".join(part for part in parts if part)

    def environment(self) -> dict[str, str]:
        tuned: dict[str, str] = {}
        if self.malloc == "glibc":
            tuned = GLIBC
        elif self.malloc == "jemalloc":
            tuned = {
                "LD_PRELOAD": jemalloc(),
                "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0,thp:always",
            }
        return {**os.environ, **tuned}


def variants() -> list[PeerVariant]:
    """As shipped first; then, each in fp32 and bf16, with tuned allocators, without metrics, and rewritten."""
    found = [PeerVariant("bf16"), PeerVariant("fp32")]
    for dtype in ("fp32", "bf16"):
        found.append(PeerVariant(dtype, malloc="glibc"))
        found.append(PeerVariant(dtype, metrics=False, malloc="glibc"))
        for malloc in ("glibc", "jemalloc"):
            found.append(PeerVariant(dtype, metrics=False, patches=("products", "optimizer"), malloc=malloc))
    return found


def jemalloc() -> str:
    """The library's file or name; empty if there is none."""
    own = sorted(FOLDER.glob("jemalloc/**/libjemalloc.so*"))
    return str(own[0]) if own else ctypes.util.find_library("jemalloc") or ""


def python() -> Path | None:
    """The interpreter of the package's environment, if that is complete."""
    path, stamp = FOLDER / "venv" / "bin" / "python", FOLDER / "installed"
    return path if path.exists() and stamp.exists() and stamp.read_text() == _stamp() else None


def install() -> Path:
    """Make the environment (once; about 2 GB): the package, with the torch version of this process; jemalloc on Debian.

    Raises `RuntimeError` where Python is not one that the package takes, or where pip fails.
    """
    found = python()
    if found is not None:
        return found
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        raise RuntimeError(f"{REQUIREMENTS[0]} needs Python 3.11 or 3.12, this is {sys.version.split()[0]}")
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "venv" / "bin" / "python"
    torch_version = torch.__version__.split("+")[0]
    for command in (
        [sys.executable, "-m", "venv", str(FOLDER / "venv")],
        [str(path), "-m", "pip", "install", "--quiet", f"torch=={torch_version}"],
        [str(path), "-m", "pip", "install", "--quiet", f"torch=={torch_version}", *REQUIREMENTS],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    if not jemalloc() and shutil.which("apt-get"):  # unpacked here, not installed; done without if that fails
        subprocess.run(["apt-get", "-qq", "download", "libjemalloc2"], cwd=FOLDER, capture_output=True, check=False)
        for package in FOLDER.glob("libjemalloc2_*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(FOLDER / "jemalloc")], capture_output=True, check=False)
    (FOLDER / "installed").write_text(_stamp())
    return path


def _stamp() -> str:
    return " ".join((*REQUIREMENTS, torch.__version__))


def converted(model: Crosscoder) -> dict[str, Tensor]:
    """Our weights by the package's names and in its shapes. Its encoder bias is a sum over the snapshots."""
    b_E = torch.zeros(model.config.n_snapshots, model.config.n_features, dtype=model.b_enc.dtype)
    b_E[0] = model.b_enc.detach()
    return {
        "W_E": model.W_enc.detach().permute(1, 2, 0).contiguous(),
        "b_E": b_E,
        "W_D": model.W_dec.detach().permute(1, 0, 2).contiguous(),
        "b_D": model.b_dec.detach().contiguous(),
        "log_threshold": model.log_threshold.detach().contiguous(),
    }


def parity(model: Crosscoder, x_BKD: Tensor, patches: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The package's loss () and gradients in float64, in the shapes and by the names of ours."""
    with _request(model, [x_BKD], patches) as (request, folder):
        request["parity"] = str(folder / "gradients.safetensors")
        done = subprocess.run(
            [str(python()), str(WORKER), json.dumps(request)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"llamascopium failed:\n{done.stderr[-2000:]}")
        found = load_file(request["parity"])
    return {
        "loss": found["loss"],
        "W_enc": found["W_E"].permute(2, 0, 1),
        "b_enc": found["b_E"][0],
        "W_dec": found["W_D"].permute(1, 0, 2),
        "b_dec": found["b_D"],
        "log_threshold": found["log_threshold"],
    }


@dataclass
class PeerProcess:
    """The package in its trainer's loop, waiting for the next batch."""

    process: subprocess.Popen[str]
    errors: Path
    seconds: list[float] = field(default_factory=list)
    """As the process itself measured each step."""

    def step(self) -> None:
        """One whole step."""
        self._ask("step")
        self.seconds.append(float(self.answer()))

    def _ask(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"llamascopium died:\n{self.errors.read_text()[-2000:]}") from None

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"llamascopium died:\n{self.errors.read_text()[-2000:]}")
        return line.strip()


@contextmanager
def running(model: Crosscoder, batches: list[Tensor], variant: PeerVariant) -> Iterator[PeerProcess]:
    """The package with our weights and batches, on as many threads as this process has."""
    with _request(model, batches, variant.patches) as (request, folder):
        request.update(dtype=variant.dtype, metrics=variant.metrics)
        errors = folder / "errors.txt"
        with errors.open("w") as error_file:
            process = subprocess.Popen(
                [str(python()), str(WORKER), json.dumps(request)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=error_file,
                text=True,
                env=variant.environment(),
            )
        try:
            peer = PeerProcess(process, errors)
            peer.answer()  # "ready"
            yield peer
        finally:
            process.kill()
            process.communicate()


@contextmanager
def _request(
    model: Crosscoder, batches: list[Tensor], patches: tuple[str, ...]
) -> Iterator[tuple[dict[str, Any], Path]]:
    with tempfile.TemporaryDirectory(prefix="crosscoder-peer-") as name:
        folder = Path(name)
        tensors = converted(model) | {f"x.{i:03d}": x.contiguous() for i, x in enumerate(batches)}
        save_file(tensors, folder / "tensors.safetensors")
        yield (
            {
                "tensors": str(folder / "tensors.safetensors"),
                "window": model.config.threshold_window,
                "sparsity": SPARSITY,
                "lr": LEARNING_RATE,
                "threads": torch.get_num_threads(),
                "patches": ["train", *patches],
            },
            folder,
        )
