"""What is recovered of a planted dictionary: with the paper's recipe, with revival alone, and by default.

    python benchmarks/planted.py --seeds 0 1 2 3 4
    python benchmarks/planted.py --recipes default --null --seeds 0 1 2 3 4
    python benchmarks/planted.py --recipes default --batches bf16 --seeds 0 1 2
    python benchmarks/planted.py --recipes default --steps 500 --turning --seeds $(seq 0 49)

Activations are sums of 512 known features over 8 snapshots that emerge, turn and vanish at known snapshots
(`crosscoder.evolution.planted`); the crosscoder has 1,024 features, lr 2e-3, lambda 0.3, 3,000 steps of 512 fresh
tokens. One JSON line a run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import numpy as np
import torch

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.evolution.planted import PlantedConfig, PlantedDictionary, score
from crosscoder.hardware import cpu_name
from crosscoder.metrics import Evaluator
from crosscoder.train.initialization import search_decoder_norm

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {"revival": "none", "whitening": "none", "joining_cosine": None},
    "revival": {"whitening": "none", "joining_cosine": None},
    "revival + whitening": {"joining_cosine": None},
    "revival + joining": {"whitening": "none"},
    "default": {},
}
BATCHES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(recipe: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    turning_point = 2 + seed % 5 if options.turning else 4
    truth = PlantedDictionary(PlantedConfig(seed=seed, evolution=not options.null, turning_point=turning_point))
    K, D = truth.directions.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    sample = truth.sample(20_000, generator).float()
    scale_K = math.sqrt(D) / torch.linalg.vector_norm(sample, dim=2).mean(dim=0)
    config = TrainConfig(
        n_steps=options.steps,
        batch_size=512,
        lr=2e-3,
        warmup_steps=100,
        seed=seed,
        dead_after_tokens=100_000,
        **RECIPES[recipe],
    )
    trainer = Trainer(Crosscoder(CrosscoderConfig(K, D, 1024), seed=seed), config)
    search_decoder_norm(trainer.model, sample[:512] * scale_K[:, None])
    start = time.perf_counter()
    for _ in range(options.steps):
        trainer.step((truth.sample(512, generator).float() * scale_K[:, None]).to(BATCHES[options.batches]))
    seconds = time.perf_counter() - start
    model = trainer.model.eval()
    held = truth.sample(20_000, generator).float() * scale_K[:, None]
    evaluator = Evaluator(held.mean(dim=0), 1024)
    for x in held.split(1000):
        code = model.encode(x)
        evaluator.add(x, model.decode(code), code)
    result = evaluator.result()
    found = score(model.W_dec.detach(), truth, scale_K=scale_K.numpy(), alive_F=(result.firing_rate_F > 0).numpy())
    recovered_T = found.recovered
    quarter_T = np.argsort(np.argsort(truth.rates)) * 4 // len(truth.rates)
    return {
        "recipe": recipe,
        "null": options.null,
        "batches": options.batches,
        "seed": seed,
        "steps": options.steps,
        "recovered": round(found.share_recovered, 4),
        "recovered_by_rate_quarter": [round(float(recovered_T[quarter_T == q].mean()), 3) for q in range(4)],
        "recovered_by_emergence": [
            round(float(recovered_T[truth.emergence == k].mean()), 3) for k in range(K) if (truth.emergence == k).any()
        ],
        "precision": round(found.precision, 4),
        "emergence_correlation": round(found.emergence_correlation, 4),
        "emergence_exact": round(found.emergence_exact, 4),
        "share_emergent": round(found.share_emergent, 4),
        "share_at_single_snapshots": round(found.share_other, 4),
        "turning_point": [int(found.turning_point), truth.turning_point],
        "turning_point_covered": bool(found.turning_point_covered),
        "turning_point_p": round(found.turning_point_p, 4),
        "explained_variance": round(result.explained_variance, 4),
        "l0": round(result.l0, 2),
        "l0_union": round(result.l0_union, 2),
        "never_fired": round(result.never_fired_fraction, 4),
        "revived": trainer.n_revived,
        "joined": trainer.n_joined,
        "seconds": round(seconds, 1),
        "cpu": cpu_name(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["paper", "revival", "default"])
    parser.add_argument("--null", action="store_true", help="no evolution at all: whatever is born is a false birth")
    parser.add_argument("--turning", action="store_true", help="the turning point at snapshot 2 + seed % 5, not at 4")
    parser.add_argument("--batches", choices=BATCHES, default="fp32", help="what training rounds activations to")
    options = parser.parse_args()
    for seed in options.seeds:
        for recipe in options.recipes:
            print(json.dumps(run(recipe, seed, options)), flush=True)


if __name__ == "__main__":
    main()
