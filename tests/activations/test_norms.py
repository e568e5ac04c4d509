"""A few tokens of huge norm (attention sinks): figures and stores that do not hide the others. A constant snapshot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crosscoder import cli
from crosscoder.activations.norms import EDGES, HUGE, warn_huge
from crosscoder.activations.store import ActivationStore
from crosscoder.config import CrosscoderConfig
from crosscoder.evaluation import evaluate
from crosscoder.model import Crosscoder

N, K, D = 4_000, 2, 64


def with_sinks() -> tuple[Tensor, Tensor]:
    """Activations (N, K, D) of which one token in 128 is huge in two channels; which those are (N,)."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(96, K, D, generator=generator), dim=2)
    code = (torch.rand(N, 96, generator=generator) < 0.06) * torch.rand(N, 96, generator=generator) * 3
    x_NKD = torch.einsum("nf,fkd->nkd", code, directions) + 0.02 * torch.randn(N, K, D, generator=generator)
    sink_N = torch.rand(N, generator=generator) < 1 / 128
    x_NKD[sink_N, :, 3] += 300
    x_NKD[sink_N, :, 17] -= 150
    return x_NKD, sink_N


def explained(x: Tensor, reconstruction: Tensor) -> float:
    return float(1 - (reconstruction - x).double().square().sum() / (x - x.mean(dim=0)).double().square().sum())


@pytest.mark.parametrize(("dtype", "least"), [("int8", 0.9995), ("int4", 0.97)])
def test_a_quantised_store_keeps_the_ordinary_tokens_beside_sinks(tmp_path: Path, dtype: str, least: float) -> None:
    """As it keeps them without sinks; and the sinks themselves within a tenth."""
    x_NKD, sink_N = with_sinks()
    stored = ActivationStore.from_array(tmp_path / "with", x_NKD, dtype).read(0)
    without = ActivationStore.from_array(tmp_path / "without", x_NKD[~sink_N], dtype).read(0)
    kept, kept_without = explained(x_NKD[~sink_N], stored[~sink_N]), explained(x_NKD[~sink_N], without)
    assert kept > least and 1 - kept < 1.1 * (1 - kept_without)
    off = (stored - x_NKD)[sink_N].norm(dim=2) / x_NKD[sink_N].norm(dim=2)
    assert float(off.max()) < 0.1


def test_figures_by_norm_are_those_of_the_tokens_alone(tmp_path: Path) -> None:
    x_NKD, sink_N = with_sinks()
    store = ActivationStore.from_array(tmp_path / "store", x_NKD, "fp32")
    model = Crosscoder(CrosscoderConfig(K, D, 128), seed=0).eval()
    found = evaluate(model, store, 512)
    with torch.no_grad():
        reconstruction = model.decode(model.encode(x_NKD))

    def pooled(chosen_NK: Tensor) -> float:
        error = deviation = 0.0
        for k in range(K):
            x, y = x_NKD[chosen_NK[:, k], k], reconstruction[chosen_NK[:, k], k]
            error += float((y - x).double().square().sum())
            deviation += float((x - x.mean(dim=0)).double().square().sum())
        return 1 - error / deviation

    norms_NK = x_NKD.norm(dim=2)
    ratio_NK = norms_NK / norms_NK.median(dim=0).values
    ordinary_NK = ratio_NK < HUGE
    assert torch.equal(ordinary_NK, ~sink_N[:, None].expand(N, K))
    assert found.ordinary_explained_variance == pytest.approx(pooled(ordinary_NK), abs=1e-4)
    assert [band.low for band in found.bands] == list(EDGES) and found.bands[-1].n == 2 * int(sink_N.sum())
    for band in found.bands:
        chosen_NK = (ratio_NK >= band.low) & (ratio_NK < (band.high or np.inf))
        if int(chosen_NK.sum()) == band.n > 100:
            assert band.explained_variance == pytest.approx(pooled(chosen_NK), abs=1e-4)


def test_sinks_are_told_at_collection_and_others_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x_NKD, sink_N = with_sinks()
    warn_huge(ActivationStore.from_array(tmp_path / "with", x_NKD, "fp32"))
    assert "4 times the median norm or more, and hold 97% of the variance" in capsys.readouterr().err
    warn_huge(ActivationStore.from_array(tmp_path / "without", x_NKD[~sink_N], "fp32"))
    assert capsys.readouterr().err == ""


def test_a_snapshot_without_variance_is_told_and_nothing_is_infinite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x_NKD = torch.randn(3000, 3, 8, generator=torch.Generator().manual_seed(0))
    x_NKD[:, 1] = 2.0
    run = tmp_path / "run"
    for split in ("train", "heldout"):
        ActivationStore.from_array(run / "activations" / split, x_NKD)
    options = ["--n-features", "32", "--n-steps", "40", "--batch-size", "64", "--lr", "1e-3", "--log-every", "10"]
    assert cli.main(["train", str(run), *options]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run / "training" / "metrics.jsonl").read_text().splitlines()
    for row in (json.loads(line, parse_constant=refuse) for line in lines):
        assert [value is None for value in row["explained_variance"]] == [False, True, False]
    capsys.readouterr()
    assert cli.main(["eval", str(run)]) == 0
    assert "same activations at snapshot1" in capsys.readouterr().err
    figures = json.loads((run / "summary.json").read_text(), parse_constant=refuse)["explained_variance"]
    assert figures["by_snapshot"]["snapshot1"] is None and figures["by_snapshot"]["snapshot0"] is not None
    assert figures["overall"] is not None
