"""Passages as text, tests of explanations, and what is drawn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from explain.planted_run import tokenizer

from crosscoder.explain.explanation_study import main_figures, partners, stratified_sample
from crosscoder.explain.passages import ACTIVE, LENGTH, TOP, FeatureContexts
from crosscoder.explain.scoring import HALF, Test, Texts, balanced_accuracy, make_test, readable, strongest


class Pieces:
    """Tokens 0, 1, ... are these pieces."""

    def __init__(self, *pieces: str) -> None:
        self._pieces = pieces

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self._pieces[i] for i in ids]


def passage(pieces: list[str], marked: list[int]) -> str:
    flags = np.isin(np.arange(len(pieces) + 2), np.array(marked) + 1)
    ids = np.array([-1, *range(len(pieces)), -1])
    return Texts(Pieces(*pieces), 0).passage(ids, flags)


def test_passages() -> None:
    assert passage(["The", "Ġcat", "Ġs", "at"], [1]) == "The<< cat>> sat"
    assert passage(["The", "Ġcat", "Ġs", "at"], [2, 3]) == "The cat<< s>><<at>>", "each token for itself"
    assert passage(["a", "Ċ", "b", "č", "Ċ"], []) == "a⏎b⏎"
    assert passage(["a", "<<", "b", ">>"], [2]) == "a< <<<b>>> >"
    assert passage(["▁the", "▁cat"], [0]) == "<< the>> cat"
    eur = [chr(0xE2), "Ĥ", "¬"]  # the three bytes of one character
    assert passage(["a", *eur, "b"], []) == "a€b" and passage([*eur, "b"], [0, 1, 2, 3]) == "<<€>><<b>>"
    assert passage([*eur, "b"], [0]) == "<<\\xe2>>\\x82\\xacb"
    assert readable("a" + chr(0x2028)) == "a⏎"


def test_marks_are_above_seven_tenths() -> None:
    assert strongest(np.array([0.0, 0.7, 0.71, 1.0])).tolist() == [False, False, True, True]


def contexts(n_active: int, n_silent: int = 20, dense: bool = False) -> FeatureContexts:
    """One feature, active on tokens 7 and (weakly) 8; windows tell themselves apart by their first token."""
    active = np.full((1, ACTIVE, LENGTH), 9, dtype=np.int32)
    active[..., 20], active[..., 30] = 7, 8
    active[0, :, 0] = 100 + np.arange(ACTIVE)
    activations = np.where(active == 7, 1.0, np.where(active == 8, 0.5, 0.2 if dense else 0.0)).astype(np.float32)
    pool = np.full((30, LENGTH), 9, dtype=np.int32)
    pool[:, 0] = 200 + np.arange(30)
    return FeatureContexts(
        features=np.array([4], dtype=np.int32),
        top_tokens=np.zeros((1, TOP, LENGTH), dtype=np.int32),
        top_activations=np.zeros((1, TOP, LENGTH), dtype=np.float32),
        active_tokens=active,
        active_activations=activations,
        n_active=np.array([n_active], dtype=np.int32),
        pool_tokens=pool,
        pool_silent=np.arange(30)[None] < n_silent,
    )


TEXTS = Texts(tokenizer(), 0)


def test_detection() -> None:
    test = make_test("detection", contexts(ACTIVE), 0, TEXTS, 0)
    assert isinstance(test, Test) and len(set(test.passages)) == 2 * HALF and test.truth.sum() == HALF
    assert [" w7 " in text for text in test.passages] == test.truth.tolist()
    assert not any(f"w{200 + i}" in text for text in test.passages for i in range(20, 30)), "silent ones alone"
    again, other = (make_test("detection", contexts(ACTIVE), 0, TEXTS, seed) for seed in (0, 1))
    assert isinstance(again, Test) and isinstance(other, Test)
    assert again.passages == test.passages and other.passages != test.passages
    orders = {
        tuple(t.truth) for s in range(20) if isinstance(t := make_test("detection", contexts(10), 0, TEXTS, s), Test)
    }
    assert len(orders) > 10, "shuffled"


def test_fuzzing() -> None:
    test = make_test("fuzzing", contexts(ACTIVE), 0, TEXTS, 0)
    assert isinstance(test, Test) and len(set(test.passages)) == 2 * HALF
    assert ["<< w7>>" in text for text in test.passages] == test.truth.tolist()
    assert {text.count("<<") for text in test.passages} == {1}, "as many marks in both"
    assert not any("<< w8>>" in text for text in test.passages), "wrong marks are where it is silent"
    assert all(f"w{100 + i}" in " ".join(test.passages) for i in range(ACTIVE))


def test_no_mark_on_the_end_of_a_text() -> None:
    given = contexts(ACTIVE, dense=True)
    ended = given.active_tokens.copy()
    ended[..., 3] = 0
    activations = np.where(ended == 0, 0, given.active_activations)
    given = dataclasses.replace(given, active_tokens=ended, active_activations=activations)
    assert make_test("fuzzing", given, 0, TEXTS, 0) == "it is active on every token of a passage"


@pytest.mark.parametrize(
    ("kind", "given", "reason"),
    [
        ("detection", contexts(4), "4 active and 20 silent passages, 5 of each are needed"),
        ("detection", contexts(10, 4), "10 active and 4 silent passages, 5 of each are needed"),
        ("fuzzing", contexts(9), "9 active passages, 10 are needed"),
        ("fuzzing", contexts(10, dense=True), "it is active on every token of a passage"),
    ],
)
def test_what_cannot_be_tested_says_why(kind: str, given: FeatureContexts, reason: str) -> None:
    assert make_test(kind, given, 0, TEXTS, 0) == reason


def test_balanced_accuracy() -> None:
    truth = np.array([True, True, False, False, False, False])
    assert balanced_accuracy(truth, [0, 1]) == 1.0
    assert balanced_accuracy(truth, [2, 3, 4, 5]) == 0.0
    assert balanced_accuracy(truth, []) == balanced_accuracy(truth, range(6)) == 0.5
    assert balanced_accuracy(truth, [0, 2]) == (0.5 + 0.75) / 2


def test_samples_are_even_over_strata_and_nested() -> None:
    stratum = np.repeat([0, 1, 2, 3], [100, 3, 50, 10])
    sample = stratified_sample(stratum, 24, 0)
    assert np.bincount(stratum[sample]).tolist() == [7, 3, 7, 7] and (np.diff(sample) > 0).all()
    for n in (5, 12, 23):
        assert set(stratified_sample(stratum, n, 0)) < set(sample)
    assert len(stratified_sample(stratum, 1000, 0)) == 163
    assert set(stratified_sample(stratum, 24, 1)) != set(sample)


def test_partners() -> None:
    explained = [True, False, True, True, False, True]
    other = partners(explained, 0)
    assert (other[[1, 4]] == -1).all() and sorted(other[[0, 2, 3, 5]]) == [0, 2, 3, 5]
    assert all(other[n] != n for n in range(6))
    assert partners([False, True], 0).tolist() == [-1, -1]


def test_figures_without_answers() -> None:
    names = ("consistency", "complexity", "detection", "detection_control", "fuzzing", "fuzzing_control")
    table = {"emergence": [0, 1], "missing": ["a", "b"], **{name: [float("nan")] * 2 for name in names}}
    figures = main_figures(table, 0)
    assert figures["n_explained"] == 0 and figures["complexity"] == {"mean": None, "low": None, "high": None}
    assert figures["detection"]["passed"] is None and figures["complexity_and_emergence"]["spearman_p"] is None


def test_figures_by_hand() -> None:
    table = {
        "emergence": [0, 9, 99, 999],
        "missing": [""] * 4,
        "consistency": [5.0, 4.0, 3.0, float("nan")],
        "complexity": [1.0, 2.0, 3.0, float("nan")],
        "detection": [1.0, 0.7, 0.5, 0.9],
        "detection_control": [0.5, 0.6, 0.4, float("nan")],
        "fuzzing": [1.0] * 4,
        "fuzzing_control": [0.5] * 4,
    }
    figures = main_figures(table, 0)
    assert figures["complexity"]["mean"] == 2 and figures["complexity_and_emergence"]["n"] == 3
    assert figures["complexity_and_emergence"]["pearson"] == pytest.approx(1)
    detection = figures["detection"]
    assert detection["n"] == 3 and detection["score"]["mean"] == pytest.approx(2.2 / 3)
    assert detection["difference"]["mean"] == pytest.approx(0.7 / 3)
    assert detection["passed"] == pytest.approx(2 / 3) and detection["control_passed"] == 0
