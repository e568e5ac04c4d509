"""Does training still give the same bits? What a refactor of the step must show, before and after.

python tools/same_bits.py --out before.json            # the table of this working tree, some 5 minutes on one core
python tools/same_bits.py --against before.json        # the same runs, compared; exit status 1 if anything differs
python tools/same_bits.py --against before.json --only native-   # those whose name begins so

Each run trains a tiny crosscoder on planted sparse activations through the public names alone and takes a sha256 of
all its losses, of its final weights, and of its code and reconstruction at inference: every gate, penalty, threshold
mode, state and kind of candidates on the native backend with float32 products, with whitening, revival and joining,
and variants with everything else that changes a step; the reference; and Triton in its interpreter for a few steps.
Bits depend on the processor, its instruction set and the version of torch: compare tables of one machine.
"""

from __future__ import annotations

import os

os.environ["CROSSCODER_GEMM_DTYPE"] = "float32"
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import hashlib
import itertools
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer, _core, hardware
from crosscoder.train.initialization import initialize

K, D, F, B, STEPS = 3, 8, 64, 64, 200
TRITON = (2, 6, 8, 8, 5)
"""K, D, F, B and steps in the interpreter."""
RANKED = {"topk": 4, "batchtopk": 4}


@dataclass(frozen=True)
class Run:
    """One training run: options of the crosscoder, options of the training, and its sizes."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int, int, int, int, int] = (K, D, F, B, STEPS)


def gates(modes: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every gate, those with thresholds in every mode."""
    for gate in ("snapshot", "shared"):
        for mode in modes:
            yield f"{gate}-{mode}", {
                "gate": gate, "threshold_mode": mode, "threshold_window": 0.1 if mode == "narrow" else 2.0,
            }  # fmt: skip
    for gate, top_k in RANKED.items():
        yield gate, {"gate": gate, "top_k": top_k}


def native_runs() -> Iterator[Run]:
    """The table that the native backend has to keep."""
    modes = ("exact", "sampled", "narrow")
    kinds = itertools.product(gates(modes), ("tanh-quad", "tanh", "l1"), ("fp32", "low-memory"), ("exact", "int8"))
    for (gate, options), penalty, state, candidates in kinds:
        yield Run(
            f"native-{gate}-{penalty}-{state}-{candidates}", {**options, "penalty": penalty},
            {"backend": "native", "state": state, "candidates": candidates},
        )  # fmt: skip


def variants(backend: str) -> Iterator[Run]:
    """What else changes a step."""
    choices: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "clip": ({}, {"clip_norm": 0.05}),
        "preactivation": ({}, {"preactivation_coefficient": 0.02}),
        "preactivation-clip": ({"gate": "shared"}, {"preactivation_coefficient": 0.02, "clip_norm": 0.05}),
        "exact-adam": ({}, {"optimizer_mode": "exact"}),
        "norm-limit": ({}, {"decoder_norm_limit": 0.5}),
        "norm-limit-low-memory": ({}, {"decoder_norm_limit": 0.5, "state": "low-memory"}),
        "unwhitened": ({}, {"whitening": "none"}),
        "no-revival": ({}, {"revival": "none"}),
        "calibrated": ({}, {"start": "calibrated", "start_l0": 6.0}),
        # Thresholds of 0 and no penalty: half of all features stay on, which goes through dense products.
        "dense": ({"threshold_init": 0.0, "penalty": "l1"}, {"sparsity_coefficient": 0.0}),
        "dense-clip": ({"threshold_init": 0.0}, {"sparsity_coefficient": 1e-4, "clip_norm": 0.05}),
        "dense-everything": (
            {"threshold_init": 0.0, "threshold_mode": "sampled", "threshold_window": 2.0},
            {
                "sparsity_coefficient": 1e-4, "clip_norm": 0.5, "decoder_norm_limit": 0.5, "optimizer_mode": "exact",
                "preactivation_coefficient": 0.01, "state": "low-memory",
            },
        ),
        "dense-topk": ({"gate": "topk", "top_k": 40}, {}),
        "dense-batchtopk": ({"gate": "batchtopk", "top_k": 40}, {"clip_norm": 0.05}),
    }  # fmt: skip
    for name, (model, train) in choices.items():
        yield Run(f"{backend}-{name}", model, {"backend": backend, **train})


def reference_runs() -> Iterator[Run]:
    for gate, options in gates(("exact", "sampled", "narrow")):
        for state in ("fp32", "low-memory"):
            yield Run(f"reference-{gate}-{state}", options, {"backend": "reference", "state": state})


def triton_runs() -> Iterator[Run]:
    """A few steps of each, the sparse way unless the name says dense."""
    sparse = {"start": "calibrated", "start_l0": 0.5}
    for whitening in ("snapshots", "none"):
        for gate, options in gates(("exact", "narrow")):
            train = {"backend": "triton", "whitening": whitening, **({} if gate in RANKED else sparse)}
            few = {"top_k": 1} if gate in RANKED else {}
            yield Run(f"triton-{gate}-{whitening}", {**options, **few}, train, TRITON)
    for name, options in {
        "low-memory": {"state": "low-memory"},
        "clip-limit-preactivation": {"clip_norm": 0.05, "decoder_norm_limit": 0.3, "preactivation_coefficient": 0.02},
        "dense": {"start": "search"},
        "dense-clip-exact": {"start": "search", "clip_norm": 0.05, "optimizer_mode": "exact"},
    }.items():
        yield Run(f"triton-{name}", {}, {"backend": "triton", **sparse, **options}, TRITON)


