"""Where do the dense and the sparse step cross, and is the step's own choice within 10 % of the better one?

At F = 8,192 from L0 2 to all features active; "step" decides for itself, the others are told.
"""

from __future__ import annotations

from typing import Any

from harness.measure import compare, gemms
from harness.results import Recorder
from harness.situation import Shape, make
from harness.variants import DEFAULT, forced_densities

QUICK = [Shape(n_snapshots=4, d_model=64, n_features=1_024, batch=256, l0=1_024 * share) for share in (0.01, 0.5)]
FULL = [Shape(l0=l0) for l0 in (2.0, 8.0, 20.0, 82.0, 205.0, 410.0, 819.0, 1_638.0, 4_096.0, 8_192.0)]


def test_density(benchmark: Any, case: Shape, device: str, rounds: int, recorder: Recorder) -> None:
    situation = make(case, device=device)
    feed = situation.feed()
    variants = [DEFAULT, *forced_densities()]
    trainers = {variant.name: variant.trainer(situation.model) for variant in variants}
    contenders = {
        **gemms(case, device),
        **{name: lambda trainer=trainer: trainer.step(next(feed)) for name, trainer in trainers.items()},
    }
    timings = compare(benchmark, "step", contenders, rounds, device=device)
    best = min(timings[variant.name].median for variant in variants[1:])
    choice = timings["step"].median / best
    recorder.add(
        str(case),
        timings,
        shape=case.to_dict(),
        density=case.l0 / case.n_features,
        choice_over_best=choice,
        **situation.facts(),
    )
    benchmark.extra_info["choice_over_best"] = round(choice, 3)
