"""What a GPU does with this package: right at full size, ceilings, steps by kernel, training, verbs. Most informative
first, at most some minutes.

python benchmarks/gpu_run.py --out benchmarks/results/gpu.jsonl             # on a CUDA machine
TRITON_INTERPRET=1 python benchmarks/gpu_run.py --tiny                      # anywhere: does every part run?

Every result is a JSON line, on disk at once. The exit code is 1 if a part failed, gave wrong numbers or took another
way than the one it is meant to measure.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_cases import (
    DEVICE,
    ON_GPU,
    SIZES,
    THRESHOLD,
    TINY,
    WINDOW,
    Results,
    Size,
    engine_of,
    host_milliseconds,
    milliseconds,
    model_and_batch,
    settings,
    synchronize,
    train_config,
)

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.evolution.planted import PlantedConfig, PlantedDictionary
from crosscoder.train.initialization import initialize

KERNELS_SHOWN = 24
STEPS = (
    ("6.9b-low-memory", "narrow", "lazy"),
    ("160m-fp32", "narrow", "lazy"),
    ("6.9b-low-memory", "sampled", "lazy"),
    ("6.9b-low-memory", "exact", "exact"),
    ("160m-low-memory", "narrow", "lazy"),
    ("160m-fp32", "sampled", "lazy"),
    ("medium-fp32", "narrow", "lazy"),
)
DENSITIES = (0.01, 0.03, 0.003, 0.1)


def far_end(results: Results, size: Size) -> None:
    """A step at the largest size against dense torch: some tokens, and the first, a middle and the last features."""
    F = size.F
    model, x_BKD = model_and_batch(size, size.active)
    engine = engine_of(model, size)
    tokens = torch.tensor([0, size.B // 2, size.B - 1], device=DEVICE)
    features = torch.tensor([0, 1, F // 2, F - 2, F - 1], device=DEVICE)
    model.b_enc[features[::2]] += 4.0  # these fire for sure
    model.b_enc[features[1]] -= 100.0  # this one never does
    before = {name: getattr(model, name)[features].float().clone() for name in ("W_enc", "W_dec")}
    expected_RKD = model.b_dec - x_BKD[tokens].float()
    parts = [slice(first, min(first + 1024, F)) for first in range(0, F, 1024)]
    x_RC, norms_FK = x_BKD[tokens].flatten(1).float(), model.decoder_norms()
    for part in parts:
        h_RF = x_RC @ model.W_enc[part].float().flatten(1).T + model.b_enc[part]
        open_RFK = h_RF[:, :, None] * norms_FK[part] > THRESHOLD
        expected_RKD += torch.einsum("rfk,fkd->rkd", h_RF[:, :, None] * open_RFK, model.W_dec[part].float())
    statistics = engine.step(x_BKD, settings(0, lr=1e-2))
    engine.settle()
    error = float((statistics.residual_BKD[tokens] - expected_RKD).norm() / expected_RKD.norm())
    fired = (statistics.fired_F[features] > 0).tolist()
    moved = {
        name: (getattr(model, name)[features].float() - old).abs().amax(dim=(1, 2)).gt(0).tolist()
        for name, old in before.items()
    }
    good = fired[::2] == [True] * 3 and not fired[1]
    good &= error < 1e-3 and moved["W_enc"] == fired and moved["W_dec"] == fired
    results.check("far end", good, elements=F * size.K * size.D, residual_error=error, fired=fired, moved=moved)


def ceilings(results: Results, sizes: dict[str, Size]) -> None:
    """What the device reaches: a copy, and products of the shapes that a step has."""
    n = 2**31 if ON_GPU else 2**16
    source = torch.empty(n, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    took = milliseconds(partial(target.copy_, source))
    results.tell(part="ceiling", what="copy", tb_per_s=2 * n / took["median"] / 1e9)
    del source, target
    for name in ("6.9b-low-memory", "160m-fp32"):
        size = sizes[name]
        B, K, D, C, T = size.B, size.K, size.D, size.K * size.D, min(size.F, 4096)
        x, W = torch.randn(B, C, device=DEVICE).bfloat16(), torch.randn(T, C, device=DEVICE).bfloat16()
        few, W_float = x.float(), W[:1024].float()
        r_KBD, d_KDT = x.view(B, K, D).transpose(0, 1), W.view(T, K, D).permute(1, 2, 0)
        works: dict[str, tuple[Any, int]] = {
            "bf16": (lambda x=x, W=W: x @ W.T, T),
            "fp32": (lambda x=few, W=W_float: x @ W.T, len(W_float)),
            "bf16, by snapshot (the threshold's)": (lambda r=r_KBD, d=d_KDT: torch.bmm(r, d), T),
        }
        if ON_GPU:
            x8, W8 = (x * 40).to(torch.int8), (W * 40).to(torch.int8)
            works["int8"] = (lambda x=x8, W=W8: torch._int_mm(x, W.T), T)
        for what, (work, width) in works.items():
            took = milliseconds(work)
            results.tell(
                part="ceiling", size=name, what=what, tflops=2 * B * C * width / took["median"] / 1e9,
                ms_all_features=took["median"] * size.F / width,
            )  # fmt: skip


def step(results: Results, name: str, size: Size, mode: str, optimizer: str) -> None:
    """The engine's whole step: time, host time, memory, and time by kernel."""
    model, x_BKD = model_and_batch(size, size.active, threshold_mode=mode, threshold_window=WINDOW[mode])
    engine = engine_of(model, size, optimizer_mode=optimizer)
    numbers = itertools.count()

    def once() -> None:
        engine.step(x_BKD, settings(next(numbers)))

    began = time.monotonic()
    once()
    engine.settle()
    synchronize()
    row: dict[str, Any] = {"size": name, "mode": mode, "optimizer": optimizer, "first_s": time.monotonic() - began}
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    row["ms"] = milliseconds(once)
    row["host_ms"] = host_milliseconds(once)
    if ON_GPU:
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row["held_gb"] = torch.cuda.memory_allocated() / 1e9
    engine.settle()
    row["pairs"] = engine._last_count
    row["sparse"] = bool(engine._fits is not None)
    results.check("step", row["sparse"], **row)
    if ON_GPU:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(3):
                once()
            synchronize()
        events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
        by_kernel = {
            event.key[:60]: [round(event.self_device_time_total / 3e3, 3), round(event.count / 3, 1)]
            for event in events[:KERNELS_SHOWN]
        }
        results.tell(part="kernels", size=name, mode=mode, optimizer=optimizer, ms_and_launches_a_step=by_kernel)


