"""What 8 and 4 bits of storage cost: explained variance of crosscoders trained from coarser activations.

python benchmarks/storage_precision.py runs/quickstart --json benchmarks/results/storage-precision-cpu.json

Takes the activations that `crosscoder quickstart` (or collect) has stored, as they are and with outlier channels as
trained transformers grow them (two channels that vary 5 times as much, 10 and 15 deviations from 0). A crosscoder is
trained from each kind of storage and evaluated on held-out activations at full precision, in points of explained
variance. "noise" is the share of the variance that storing itself loses. With --json, what an earlier call of the same
settings has measured is kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscoder import ActivationLoader, ActivationStore, Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.hardware import cpu_name
from crosscoder.metrics import Evaluator
from crosscoder.train.initialization import search_decoder_norm


def hadamard(width: int) -> Tensor:
    """(width, width) orthogonal and symmetric; width a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / width**0.5


def quantised(x_ND: Tensor, bits: int, group: int, rotation: int, whiten: bool) -> Tensor:
    """x as `bits` with a bf16 scale for each token and `group` channels, after a rotation of `rotation` channels."""
    offset, gain = (x_ND.mean(dim=0), x_ND.std(dim=0)) if whiten else (torch.zeros(1), torch.ones(1))
    white = (x_ND - offset) / gain
    turn = hadamard(rotation) if rotation else None
    if turn is not None:
        white = (white.unflatten(1, (-1, rotation)) @ turn).flatten(1)
    most = 2 ** (bits - 1) - 1
    parts = white.unflatten(1, (-1, group))
    scale = (parts.abs().amax(dim=2, keepdim=True) / most * (1 + 2**-8)).bfloat16().float()
    stored = (parts / scale.clamp(min=1e-30)).round().clamp(-most, most) * scale
    stored = stored.flatten(1)
    if turn is not None:
        stored = (stored.unflatten(1, (-1, rotation)) @ turn.T).flatten(1)
    return stored * gain + offset


def with_outliers(x_NKD: Tensor) -> Tensor:
    """Two channels that vary 5 times as much as they did, 10 and 15 deviations of an activation from 0."""
    x_NKD = x_NKD.clone()
    size = x_NKD.std(dim=(0, 2), keepdim=True)[..., 0]
    for channel, shift in ((5, 10.0), (77, -15.0)):
        x_NKD[:, :, channel] = x_NKD[:, :, channel] * 5 + shift * size
    return x_NKD


def explained(model: Crosscoder, heldout_NKD: Tensor, scale_K: Tensor) -> float:
    x_NKD = heldout_NKD * scale_K[:, None]
    evaluator = Evaluator(x_NKD.mean(dim=0), model.config.n_features)
    with torch.no_grad():
        for x_BKD in x_NKD.split(2_048):
            code = model.encode(x_BKD)
            evaluator.add(x_BKD, model.decode(code), code)
    return evaluator.result().explained_variance


def trained(store: ActivationStore, options: argparse.Namespace, seed: int) -> tuple[Crosscoder, Tensor]:
    config = TrainConfig(
        n_steps=options.steps, batch_size=options.batch, lr=2e-3, warmup_steps=50, revival_every=100, seed=seed
    )
    model = Crosscoder(CrosscoderConfig(store.n_snapshots, store.d_model, options.features), seed=seed)
    loader = ActivationLoader(store, config.batch_size, seed, memory_bytes=256 << 20)
    trainer = Trainer(model, config)
    search_decoder_norm(trainer.model, next(iter(ActivationLoader(store, 512, seed, memory_bytes=256 << 20))))
    while trainer.step_number < config.n_steps:
        for x_BKD in loader:
            trainer.step(x_BKD)
            if trainer.step_number == config.n_steps:
                break
    return trainer.model.eval(), torch.from_numpy(loader.scale_K).float()


def read_all(store: ActivationStore, most: int) -> Tensor:
    parts = [store.read(shard) for shard in range(len(store.shard_rows))]
    return torch.cat(parts)[:most]


def kinds(options: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any] | None]]:
    """Name -> (dtype of the store, settings of `quantised` that are simulated in it)."""
    simulated = {
        "int8, one scale a token, no channel statistics": {"bits": 8, "group": 128, "rotation": 0, "whiten": False},
        "int4, one scale a token": {"bits": 4, "group": 128, "rotation": 0, "whiten": True},
        "int4, groups of 32": {"bits": 4, "group": 32, "rotation": 0, "whiten": True},
        "int4, groups of 16": {"bits": 4, "group": 16, "rotation": 0, "whiten": True},
        "int4, Hadamard 128, one scale a token": {"bits": 4, "group": 128, "rotation": 128, "whiten": True},
        "int4, Hadamard 32, groups of 32": {"bits": 4, "group": 32, "rotation": 32, "whiten": True},
    }
    stores: dict[str, tuple[str, dict[str, Any] | None]] = {dtype: (dtype, None) for dtype in ("bf16", "int8", "int4")}
    return stores | {name: ("fp32", how) for name, how in simulated.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    for name, default in (("features", 1_024), ("steps", 500), ("batch", 512), ("tokens", 60_000), ("seeds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--data", nargs="+", default=["as collected", "with outlier channels"])
    parser.add_argument(
        "--kinds", nargs="+", help="some of the ways of storing, by name; bf16 has to be among the first"
    )
    options = parser.parse_args()
    train, heldout = (ActivationStore.open(options.run / "activations" / split) for split in ("train", "heldout"))
    names = [train.snapshot_names[k] for k in np.linspace(0, train.n_snapshots - 1, 4).round().astype(int)]
    result: dict[str, Any] = {"cpu": cpu_name(), "snapshots": names, "d_model": train.d_model}
    result |= {name: getattr(options, name) for name in ("features", "steps", "batch", "tokens", "seeds")}
    if options.json and options.json.exists():
        earlier = json.loads(options.json.read_text())
        if all(earlier.get(name) == value for name, value in result.items()):
            result = earlier
    for data in options.data:
        x, test = (read_all(store.select(names), options.tokens) for store in (train, heldout))
        if data != "as collected":
            x, test = with_outliers(x), with_outliers(test)
        variance = (x - x.mean(dim=0)).square().sum(dim=(0, 2))
        rows: dict[str, Any] = result.setdefault(data, {})
        for kind, (dtype, how) in kinds(options).items():
            if kind in rows or (options.kinds and kind not in options.kinds):
                continue
            with tempfile.TemporaryDirectory() as folder:
                stored = x
                if how is not None:
                    stored = torch.stack([quantised(x[:, k], **how) for k in range(x.shape[1])], dim=1)
                store = ActivationStore.from_array(Path(folder) / "s", stored, dtype)
                noise = float(((read_all(store, len(x)) - x).square().sum(dim=(0, 2)) / variance).mean())
                scores = []
                for seed in range(options.seeds):
                    model, scale_K = trained(store, options, seed)
                    scores.append(100 * explained(model, test, scale_K))
                rows[kind] = {"noise_points": 100 * noise, "explained_variance_points": scores}
                lost = np.subtract(rows["bf16"]["explained_variance_points"], scores)
                rows[kind]["lost_points"] = float(lost.mean())
                print(
                    f"{data:<22} {kind:<48} noise {100 * noise:8.4f}  EV {scores}  lost {lost.mean():+.3f}", flush=True
                )
            if options.json:
                options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
