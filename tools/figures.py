"""Are the figures in README.md and docs/ those of the committed results?

    python tools/figures.py          # every figure, where it stands, and whether it follows from benchmarks/results

Each entry of `CHECKED` is a phrase of a document whose numbers are computed here from the results. After a new
measurement the command names the phrases that must change. Figures whose results are not committed are in
docs/benchmarks.md, with the command that gives each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from crosscoder.step_time import GPUS, Mode, Step

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SMALL, LARGE = "K8-D256-F8192-B1024-L20", "K8-D256-F32768-B2048-L20"
DENSE, PEER = "K8-D256-F16384-B1024-L20", f"{SMALL} llamascopium bf16"
BEST_PEER = f"{PEER}, no metrics, products, optimizer, glibc tuned"


def _entries(name: str) -> dict[str, Any]:
    """The cases of a results file, by name."""
    return {entry["case"]: entry for entry in json.loads((RESULTS / f"{name}.json").read_text())}


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def _gemms(file: str, case: str, contender: str = "step") -> float:
    """A contender's median as a multiple of the one product."""
    return float(_entries(file)[case]["contenders"][contender]["gemms"])


def _planted(recipe: str, key: str, *, null: bool = False, steps: int = 3000) -> list[float]:
    """One number a seed of the planted dictionary."""
    return [
        float(row[key])
        for row in _lines("planted-cpu")
        if (row["recipe"], row["null"], row["steps"]) == (recipe, null, steps)
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _planted_dictionary() -> str:
    paper = _planted("paper", "recovered")
    order = _planted("paper", "emergence_correlation")
    ours = _planted("default", "recovered")
    seeds = {5: "five"}[len(ours)]
    null = _planted("default", "share_emergent", null=True)
    return (
        f"features recovered from a planted dictionary, {seeds} seeds | {100 * _mean(ours):.0f} % (the paper's recipe "
        f"{100 * min(paper):.0f} to {100 * max(paper):.0f} %); order of emergence "
        f"{_mean(_planted('default', 'emergence_correlation')):.3f} ({min(order):.2f} to {max(order):.2f}); "
        f"without evolution {100 * _mean(null):.1f} % seem to emerge"
    )


def _turning_point() -> str:
    covered = _planted("default", "turning_point_covered", steps=500)
    assert all(covered), f"covered in {sum(covered):.0f} of {len(covered)}: the sentence must say so"
    return f"the right snapshot in all of {len(covered)} seeds"


def _geometry() -> str:
    entry = _entries("evolution-amd-epyc")["K32-D768-F98304"]
    beside = entry["peak_bytes_beyond_the_map"] / 2**30
    return (
        f"{entry['ratio']:.2f} of reading the weights and one product (one run; {entry['ratio_with_kinds']:.2f} with "
        f"each kind's own dimensionality); {beside:.2f} GiB beside the mapped weights"
    )


def _examples() -> str:
    return f"{_entries('examples-amd-epyc')[SMALL]['with_examples_over_encode']:.2f} of encoding alone"


def _loader() -> str:
    found = json.loads((RESULTS / "loader-amd-epyc.json").read_text())["bf16"]
    read_back = found["read_back"]["later_to_pread"]
    return (
        f"{found['later_to_pread']:.2f} times the rate of `pread` alone where the cache holds what was just written, "
        f"{read_back:.2f} times where it was filled by reading the disk"
    )


def _bigrams() -> str:
    entries = _entries("bigrams-amd-epyc").values()
    rates = [entry["million_tokens_a_second"]["count"] for entry in entries]
    bytes_each = {round(entry["bytes_a_distinct_bigram_counting"]) for entry in entries}
    assert len(bytes_each) == 1, f"bytes a pair differ: {bytes_each}"
    return f"{min(rates):.0f} to {max(rates):.0f} M tokens a second, {bytes_each.pop()} bytes a distinct pair"


def _step_int8() -> str:
    large, small = (_gemms("step-amd-epyc", f"{case} candidates int8", "candidates int8") for case in (LARGE, SMALL))
    return f"with int8 candidates {large:.2f} and {small:.1f}"


def _step_amx() -> str:
    large, small = (_gemms("step-intel-xeon", case) for case in (LARGE, SMALL))
    return f"with AMX, where the product is faster, {large:.2f} and {small:.2f}"


def _step_table() -> str:
    return f"{_gemms('step-amd-epyc', SMALL):.2f} (1.58) | {_gemms('dense-amd-epyc', f'{DENSE} autograd'):.2f} |"


def _encode_table() -> str:
    small, large = (_gemms("encode-amd-epyc", case, "encode") for case in (SMALL, LARGE))
    return f"| `model.encode` | {small:.2f} | | {large:.2f} |"


def _dense() -> str:
    eager, compiled = (
        _entries("dense-amd-epyc")[f"{DENSE} {kind}"]["step_is_faster_by"] for kind in ("autograd", "compiled")
    )
    return f"{eager:.0f} times as fast; {compiled:.0f} times compiled dense torch"


def _peer() -> str:
    best = _entries("peer-amd-epyc")[BEST_PEER]
    shipped = _entries("peer-amd-epyc")[PEER]["step_is_faster_by"]
    times = best["contenders"]
    int8 = (
        next(time["gemms"] for name, time in times.items() if name.startswith("llamascopium"))
        / times["step, int8"]["gemms"]
    )
    return (
        f"{shipped:.0f} times as fast as shipped, {best['step_is_faster_by']:.0f} times its best variant "
        f"({int8:.0f} with int8 candidates"
    )


def _memory() -> str:
    plain, low = (_entries("memory-amd-epyc")[case]["memory"] for case in (LARGE, f"{LARGE} state low-memory"))
    return (
        f"{plain['beyond'] / 2**20:.0f} MiB; low-memory state {low['state'] / low['parameters']:.2f} bytes a parameter"
    )


def _completeness() -> str:
    errors = [row["completeness_error_by_steps"]["10"] for row in _lines("attribution-cpu") if "snapshot" in row]
    return f"completeness error {100 * max(errors):.1f} % with 10 steps"


def _kernels() -> str:
    tables = json.loads((RESULTS / "compile-gate.json").read_text())["triton"]
    low = [
        row["a_parameter"]
        for table in tables.values()
        for row in table["rows"]
        if row["arch"] == 90 and "WHAT=2" in row["constants"] and "EIGHT_BIT=1" in row["constants"]
    ]
    return f"{max(low):.0f} instructions a parameter"


def _modelled_steps() -> str:
    gpu, times = GPUS["h100"], []
    for low_memory, D, F in ((True, 4096, 32_768), (False, 768, 98_304), (True, 768, 98_304)):
        modes = [Step(2048, 32, D, F, low_memory, mode).seconds(gpu) for mode in get_args(Mode)]
        times.append(" · ".join(f"{1e3 * seconds:.0f}" for seconds in modes))
    return (
        f"{times[0]} ms for 6.9B with low-memory state, {times[1]} for 160M with fp32 state, {times[2]} with low-memory"
    )


def _counted_memory() -> str:
    sizes = json.loads((RESULTS / "memory-ghost.json").read_text()).values()
    rows = {"with joining and revival": "step with joining and revival", "peak of a dense step": "dense step"}
    return " ".join(f"| {row} | {' | '.join(f'{size[part]:.1f}' for size in sizes)} |" for row, part in rows.items())


def _bit_flips() -> str:
    found = json.loads((RESULTS / "bit-flips.json").read_text())
    assert not found["faults"], "the sentence must say so"
    n_files = sum(tally["files"] for tally in found["by_files"].values())
    return f"{found['flips']:,} flipped bits, over all {n_files} files of a small run that something reads back"


CHECKED: dict[str, tuple[str, Callable[[], str]]] = {
    "planted dictionary": ("README.md", _planted_dictionary),
    "turning point": ("README.md", _turning_point),
    "geometry": ("README.md", _geometry),
    "examples": ("README.md", _examples),
    "loader": ("README.md", _loader),
    "bigrams": ("README.md", _bigrams),
    "step, int8": ("README.md", _step_int8),
    "step, AMX": ("README.md", _step_amx),
    "dense torch": ("README.md", _dense),
    "the authors' package": ("README.md", _peer),
    "memory": ("README.md", _memory),
    "completeness": ("README.md", _completeness),
    "step, table": ("docs/performance.md", _step_table),
    "encode, table": ("docs/performance.md", _encode_table),
    "compiled kernels": ("docs/performance.md", _kernels),
    "bit flips": ("README.md", _bit_flips),
    "counted memory": ("docs/performance.md", _counted_memory),
    "modelled steps on a GPU": ("docs/performance.md", _modelled_steps),
}
"""By name: the document, and the phrase that it must hold."""


def holds(name: str) -> tuple[str, str, bool]:
    """(Document, phrase, whether it stands there); line breaks count as spaces."""
    document, phrase = CHECKED[name]
    wanted = phrase()
    text = " ".join((ROOT / document).read_text(encoding="utf-8").split())
    return document, wanted, wanted in text


def main() -> int:
    """Print every figure; 1 if a document says something else."""
    wrong = 0
    for name in CHECKED:
        document, phrase, there = holds(name)
        print(f"{'ok   ' if there else 'WRONG'} {document}: {phrase}")
        wrong += not there
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
