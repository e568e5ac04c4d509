"""Options of `pytest benchmarks`, and what each benchmark asks for: its case, a device, a recorder."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does

from pathlib import Path

import pytest
import torch

from harness.results import FOLDER, Recorder
from harness.variants import step_variants


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("crosscoder benchmarks")
    group.addoption("--full", action="store_true", help="the sizes of the published results (quick ones else)")
    group.addoption("--device", default="cpu", help="what to measure on: cpu (default), cuda, cuda:1, ...")
    group.addoption("--threads", type=int, default=None, help="torch's threads (default: torch's own choice)")
    group.addoption("--rounds", type=int, default=None, help="rounds of each comparison (default: 3 quick, 7 full)")
    group.addoption("--results", type=Path, default=FOLDER, help="folder for the JSON results")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` runs over the module's FULL or QUICK cases, `variant` over the ways to train besides the default."""
    if "case" in metafunc.fixturenames:
        cases = getattr(metafunc.module, "FULL" if metafunc.config.getoption("--full") else "QUICK")
        metafunc.parametrize("case", cases, ids=str)
    if "variant" in metafunc.fixturenames:
        variants = step_variants(metafunc.config.getoption("--device"))[1:]
        metafunc.parametrize("variant", variants, ids=lambda variant: variant.name.replace(" ", "-"))
    if "opponent" in metafunc.fixturenames and hasattr(metafunc.module, "opponents"):
        opponents = metafunc.module.opponents(metafunc.config.getoption("--full"))
        metafunc.parametrize("opponent", opponents, ids=lambda one: str(one).replace(", ", "+").replace(" ", "-"))


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


@pytest.fixture
def rounds(request: pytest.FixtureRequest, full: bool) -> int:
    return request.config.getoption("--rounds") or (7 if full else 3)


@pytest.fixture
def recorder(request: pytest.FixtureRequest, full: bool, device: str) -> Recorder:
    question = request.path.stem.removeprefix("bench_")
    return Recorder(question, request.config.getoption("--results"), quick=not full, device=device)
