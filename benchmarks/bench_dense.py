"""How much faster is the step than dense fp32 torch: autograd and (fused) Adam, eager and compiled?

The opponent is `harness.opponents`, the same loss written as everybody writes it. At F = 16,384 its tensors of shape
(B, K, F) take 0.5 GiB each.
"""

from __future__ import annotations

from typing import Any

import pytest

from harness.measure import compare, gemms
from harness.opponents import DenseCrosscoder, DenseTrainer
from harness.results import Recorder
from harness.situation import Shape, make
from harness.variants import DEFAULT, LEARNING_RATE, SPARSITY

QUICK = [Shape(n_features=2_048, batch=256)]
FULL = [Shape(n_features=8_192), Shape(n_features=16_384)]


@pytest.mark.parametrize("opponent", ["autograd", "compiled"])
def test_dense(benchmark: Any, case: Shape, opponent: str, device: str, rounds: int, recorder: Recorder) -> None:
    situation = make(case, device=device)
    feed = situation.feed()
    trainer = DEFAULT.trainer(situation.model)
    dense = DenseTrainer(
        DenseCrosscoder(situation.model, SPARSITY).to(device), LEARNING_RATE, compiled=opponent == "compiled"
    )
    name = f"dense {opponent}"
    contenders = {
        **gemms(case, device),
        "step": lambda: trainer.step(next(feed)),
        name: lambda: dense.step(next(feed)),
    }
    timings = compare(benchmark, name, contenders, rounds, device=device)
    ratio = timings[name].median / timings["step"].median
    recorder.add(
        f"{case} {opponent}",
        timings,
        shape=case.to_dict(),
        step_is_faster_by=ratio,
        **situation.facts(),
    )
    benchmark.extra_info["step_is_faster_by"] = round(ratio, 2)
