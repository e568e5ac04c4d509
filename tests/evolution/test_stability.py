"""Matching two dictionaries: against the Hungarian method, on copies, and on dictionaries with nothing in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution import compare_dictionaries, match_features, matching, stability
from crosscoder.evolution.planted import PlantedConfig, PlantedDictionary


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["float32", "bfloat16"])
def in_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, searched in either dtype: what is found must not depend on it."""
    monkeypatch.setenv("CROSSCODER_GEMM_DTYPE", request.param)
    monkeypatch.setattr(matching, "BLOCK", 17)
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 7)


@pytest.mark.parametrize("shape", [(90, 90), (60, 90), (90, 60)])
@pytest.mark.usefixtures("in_blocks")
def test_equals_the_hungarian_method(shape: tuple[int, int]) -> None:
    first, second = random((shape[0], 2, 5), 1), random((shape[1], 2, 5), 2)  # five dimensions: many are alike
    cosine = torch.nn.functional.normalize(first[:, 1], dim=1) @ torch.nn.functional.normalize(second[:, 1], dim=1).T
    allowed = np.where(cosine >= 0.5, cosine, 0)
    rows, columns = linear_sum_assignment(allowed, maximize=True)
    best = allowed[rows, columns].sum()

    found = match_features(first, second, candidates=90)
    assert found.n_cut == 0 and found.loss == 0
    assert found.cosine.sum() == pytest.approx(best, abs=1e-4)
    paired = np.flatnonzero(found.match >= 0)
    assert len(np.unique(found.match[paired])) == len(paired) > 40
    np.testing.assert_allclose(found.cosine[paired], cosine[paired, found.match[paired]], atol=1e-6)
    assert (found.cosine[paired] >= 0.5).all()
    np.testing.assert_allclose(found.nearest, cosine.amax(dim=1), atol=1e-6)

    rows, columns = linear_sum_assignment(cosine.clamp_min(0).numpy(), maximize=True)
    full = match_features(first, second)
    assert (full.candidates, full.loss, full.n_cut) == (0, 0, 0)
    assert full.cosine.sum() == pytest.approx(float(cosine[rows, columns].sum()), abs=1e-4)
    paired = np.flatnonzero(full.match >= 0)
    assert len(np.unique(full.match[paired])) == len(paired) == min(shape)
    np.testing.assert_allclose(full.nearest, found.nearest, atol=1e-6)

    for n in (1, 2, 4):
        cut = match_features(first, second, candidates=n)
        lost = (best - cut.cosine.sum()) / min(shape)
        assert cut.n_cut == ((cosine >= 0.5).sum(dim=1) > n).sum() > 0
        assert lost - 1e-6 <= cut.loss < 0.95
        assert lost > (0.01 if n == 1 else -1e-6)
        # Of each row no more than the n nearest.
        for f in np.flatnonzero(cut.match >= 0):
            assert cosine[f, cut.match[f]] >= cosine[f].sort().values[-n] - 1e-6


@pytest.mark.usefixtures("in_blocks")
def test_candidates_and_loss_are_exact() -> None:
    """Families of features of which many are as near as the floor and as the last candidate, up to bf16's error."""
    family = torch.arange(120) // 12
    centres = random((10, 24), 1)[family]
    first, second = (centres + 0.9 * random((120, 24), seed) for seed in (2, 3))
    units = [torch.nn.functional.normalize(one, dim=1) for one in (first, second)]
    cosine = (units[0] @ units[1].T).numpy()
    assert ((np.abs(cosine - 0.5) < matching.SLACK).sum(axis=1) > 0).sum() > 40, "worth testing"
    n = 3
    pairs = matching._Pairs(*units)
    near = matching._search(pairs, n)
    allowed = np.where(cosine >= 0.5, cosine, -1)
    order = np.argsort(-allowed, axis=1, kind="stable")[:, :n]
    expected = {(f, int(g)) for f in range(120) for g in order[f] if allowed[f, g] >= 0.5}
    assert set(zip(near.rows.tolist(), near.columns.tolist(), strict=True)) == expected
    assert (near.cut_A == ((cosine >= 0.5).sum(axis=1) > n)).all() and 20 < near.cut_A.sum() < 120
    np.testing.assert_allclose(near.nearest_A, cosine.max(axis=1), atol=1e-6)

    match_A, cosine_A = matching._assign(near, (120, 120))
    prices = matching._prices(near, match_A, cosine_A, 120)
    dual = prices.sum() + np.where(cosine >= 0.5, cosine - prices, 0).max(axis=1).sum()
    found = match_features(first[:, None], second[:, None], candidates=n)
    assert found.loss == pytest.approx((dual - cosine_A.sum()) / 120, abs=1e-6) and found.loss > 0.02


def test_random_directions_are_not_the_dictionary_that_the_seed_drew() -> None:
    drawn = random((400, 1, 48), 3)
    found = compare_dictionaries(drawn, drawn, np.zeros(400), np.zeros(400), seed=3)
    assert found.share_stable == 1 and found.share_stable_null == 0


