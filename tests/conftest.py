"""Settings of all tests: as the command line does, threads that wait without spinning; Triton's interpreter where there
is no GPU, chosen before anything loads Triton; memory that nobody has filled is poisoned;
what a ghost of a GPU needs (support/ghost.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from support import ghost_guard

ghost_guard.load()

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from support.poison import poisoned


@pytest.fixture(scope="session", autouse=True)
def poison() -> Iterator[None]:
    """For every test and fixture of the session; processes that a test starts are as a user's."""
    with poisoned():
        yield
