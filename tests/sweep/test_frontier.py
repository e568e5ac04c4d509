"""Frontiers of explained variance against L0 at common L0."""

from __future__ import annotations

import numpy as np
import pytest

from crosscoder.errors import DataError
from crosscoder.sweep import result_tables as tables
from crosscoder.sweep.frontier import Frontier, compare


def test_interpolation_is_linear_in_log_l0_and_never_beyond_the_points() -> None:
    frontier = Frontier.of([16, 4, 1], [0.9, 0.7, 0.5])
    np.testing.assert_allclose(frontier.at(np.array([1.0, 2.0, 4.0, 8.0, 16.0])), [0.5, 0.6, 0.7, 0.8, 0.9])
    for outside in (0.9, 17.0):
        with pytest.raises(DataError, match="not beyond"):
            frontier.at(np.array([2.0, outside]))


def test_points_that_another_dominates_are_not_of_the_frontier() -> None:
    frontier = Frontier.of([4, 2, 3, 8, 8, 16], [0.6, 0.5, 0.4, 0.7, 0.8, 0.8])
    assert frontier.l0_P.tolist() == [2, 4, 8] and frontier.explained_P.tolist() == [0.5, 0.6, 0.8]


def test_a_point_without_active_features_is_left_out() -> None:
    frontier = Frontier.of([0.0, 8.0, 2.0], [0.0, 0.8, 0.6])
    assert frontier.l0_P.tolist() == [2.0, 8.0] and frontier.explained_P.tolist() == [0.6, 0.8]


def test_methods_are_compared_only_where_all_overlap() -> None:
    a = [Frontier.of([1, 16], [0.5, 0.9]), Frontier.of([2, 32], [0.5, 0.9])]
    b = [Frontier.of([1, 8], [0.4, 0.7]), Frontier.of([1, 64], [0.4, 1.0])]
    found = compare({"a": a, "b": b}, n=3)
    np.testing.assert_allclose(found.l0_G, [2, 4, 8])
    np.testing.assert_allclose(found.explained_SG["a"], [[0.6, 0.7, 0.8], [0.5, 0.6, 0.7]])
    np.testing.assert_allclose(found.explained_SG["b"], [[0.5, 0.6, 0.7], [0.5, 0.6, 0.7]])
    np.testing.assert_allclose(found.difference("a", "b"), [[0.1, 0.1, 0.1], [0, 0, 0]], atol=1e-12)
    apart = compare({"a": a, "b": [Frontier.of([40, 50], [0.1, 0.2])] * 2})
    assert len(apart.l0_G) == 0 and apart.explained_SG["a"].shape == (2, 0)
    assert len(compare({"a": a, "b": [Frontier.of([], [])] * 2}).l0_G) == 0


def table(rows: list[tuple[str, int, float, float, float | None, float | None]]) -> tables.Columns:
    names = ("method", "seed", "explained_variance_last", "l0_last", "explained_variance", "l0")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return {**columns, "n_features": [64] * len(rows)}


def test_the_table_of_common_l0_pairs_the_seeds() -> None:
    rows: list[tuple[str, int, float, float, float | None, float | None]] = []
    for seed, lead in ((0, 0.1), (1, 0.3)):
        for l0, explained in ((2.0, 0.4), (8.0, 0.6)):
            rows += [("crosscoder", seed, explained + lead, l0, explained + lead, l0)]
            rows += [("sae", seed, explained, l0, None, None), ("chain", seed, explained, l0, explained - lead, l0)]
    rows.append(("sae", 7, 0.0, 2.0, None, None))  # a seed that the others lack does not count
    found = tables.at_common_l0(table(rows))
    sae = [i for i, method in enumerate(found["method"]) if method == "sae"]
    assert {found["scope"][i] for i in sae} == {"last"}, "an SAE of one snapshot says nothing about all"
    assert len(sae) == 5 and found["seeds"] == [2] * len(found["seeds"])
    np.testing.assert_allclose([found["explained_variance"][i] for i in sae], [0.4, 0.45, 0.5, 0.55, 0.6])
    for name, value in (("crosscoder_lead", 0.2), ("lowest_lead", 0.1), ("highest_lead", 0.3)):
        np.testing.assert_allclose([found[name][i] for i in sae], value)
    chain = [i for i in range(len(found["l0"])) if (found["method"][i], found["scope"][i]) == ("chain", "all")]
    np.testing.assert_allclose([found["crosscoder_lead"][i] for i in chain], 0.4)


def test_an_overlap_that_is_empty_gives_no_rows() -> None:
    rows: list[tuple[str, int, float, float, float | None, float | None]] = [
        ("crosscoder", 0, 0.5, 1.0, 0.5, 1.0),
        ("crosscoder", 0, 0.6, 2.0, 0.6, 2.0),
        ("sae", 0, 0.5, 3.0, None, None),
        ("sae", 0, 0.6, 4.0, None, None),
    ]
    assert tables.at_common_l0(table(rows))["l0"] == []
