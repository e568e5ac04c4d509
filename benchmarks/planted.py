"""What is recovered of a planted dictionary, with and without revival from residuals.

    python benchmarks/planted.py --seeds 0 1

Activations are sums of 512 known features over 8 snapshots that emerge, turn and vanish at known snapshots
(`crosscoder.evolution.planted`); the crosscoder has 1,024 features, lr 2e-3, lambda 0.3, 3,000 steps of 512 fresh
tokens. One JSON line a run.
"""

from __future__ import annotations

import argparse
import json
import math
import time

import numpy as np
import torch

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.evolution.planted import PlantedConfig, PlantedDictionary, score
from crosscoder.hardware import cpu_name
from crosscoder.metrics import Evaluator
from crosscoder.train.initialization import search_decoder_norm


def run(revival: str, seed: int, steps: int) -> dict[str, object]:
    truth = PlantedDictionary(PlantedConfig(seed=seed))
    K, D = truth.directions.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    sample = truth.sample(20_000, generator).float()
    scale_K = math.sqrt(D) / torch.linalg.vector_norm(sample, dim=2).mean(dim=0)
    config = TrainConfig(
        n_steps=steps, batch_size=512, lr=2e-3, warmup_steps=100, revival=revival, seed=seed, dead_after_tokens=100_000
    )
    trainer = Trainer(Crosscoder(CrosscoderConfig(K, D, 1024), seed=seed), config)
    search_decoder_norm(trainer.model, sample[:512] * scale_K[:, None])
    start = time.perf_counter()
    for _ in range(steps):
        trainer.step(truth.sample(512, generator).float() * scale_K[:, None])
    seconds = time.perf_counter() - start
    model = trainer.model.eval()
    held = truth.sample(20_000, generator).float() * scale_K[:, None]
    evaluator = Evaluator(held.mean(dim=0), 1024)
    for x in held.split(1000):
        code = model.encode(x)
        evaluator.add(x, model.decode(code), code)
    result = evaluator.result()
    found = score(model.W_dec.detach(), truth, scale_K=scale_K.numpy(), alive_F=(result.firing_rate_F > 0).numpy())
    rate_T, recovered_T = np.asarray(truth.rates), found.recovered
    order = np.argsort(rate_T)
    return {
        "revival": revival,
        "seed": seed,
        "steps": steps,
        "recovered": round(found.share_recovered, 4),
        "recovered_rarest_quarter": round(float(recovered_T[order[: len(order) // 4]].mean()), 4),
        "recovered_commonest_quarter": round(float(recovered_T[order[-len(order) // 4 :]].mean()), 4),
        "precision": round(found.precision, 4),
        "emergence_correlation": round(found.emergence_correlation, 4),
        "turning_point": [int(found.turning_point), truth.turning_point],
        "explained_variance": round(result.explained_variance, 4),
        "l0": round(result.l0, 2),
        "l0_union": round(result.l0_union, 2),
        "never_fired": round(result.never_fired_fraction, 4),
        "revived": trainer.n_revived,
        "seconds": round(seconds, 1),
        "cpu": cpu_name(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    for seed in options.seeds:
        for revival in ("none", "residual"):
            print(json.dumps(run(revival, seed, options.steps)), flush=True)


if __name__ == "__main__":
    main()