def test_random_directions_are_compared_with_some_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "NULL_FEATURES", 40)
    first, second = random((300, 1, 8), 1), random((200, 1, 8), 2)
    found = compare_dictionaries(first, second, np.zeros(300), np.zeros(200))
    known = np.isfinite(found.nearest_null)
    assert known.sum() == 40 and known[40:].any()
    assert found.share_stable_null == pytest.approx((found.nearest_null[known] >= 0.7).mean()) and found.n_first == 300


def test_a_permuted_copy_is_matched_exactly() -> None:
    truth = PlantedDictionary(PlantedConfig(n_features=100, l0=4.0))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(random((64, 64), 3)).Q
    first = truth.decoders() @ rotation
    second = (first * 3)[order] + 0.01 * random((100, 8, 64), 4)
    there = truth.present[:, -1]
    found = compare_dictionaries(
        first,
        second,
        truth.emergence,
        truth.emergence[order],
        take_first=there,
        take_second=there[order],
    )
    assert found.n_first == found.n_second == there.sum() < 100
    assert (order.numpy()[found.matching.match[there]] == np.flatnonzero(there)).all()
    assert (found.matching.match[~there] == -1).all() and np.isnan(found.matching.nearest[~there]).all()
    again = match_features(first, second, take_first=there, take_second=there[order], candidates=3)
    assert (again.match == found.matching.match).all()
    assert found.share_stable == 1 and found.share_stable_null == 0 and (found.share_at[:-1] == 1).all()
    assert found.n_pairs == there.sum() and found.n_pairs_emerging == (there & (truth.emergence > 0)).sum()
    assert found.emergence_correlation == pytest.approx(1) and found.emergence_same == found.emergence_within_one == 1
    assert found.emergence_p == 1 / 501
    assert found.emergence_same_null < 0.5 and found.emergence_same_emerging_null < found.emergence_same_null


def test_agreement_of_emergence_by_hand() -> None:
    W_dec = torch.eye(6)[:, None, :].expand(6, 6, 6)
    found = compare_dictionaries(W_dec, W_dec, [0, 0, 0, 2, 3, -1], [0, 0, 1, 2, 5, 4])
    assert (found.n_pairs, found.n_pairs_emerging) == (5, 3)
    assert found.emergence_same == pytest.approx(3 / 5) and found.emergence_within_one == pytest.approx(4 / 5)
    assert found.emergence_same_emerging == pytest.approx(1 / 3)
    assert found.emergence_within_one_emerging == pytest.approx(2 / 3)
    assert {(own, other): n for (own, other), n in np.ndenumerate(found.emergence_pairs) if n} == {
        (0, 0): 2, (0, 1): 1, (2, 2): 1, (3, 5): 1,
    }  # fmt: skip


def test_nothing_in_common_is_chance() -> None:
    first, second = random((300, 1, 48), 1), random((300, 1, 48), 2)
    found = compare_dictionaries(first, second, np.zeros(300), np.zeros(300))
    assert found.share_stable == found.share_stable_null == 0 and found.n_pairs == 0
    assert found.nearest_median == pytest.approx(found.nearest_median_null, abs=0.03)
    assert np.median(found.nearest_null) == pytest.approx(found.nearest_median_null)
    assert np.isnan(found.emergence_correlation) and np.isnan(found.emergence_same)
    # In a narrow cone directions are alike without being the same: the null knows.
    cone = torch.ones(48) * 1.5
    found = compare_dictionaries(first + cone, second + cone, np.zeros(300), np.zeros(300), candidates=300)
    assert found.share_stable > 0.9
    assert found.nearest_median == pytest.approx(found.nearest_median_null, abs=0.05)
    assert found.share_stable_null > 0.9


def test_empty_and_zero() -> None:
    nobody = np.zeros(5, dtype=bool)
    found = compare_dictionaries(torch.zeros(5, 2, 3), torch.ones(4, 2, 3), np.zeros(5), np.zeros(4))
    assert found.n_first == 0 and (found.matching.match == -1).all() and np.isnan(found.share_stable)
    found = compare_dictionaries(torch.ones(5, 2, 3), torch.ones(5, 2, 3), nobody, nobody, take_second=nobody)
    assert found.n_second == 0 and (found.matching.match == -1).all()


def test_bad_input() -> None:
    W_dec = torch.ones(4, 2, 3)
    with pytest.raises(DataError, match="differ in snapshots or width"):
        match_features(W_dec, torch.ones(4, 3, 3))
    with pytest.raises(ConfigError, match="snapshot 2 does not exist"):
        match_features(W_dec, W_dec, snapshot=2)
    with pytest.raises(ConfigError, match="candidates"):
        match_features(W_dec, W_dec, candidates=-1)
    with pytest.raises(DataError, match="mask of the second"):
        match_features(W_dec, W_dec, take_second=[True])
    with pytest.raises(DataError, match="emergence"):
        compare_dictionaries(W_dec, W_dec, np.zeros(4), np.zeros(5))
    with pytest.raises(DataError, match="between -1 and 1"):
        compare_dictionaries(W_dec, W_dec, np.zeros(4), np.full(4, 2))
