"""Draw the committed results: `python benchmarks/plot.py` writes docs/images/benchmarks-<device>.svg from the JSON.

    python benchmarks/plot.py                  # every device that has full-size results
    python benchmarks/plot.py --quick          # from quick results, beside the JSON

One panel a question; times are multiples of the one product (B, K D) x (K D, F), the faster of fp32 and bf16.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from crosscoder.files import make_folder
from harness.results import FOLDER

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
Entry = dict[str, Any]
AXES = {"n_features": "F features", "n_snapshots": "K snapshots", "batch": "B tokens", "l0": "active features a token"}


def step(axes: Axes, entries: list[Entry]) -> None:
    """The step against each size, the others as in the first case."""
    sweeps = [entry for entry in entries if list(entry["contenders"])[-1] == "step"]
    usual = {name: _most_common([entry["shape"][name] for entry in sweeps]) for name in AXES}
    for name, label in AXES.items():
        points = sorted(
            (entry["shape"][name] / usual[name], entry["contenders"]["step"]["gemms"])
            for entry in sweeps
            if all(entry["shape"][other] == usual[other] for other in AXES if other != name)
        )
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), "o-", label=f"{label} ({usual[name]:g})")
    _logarithmic(axes, "size, as a multiple of the one in brackets", "step / one product")


def density(axes: Axes, entries: list[Entry]) -> None:
    entries = sorted(entries, key=lambda entry: entry["density"])
    for name in entries[0]["contenders"]:
        if not name.startswith("one GEMM"):
            gemms = [entry["contenders"][name]["gemms"] for entry in entries]
            style = "k--" if name == "step" else "o-"
            axes.plot([entry["density"] for entry in entries], gemms, style, label=name)
    _logarithmic(axes, "share of the features that are active", "step / one product")


def bars(axes: Axes, entries: list[Entry]) -> None:
    """Every contender of every case once, the fastest of its measurements."""
    best: dict[str, float] = {}
    for entry in entries:
        for name, figures in entry["contenders"].items():
            shape = entry["shape"]
            label = f"{name}, F={shape['n_features']:,}"
            best[label] = min(figures["gemms"], best.get(label, float("inf")))
    labels = sorted(best, key=best.__getitem__, reverse=True)
    axes.barh(labels, [best[label] for label in labels], color=["C3" if "step" in label else "C0" for label in labels])
    for place, label in enumerate(labels):
        axes.text(best[label], place, f" {best[label]:.3g}", va="center", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("time / one product")
    axes.tick_params(axis="y", labelsize=7)


def memory(axes: Axes, entries: list[Entry]) -> None:
    labels = [entry["case"] for entry in entries]
    axes.barh(labels, [entry["memory"]["beyond"] / 2**20 for entry in entries])
    axes.set_xlabel("MiB beyond weights, optimiser state and batch")
    axes.tick_params(axis="y", labelsize=7)


QUESTIONS: dict[str, tuple[str, Callable[[Axes, list[Entry]], None]]] = {
    "step": ("The whole step", step),
    "density": ("Dense or sparse", density),
    "ops": ("One operation at a time", bars),
    "dense": ("Against dense torch", bars),
    "peer": ("Against llamascopium", bars),
    "encode": ("Encode only", bars),
    "memory": ("Peak memory of a step", memory),
}


def draw(device: str, results: dict[str, list[Entry]], path: Path) -> None:
    shown = [question for question in QUESTIONS if results.get(question)]
    figure, grid = plt.subplots(len(shown), 1, figsize=(9, 3.6 * len(shown)), layout="constrained", squeeze=False)
    for axes, question in zip(grid[:, 0], shown, strict=True):
        title, panel = QUESTIONS[question]
        panel(axes, results[question])
        where = results[question][0]["environment"]
        axes.set_title(f"{title}: {where['device']}, {where['threads']} threads, torch {where['torch']}", fontsize=9)
    matplotlib.rcParams["svg.hashsalt"] = device  # the same data, the same file
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    print(path)


def _most_common(values: list[Any]) -> Any:
    return max(values, key=values.count)


def _logarithmic(axes: Axes, x: str, y: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the JSON results")
    parser.add_argument("--quick", action="store_true", help="draw quick results, into that folder")
    options = parser.parse_args()
    found: dict[str, dict[str, list[Entry]]] = {}
    for path in sorted(options.results.glob("*.json")):
        match = re.fullmatch(r"([a-z]+)-(.+?)(-quick)?", path.stem)
        if match and match[1] in QUESTIONS and bool(match[3]) == options.quick:
            found.setdefault(match[2], {})[match[1]] = json.loads(path.read_text(encoding="utf-8"))
    if not found:
        parser.error(
            f"no results in {options.results}; first run: pytest benchmarks{'' if options.quick else ' --full'}"
        )
    folder = make_folder(options.results if options.quick else IMAGES)
    for device, results in found.items():
        draw(device, results, folder / f"benchmarks-{device}{'-quick.png' if options.quick else '.svg'}")


if __name__ == "__main__":
    main()
