"""Probes: against the definitions, on a planted truth, and what they say where label or norm mislead."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evolution.planted_codes import planted_tokens
from torch import Tensor

from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution import (
    Probes,
    ProbeTrainer,
    area_under_curve,
    fit_probes,
    norm_honesty,
    snapshot_areas,
    stratified_sample,
)
from crosscoder.evolution.planted import PlantedConfig, PlantedDictionary


def small_truth(**changes: float) -> PlantedDictionary:
    return PlantedDictionary(
        PlantedConfig(n_snapshots=6, d_model=32, n_features=40, l0=4.0, turning_point=3, **changes)
    )  # type: ignore[arg-type]


def test_area_by_counting_pairs() -> None:
    rng = np.random.default_rng(0)
    score = rng.integers(0, 9, 60).astype(np.float32)  # many ties
    active = np.flatnonzero(rng.random(60) < 0.4)
    rest = np.setdiff1d(np.arange(60), active)
    difference = score[active][:, None] - score[rest]
    expected = ((difference > 0) + 0.5 * (difference == 0)).mean()
    assert area_under_curve(score, active) == pytest.approx(expected, abs=1e-12)
    assert area_under_curve(score, active[:10]) > 0 and np.isnan(area_under_curve(score, active[:9]))
    assert np.isnan(area_under_curve(score, np.arange(51)))


def test_a_planted_feature_is_separable_exactly_where_it_is() -> None:
    truth = small_truth(noise=0.1)
    x_BKD, a_BT = planted_tokens(truth, 6000)
    probes = fit_probes([(x_BKD, a_BT > 0)], x_BKD.mean(dim=0), 40)
    assert probes.n_tokens == 6000 and (probes.n_active == (a_BT > 0).sum(dim=0).numpy()).all()
    x_TKD, a_TT = planted_tokens(truth, 4000, seed=1)
    areas = [snapshot_areas(probes, k, x_TKD[:, k], a_TT > 0, a_TT) for k in range(6)]
    auc = np.stack([area.auc for area in areas], axis=1)
    assert np.isfinite(auc).all() and (~truth.present).sum() > 50
    assert auc[truth.present].min() > 0.97
    absent = auc[~truth.present]
    assert abs(absent.mean() - 0.5) < 0.01 and np.abs(absent - 0.5).max() < 0.12
    # h is the true activation here: without any part of the snapshot, the labels are the same.
    np.testing.assert_array_equal(auc, np.stack([area.without for area in areas], axis=1))
    shuffled, random = (np.stack([getattr(area, n) for area in areas], axis=1) for n in ("shuffled", "random"))
    assert abs(shuffled.mean() - 0.5) < 0.01 and np.abs(shuffled - 0.5).max() < 0.12
    assert 0.5 < random[truth.present].mean() < 0.75  # its sign is chosen

    found = norm_honesty(
        auc,
        truth.strengths.numpy(),
        auc_without_nK=auc,
        features_n=np.arange(40),
        weights_n=np.ones(40),
    )
    emergent = truth.emergence > 0
    assert np.nanmean(found.correlation[emergent]) > 0.6 and found.correlation_median_null < 0.3
    assert not len(found.hidden) and not len(found.hollow) and found.share_hidden == 0


def test_directions_are_the_definition_and_do_not_depend_on_batches() -> None:
    truth = small_truth()
    x_BKD, a_BT = planted_tokens(truth, 900)
    x_BKD += torch.linspace(0, 30, 32)  # a large mean
    active_Bn = (a_BT > 0)[:, :7]
    ridge = 1e-3
    results = []
    for sizes in ([900], [1, 0, 300, 37, 562]):
        trainer = ProbeTrainer(x_BKD.mean(dim=0) + 0.5, 7, seed=3)  # only about the mean
        for x, active in zip(x_BKD.split(sizes), active_Bn.split(sizes), strict=True):
            trainer.add(x, active)
        results.append(trainer.probes(ridge))
    for name in ("weights", "shuffled", "random"):
        a, b = (getattr(result, name) for result in results)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))

    x = x_BKD.double()
    moved = torch.cat([torch.zeros(1, 7, dtype=torch.bool), active_Bn[:-1]])
    for name, labels in (("weights", active_Bn), ("shuffled", moved)):
        for f in range(3):
            on, off = x[labels[:, f]], x[~labels[:, f]]
            for k in (0, 5):
                total = torch.cov(x[:, k].T, correction=0)
                within = (
                    len(on) * torch.cov(on[:, k].T, correction=0) + len(off) * torch.cov(off[:, k].T, correction=0)
                ) / 900
                within += ridge * total.diagonal().mean() * torch.eye(32)
                expected = torch.linalg.solve(within, on[:, k].mean(dim=0) - off[:, k].mean(dim=0))
                got = getattr(results[0], name)[f, k].double()
                assert torch.cosine_similarity(got, expected, dim=0) > 1 - 1e-5


def test_the_discriminant_falls_little_short_of_logistic_regression() -> None:
    truth = small_truth(noise=0.3)
    x_BKD, a_BT = planted_tokens(truth, 4000)
    x_TKD, a_TT = planted_tokens(truth, 4000, seed=1)
    probes = fit_probes([(x_BKD, a_BT > 0)], x_BKD.mean(dim=0), 40)
    rows = np.flatnonzero(truth.present[:, 5])[:2]
    areas = snapshot_areas(probes, 5, x_TKD[:, 5], a_TT > 0, a_TT)
    for f in rows:
        w = logistic(x_BKD[:, 5], a_BT[:, f] > 0)
        best = area_under_curve((x_TKD[:, 5].double() @ w).numpy(), np.flatnonzero(a_TT[:, f].numpy()))
        assert 0.8 < best < 1 and areas.auc[f] > best - 0.02


def logistic(x_BD: Tensor, y_B: Tensor, ridge: float = 1e-4) -> Tensor:
    """(D,) weights of logistic regression by L-BFGS, float64."""
    x, y = x_BD.double(), y_B.double()
    w, b = torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    parameters = [w.requires_grad_(), b.requires_grad_()]
    optimiser = torch.optim.LBFGS(parameters, max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ w + b, y) + ridge * w.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    return w.detach()


def test_a_label_that_the_snapshot_made_itself_is_seen_through() -> None:
    # Snapshot 0 is noise, yet h sums over it: the label can be read there, but not what the other snapshot says.
    generator = torch.Generator().manual_seed(0)
    x_BKD, x_TKD = torch.randn(2, 5000, 2, 8, generator=generator)
    w_D = torch.nn.functional.one_hot(torch.tensor(3), 8).float()
    h_B, h_T = x_BKD.sum(dim=1) @ w_D, x_TKD.sum(dim=1) @ w_D
    probes = fit_probes([(x_BKD, (h_B > 2)[:, None])], torch.zeros(2, 8), 1)
    without = (h_T - x_TKD[:, 0] @ w_D)[:, None]
    areas = snapshot_areas(probes, 0, x_TKD[:, 0], (h_T > 2)[:, None], without)
    assert areas.auc[0] > 0.85 and abs(areas.without[0] - 0.5) < 0.05


def test_a_snapshot_without_variance_tells_nothing() -> None:
    x = torch.ones(200, 1, 4)
    active = (torch.arange(200) % 3 == 0)[:, None]
    probes = fit_probes([(x, active)], x.mean(dim=0), 1)
    assert snapshot_areas(probes, 0, x[:, 0], active, active.float()).auc[0] == 0.5


def test_disagreements_and_weights() -> None:
    auc = np.array([[0.95, 0.99, 0.6], [0.5, 0.95, np.nan], [0.92, 0.99, 0.99]])
    relative = np.array([[0.05, 1.0, 0.5], [0.02, 1.0, 0.0], [0.1, 1.0, 0.2]])
    without = auc.copy()
    without[2, 0] = 0.8  # only its own part in the label made it separable
    found = norm_honesty(
        auc, relative, auc_without_nK=without, features_n=np.array([4, 7, 9]), weights_n=np.array([1.0, 2.0, 1.0])
    )
    assert found.hidden.tolist() == [[4, 0]] and found.hollow.tolist() == [[4, 2]]
    assert found.share_hidden == pytest.approx(1 / 4)  # weights 1, 2 and 1; the NaN does not count
    assert found.share_hollow == pytest.approx(1 / 5)
    assert found.bin_count.tolist() == [3, 1, 1, 0, 0, 3] and found.bin_count.sum() == 8
    assert found.bin_auc[0] == pytest.approx((0.95 + 2 * 0.5 + 0.92) / 4)
    assert found.correlation[2] == pytest.approx(3 / np.sqrt(12))  # ranks (1, 2.5, 2.5) and (1, 3, 2)
    assert found.correlation[1] == pytest.approx(1)


def test_the_sample_is_stratified() -> None:
    kind = np.repeat([0, 1, 1, 2], [500, 40, 3, 10])
    emergence = np.repeat([0, 4, 5, -1], [500, 40, 3, 10])
    ids, weights = stratified_sample(kind, emergence, 61, alive_F=kind != 2, seed=1)
    groups = [int(((ids >= low) & (ids < high)).sum()) for low, high in ((0, 500), (500, 540), (540, 543), (543, 553))]
    assert groups == [29, 29, 3, 0] and (np.diff(ids) > 0).all()
    assert weights.sum() == pytest.approx(543)
    assert weights[ids >= 540].tolist() == [1, 1, 1]
    everything, ones = stratified_sample(kind, emergence, 10_000, alive_F=kind != 2)
    assert everything.tolist() == list(range(543)) and (ones == 1).all()
    assert stratified_sample(kind, emergence, 61, alive_F=kind != 2, seed=2)[0].tolist() != ids.tolist()
    nothing, _ = stratified_sample(kind, emergence, 5, alive_F=np.zeros(553, dtype=bool))
    assert len(nothing) == 0


def test_bad_input() -> None:
    trainer = ProbeTrainer(torch.zeros(2, 4), 3)
    with pytest.raises(DataError, match="there was none"):
        trainer.probes()
    with pytest.raises(DataError, match=r"do not fit \(tokens, 2, 4\)"):
        trainer.add(torch.ones(5, 3, 4), torch.ones(5, 3, dtype=torch.bool))
    trainer.add(torch.ones(5, 2, 4), torch.ones(5, 3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="ridge"):
        trainer.probes(-1)
    probes: Probes = trainer.probes()
    assert torch.isfinite(probes.weights).all()
    with pytest.raises(DataError, match="do not fit 3 probes"):
        snapshot_areas(probes, 0, torch.ones(5, 4), torch.ones(5, 2, dtype=torch.bool), torch.ones(5, 2))
    with pytest.raises(DataError, match="do not match"):
        norm_honesty([[1.0]], [[1.0, 2.0]], auc_without_nK=[[1.0]], features_n=[0], weights_n=[1])
    with pytest.raises(ConfigError, match="at least 1"):
        stratified_sample([0], [0], 0, alive_F=[True])
    with pytest.raises(DataError, match="alike"):
        stratified_sample([0, 1], [0], 5, alive_F=[True])
