"""Types of features whose rules are known, the controls, and the comparison of emergence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from evolution import planted_types as planted
from hypothesis import given
from hypothesis import strategies as st

from crosscoder.activations.tokens import TokenSet
from crosscoder.common.statistics import kruskal_wallis, mann_whitney
from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution.analyses.types import TypesResult, summary
from crosscoder.evolution.positions import Places, Positions, collect_positions
from crosscoder.evolution.reading import Pairs
from crosscoder.evolution.types import (
    CONTEXT_SENSITIVE,
    INDUCTION,
    OTHER,
    PREVIOUS_TOKEN,
    SINGLE_TOKEN,
    TYPE_NAMES,
    UNJUDGED,
    FeatureTypes,
    InductionResponse,
    emergence_by_type,
    feature_types,
    induction_responses,
    modal,
)

NAMES = list(planted.RULES)
LENGTH = 20


@pytest.fixture(scope="module")
def tokens() -> TokenSet:
    return planted.text()


@pytest.fixture(scope="module")
def positions(tokens: TokenSet) -> Positions:
    h = planted.activations(tokens.ids.astype(np.int64))
    return collect_positions(planted.batches(h, tokens.ids, 16), planted.F, tokens)


@pytest.fixture(scope="module")
def responses() -> tuple[InductionResponse, InductionResponse]:
    return induction_responses(planted.read, planted.F, planted.RARE, length=LENGTH)


@pytest.fixture(scope="module")
def found(
    positions: Positions, tokens: TokenSet, responses: tuple[InductionResponse, InductionResponse]
) -> FeatureTypes:
    return feature_types(positions, tokens, *responses)


def test_every_planted_feature_has_its_type(found: FeatureTypes) -> None:
    types = {name: TYPE_NAMES[code] for name, code in zip(NAMES, found.type, strict=True)}
    assert types == {name: kind for name, (_, kind) in planted.RULES.items()}
    assert sum(found.n_by_type.values()) == planted.F and found.n_by_type["induction"] == 2
    of = NAMES.index
    assert found.token[of("token 7")] == 7 and found.token_share[of("token 7")] == 1
    assert found.previous[of("after 9")] == 9 and found.previous_share[of("after 9")] == 1
    assert found.passage_share[of("theme")] == pytest.approx(3 / planted.S)
    assert found.most_in_passage[of("theme")] == planted.C - 1
    assert found.n_positions[of("rare")] == 5 and not found.judged[of("rare")].any()
    assert found.token[of("never")] == -1 and found.token_share[of("never")] == 0
    # What is not active on random tokens is not judged by the rule of induction, and has a type all the same.
    assert not found.judged[of("theme"), INDUCTION] and found.judged[of("theme"), CONTEXT_SENSITIVE]


def test_features_that_only_know_a_token_again_do_not_fall(found: FeatureTypes) -> None:
    response, again, late = found.induction, NAMES.index("token again"), NAMES.index("late")
    for feature in (again, late):
        assert response.second[feature] >= 3 * response.first[feature] and response.judged[feature]
        assert response.broken[feature] == pytest.approx(response.second[feature])
    check = NAMES.index("checksum")
    assert response.broken[check] < 0.5 * response.second[check], "it falls, but is no more active the second time"
    assert response.second[check] < 2 * response.first[check]


def test_controls_make_no_false_calls_here_and_would_show_them(
    found: FeatureTypes,
    positions: Positions,
    tokens: TokenSet,
    responses: tuple[InductionResponse, InductionResponse],
) -> None:
    assert (found.control == 0).all()
    judged = planted.F - 2
    assert found.n_control.tolist() == [judged, judged, responses[1].judged.sum(), judged]
    swapped = feature_types(positions, tokens, responses[0], responses[0])
    assert swapped.control[INDUCTION] == 2 / responses[0].judged.sum()
    level = InductionResponse(*(vars(responses[0])[name] for name in ("second", "second", "second", "active")))
    assert feature_types(positions, tokens, responses[0], level).control[INDUCTION] == 0
    one_word = TokenSet(np.full_like(tokens.ids, 7), tokens.document, tokens.names, "none")
    same = feature_types(positions, one_word, *responses)
    assert same.control[SINGLE_TOKEN] == 1 and same.control[PREVIOUS_TOKEN] == 0


def test_control_of_context_scatters_the_active_tokens(
    tokens: TokenSet, responses: tuple[InductionResponse, InductionResponse]
) -> None:
    n = planted.F
    places = Places(
        value=np.ones((n, 30), dtype=np.float32),
        sequence=np.zeros((n, 30), dtype=np.int32),
        position=np.tile(np.arange(1, 31, dtype=np.int32), (n, 1)),
    )

    def control(sizes: list[int]) -> float:
        passages = np.array(sizes, dtype=np.int32)
        at = Positions(
            n_tokens=int(passages.sum()),
            fired=np.full(n, 30),
            strongest=places,
            sampled=places,
            passages=np.ones(n, dtype=np.int64),
            most_in_passage=np.full(n, 30),
            passage_sizes=passages,
        )
        types = feature_types(at, tokens, *responses)
        assert types.judged[:, CONTEXT_SENSITIVE].all() == (len(sizes) > 20)
        return float(types.control[CONTEXT_SENSITIVE])

    assert control([100] * 40) == 0
    assert control([10**6] + [1] * 39) == 1, "one passage is nearly all of the text"
    assert np.isnan(control([100] * 20)), "one passage of 20 is 5 % already: nothing could pass"


@given(st.lists(st.lists(st.integers(-1, 4), min_size=6, max_size=6), min_size=1, max_size=5))
def test_modal_token(rows: list[list[int]]) -> None:
    token, share = modal(np.array(rows, dtype=np.int32), np.full(len(rows), 6))
    for row, t, p in zip(rows, token, share, strict=True):
        counts = {v: row.count(v) for v in row if v >= 0}
        assert p == max(counts.values(), default=0) / 6
        assert t == min((v for v in counts if counts[v] == max(counts.values())), default=-1)


def at_share(share: int, of: int, tokens: TokenSet) -> tuple[Positions, TokenSet]:
    """One feature at `of` positions, `share` of which hold token 7, all others different tokens after token 9."""
    ids = np.arange(1000, 1000 + tokens.ids.size, dtype=np.int32).reshape(tokens.ids.shape)
    ids[:, 1::2] = 9
    ids[:share, 2] = 7
    text = TokenSet(ids, tokens.document, tokens.names, "none")
    h = np.zeros((*ids.shape, 1), dtype=np.float32)
    h[:of, 2] = 1
    return collect_positions(planted.batches(h, ids, 50), 1, text), text


@pytest.mark.parametrize(
    ("share", "of", "kind"),
    [
        (40, 50, SINGLE_TOKEN),
        (39, 50, OTHER),
        (25, 50, OTHER),
        (24, 50, PREVIOUS_TOKEN),
        (20, 20, SINGLE_TOKEN),
        (19, 19, UNJUDGED),
    ],
)
def test_the_shares_at_which_types_change(share: int, of: int, kind: int, tokens: TokenSet) -> None:
    silent = InductionResponse(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1, dtype=np.int64))
    assert feature_types(*at_share(share, of, tokens), silent, silent).type.tolist() == [kind]


def test_induction_reads_repeated_reordered_and_unrelated_halves() -> None:
    seen: list[np.ndarray] = []

    def read(ids: list[np.ndarray], kept: int) -> list[Pairs]:
        assert kept == 2 * LENGTH
        seen.extend(ids)
        return planted.read(ids, kept)

    induction_responses(read, planted.F, 41, length=LENGTH, n_sequences=30, end_of_text=5)
    repeated, broken, unrelated, unrelated_broken = seen
    a, b = repeated[:, :LENGTH], unrelated[:, LENGTH:]
    assert (repeated[:, LENGTH:] == a).all() and (broken[:, LENGTH:] == a).all()
    assert (unrelated[:, :LENGTH] == a).all() and (unrelated_broken[:, LENGTH:] == b).all()
    assert (broken[:, :LENGTH] == unrelated_broken[:, :LENGTH]).all()
    for whole, other, said in zip(a, b, broken[:, :LENGTH], strict=True):
        assert sorted(whole) == sorted(said) and len({*whole, *other}) == 2 * LENGTH
        following = set(zip(whole.tolist(), whole[1:].tolist(), strict=False))
        assert not following & set(zip(said.tolist(), said[1:].tolist(), strict=False))
    assert set(np.unique(repeated)) | set(np.unique(b)) == set(range(41)) - {5}


def test_induction_means_by_definition(responses: tuple[InductionResponse, InductionResponse]) -> None:
    texts: list[np.ndarray] = []
    again = induction_responses(
        lambda ids, kept: texts.extend(ids) or planted.read(ids, kept),  # type: ignore[func-returns-value]
        planted.F,
        planted.RARE,
        length=LENGTH,
    )
    for intact, broken, response in ((0, 1, responses[0]), (2, 3, responses[1])):
        h, h_broken = (planted.activations(texts[at]).astype(np.float64) for at in (intact, broken))
        second = h[:, LENGTH + 1 :]
        np.testing.assert_allclose(response.first, h[:, 1:LENGTH].mean(axis=(0, 1)), rtol=1e-6)
        np.testing.assert_allclose(response.second, second.mean(axis=(0, 1)), rtol=1e-6)
        left = np.where(second > 0, h_broken[:, LENGTH + 1 :], 0)
        np.testing.assert_allclose(response.broken, left.mean(axis=(0, 1)), rtol=1e-6)
        assert (response.active == (second > 0).sum(axis=(0, 1))).all()
    for one, two in zip(again, responses, strict=True):
        assert all((vars(one)[name] == vars(two)[name]).all() for name in vars(one))


def test_emergence_by_type() -> None:
    steps = [0, 1, 10, 100, 1000]
    rng = np.random.default_rng(0)
    kind = np.repeat([SINGLE_TOKEN, PREVIOUS_TOKEN, INDUCTION, CONTEXT_SENSITIVE, UNJUDGED], [60, 40, 3, 50, 30])
    emergence = np.concatenate(
        [
            rng.choice(2, 60),
            rng.choice([1, 2], 40),
            [4, 4, 4],
            rng.choice([-1, 3, 4], 50),
            rng.choice(5, 30),
        ]
    )
    found = emergence_by_type(kind, emergence, steps)
    born = int((emergence[kind == CONTEXT_SENSITIVE] >= 0).sum())
    assert found.n.tolist() == [60, 40, 3, born, 0, 30]
    assert found.counts.sum(axis=1).tolist() == found.n.tolist() and found.counts[INDUCTION].tolist() == [0, 0, 0, 0, 3]
    assert found.median[INDUCTION] == 1000 and np.isnan(found.median[OTHER])
    assert found.median_low[PREVIOUS_TOKEN] <= found.median[PREVIOUS_TOKEN] <= found.median_high[PREVIOUS_TOKEN]
    assert found.compared.tolist() == [True, True, False, True, False, False]
    groups = [emergence[(kind == code) & (emergence >= 0)] for code in (0, 1, 3)]
    overall = kruskal_wallis(groups)
    assert (found.statistic, found.p, found.effect) == (overall.statistic, overall.p, overall.effect)
    assert found.pairs.tolist() == [[0, 1], [0, 3], [1, 3]]
    tests = [mann_whitney(groups[i], groups[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.pair_p.tolist() == [test.p for test in tests]
    assert (found.pair_holm >= found.pair_p).all() and found.pair_holm.max() < 1e-6
    assert (found.pair_effect < 0).all(), "each type emerges before the next"


def test_types_that_do_not_differ() -> None:
    rng = np.random.default_rng(1)
    found = emergence_by_type(np.repeat([0, 1, 4], 100), rng.choice(5, 300), np.arange(5))
    assert found.p > 0.05 and found.effect < 0.02 and found.pair_holm.min() > 0.05
    alone = emergence_by_type([0] * 9, [2] * 9, np.arange(5))
    assert np.isnan(alone.p) and alone.pairs.shape == (0, 2) and alone.pair_holm.size == 0


def test_main_figures_are_json(found: FeatureTypes) -> None:
    emergence = emergence_by_type(found.type, np.zeros(planted.F, dtype=np.int64), [0, 1])
    figures = summary(TypesResult(found, emergence, emergence), [])
    types = json.loads(json.dumps(figures, allow_nan=False))["features_by_type"]
    assert types["counts"] == found.n_by_type
    assert types["rules"]["induction"] == {"judged": 6, "false_calls_in_control": 0, "control_features": 3}
    assert types["emergence"]["all"]["p"] is None and "unjudged" in types["emergence"]["all"]["by_type"]


def test_malformed_input_is_refused(
    positions: Positions, tokens: TokenSet, responses: tuple[InductionResponse, InductionResponse]
) -> None:
    short = InductionResponse(*(values[:-1] for values in vars(responses[0]).values()))
    with pytest.raises(DataError, match="the responses are of 11 features, the positions of 12"):
        feature_types(positions, tokens, short, responses[1])
    with pytest.raises(DataError, match="of another TokenSet"):
        feature_types(positions, TokenSet(tokens.ids[:5], tokens.document[:5], tokens.names, "none"), *responses)
    with pytest.raises(ConfigError, match="at least 3 tokens"):
        induction_responses(planted.read, planted.F, planted.V, length=2)
    with pytest.raises(ConfigError, match="needs 100 different tokens, the vocabulary has 99; .* at most 49"):
        induction_responses(planted.read, planted.F, planted.V, length=50)
    with pytest.raises(DataError, match="do not match emergence"):
        emergence_by_type([0, 1], [0], [0, 1])
    with pytest.raises(DataError, match="types must be 0 to 5"):
        emergence_by_type([6], [0], [0, 1])
    with pytest.raises(DataError, match="outside the 2 snapshots"):
        emergence_by_type([0], [2], [0, 1])
