"""Every method finds the planted feature, and ablation moves the metric by the amount worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attribution import planted, small

from crosscoder.attribution.ablation import Ablator
from crosscoder.attribution.circuits import circuit
from crosscoder.attribution.coding import CodedTask, PromptActivations, code_task
from crosscoder.attribution.exact import exact_effects
from crosscoder.attribution.gradients import METHODS, attribute
from crosscoder.attribution.snapshot import measure_snapshot
from crosscoder.attribution.splice import CutModel, Splice
from crosscoder.config import AttributionSettings
from crosscoder.evolution.strength import life_cycles

KNOWN, SECOND = 3, 5
SETTINGS = AttributionSettings(n_prompts=24, n_exact=20, n_random=1)


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> CodedTask:
    snapshots = small.InMemory(tuple(planted.model(k) for k in range(3)), layer=0)
    folder = tmp_path_factory.mktemp("planted")
    return code_task(PromptActivations(planted.task(), snapshots, folder), planted.crosscoder())


def splice(k: int) -> Splice:
    crosscoder = planted.crosscoder()
    return Splice(CutModel(planted.model(k), 0), crosscoder.W_dec[:, k], crosscoder.b_dec[k])


def lengths(coded: CodedTask, index: torch.Tensor) -> np.ndarray:
    return coded.task.last_P[index].numpy() + 1


@pytest.mark.parametrize("k", [1, 2])
def test_every_method_ranks_the_known_feature_first(coded: CodedTask, k: int) -> None:
    task = coded.task
    found = attribute(splice(k), coded.at(k, "clean"), coded.at(k, "corrupted"), task, task.train)
    tokens = lengths(coded, task.train)
    for method in METHODS:
        mean_F = found.mean(method, planted.N_FEATURES)
        assert np.argsort(-np.abs(mean_F))[:2].tolist() == [KNOWN, SECOND], method
        for feature in (KNOWN, SECOND):
            assert mean_F[feature] == pytest.approx(planted.metric(k, tokens, feature).mean(), rel=1e-3), method
        assert np.abs(np.delete(mean_F, [KNOWN, SECOND])).max() < 1e-3 * mean_F[KNOWN]
    assert found.completeness_error() < 1e-3


@pytest.mark.parametrize("k", [1, 2])
def test_exact_effects_are_the_analytic_amounts(coded: CodedTask, k: int) -> None:
    task, tokens = coded.task, lengths(coded, coded.task.train)
    features = np.array([7, KNOWN, 0, SECOND])
    for other in (None, coded.at(k, "corrupted").pairs):
        effects = exact_effects(splice(k), coded.at(k, "clean"), other, task, task.train, features)
        assert effects.argmax() == 1
        for row, feature in ((1, KNOWN), (3, SECOND)):
            assert effects[row] == pytest.approx(planted.metric(k, tokens, feature).mean(), rel=1e-3)
        assert np.abs(effects[[0, 2]]).max() < 1e-3 * effects[1]


@pytest.mark.parametrize("ablation", ["zero", "resample", "mean"])
def test_ablating_the_known_feature_moves_the_metric_by_the_analytic_amount(coded: CodedTask, ablation: str) -> None:
    k, task = 2, coded.task
    ablator = Ablator(splice(k), coded.at(k, "clean"), coded.at(k, "corrupted"), task, ablation=ablation)  # type: ignore[arg-type]
    tokens = lengths(coded, task.test)
    whole = planted.metric(k, tokens, KNOWN) + planted.metric(k, tokens, SECOND)
    np.testing.assert_allclose(ablator.metric(None), whole, rtol=1e-3)
    mask = np.zeros(planted.N_FEATURES, dtype=bool)
    np.testing.assert_array_equal(ablator.metric(mask), ablator.metric(None))
    mask[KNOWN] = True
    left = planted.metric(k, tokens, SECOND)
    if ablation == "mean":  # on each of the T - 1 tokens that are not end-of-text
        train = lengths(coded, task.train)
        mean = planted.VALUE * len(train) / (train - 1).sum()
        left = left + (tokens - 1) * planted.metric(k, tokens, KNOWN, value=mean)
    np.testing.assert_allclose(ablator.metric(mask), left, rtol=1e-3)


def test_the_whole_measurement_and_the_circuit(coded: CodedTask) -> None:
    crosscoder = planted.crosscoder()
    parts = [measure_snapshot(planted.model(k), k, 0, coded, crosscoder, SETTINGS) for k in range(3)]
    assert [part.above_chance for part in parts] == [False, True, True], "snapshot 0 writes nothing"
    assert parts[0].attributed is None and parts[1].explained_variance > 0.999
    for part in (parts[1].attributed, parts[2].attributed):
        assert part is not None and part.listed[:2].tolist() == [KNOWN, SECOND]
        curves = part.curves["resample"]
        zero = {name: getattr(curves, name).mean(axis=-1) for name in ("disrupt", "restore", "clean", "empty")}
        # the first carries 3/4 of the metric, both all of it
        np.testing.assert_allclose(zero["disrupt"][:2] / zero["clean"], [0.25, 0.0], atol=2e-3)
        np.testing.assert_allclose(zero["restore"][:2] / zero["clean"], [0.75, 1.0], atol=2e-3)
        assert abs(zero["empty"]) < 1e-3 * zero["clean"] and curves.enough == 2
        assert np.nanmax(np.abs(1 - curves.disrupt_random[0].mean() / zero["clean"])) < 0.3
    attribution_FK = np.zeros((planted.N_FEATURES, 3))
    for k in (1, 2):
        part = parts[k].attributed
        assert part is not None
        sums = np.bincount(part.feature, part.values["integrated_gradients"], minlength=planted.N_FEATURES)
        attribution_FK[:, k] = sums / coded.task.n_train
    norms_FK = crosscoder.decoder_norms().detach().double().numpy()
    found = circuit(attribution_FK, norms_FK, life_cycles(norms_FK, [0, 1, 2]), 2)
    assert sorted(found.features.tolist()) == [KNOWN, SECOND] and found.dominant.tolist() == [-1, KNOWN, KNOWN]
    np.testing.assert_allclose(found.relative_effect, [[0, 1 / 3, 2 / 3]] * 2, atol=1e-3)
    np.testing.assert_allclose(found.relative_norm, [[0, 1 / 3, 2 / 3]] * 2, atol=1e-6)
    np.testing.assert_allclose(found.share[found.features == KNOWN][0], [0, 0.75, 0.75], atol=2e-3)
    assert found.handovers == 0
