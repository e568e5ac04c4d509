"""How much faster is the step than the authors' package, llamascopium, as shipped and at its best?

The package is installed into an environment of its own (`benchmarks/.peer`, once) and trains the same crosscoder on the
same batches through its own trainer, in a process that takes turns with ours. "As shipped" is bf16 autocast with the
metrics that it computes at every step; it trains only with the patches that `harness.peer_worker` describes.
`tests/parity` compares loss and gradients of both on the same weights.
"""

from __future__ import annotations

from typing import Any

import pytest

from harness import peer
from harness.measure import compare, gemms
from harness.peer import PeerVariant
from harness.results import Recorder
from harness.situation import Shape, make
from harness.variants import DEFAULT, Variant

QUICK = [Shape(n_snapshots=4, d_model=64, n_features=1_024, batch=256)]
FULL = [Shape()]


def opponents(full: bool) -> list[PeerVariant]:
    """All variants; at quick sizes the package as shipped and what is usually its best."""
    variants = peer.variants()
    return variants if full else [variants[0], PeerVariant("bf16", False, ("products", "optimizer"), "glibc")]


def test_peer(benchmark: Any, case: Shape, opponent: PeerVariant, rounds: int, recorder: Recorder) -> None:
    try:
        peer.install()
    except RuntimeError as error:
        pytest.skip(str(error))
    if opponent.malloc == "jemalloc" and not peer.jemalloc():
        pytest.skip("no jemalloc here (Debian: apt-get install libjemalloc2)")
    situation = make(case)
    feed = situation.feed()
    trainer = DEFAULT.trainer(situation.model)
    int8 = Variant("step, int8", {"candidates": "int8"}).trainer(situation.model)
    with peer.running(situation.model, situation.batches, opponent) as process:
        contenders = {
            **gemms(case),
            "step": lambda: trainer.step(next(feed)),
            "step, int8": lambda: int8.step(next(feed)),
            str(opponent): process.step,
        }
        timings = compare(benchmark, str(opponent), contenders, rounds)
    ratio = timings[str(opponent)].median / timings["step"].median
    recorder.add(
        f"{case} {opponent}",
        timings,
        shape=case.to_dict(),
        step_is_faster_by=ratio,
        requirements=list(peer.REQUIREMENTS),
        **situation.facts(),
    )
    benchmark.extra_info["step_is_faster_by"] = round(ratio, 2)
