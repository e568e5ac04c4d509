"""Matching two dictionaries: at the paper's size, and what the restriction to the nearest neighbours costs.

The truth is planted: features in families, whose members are alike (most families are small, some have 200); a share of
them is in both dictionaries, at cosines from `nearest` down to `farthest`, the rest is each one's own. The work is
compared with the product of all pairs in fp32. Seconds on a shared machine say little: CPU seconds stand beside them.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from crosscoder.evolution.matching import CANDIDATES, match_features
from crosscoder.evolution.stability import STABLE
from harness.measure import Timing
from harness.memory import peak_anonymous
from harness.results import Recorder

SHARED = 0.6
LARGEST_FAMILY = 200
PRODUCT_ROWS = 4_096


@dataclass(frozen=True)
class Size:
    """Sizes and difficulty of one case."""

    n_features: int
    d_model: int = 768
    farthest: float = 0.7
    nearest: float = 0.99
    family: float = 0.6
    """Mean cosine of two features of one family."""
    exact: bool = False
    """Whether the matching of all pairs is done too."""

    def __str__(self) -> str:
        return f"D{self.d_model}-F{self.n_features}-c{self.farthest:g}-family{self.family:g}"


QUICK = [Size(1_024, exact=True)]
FULL = [
    Size(4_096, exact=True),
    Size(4_096, exact=True, farthest=0.5, family=0.8),
    Size(98_304),
]


@dataclass(frozen=True)
class Planted:
    """Two dictionaries and which of their features are the same."""

    first: Tensor
    """(F, 1, D)"""
    second: Tensor
    match: np.ndarray
    """(F,) feature of the second dictionary, -1 for the first's own."""


def planted(case: Size, seed: int = 0) -> Planted:
    generator = torch.Generator().manual_seed(seed)
    F, D = case.n_features, case.d_model

    def units(n: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(n, D, generator=generator), dim=1)

    def mixed(a: Tensor, b: Tensor, cosine: Tensor | float) -> Tensor:
        """Unit vectors at about this cosine to `a`, for `b` about orthogonal to it."""
        share = torch.as_tensor(cosine)
        return torch.nn.functional.normalize(share * a + (1 - share.square()).sqrt() * b, dim=1)

    sizes_F = (1 / (torch.rand(F, generator=generator) + 1 / LARGEST_FAMILY)).long().clamp_min(1)
    centres_FD = units(F)[torch.repeat_interleave(torch.arange(F), sizes_F)[:F]]
    first_FD = mixed(centres_FD, units(F), case.family**0.5)
    cosine_F1 = case.farthest + (case.nearest - case.farthest) * torch.rand(F, 1, generator=generator)
    shared_F = torch.rand(F, generator=generator) < SHARED
    same_FD = mixed(first_FD, units(F), cosine_F1)
    own_FD = mixed(centres_FD, units(F), case.family**0.5)
    order_F = torch.randperm(F, generator=generator)
    second_FD = torch.where(shared_F[:, None], same_FD, own_FD)[order_F]
    match_F = torch.where(shared_F, order_F.argsort(), -1)
    return Planted(first_FD[:, None], second_FD[:, None], match_F.numpy())


def product(case: Size) -> float:
    """Seconds for the product of all pairs in fp32, from some of its rows."""
    rows, all_rows = (torch.full((n, case.d_model), 0.5) for n in (min(PRODUCT_ROWS, case.n_features), PRODUCT_ROWS))
    out = torch.empty(len(rows), PRODUCT_ROWS)
    torch.mm(rows, all_rows.T, out=out)
    start = time.process_time()
    for _ in range(3):
        torch.mm(rows, all_rows.T, out=out)
    return (time.process_time() - start) / 3 * case.n_features**2 / out.numel()


def test_matching(case: Size, recorder: Recorder, request: pytest.FixtureRequest) -> None:
    truth = planted(case)
    shared = truth.match >= 0
    timings: dict[str, Timing] = {}
    found: dict[str, dict[str, float]] = {}
    peaks: dict[str, int] = {}
    F = case.n_features
    for n in [0, F, 1, 4, 16, CANDIDATES] if case.exact else [16, CANDIDATES]:
        name = {0: "all pairs", F: "all pairs of 0.5 or more"}.get(n, f"{n} candidates")
        seconds, busy = time.perf_counter(), time.process_time()
        with peak_anonymous() as peak:
            matching = match_features(truth.first, truth.second, candidates=n)
        timings[name] = Timing((time.perf_counter() - seconds,))
        peaks[name] = peak.bytes
        stable = matching.cosine >= STABLE
        found[name] = {
            "cpu_seconds": time.process_time() - busy,
            "mean_cosine": float(matching.cosine.sum(dtype=np.float64)) / F,
            "bound_of_loss": matching.loss,
            "cut": matching.n_cut,
            "recall": float((matching.match == truth.match)[shared].mean()),
            "stable": int(stable.sum()),
            "stable_and_right": int((stable & (matching.match == truth.match)).sum()),
            "nearest_stable": int((matching.nearest >= STABLE).sum()),
        }
    if case.exact:
        for figures in found.values():  # beside "bound_of_loss", which does not know the best
            figures["loss"] = found["all pairs of 0.5 or more"]["mean_cosine"] - figures["mean_cosine"]
            figures["stable_lost"] = found["all pairs"]["stable"] - figures["stable"]
    product_seconds = product(case)
    main = f"{CANDIDATES} candidates"
    ratio = found[main]["cpu_seconds"] / product_seconds
    recorder.add(
        str(case),
        timings,
        shape=asdict(case),
        found=found,
        product_cpu_seconds=product_seconds,
        ratio=ratio,
        peak_bytes_beyond_the_decoders=peaks,
    )
    print(f"\n{case}: {ratio:.2f} x the product of all pairs, {peaks[main] / 2**30:.2f} GiB beyond the decoders")
    for name, figures in found.items():
        print(f"  {name}: {timings[name].median:.1f} s, {figures}")
