"""A whole run: flipped bits of every file, and hostile content of every kind of file, are noticed by what reads it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bit_flips import FAULTS, copied, files_of, flip
from hostile_files import try_all
from whole_run import build_quietly

pytestmark = pytest.mark.slow
FLIPS = 1200
RECORDS = ("training.json", "checkpoints/*", "snapshots.json", "summary.json", "metrics.jsonl", "manifest.json", ".npz")
"""Files of which every bit counts."""
NOT_READ = {".csv", ".html", ".md", ".svg", ".lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    build_quietly(folder)
    return folder


def test_flipped_bits_are_noticed(whole: Path) -> None:
    with copied(whole) as folder:
        files, unread = files_of(folder)
        before = {path: path.read_bytes() for path in files}
        tallies = flip(folder, files, FLIPS, 0, lambda line: None)
        assert all(path.read_bytes() == data for path, data in before.items())
    assert {Path(name).suffix or Path(name).name for name in unread} <= NOT_READ, "something reads every other file"
    faults = [line for tally in tallies.values() for lines in tally.examples.values() for line in lines]
    assert not faults, "\n".join(faults)
    outcomes: Counter[str] = Counter()
    for pattern, tally in tallies.items():
        outcomes += tally.outcomes
        if pattern.endswith(RECORDS):
            assert set(tally.outcomes) == {"refused"}, pattern
    assert outcomes.total() == FLIPS and outcomes["refused"] > 0.6 * FLIPS
    assert set(FAULTS).isdisjoint(outcomes)


@pytest.mark.parametrize("only", ["/snapshots.json", "/config/train.yaml", "/training.json", "/life.npz"])
def test_hostile_content_is_refused_by_name(whole: Path, only: str) -> None:
    with copied(whole) as folder:
        tallies = try_all(folder, files_of(folder, only)[0])
    faults = [line for tally in tallies.values() for lines in tally.examples.values() for line in lines]
    assert tallies and not faults, "\n".join(faults)
