"""Latent scaling: against its definition in float64, and on planted shrinkage and decoupling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evolution.planted_codes import code_of, planted_tokens

from crosscoder.errors import DataError
from crosscoder.evolution.latent_scaling import ScalingSums, latent_scaling
from crosscoder.evolution.planted import PlantedConfig, PlantedDictionary

NAMES = ("beta_error", "beta_reconstruction", "beta_error_own", "beta_reconstruction_own", "beta_error_null")


def test_equals_the_definition_however_batches_are_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(12, 3, 5, generator=generator)
    W_dec[2, 0] = 0
    W_dec[7] = 0
    a_BF = torch.rand(60, 12, generator=generator) * (torch.rand(60, 12, generator=generator) < 0.3)
    a_BF[:, 4] = 0  # never fires
    a_BF[20] = 0  # a token without features
    open_FK = torch.rand(12, 3, generator=generator) < 0.7
    open_FK[:, 1] = True
    error, reconstruction = torch.randn(2, 60, 3, 5, generator=generator) + 2
    alive = np.arange(12) != 4
    results = []
    for sizes in ([60], [1, 19, 1, 39, 0]):
        parts = zip(a_BF.split(sizes), error.split(sizes), reconstruction.split(sizes), strict=True)
        batches = ((code_of(a, open_FK), e, r) for a, e, r in parts)
        results.append(latent_scaling(batches, W_dec, alive_F=alive, seed=5))
    for name in (*NAMES, "nu_error", "nu_reconstruction"):
        a, b = (getattr(result, name) for result in results)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    W, a_BF, found = W_dec.double(), a_BF.double(), results[0]
    error, reconstruction = (y.double() - y.double().mean(dim=0) for y in (error, reconstruction))
    other = ScalingSums(W_dec, alive_F=alive, seed=5)._other_F
    assert (other[torch.from_numpy(alive)] != torch.arange(12)[torch.from_numpy(alive)]).all() and 4 not in other
    for f in range(12):
        norms = W[f].norm(dim=1)
        peak = int(norms.argmax())
        assert found.peak[f] == peak or norms.max() == 0
        for k in range(3):
            targets = {
                "error": error[:, k] + a_BF[:, f, None] * open_FK[f, k] * W[f, k],
                "reconstruction": reconstruction[:, k],
            }
            g = int(other[f])
            away = W[g, int(W[g].norm(dim=1).argmax())]
            along = {
                "": W[f, peak],
                "_own": W[f, k] / norms[k] * norms[peak],
                "_null": away / away.norm() * norms[peak],
            }
            for target, y in targets.items():
                for suffix, d in along.items():
                    expected = (a_BF[:, f] * (y @ d)).sum() / (norms[peak] ** 2 * a_BF[:, f].square().sum())
                    if g == 7 and suffix == "_null":
                        expected = torch.tensor(0.0 if f not in (4, 7) else torch.nan)
                    got = getattr(found, f"beta_{target}{suffix}")[f, k]
                    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(found.beta_error[[4, 7]]).all() and not found.low[[4, 7]].any()
    assert np.isnan(found.beta_error_own[2, 0]) and np.isfinite(found.beta_error[2, 0]) and found.low[2, 0]


def planted() -> tuple[PlantedDictionary, torch.Tensor, torch.Tensor]:
    truth = PlantedDictionary(PlantedConfig(n_snapshots=6, d_model=64, n_features=40, l0=3.0, turning_point=3))
    return (truth, *planted_tokens(truth, 5000))


def test_an_honest_dictionary_has_beta_equal_to_its_relative_norm() -> None:
    truth, x_BKD, a_BT = planted()
    strengths, present = truth.strengths.numpy(), torch.from_numpy(truth.present)
    reconstruction = torch.einsum("bt,tkd->bkd", a_BT, truth.decoders())
    found = latent_scaling([(code_of(a_BT, present), x_BKD - reconstruction, reconstruction)], truth.decoders())
    here = truth.present
    np.testing.assert_allclose(found.beta_error_own[here], strengths[here], atol=0.02)
    assert np.isnan(found.beta_error_own[~here]).all()
    directions = truth.directions.numpy()
    turned = np.einsum("tkd,td->tk", directions, directions[np.arange(40), truth.peak])
    np.testing.assert_allclose(found.beta_error, strengths * turned, atol=0.02)
    assert found.low.sum() == (~here).sum() > 50
    assert found.share_shrunk == 0 and found.share_shrunk_null == 0
    assert found.share_decoupled < 0.05  # other features are alike by chance only


def test_shrinkage_and_decoupling_are_told_apart() -> None:
    truth, x_BKD, a_BT = planted()
    shrunk, decoupled = np.flatnonzero((truth.emergence == 0) & (truth.peak > 3) & (truth.death < 0))[:2]
    k = 3  # after the turn, as the peak
    true = torch.einsum("bt,tkd->bkd", a_BT, truth.decoders())
    # A dictionary with one more feature, which does at snapshot k what `decoupled` should do.
    W_dec = torch.cat([truth.decoders(), torch.zeros(1, 6, 64)])
    present = torch.cat([torch.from_numpy(truth.present), torch.zeros(1, 6, dtype=torch.bool)])
    code = torch.cat([a_BT, a_BT[:, decoupled, None]], dim=1)
    W_dec[-1, k], present[-1, k] = W_dec[decoupled, k], True
    for f in (shrunk, decoupled):
        W_dec[f, k], present[f, k] = 0, False
    reconstruction = torch.einsum("bt,btk,tkd->bkd", code, present[None].float().expand(len(code), -1, -1), W_dec)
    assert (reconstruction - true)[:, k].norm() > 1
    found = latent_scaling([(code_of(code, present), x_BKD - reconstruction, reconstruction)], W_dec)
    assert found.shrunk[shrunk, k] and not found.decoupled[shrunk, k]
    assert found.decoupled[decoupled, k] and not found.shrunk[decoupled, k]
    assert found.nu_error[shrunk, k] == pytest.approx(float(truth.strengths[shrunk, k]), abs=0.05)
    assert found.shrunk.sum() == 1
    assert found.share_shrunk == pytest.approx(1 / found.low.sum())


def test_bad_input() -> None:
    W_dec = torch.ones(4, 2, 3)
    sums = ScalingSums(W_dec)
    with pytest.raises(DataError, match="there was none"):
        sums.result()
    code = code_of(torch.ones(5, 4), torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(DataError, match="does not fit decoders"):
        sums.add(code, torch.ones(5, 2, 3), torch.ones(5, 2, 4))
    with pytest.raises(DataError, match="does not fit decoders"):
        sums.add(code, torch.ones(6, 2, 3), torch.ones(6, 2, 3))
    with pytest.raises(DataError, match="alive_F"):
        ScalingSums(W_dec, alive_F=[True])
    with pytest.raises(DataError, match="floating point"):
        ScalingSums(torch.ones(4, 2, 3, dtype=torch.int64))
