"""Settings of all tests: as the command line does, threads that wait without spinning; Triton's interpreter where there
is no GPU, chosen before anything loads Triton; memory that nobody has filled is poisoned; the workers of `pytest -n N`
share the cores; what a ghost of a GPU needs (support/ghost.py)."""

from __future__ import annotations

import itertools
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
    """Each worker gets an equal part of the list, and later tests from the end of another's that it has not begun."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each worker's part begins with slow tests, file by file: in the end quick ones are left to share out."""
    if WORKERS == 1:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    parts: list[list[pytest.Item]] = [[] for _ in range(WORKERS)]
    for number, (_, tests) in enumerate(itertools.groupby(slow, key=lambda item: item.path)):
        parts[number % WORKERS] += tests
    for part in parts:
        room = max(0, len(items) // WORKERS - len(part))
        part.extend(quick[:room])
        del quick[:room]
    items[:] = [item for part in parts for item in part] + quick


@pytest.fixture(scope="session", autouse=True)
def poison() -> Iterator[None]:
    """For every test and fixture of the session; processes that a test starts are as a user's."""
    with poisoned():
        yield
