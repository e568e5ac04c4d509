"""The loader against what the machine can do: pread from the page cache, dd from the disk.

python benchmarks/loader.py --folder /tmp/loader-bench --json benchmarks/results/loader-xeon.json

A store of K x D activations is written once, for each dtype. "page cache": two threads of the loader into (B, K, D)
bf16, against two threads that pread the same files in 4 MiB pieces, by turns; the best of the repeats of each. "cold":
the files put out of the page cache, against dd iflag=direct. "first pass": a new loader, so with fresh memory and with
every block's checksum; "later passes": the same loader again. "read back": the same once more after "cold", when the
page cache holds what was read from the disk instead of what was written, which pread copies more slowly.
Rates are of stored bytes; "memory" is what a loader takes; "training" is how long training stands waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crosscoder import ActivationLoader, ActivationStore, __version__
from crosscoder.hardware import cpu_name
from harness.situation import Shape, make
from harness.variants import DEFAULT

PIECE = 4 << 20
THREADS = 2
TRAINING_MEMORY = 64 << 20  # so little that the loader has to read all the time
RATES = ("first_pass_activations_per_s", "later_pass_activations_per_s", "later_pass_activations_per_cpu_s")


def make_store(folder: Path, dtype: str, options: argparse.Namespace) -> ActivationStore:
    N, K, D, T = options.tokens, options.snapshots, options.width, options.rows_per_shard
    rows = [min(T, N - start) for start in range(0, N, T)]
    source = {"made by": "benchmarks/loader.py"}
    store = ActivationStore.create(folder / dtype, K, D, dtype, shard_rows=rows, source=source)
    generator = torch.Generator().manual_seed(0)
    for shard, k in store.missing():
        store.write_segment(shard, k, torch.randn(rows[shard], D, generator=generator))
    return store


def files_of(store: ActivationStore) -> list[Path]:
    return [store.segment_path(shard, k) for shard in range(len(store.shard_rows)) for k in range(store.n_snapshots)]


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall time, and CPU time of the whole process."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu


def pread_all(files: list[Path]) -> None:
    """Two threads, 4 MiB a call, each into one buffer."""
    lock, left = threading.Lock(), list(files)

    def work() -> None:
        buffer = bytearray(PIECE)
        while True:
            with lock:
                if not left:
                    return
                path = left.pop()
            descriptor = os.open(path, os.O_RDONLY)
            offset = 0
            while (done := os.preadv(descriptor, [buffer], offset)) > 0:
                offset += done
            os.close(descriptor)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def evict(files: list[Path]) -> None:
    os.sync()
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def dd_all(files: list[Path]) -> None:
    for path in files:
        subprocess.run(
            ["dd", f"if={path}", "of=/dev/null", "bs=4M", "iflag=direct"], check=True, stderr=subprocess.DEVNULL
        )


def drain(loader: ActivationLoader) -> int:
    return sum(len(batch) for batch in loader)


def loader_of(store: ActivationStore, options: argparse.Namespace, **changes: Any) -> ActivationLoader:
    settings = {"dtype": "bf16", "n_threads": THREADS, "direct": False, **changes}
    return ActivationLoader(store, options.batch, drop_last=False, **settings)


def anonymous_memory() -> int:
    """Resident memory of the process in bytes, without what is mapped from files (that is the page cache)."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


def measure(store: ActivationStore, options: argparse.Namespace) -> dict[str, Any]:
    files = files_of(store)
    gigabytes = sum(path.stat().st_size for path in files) / 1e9
    values = store.n_tokens * store.n_snapshots
    pread_all(files)
    pread, first, later = [], [], []
    loader = loader_of(store, options)
    drain(loader)
    for _ in range(options.repeats):
        pread.append(seconds(lambda: pread_all(files)))
        first.append(seconds(lambda: drain(loader_of(store, options))))
        later.append(seconds(lambda: drain(loader)))

    def best(times: list[tuple[float, float]], clock: int) -> float:
        return min(entry[clock] for entry in times)

    def ratio(times: list[tuple[float, float]], clock: int) -> float:
        return statistics.median(p[clock] / t[clock] for p, t in zip(pread, times, strict=True))

    before, most = anonymous_memory(), 0
    for _ in loader_of(store, options):
        most = max(most, anonymous_memory())
    return {
        "gigabytes": gigabytes,
        "memory_GiB": (most - before) / 2**30,
        "run_rows": loader.run_rows,
        "window_runs": loader.window_runs,
        "pread_GB_per_s": gigabytes / best(pread, 0),
        "first_pass_GB_per_s": gigabytes / best(first, 0),
        "later_pass_GB_per_s": gigabytes / best(later, 0),
        "first_pass_activations_per_s": values / best(first, 0),
        "later_pass_activations_per_s": values / best(later, 0),
        "later_pass_activations_per_cpu_s": values / best(later, 1),
        "first_to_pread": best(pread, 0) / best(first, 0),
        "later_to_pread": best(pread, 0) / best(later, 0),
        "later_to_pread_median_of_pairs": ratio(later, 0),
        "later_to_pread_cpu_time": ratio(later, 1),
        "first_to_pread_cpu_time": ratio(first, 1),
    }


