"""Commands that start within milliseconds, in one process for each file of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faults.forking import Forks


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("logs")) as running:
        yield running
