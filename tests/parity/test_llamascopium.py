"""The authors' package computes the same loss and gradients as ours, patched as the benchmark patches it.

Skipped where `benchmarks/bench_peer.py` has not installed it.
"""

from __future__ import annotations

import pytest
import torch
from support.steps import loss_and_gradients

from harness import peer
from harness.situation import Shape, make
from harness.variants import SPARSITY

pytestmark = pytest.mark.skipif(peer.python() is None, reason="llamascopium is not installed (pytest benchmarks)")


@pytest.mark.slow
@pytest.mark.parametrize("patches", [(), ("products",)], ids=["as-shipped", "rewritten"])
def test_loss_and_every_gradient(patches: tuple[str, ...]) -> None:
    situation = make(Shape(n_snapshots=5, d_model=24, n_features=96, batch=64, l0=7.0), n_batches=1)
    model, x = situation.model.double(), situation.batches[0].double()
    ours = loss_and_gradients(model, x, sparsity_coefficient=SPARSITY)
    theirs = peer.parity(model, x, patches)
    torch.testing.assert_close(theirs.pop("loss"), ours.loss.total, rtol=1e-12, atol=0)
    for name, gradient in ours.gradients.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(theirs.pop(name), gradient, rtol=0, atol=1e-11 * scale, msg=name)
    assert not theirs