def runs() -> list[Run]:
    """All of them."""
    return [*native_runs(), *variants("native"), *reference_runs(), *variants("reference"), *triton_runs()]


def batch(sizes: tuple[int, int, int, int, int], seed: int) -> Tensor:
    """(B, K, D): sums of a few of 2 D planted directions, which come and go over the snapshots."""
    K, D, _, B, _ = sizes
    generator = torch.Generator().manual_seed(1000)
    directions = torch.nn.functional.normalize(torch.randn(2 * D, D, generator=generator), dim=1)
    strength = torch.rand(2 * D, K, generator=generator)
    strength *= torch.rand(2 * D, K, generator=generator) < 0.7
    generator.manual_seed(seed)
    on = torch.rand(B, 2 * D, generator=generator) < 3 / (2 * D)
    code = torch.rand(B, 2 * D, generator=generator) * on
    x = torch.einsum("bn,nk,nd->bkd", code, strength, directions) + 0.02 * torch.randn(B, K, D, generator=generator)
    return x * (D**0.5 / x.norm(dim=2).mean(dim=0)[:, None])


def digest(*tensors: Tensor) -> str:
    """sha256 of the numbers' bytes."""
    found = hashlib.sha256()
    for tensor in (each.detach().contiguous() for each in tensors):
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else repr(float(tensor)).encode())
    return found.hexdigest()


def outcome(run: Run) -> dict[str, Any]:
    """What a run gives: three hashes, and figures for whoever looks into a difference."""
    K, D, F, B, steps = run.sizes
    model = Crosscoder(CrosscoderConfig(K, D, F, **run.model), seed=1)
    options = {
        "n_steps": steps, "batch_size": B, "lr": 3e-3, "sparsity_coefficient": 0.1, "revival_rate": 0.02,
        "revival_every": 20 if steps > 20 else 2, "warmup_steps": 10, "seed": 3,
    }  # fmt: skip
    config = TrainConfig(**{**options, **run.train})
    trainer = Trainer(model, config)
    if config.backend == "triton" and "dense" not in run.name:
        trainer.engine.dense_above = 1.0  # so few pairs would all go the dense way
    initialize(model, batch(run.sizes, 0), config)
    losses = []
    for step in range(steps):
        metrics = trainer.step(batch(run.sizes, step))
        # Read after `settle`: where a backend runs ahead, a step that is done again writes its loss anew.
        losses.append(metrics["loss"])
    trainer.engine.settle()
    model.eval()
    x = batch(run.sizes, 10_000)
    code = model.encode(x, backend=config.backend)
    reconstruction = model.decode(code, backend=config.backend)
    state = model.state_dict()
    return {
        "losses": digest(*(torch.as_tensor(loss) for loss in losses)),
        "weights": digest(*(state[name] for name in sorted(state))),
        "code": digest(code.row_offsets, code.features, code.values, code.gates, reconstruction),
        "last_loss": float(losses[-1]),
        "revived": float(metrics["revived"]),
        "joined": float(metrics["joined"]),
        "pairs_a_token": code.n_pairs / B,
    }


def table(only: str) -> dict[str, Any]:
    """Machine and outcomes."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="(overflow|invalid value) encountered")  # hashes in the interpreter
    chosen = [run for run in runs() if run.name.startswith(only)]
    found = {}
    for i, run in enumerate(chosen):
        found[run.name] = outcome(run)
        print(f"\r{i + 1} of {len(chosen)}  {run.name:<60}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {
        "cpu": hardware.cpu_name(),
        "isa_level": _core.isa_level(),
        "torch": torch.__version__,
        "steps": STEPS,
        "runs": found,
    }


def differences(now: dict[str, Any], before: dict[str, Any], only: str = "") -> list[str]:
    """What differs, a line each."""
    lines = [
        f"{name}: {before[name]} then, {now[name]} now" for name in ("cpu", "isa_level") if before[name] != now[name]
    ]
    for name in before["runs"].keys() | now["runs"].keys():
        if not name.startswith(only):
            continue
        then, here = before["runs"].get(name), now["runs"].get(name)
        if then is None or here is None:
            lines.append(f"{name}: only {'now' if then is None else 'then'}")
            continue
        unlike = [part for part in ("losses", "weights", "code") if then[part] != here[part]]
        if unlike:
            lines.append(f"{name}: {', '.join(unlike)} (last loss {then['last_loss']} then, {here['last_loss']} now)")
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Does training still give the same bits?")
    parser.add_argument("--out", type=Path, help="write the table here, as JSON")
    parser.add_argument("--against", type=Path, help="a table of before, to compare with")
    parser.add_argument("--only", default="", help="only the runs whose name begins so")
    arguments = parser.parse_args()
    found = table(arguments.only)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not arguments.against:
        print(f"{len(found['runs'])} runs")
        return 0
    lines = differences(found, json.loads(arguments.against.read_text(encoding="utf-8")), arguments.only)
    print("\n".join(lines) or f"all {len(found['runs'])} runs: the same bits")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
