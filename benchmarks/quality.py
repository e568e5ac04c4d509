"""What a whole training run ends with, option by option: explained variance and L0 on held-out activations, and time.

    crosscoder quickstart                                  # makes real activations: runs/quickstart
    python benchmarks/quality.py runs/quickstart           # one JSON line a variant, in benchmarks/results/

Every variant trains on the same batches in the same order from the same seed; only what it names differs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from crosscoder import ActivationLoader, ActivationStore, Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.hardware import cpu_name
from crosscoder.metrics import Evaluator
from crosscoder.train.initialization import initialize

NARROW = {"threshold_mode": "narrow", "threshold_window": 0.02}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact window 4": ({"threshold_mode": "exact", "threshold_window": 4.0}, {}),
    "sampled window 4": ({"threshold_mode": "sampled", "threshold_window": 4.0}, {}),
    "narrow 0.1": ({"threshold_mode": "narrow", "threshold_window": 0.1}, {}),
    "narrow 0.02": (NARROW, {}),
    "narrow, exact Adam": (NARROW, {"optimizer_mode": "exact"}),
    "narrow, low-memory": (NARROW, {"state": "low-memory"}),
    "narrow, int8 candidates": (NARROW, {"candidates": "int8"}),
    "narrow, calibrated start": (NARROW, {"start": "calibrated"}),
    "sampled, calibrated start": ({"threshold_mode": "sampled", "threshold_window": 4.0}, {"start": "calibrated"}),
}


def run(folder: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    model_options, train_options = VARIANTS[name]
    store = ActivationStore.open(folder / "activations" / "train")
    loader = ActivationLoader(store, options.batch_size, options.seed)
    config = TrainConfig(
        n_steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        warmup_steps=100,
        sparsity_coefficient=options.sparsity,
        seed=options.seed,
        dead_after_tokens=200 * options.batch_size,
        **train_options,
    )
    shape = (store.n_snapshots, store.d_model, options.features)
    trainer = Trainer(Crosscoder(CrosscoderConfig(*shape, **model_options), seed=options.seed), config)
    initialize(trainer.model, next(iter(ActivationLoader(store, 512, options.seed))), config)
    started, early, recall = time.perf_counter(), 0.0, None
    while trainer.step_number < options.steps:
        for x_BKD in loader:
            metrics = trainer.step(x_BKD)
            recall = metrics.get("candidate_recall", recall)
            if trainer.step_number == options.steps // 10:
                early = time.perf_counter() - started
            if trainer.step_number == options.steps:
                break
    seconds = time.perf_counter() - started
    held = ActivationStore.open(folder / "activations" / "heldout")
    scale_K = torch.from_numpy(loader.scale_K).float()
    evaluator = Evaluator(torch.from_numpy(held.means()).float() * scale_K[:, None], options.features)
    model = trainer.model.eval()
    for x_BKD in ActivationLoader(held, 512, shuffle=False, scale=loader.scale_K, drop_last=False):
        code = model.encode(x_BKD)
        evaluator.add(x_BKD, model.decode(code), code)
    result = evaluator.result()
    return {
        "variant": name,
        "features": options.features,
        "steps": options.steps,
        "seed": options.seed,
        "sparsity_coefficient": options.sparsity,
        "explained_variance": round(result.explained_variance, 5),
        "l0": round(result.l0, 3),
        "l0_union": round(result.l0_union, 3),
        "never_fired": round(result.never_fired_fraction, 4),
        "dead": int((trainer.silent_tokens_F >= config.dead_after_tokens).sum()),
        "recall": None if recall is None else float(recall),
        "threshold": [round(float(q), 4) for q in model.threshold.detach().quantile(torch.tensor([0.1, 0.5, 0.9]))],
        "largest_norm": [
            round(float(q), 4) for q in model.decoder_norms().amax(1).detach().quantile(torch.tensor([0.1, 0.5, 0.9]))
        ],
        "seconds": round(seconds, 1),
        "seconds_first_tenth": round(early, 1),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder with activations/train and activations/heldout")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--sparsity", type=float, default=0.06)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality.jsonl")
    options = parser.parse_args()
    for name in options.variants:
        row = run(options.run, name, options)
        print(json.dumps(row), flush=True)
        with options.out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
