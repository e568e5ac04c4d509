"""Life cycles: cases by hand, and what must hold for any norms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.evolution import life_cycles, threshold_sweep
from crosscoder.evolution.strength import DEAD, EMERGENT, INITIALIZATION, OTHER

STEPS = [0, 64, 128, 256, 512]
NORMS = np.array(
    [
        [2.0, 2.0, 0.5, 1.5, 1.0],  # there from the start, dips at 128, comes back
        [0.0, 0.0, 1.0, 4.0, 4.0],  # 1/4 is not above 0.3: born at 256; the later of two peaks
        [0.0, 1.0, 0.0, 1.0, 1.0],  # a single snapshot is not a birth
        [0.0, 0.0, 0.0, 0.0, 3.0],  # the last snapshot needs no next one
        [0.0, 3.0, 3.0, 0.0, 0.0],  # dies at 256
        [0.0, 0.0, 5.0, 0.0, 0.0],  # never twice in a row
        [0.0, 0.0, 0.0, 0.0, 0.0],  # no decoder at all
        [1.0, 0.0, 0.0, 0.0, 0.0],  # there at the start only
        [9.0, 9.0, 9.0, 9.0, 9.0],  # declared dead below
    ]
)
ALIVE = [True] * 8 + [False]


def test_cases_by_hand() -> None:
    cycles = life_cycles(NORMS, STEPS, alive_F=ALIVE)
    emergent, initial = EMERGENT, INITIALIZATION
    assert cycles.kind.tolist() == [
        initial, emergent, emergent, emergent, emergent, OTHER, DEAD, initial, DEAD,
    ]  # fmt: skip
    assert cycles.emergence.tolist() == [0, 3, 3, 4, 1, -1, -1, 0, -1]
    assert cycles.peak.tolist() == [1, 4, 4, 4, 2, 2, 4, 0, 4]
    assert cycles.death.tolist() == [-1, -1, -1, -1, 3, 3, -1, 1, -1]
    assert cycles.revived.tolist() == [True, False, True, False, False, False, False, False, False]
    assert cycles.lifetime.tolist() == pytest.approx([0.8, 0.4, 0.6, 0.2, 0.4, 0.2, 0, 0.2, 0])
    assert cycles.births.tolist() == [0, 1, 0, 2, 1]
    assert cycles.deaths.tolist() == [0, 1, 0, 2, 0]
    assert cycles.n_by_kind == {"initialization": 2, "emergent": 4, "dead": 2, "other": 1}
    assert cycles.relative[1].tolist() == [0, 0, 0.25, 1, 1]
    # From 1 before and 0.75 after down to 0.25: a third of 0.75 is left.
    assert cycles.dip[0] == pytest.approx(2 / 3)
    assert cycles.dip[5] != cycles.dip[5]  # nothing before and after to compare with
    assert np.isnan(cycles.births_per_log_step[0])
    assert cycles.births_per_log_step[3] == pytest.approx(2 / np.log10(257 / 129))


def test_without_step_0_nothing_is_an_initialization_feature() -> None:
    cycles = life_cycles([[1.0, 1.0, 1.0]], [1, 2, 4])
    assert cycles.kind.tolist() == [EMERGENT]
    assert cycles.emergence.tolist() == [0]
    assert np.isnan(cycles.dip).all()


def test_sharedness() -> None:
    cycles = life_cycles([[2.0, 2.0, 2.0, 2.0], [0.0, 5.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]], [0, 1, 2, 4])
    assert cycles.sharedness.tolist() == pytest.approx([1.0, 0.0, 0.5])
    assert life_cycles([[3.0]], [0]).sharedness.tolist() == [1.0]


def test_threshold_sweep() -> None:
    sweep = threshold_sweep(NORMS, STEPS, (0.2, 0.3), alive_F=ALIVE)
    assert sweep.n_by_kind.tolist() == [[2, 4, 2, 1], [2, 4, 2, 1]]
    assert sweep.same_emergence.tolist() == pytest.approx([6 / 7, 1.0])  # feature 1: 1/4 is above 0.2
    assert sweep.births.tolist() == [[0, 1, 1, 1, 1], [0, 1, 0, 2, 1]]


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match=r"\[0, 1\)"):
        life_cycles(NORMS, STEPS, threshold=1.0)
    with pytest.raises(DataError, match="increase strictly"):
        life_cycles(NORMS, [0, 2, 2, 3, 4])
    with pytest.raises(DataError, match="do not match 4 snapshots"):
        life_cycles(NORMS, STEPS[:4])
    with pytest.raises(DataError, match="alive_F"):
        life_cycles(NORMS, STEPS, alive_F=[True])
    broken = NORMS.copy()
    broken[3, 2] = np.nan
    with pytest.raises(NonFiniteError, match="feature 3 at step 128"):
        life_cycles(broken, STEPS)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, (6, 5), elements=st.floats(0, 1e6)), st.floats(0, 0.9))
def test_invariants(norms: np.ndarray, threshold: float) -> None:
    cycles = life_cycles(norms, STEPS, threshold=threshold)
    alive = cycles.alive
    assert (alive == (norms.max(axis=1) > 0)).all()
    assert cycles.present[alive, cycles.peak[alive]].all()
    born = cycles.emergence >= 0
    assert cycles.present[born, cycles.emergence[born]].all()
    assert ((cycles.lifetime > 0) == alive).all()
    gone = cycles.death >= 0
    assert all(
        not cycles.present[f, d:].any() and cycles.present[f, d - 1]
        for f, d in zip(np.flatnonzero(gone), cycles.death[gone], strict=True)
    )
    assert cycles.births.sum() == cycles.n_by_kind["emergent"]
    assert cycles.deaths.sum() == gone.sum()
    shared = cycles.sharedness[alive]
    assert ((shared >= 0) & (shared <= 1 + 1e-6)).all()
    doubled = life_cycles(norms * 2, STEPS, threshold=threshold)  # a power of two: exact
    assert (doubled.kind == cycles.kind).all() and (doubled.emergence == cycles.emergence).all()
