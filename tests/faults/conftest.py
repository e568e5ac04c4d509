"""A process that commands are forked from, and runs made by them, once a session."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.forking import Forks
from faults.tiny_run import EVOLVE, TRAIN, make_inputs, make_run

from crosscoder.evolution.analyses import analyses


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """A folder with a run that is trained and evaluated."""
    folder = tmp_path_factory.mktemp("base")
    make_inputs(folder)
    make_run(folder, forks)
    return folder


@pytest.fixture(scope="session")
def evolved(base: Path, tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """The same with the analyses that a page needs, beside another run of the same activations."""
    needed = [one.name for one in analyses() if one.required]
    folder = tmp_path_factory.mktemp("evolved")
    for name in ("run", "other"):
        shutil.copytree(base / "run", folder / name)
    forks.run(folder, "evolve", "run", *EVOLVE, "--only", *needed)
    forks.run(folder, "train", "other", *TRAIN, "--seed", 1, "--no-resume")
    forks.run(folder, "evolve", "other", "--only", "life")
    return folder