def measure_cold(store: ActivationStore, options: argparse.Namespace) -> dict[str, Any]:
    files = files_of(store)
    gigabytes = sum(path.stat().st_size for path in files) / 1e9
    ways: dict[str, Callable[[], object]] = {
        "dd": lambda: dd_all(files),
        "loader_direct": lambda: drain(loader_of(store, options, direct=True, n_threads=options.cold_threads)),
        "loader_buffered": lambda: drain(loader_of(store, options, direct=False, n_threads=options.cold_threads)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, work in ways.items():
            evict(files)
            times[name].append(seconds(work)[0])
    result = {f"{name}_GB_per_s": gigabytes / min(values) for name, values in times.items()}
    for name in ("loader_direct", "loader_buffered"):
        result[f"{name}_to_dd"] = min(times["dd"]) / min(times[name])
        result[f"{name}_to_dd_median_of_pairs"] = statistics.median(
            d / t for d, t in zip(times["dd"], times[name], strict=True)
        )
    return result


def measure_waiting(options: argparse.Namespace) -> dict[str, Any]:
    """The share of its time that training stands waiting for a batch: the step of the benchmark (K = 8, D = 256,
    F = 8,192, B = 1,024, 20 pairs a token) from a bf16 store, from the page cache and from the disk."""
    shape = Shape()
    situation = make(shape, n_batches=options.training_steps)
    store = ActivationStore.from_array(options.folder / "training", torch.cat(situation.batches), "bf16")
    trainer = DEFAULT.trainer(situation.model)
    settings: dict[str, Any] = {"scale": [1.0] * shape.n_snapshots, "memory_bytes": TRAINING_MEMORY}
    result: dict[str, Any] = {"shape": shape.to_dict(), "steps": options.training_steps}
    for name, direct in (("page cache", False), ("cold", True)):
        loader = ActivationLoader(store, shape.batch, direct=direct, **settings)
        if direct:
            evict(files_of(store))
        batches = iter(loader)
        trainer.step(next(batches))
        began, waited = time.perf_counter(), loader.wait_seconds
        pairs = [float(trainer.step(x_BKD)["l0_union"]) for x_BKD in batches]
        took = time.perf_counter() - began
        result[name] = {
            "seconds_a_step": took / len(pairs),
            "pairs_a_token": statistics.mean(pairs),
            "waits": loader.waits,
            "wait_fraction": (loader.wait_seconds - waited) / took,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    for name, default in (("tokens", 32_768), ("snapshots", 32), ("width", 768), ("rows-per-shard", 4_096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("batch", 2_048), ("repeats", 5), ("cold-threads", 4), ("training-steps", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "int8"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "cpu": cpu_name(),
        "kernel": platform.release(),
        "crosscoder": __version__,
        "torch": torch.__version__,
        "load_at_start": os.getloadavg()[0],
        "shape": {name: getattr(options, name) for name in ("tokens", "snapshots", "width", "rows_per_shard", "batch")},
    }
    for dtype in options.dtypes:
        store = make_store(options.folder, dtype, options)
        result[dtype] = measure(store, options)
        result[dtype]["cold"] = measure_cold(store, options)
        drain(loader_of(store, options))
        result[dtype]["read_back"] = measure(store, options)
    for finer, coarser in (("bf16", "int8"), ("int8", "int4")):
        if finer in result and coarser in result:
            for rate in RATES:
                result[f"{coarser}_to_{finer}_{rate}"] = result[coarser][rate] / result[finer][rate]
    if options.training_steps:
        result["training"] = measure_waiting(options)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
