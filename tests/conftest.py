"""Settings of all tests: as the command line does, threads that wait without spinning; Triton's interpreter where there
is no GPU, chosen before anything loads Triton; memory that nobody has filled is poisoned; the workers of `pytest -n N`
share the cores; what a ghost of a GPU needs (support/ghost.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // WORKERS)))

from support import ghost_guard

ghost_guard.load()

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from support.poison import poisoned


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker that has no tests left takes some of another's; till then it has whole files, so fixtures are shared."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first in workers: at the end there are quick ones to share out, and none waits long for another."""
    if WORKERS > 1:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def poison() -> Iterator[None]:
    """For every test and fixture of the session; processes that a test starts are as a user's."""
    with poisoned():
        yield
