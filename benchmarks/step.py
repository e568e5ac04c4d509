"""Time of one training step, closed form against autograd, beside the one product that no step can do without.

OMP_WAIT_POLICY=passive python benchmarks/step.py
OMP_WAIT_POLICY=active python benchmarks/step.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from crosscoder import Crosscoder, CrosscoderConfig
from crosscoder.hardware import cpu_name
from crosscoder.step import loss_and_gradients


def seconds(work: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Smallest, median and largest time of `repeats` runs after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:]), statistics.median(times[1:]), max(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("snapshots", 14), ("width", 128), ("features", 2048), ("batch", 512), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--active", type=int, default=20, help="active features a token")
    options = parser.parse_args()
    K, D, F, B = options.snapshots, options.width, options.features, options.batch
    model = Crosscoder(CrosscoderConfig(K, D, F))
    x = torch.randn(B, K, D)
    with torch.no_grad():
        h = model.preactivations(x)
        cut = model.threshold / model.decoder_norms().amax(dim=1)
        model.b_enc += cut - h.kthvalue(F - options.active, dim=1).values.mean()
        weight = model.W_enc.detach().flatten(1).T.contiguous()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def closed_form() -> None:
        result = loss_and_gradients(model, x, sparsity_coefficient=0.1)
        for name, gradient in result.gradients.items():
            getattr(model, name).grad = gradient

    def autograd() -> None:
        model.zero_grad()
        model.loss(x, sparsity_coefficient=0.1).total.backward()

    closed_form()
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, K={K} D={D} F={F} B={B}")
    print(f"active features a token: {model.encode(x).n_pairs / B:.1f}")
    works: dict[str, Callable[[], object]] = {
        "one product, fp32": lambda: x.flatten(1) @ weight,
        "closed form": closed_form,
        "autograd": autograd,
        "fused Adam": optimizer.step,
    }
    for name, work in works.items():
        low, median, high = seconds(work, options.repeats)
        print(f"{name:<18} {median:.4f} s  ({low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main()
