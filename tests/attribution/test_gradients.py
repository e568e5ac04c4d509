"""Attributions against a dense oracle, and the completeness of integrated gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from attribution import small

from crosscoder.attribution.coding import CodedTask, PromptActivations, code_task
from crosscoder.attribution.exact import exact_effects
from crosscoder.attribution.gradients import METHODS, PromptAttributions, attribute, midpoints
from crosscoder.attribution.splice import CutModel, Splice

K, F, k = 3, 64, 1


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[CodedTask, Splice]:
    snapshots = small.InMemory(tuple(small.neox(seed) for seed in range(K)))
    crosscoder = small.crosscoder(K, F)
    task = code_task(PromptActivations(small.task(), snapshots, tmp_path_factory.mktemp("coded")), crosscoder)
    return task, Splice(CutModel(snapshots.load(k), snapshots.layer), crosscoder.W_dec[:, k], crosscoder.b_dec[k])


def found(setting: tuple[CodedTask, Splice], steps: int = 10) -> PromptAttributions:
    task, splice = setting
    return attribute(splice, task.at(k, "clean"), task.at(k, "corrupted"), task.task, task.task.train, steps=steps)


def dense(setting: tuple[CodedTask, Splice], prompt: int) -> dict[str, torch.Tensor]:
    """(F,) attributions of one prompt, by autograd on a dense (T, F) matrix of features, without padding."""
    task, splice = setting
    clean, other = (task.at(k, side).take(torch.tensor([prompt])) for side in ("clean", "corrupted"))

    def features(prompts: object) -> torch.Tensor:
        pairs = prompts.pairs  # type: ignore[attr-defined]
        f_RF = torch.zeros(len(pairs.offsets_R) - 1, F)
        f_RF[pairs.rows(), pairs.features_N] = pairs.values_N
        return f_RF

    f, f_other = features(clean), features(other)
    error, error_other = splice.error(clean), splice.error(other)

    def gradient(f_RF: torch.Tensor, error_RD: torch.Tensor) -> torch.Tensor:
        f_RF = f_RF.clone().requires_grad_()
        x_TD = torch.cat([clean.x_PTD[0, :1], f_RF @ splice.W_FD + splice.b_D + error_RD])
        logits = splice.model.logits(clean.ids_PT, x_TD[None], clean.last_P)
        (g_RF,) = torch.autograd.grad(task.task.measure(logits, torch.tensor([prompt])).sum(), f_RF)
        return g_RF

    at_clean = gradient(f, error)
    path = [
        gradient(f_other + a * (f - f_other), error_other + a * (error - error_other)) for a in midpoints(10).tolist()
    ]
    return {
        "gradient_x_activation": (f * at_clean).sum(dim=0),
        "attribution_patching": ((f - f_other) * at_clean).sum(dim=0),
        "integrated_gradients": ((f - f_other) * torch.stack(path).mean(dim=0)).sum(dim=0),
    }


def test_all_methods_equal_dense_autograd(setting: tuple[CodedTask, Splice]) -> None:
    attributions = found(setting)
    assert sorted(attributions.prompts.tolist()) == setting[0].task.train.tolist()
    for prompt in setting[0].task.train.tolist():
        oracle = dense(setting, prompt)
        rows = attributions.prompt == prompt
        for method in METHODS:
            sparse_F = np.zeros(F)
            sparse_F[attributions.feature[rows]] = attributions.values[method][rows]
            np.testing.assert_allclose(sparse_F, oracle[method].numpy(), atol=2e-5, err_msg=method)


def test_only_active_features_are_stored(setting: tuple[CodedTask, Splice]) -> None:
    attributions, task = found(setting), setting[0]
    active = set()
    for side in ("clean", "corrupted"):
        prompts = task.at(k, side)
        prompt_N = prompts.prompt_of_rows()[prompts.pairs.rows()]
        active |= set(zip(prompt_N.tolist(), prompts.pairs.features_N.tolist(), strict=True))
    stored = list(zip(attributions.prompt.tolist(), attributions.feature.tolist(), strict=True))
    assert len(stored) == len(set(stored))
    train = set(task.task.train.tolist())
    assert set(stored) == {pair for pair in active if pair[0] in train}


def test_completeness_improves_with_steps(setting: tuple[CodedTask, Splice]) -> None:
    """Features and error together account for m(x) - m(x'), the better the finer the path."""
    errors = [found(setting, steps).completeness_error() for steps in (1, 4, 16, 64)]
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 2e-3
    assert errors[2] < 0.05
    attributions = found(setting, 64)
    place = {prompt: row for row, prompt in enumerate(attributions.prompts.tolist())}
    total = attributions.error["integrated_gradients"].copy()
    for prompt, value in zip(attributions.prompt.tolist(), attributions.values["integrated_gradients"], strict=True):
        total[place[prompt]] += value
    np.testing.assert_allclose(total, attributions.clean - attributions.corrupted, atol=5e-3)
    assert attributions.completeness_error("attribution_patching") > 10 * errors[3], "the path matters"


def test_exact_effects_equal_running_each_prompt(setting: tuple[CodedTask, Splice]) -> None:
    """Against setting the feature in a dense code, prompt by prompt."""
    task, splice = setting
    clean, other = task.at(k, "clean"), task.at(k, "corrupted")
    counts = torch.bincount(clean.pairs.features_N, minlength=F)
    features = np.array([int(counts.argmax()), int(counts.argsort(descending=True)[3]), int(counts.argmin())])
    train = task.task.train
    for patched in (None, other.pairs):
        effects = exact_effects(splice, clean, patched, task.task, train, features)
        for place, feature in enumerate(features.tolist()):
            total = 0.0
            for prompt in train.tolist():
                one = clean.take(torch.tensor([prompt]))
                rows = clean.rows_of(torch.tensor([prompt]))
                change_R = torch.zeros(len(rows))
                for pairs, sign in ((clean.pairs, -1.0), (patched, 1.0)):
                    if pairs is not None:
                        taken = pairs.take(rows)
                        chosen = taken.features_N == feature
                        change_R[taken.rows()[chosen]] += sign * taken.values_N[chosen]
                with torch.no_grad():
                    before = task.task.measure(splice.logits(one), torch.tensor([prompt]))
                    moved = splice.shifted_logits(one, change_R[:, None] * splice.W_FD[feature])
                    total += float(before - task.task.measure(moved, torch.tensor([prompt])))
            assert effects[place] == pytest.approx(total / len(train), abs=2e-5)
    assert np.abs(effects).max() > 1e-3


def test_midpoints() -> None:
    np.testing.assert_allclose(midpoints(4), [0.125, 0.375, 0.625, 0.875])


def test_probability_difference_has_gradients_too(setting: tuple[CodedTask, Splice]) -> None:
    task, splice = setting
    from crosscoder.attribution.task import Task

    probabilities = Task(task.task.name, task.task.examples, task.task.n_train, "probability-difference")
    clean, other = task.at(k, "clean"), task.at(k, "corrupted")
    attributions = attribute(splice, clean, other, probabilities, probabilities.train, steps=32)
    assert np.abs(attributions.clean).max() <= 1 and attributions.completeness_error() < 0.05


def test_folder_names(tmp_path: Path) -> None:
    """Activations of the two sides and of the snapshots lie apart."""
    snapshots = small.InMemory(tuple(small.neox(seed) for seed in range(2)))
    PromptActivations(small.task(), snapshots, tmp_path).compute()
    assert {path.name for path in tmp_path.iterdir()} == {
        f"step{n}-{s}.npy" for n in (0, 1) for s in ("clean", "corrupted")
    }
