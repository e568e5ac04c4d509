"""How much memory does a step take beyond weights, optimiser state and the batch? (`harness.memory` says how.)"""

from __future__ import annotations

import pytest

from harness.memory import DENSE, measure
from harness.results import Recorder
from harness.situation import Shape
from harness.variants import DEFAULT, Variant

QUICK = [Shape(n_features=2_048, batch=256)]
FULL = [Shape(), Shape(n_features=32_768, batch=2_048)]
MOST_DENSE_BYTES = 8 * 2**30
"""The dense opponent sits out where its tensors of shape (B, K, F) would take more in all than this."""
DENSE_TENSORS = 5


def test_step(case: Shape, device: str, recorder: Recorder) -> None:
    recorder.add(str(case), shape=case.to_dict(), memory=measure(case, DEFAULT, device))


def test_variant(case: Shape, variant: Variant, device: str, recorder: Recorder) -> None:
    recorder.add(f"{case} {variant.name}", shape=case.to_dict(), memory=measure(case, variant, device))


def test_dense(case: Shape, device: str, recorder: Recorder) -> None:
    if DENSE_TENSORS * 4 * case.batch * case.n_snapshots * case.n_features > MOST_DENSE_BYTES:
        pytest.skip(f"the dense step does not fit at {case}")
    recorder.add(f"{case} {DENSE}", shape=case.to_dict(), memory=measure(case, DENSE, device))
