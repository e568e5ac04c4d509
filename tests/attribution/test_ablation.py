"""Ablation curves: what an ablated feature becomes, controls, sizes, the smallest sufficient set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attribution import small

from crosscoder.attribution.ablation import Ablator, curves, equally_active, grid, matched_random
from crosscoder.attribution.coding import CodedTask, PromptActivations, code_task
from crosscoder.attribution.splice import CutModel, Splice

K, F, k = 2, 64, 1


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[CodedTask, Splice]:
    snapshots = small.InMemory(tuple(small.neox(seed) for seed in range(K)))
    crosscoder = small.crosscoder(K, F)
    task = code_task(PromptActivations(small.task(16), snapshots, tmp_path_factory.mktemp("coded")), crosscoder)
    return task, Splice(CutModel(snapshots.load(k), snapshots.layer), crosscoder.W_dec[:, k], crosscoder.b_dec[k])


@pytest.mark.parametrize("errors", ["kept", "ablated"])
@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
def test_against_a_dense_code(setting: tuple[CodedTask, Splice], ablation: str, errors: str) -> None:
    """x rebuilt from a dense (T, F) code, changed where the mask says so, through the whole model's upper half."""
    task, splice = setting
    clean, other = task.at(k, "clean"), task.at(k, "corrupted")
    ablator = Ablator(splice, clean, other, task.task, ablation=ablation, errors=errors)  # type: ignore[arg-type]
    mask = np.random.default_rng(0).random(F) < 0.4

    def dense(prompts: object) -> torch.Tensor:
        pairs = prompts.pairs  # type: ignore[attr-defined]
        f_RF = torch.zeros(len(pairs.offsets_R) - 1, F)
        f_RF[pairs.rows(), pairs.features_N] = pairs.values_N
        return f_RF

    train = clean.take(task.task.train)
    expected = []
    for prompt in task.task.test.tolist():
        one, corrupted = (prompts.take(torch.tensor([prompt])) for prompts in (clean, other))
        f_RF, error_RD = dense(one), splice.error(one)
        becomes = {"mean": dense(train).mean(dim=0).expand_as(f_RF), "zero": 0 * f_RF, "resample": dense(corrupted)}
        error_becomes = {
            "mean": splice.error(train).mean(dim=0),
            "zero": 0 * error_RD,
            "resample": splice.error(corrupted),
        }
        f_RF = torch.where(torch.from_numpy(mask), becomes[ablation], f_RF)
        error_RD = error_becomes[ablation].expand_as(error_RD) if errors == "ablated" else error_RD
        x_TD = torch.cat([one.x_PTD[0, :1], f_RF @ splice.W_FD + splice.b_D + error_RD])
        with torch.no_grad():
            logits = splice.model.logits(one.ids_PT, x_TD[None], one.last_P)
        expected.append(float(task.task.measure(logits, torch.tensor([prompt]))))
    np.testing.assert_allclose(ablator.metric(mask), expected, atol=3e-5)
    assert np.abs(ablator.metric(mask) - ablator.metric(None)).max() > 1e-2
    nothing = ablator.metric(np.zeros(F, dtype=bool))
    assert np.allclose(nothing, ablator.metric(None), atol=1e-7) == (errors == "kept")


def test_curves_are_nested_sets_with_their_ends(setting: tuple[CodedTask, Splice]) -> None:
    task, splice = setting
    ablator = Ablator(splice, task.at(k, "clean"), task.at(k, "corrupted"), task.task, ablation="zero")
    rng = np.random.default_rng(0)
    rate, norm = rng.random(F), rng.random(F)
    ranking = rng.permutation(F)
    found = curves(ablator, ranking, rate, norm, n_random=2, seed=0)
    assert found.k.tolist() == [1, 2, 5, 10, 20, 50, 64]
    np.testing.assert_allclose(found.disrupt[-1], found.empty, atol=1e-6)
    np.testing.assert_allclose(found.restore[-1], found.clean, atol=1e-6)
    first = np.zeros(F, dtype=bool)
    first[ranking[:5]] = True
    np.testing.assert_array_equal(found.disrupt[2], ablator.metric(first))
    np.testing.assert_array_equal(found.restore[2], ablator.metric(~first))
    assert np.isfinite(found.disrupt_random[:5]).all() and np.isnan(found.disrupt_random[5:]).all(), (
        "14 others are left"
    )
    np.testing.assert_allclose(found.active[:, 0], [rate[ranking[:size]].sum() for size in found.k])


def test_the_smallest_set_that_keeps_80_percent() -> None:
    """Bisection finds the first size at which a rising curve passes 80 %."""

    class Made:
        """Each of the first features adds what it has to the metric."""

        worth = np.array([0.3, 0.2, 0.1, 0.08, 0.05, 0.05, 0.03, 0.05, 0.06, 0.04, 0.02, 0.02])

        def metric(self, ablated: np.ndarray | None) -> np.ndarray:
            kept = 1.0 if ablated is None else self.worth[~ablated].sum() / self.worth.sum()
            return np.full(3, 0.5 + 2 * kept)

    ranking = np.arange(12)
    found = curves(Made(), ranking, np.ones(12), np.ones(12), n_random=1, seed=0)  # type: ignore[arg-type]
    assert found.enough == 7  # 0.81 of the sum; 6 features have 0.78
    for seed in range(30):  # wherever it lies between two sizes of the grid
        Made.worth = np.sort(np.random.default_rng(seed).dirichlet(np.full(40, 0.1 + seed / 10)))[::-1]
        smallest = int(np.searchsorted(Made.worth.cumsum(), 0.8)) + 1
        found = curves(Made(), np.arange(40), np.ones(40), np.ones(40), n_random=1, seed=0)  # type: ignore[arg-type]
        assert found.enough == smallest
    Made.worth = np.full(12, 1.0)
    found = curves(Made(), ranking[:4], np.ones(12), np.ones(12), n_random=1, seed=0)  # type: ignore[arg-type]
    assert found.enough == -1


def test_grid() -> None:
    assert grid(1) == [1] and grid(0) == [] and grid(50) == [1, 2, 5, 10, 20, 50]
    assert grid(2033) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 2033]


def test_matched_random_features_are_alike_and_others() -> None:
    rng = np.random.default_rng(0)
    rate, norm = 10 ** rng.uniform(-4, -0.5, 3000), rng.lognormal(0, 0.5, 3000)
    norm[10:20] = 0
    top = np.argsort(-rate)[100:150]
    found = matched_random(top, rate, norm, np.random.default_rng(1))
    assert len(found) == len(set(found.tolist())) == 50 and not set(found.tolist()) & set(top.tolist())
    for values in (rate, norm):
        assert np.abs(np.log(values[found] / values[top])).mean() < 0.2
    arbitrary = np.random.default_rng(2).permutation(3000)[:50]
    assert np.abs(np.log(rate[arbitrary] / rate[top])).mean() > 1
    assert matched_random(top, rate, norm, np.random.default_rng(3)).tolist() != found.tolist()
    assert len(matched_random(np.arange(30), rate[:40], norm[:40] + 1, rng)) == 10, "no more than there are"


def test_equally_active_random_features() -> None:
    rate = np.r_[np.full(5, 0.4), np.full(100, 0.05)]
    found = equally_active(np.arange(5), rate, np.random.default_rng(0))
    assert len(found) == 40 and found.min() >= 5
    assert len(equally_active(np.arange(50), rate, np.random.default_rng(0))) == 55, "all others"