def dense(results: Results, name: str, size: Size, share: int) -> None:
    """Dense torch in bf16 on a `share`-th of the features, autograd and fused Adam, plain and compiled: all its
    products grow with the features, so times `share` is what the whole takes."""
    part = replace(size, F=max(8, size.F // share))
    model, x_BKD = model_and_batch(replace(part, state="low-memory"), part.active)
    W_enc, W_dec = (torch.nn.Parameter(W.detach().bfloat16()) for W in (model.W_enc, model.W_dec))
    b_enc, b_dec = (torch.nn.Parameter(b.detach().bfloat16()) for b in (model.b_enc, model.b_dec))
    optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=1e-9, **({"fused": True} if ON_GPU else {}))

    def loss(x_BKD: torch.Tensor) -> torch.Tensor:
        h_BF = x_BKD.flatten(1) @ W_enc.flatten(1).T + b_enc
        norms_FK = W_dec.float().norm(dim=2).bfloat16()
        total = x_BKD.new_zeros((), dtype=torch.float32)
        for k in range(size.K):
            f_BF = h_BF * (h_BF * norms_FK[:, k] > THRESHOLD)
            residual_BD = f_BF @ W_dec[:, k] + b_dec[k] - x_BKD[:, k]
            total = total + residual_BD.float().square().sum() + 0.1 * torch.tanh(f_BF * norms_FK[:, k]).float().sum()
        return total / len(x_BKD)

    for way in ("plain", "compiled") if ON_GPU else ("plain",):
        forward = torch.compile(loss) if way == "compiled" else loss

        def once(forward: Any = forward) -> None:
            optimizer.zero_grad(set_to_none=True)
            forward(x_BKD).backward()
            optimizer.step()

        with torch.enable_grad():
            took = milliseconds(once, 3)
        results.tell(part="dense bf16 torch", size=name, way=way, features=part.F, ms=took, times=size.F / part.F)


def training(results: Results, tiny: bool) -> None:
    """`Trainer` end to end on the planted task: GPU against CPU, the same bits twice, batches in bf16."""
    K, D, F, B, N = (3, 8, 32, 16, 3) if tiny else (8, 64, 1024, 512, 400)
    truth = PlantedDictionary(
        PlantedConfig(
            n_snapshots=K, d_model=D, n_features=max(16, F // 2), l0=2.0 if tiny else 5.0, turning_point=K // 2
        )
    )
    losses = {}
    runs = [("cpu", torch.device("cpu"), torch.float32), ("first", DEVICE, torch.float32)]
    for run, device, dtype in (*runs, ("again", DEVICE, torch.float32), ("bf16 batches", DEVICE, torch.bfloat16)):
        generator = torch.Generator().manual_seed(1)
        model = Crosscoder(CrosscoderConfig(K, D, F), seed=0).to(device)
        backend = "auto" if run == "cpu" else "triton"
        config = TrainConfig(
            n_steps=N, batch_size=B, lr=2e-3, warmup_steps=20, revival_every=2 if tiny else 100,
            dead_after_tokens=50_000, start="calibrated", start_l0=8.0, backend=backend,
        )  # fmt: skip
        trainer = Trainer(model, config)
        initialize(model, truth.sample(512, generator).to(device), config)
        began = time.monotonic()
        metrics = [trainer.step(truth.sample(B, generator).to(device, dtype)) for _ in range(N)]
        trainer.engine.settle()
        losses[run] = torch.stack([torch.as_tensor(row["loss"]).float().cpu() for row in metrics])
        results.check(
            "training", trainer.engine.name == ("native" if run == "cpu" else "triton"), run=run,
            backend=trainer.engine.name, seconds=time.monotonic() - began,
            loss=[float(losses[run][i]) for i in (0, 1, N // 2, N - 1)],
            explained_variance=float(torch.as_tensor(metrics[-1]["explained_variance"]).mean()),
            l0=float(torch.as_tensor(metrics[-1]["l0"]).mean()),
        )  # fmt: skip
    apart = float((losses["first"][:50] / losses["cpu"][:50] - 1).abs().max())
    same = torch.equal(losses["first"], losses["again"])
    results.check("training, compared", same and apart < 1e-2, same_bits=same, first_50_apart_from_cpu=apart)


def trainer_step(results: Results, name: str, size: Size) -> None:
    """What `Trainer.step` adds to the engine's step: firing, metrics, whitening."""
    model, x_BKD = model_and_batch(size, size.active)
    config = train_config(size, n_steps=10**6, lr=1e-9, warmup_steps=0, sparsity_warmup_fraction=0.0, revival="none")
    trainer = Trainer(model, config)
    trainer.step(x_BKD)
    trainer.engine.settle()
    for kind, batch in (("bf16", x_BKD), ("fp32", x_BKD.float())):
        row: dict[str, Any] = {"ms": milliseconds(lambda batch=batch: trainer.step(batch))["median"]}
        row["host_ms"] = host_milliseconds(lambda batch=batch: trainer.step(batch))
        if ON_GPU:
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        results.tell(part="Trainer.step", size=name, batch=kind, whitened=model.is_mixed, **row)


def crossover(results: Results, name: str, size: Size) -> None:
    """The sparse and the dense way at some densities: where they cross is what `dense_above` should be."""
    for density in DENSITIES if ON_GPU else DENSITIES[:1]:
        for way, above in (("sparse", 1.0), ("dense", -1.0)):
            model, x_BKD = model_and_batch(size, density * size.F)
            engine = engine_of(model, size)
            engine.dense_above = above
            took = milliseconds(partial(engine.step, x_BKD, settings(0)), 2, 1)
            results.tell(part="crossover", size=name, density=density, way=way, ms=took["median"])
            del engine, model


def verbs(results: Results) -> None:
    """The command line from text to the page and further, every verb on the device."""
    with tempfile.TemporaryDirectory() as folder:
        text, run = Path(folder, "text"), f"{folder}/run"
        text.mkdir()
        root = Path(__file__).parents[1]  # a million characters that are there without a network: our own source
        sources = [*root.glob("docs/*.md"), *root.glob("python/**/*.py"), *root.glob("tests/**/*.py")]
        for number, source in enumerate(sources):
            shutil.copy(source, text / f"{number}.txt")
        small = ["--lm-steps", "8", "--lm-snapshots", "6", "--max-characters", "1100000"]
        small += ["--n-features", "64", "--train-steps", "8", "--batch-size", "64"]
        for arguments in (
            ["quickstart", "--out", run, "--text", str(text), *small],
            ["attribute", run, "--task", "induction"],
            ["sweep", run, "--n-steps", "4", "--sparsity", "0.1", "--baselines", "sae"],
        ):
            began = time.monotonic()
            command = [sys.executable, "-m", "crosscoder", *arguments, "--device", DEVICE.type]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            on_device = f"device: {DEVICE.type}" in done.stdout
            results.check(
                f"verb {arguments[0]}",
                done.returncode == 0 and on_device,
                command=" ".join(command[1:]),
                seconds=time.monotonic() - began,
                said=(done.stdout + done.stderr)[-800:],
            )


def commit() -> str:
    if shutil.which("git") is None:
        return "unknown: no git here"
    said = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return said.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="sizes for the interpreter; no table by kernel",
    )
    parser.add_argument("--budget", type=float, default=300, help="seconds after which no further part begins")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="the results, one JSON line each")
    options = parser.parse_args()
    if not ON_GPU and not (options.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        print("torch sees no CUDA device: only --tiny runs here, with TRITON_INTERPRET=1 set", file=sys.stderr)
        return 1
    sizes = TINY if options.tiny else SIZES
    results = Results(options.out, options.budget)
    device: dict[str, Any] = {"device": "Triton's interpreter: times mean nothing"}
    if ON_GPU:
        properties = torch.cuda.get_device_properties(0)
        device = {"device": properties.name, "sms": properties.multi_processor_count, "bytes": properties.total_memory}
    results.tell(
        part="device", **device, torch=torch.__version__, cuda=torch.version.cuda, triton=triton.__version__,
        commit=commit(),
    )  # fmt: skip
    big, wide = sizes["6.9b-low-memory"], sizes["160m-fp32"]
    with torch.no_grad():
        results.part("far end", far_end, big)
        results.part("ceilings", ceilings, sizes)
        for name, mode, optimizer in STEPS[: 4 if options.tiny else None]:
            results.part(f"step {name} {mode}", step, name, sizes[name], mode, optimizer)
        results.part("dense", dense, "6.9b-low-memory", big, 1 if options.tiny else 4)
        results.part("training", training, options.tiny)
        results.part("verbs", verbs)
        for name in ("6.9b-low-memory", "160m-fp32"):
            results.part(f"Trainer.step {name}", trainer_step, name, sizes[name])
        results.part("crossover", crossover, "160m-fp32", wide)
        results.part("dense", dense, "160m-fp32", wide, 1 if options.tiny else 4)
    results.tell(part="done", failed=results.failed)
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
