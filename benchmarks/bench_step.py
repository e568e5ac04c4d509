"""How long does a whole training step take, in units of the one product that it can't do without?

Against F, K, B and L0; `Trainer.step` with the package's defaults. `test_variant` compares the other backends,
optimiser modes, states and threshold modes with it, one at a time, each in one run.
"""

from __future__ import annotations

from typing import Any

import pytest

from harness.measure import compare, gemms
from harness.results import Recorder
from harness.situation import Shape, make
from harness.variants import DEFAULT, Variant

BASE = Shape()
BARS = [BASE, BASE.but(n_features=32_768, batch=2_048)]
"""Where the variants are compared at full sizes; the sweeps are of the default step."""
QUICK = [Shape(n_features=2_048, batch=256), Shape(n_features=4_096, batch=256)]
FULL = [
    *BARS,
    *(BASE.but(n_features=F) for F in (2_048, 4_096, 16_384)),
    *(BASE.but(n_snapshots=K) for K in (3, 16, 32)),
    *(BASE.but(batch=B) for B in (256, 4_096)),
    *(BASE.but(l0=l0) for l0 in (5.0, 50.0, 200.0)),
]


def test_step(benchmark: Any, case: Shape, device: str, rounds: int, recorder: Recorder) -> None:
    situation = make(case, device=device)
    feed = situation.feed()
    trainer = DEFAULT.trainer(situation.model)
    contenders = {**gemms(case, device), "step": lambda: trainer.step(next(feed))}
    timings = compare(benchmark, "step", contenders, rounds, device=device)
    entry = recorder.add(str(case), timings, shape=case.to_dict(), **situation.facts())
    benchmark.extra_info["gemms"] = round(entry["contenders"]["step"]["gemms"], 2)


def test_variant(benchmark: Any, case: Shape, variant: Variant, device: str, rounds: int, recorder: Recorder) -> None:
    if case not in BARS + QUICK:
        pytest.skip("variants are compared at the sizes of the bars")
    situation = make(case, device=device)
    feed = situation.feed()
    trainers = {name: way.trainer(situation.model) for name, way in (("step", DEFAULT), (variant.name, variant))}
    contenders = {
        **gemms(case, device),
        **{name: lambda trainer=trainer: trainer.step(next(feed)) for name, trainer in trainers.items()},
    }
    timings = compare(benchmark, variant.name, contenders, rounds, device=device)
    entry = recorder.add(f"{case} {variant.name}", timings, shape=case.to_dict(), **situation.facts())
    benchmark.extra_info["gemms"] = round(entry["contenders"][variant.name]["gemms"], 2)
