"""Made-up results of analyses, with the names and shapes of real ones."""

from __future__ import annotations

import dataclasses
import types as kinds_of_types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crosscoder.evolution.analyses import analyses
from crosscoder.evolution.comparison_figures import Comparisons
from crosscoder.evolution.stability import Stability
from crosscoder.explain.figures import Explanations
from crosscoder.figures.results import Results
from crosscoder.figures.table import FigureTable
from crosscoder.report.assemble import page_of, parts
from crosscoder.sweep.figures import Sweep


@dataclass(frozen=True)
class Made:
    """Arrays of analyses by name, to be changed by a test, and the results that they make."""

    arrays: dict[str, dict[str, Any]]
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Columns of "explanations" and "sweep"."""
    comparisons: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name of another run -> the arrays of `Stability`."""
    steps: np.ndarray = field(default_factory=lambda: STEPS)
    others: Iterable[object] = ()

    @property
    def results(self) -> Results:
        found: list[object] = [
            filled(one.result, self.arrays[one.name]) for one in analyses() if one.name in self.arrays
        ]
        if self.comparisons:
            by_run = {name: filled(Stability, arrays) for name, arrays in self.comparisons.items()}
            found.append(Comparisons(by_run))
        tables = {"explanations": Explanations, "sweep": Sweep}
        found += [tables[name](dict(columns)) for name, columns in self.tables.items()]
        return Results(self.steps, [*found, *self.others])

    @property
    def figures(self) -> dict[str, FigureTable]:
        """All figures of the page, by key."""
        return {table.key: table for table in page_of(self.results, parts()).tables}


def filled(kind: Any, arrays: Mapping[str, Any], prefix: str = "") -> Any:
    """A result from its arrays, names joined by points; what a test did not give is NaN, 0, empty or has no key."""
    hints = typing.get_type_hints(kind)
    return kind(**{one.name: _filled(hints[one.name], arrays, prefix + one.name) for one in dataclasses.fields(kind)})


def _filled(hint: Any, arrays: Mapping[str, Any], name: str) -> Any:
    if typing.get_origin(hint) in (typing.Union, kinds_of_types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return filled(hint, arrays, f"{name}.")
    if isinstance(origin := typing.get_origin(hint), type) and issubclass(origin, Mapping):
        keys = dict.fromkeys(one[len(name) + 1 :].split(".")[0] for one in arrays if one.startswith(f"{name}."))
        return {key: _filled(typing.get_args(hint)[1], arrays, f"{name}.{key}") for key in keys}
    if name in arrays:
        value = np.asarray(arrays[name])
        return hint(value.item()) if hint in (bool, int, float, str) else value
    empty: dict[Any, Any] = {float: np.nan, int: 0, bool: False, str: ""}
    return empty.get(hint, np.zeros((0,)))


STEPS = np.array([0, 1, 8, 64, 512, 1000])
MEASURES = ("entropy", "context")


def correlation(n: int, value: float, p: float) -> dict[str, np.ndarray]:
    names = {"n": n, "spearman": value, "spearman_low": value - 0.1, "spearman_high": value + 0.1, "spearman_p": p}
    return {name: np.array(number) for name, number in names.items()}


def rng_free(n: int, K: int) -> np.ndarray:
    """(n, K) relative norms, without drawing from the generator of the others."""
    return 0.5 + 0.5 * np.cos(np.arange(n * K).reshape(n, K)) ** 2


def life(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    K = len(STEPS)
    kind = rng.choice(2, n, p=[0.4, 0.6])
    emergence = np.where(kind == 0, 0, rng.integers(1, K, n))
    births = np.bincount(emergence[kind == 1], minlength=K)
    return {
        "norms": np.full((n, K), 2.0),
        "cycles.threshold": 0.3,
        "cycles.steps": STEPS,
        "cycles.kind": kind,
        "cycles.emergence": emergence,
        "cycles.relative": rng_free(n, K),
        "cycles.revived": np.arange(n) % 7 == 0,
        "cycles.deaths": births // 2,
        "cycles.sharedness": rng.random(n),
        "cycles.births": births,
        "cycles.lifetime": rng.random(n),
        "interval.births_low": births * 0.9,
        "interval.births_high": births * 1.2,
        "interval.level": np.array(0.9),
        "interval.n_by_kind_low": np.array([20.0, 30.0, 0, 0]),
        "interval.n_by_kind_high": np.array([28.0, 40.0, 0, 0]),
        "cycles.births_per_log_step": births / np.append(np.nan, np.diff(np.log10(1 + STEPS))),
        "cycles.deaths_per_log_step": np.full(K, 1.5),
        "sweep.thresholds": np.array([0.1, 0.3, 0.5]),
        "sweep.n_by_kind": np.array([[9, 5, 0, 1], [8, 6, 0, 1], [7, 7, 0, 1]]),
        "sweep.births": np.tile(births, (3, 1)),
        "sweep.same_emergence": np.array([0.9, 1, 0.8]),
        "sweep.reference": np.array(0.3),
    }


def rotation(cosines: np.ndarray) -> dict[str, Any]:
    K = len(STEPS)
    mean = np.exp(-np.abs(np.subtract.outer(np.arange(K), np.arange(K))) / 3.0)
    counts = np.full((K, K), 12)
    return {
        "to_final": cosines,
        "to_previous": cosines,
        "levels": np.array([0.1, 0.5, 0.9]),
        "overall.mean": mean,
        "overall.quantiles": np.stack([mean * 0.6, mean, np.minimum(1, mean * 1.3)]),
        "overall.counts": counts,
        **{f"by_mask.{kind}.{name}": value for kind in ("initialization", "emergent")
           for name, value in (("mean", mean), ("counts", counts))},
        "turning_point.null_mean": np.full((K, K), 0.07),
    }  # fmt: skip


def types(n: int, emergence: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    code = rng.choice(6, n, p=[0.3, 0.2, 0.1, 0.1, 0.2, 0.1])
    counts = np.stack([np.bincount(emergence[(code == t) & (emergence > 0)], minlength=len(STEPS)) for t in range(6)])
    median = np.array([np.median(STEPS[emergence[code == t]]) for t in range(6)])
    return {
        "features.type": code,
        "features.judged": np.ones((n, 4), dtype=bool),
        "features.control": np.array([0.0, 0.01, np.nan, 0.02]),
        "emergent.counts": counts,
        "emergent.n": counts.sum(axis=1),
        "emergent.compared": np.array([True, True, True, True, True, False]),
        "emergent.p": np.array(0.001),
        "emergent.effect": np.array(0.2),
        "emergent.pairs": np.array([[0, 1], [0, 2], [1, 2]]),
        "emergent.pair_effect": np.array([-0.1, -0.7, -0.4]),
        "emergent.pair_p": np.array([0.3, 0.001, 0.02]),
        "emergent.pair_holm": np.array([0.3, 0.003, 0.04]),
        "emergent.median": median,
        "emergent.median_low": median - 1,
        "emergent.median_high": median + 1,
    }


def explanations(n: int, rng: np.random.Generator) -> dict[str, list[Any]]:
    marks = np.where(rng.random(n) < 0.1, np.nan, rng.integers(1, 6, n))
    scores = {name: (rng.integers(0, 11, n) / 10).tolist() for name in ("detection", "fuzzing", "detection_control")}
    return {
        "feature": list(range(n)),
        "kind": ["initialization", "emergent"] * (n // 2),
        "emergence": rng.choice(STEPS, n).tolist(),
        "explanation": ["" if np.isnan(mark) else f"a <b>word</b> {mark:.0f}" for mark in marks],
        "complexity": marks.tolist(),
        **scores,
    }


def sweep() -> dict[str, list[Any]]:
    rows = [
        (method, 2048, sparsity, 0.001, 0, explained, l0, None if method == "sae" else explained, l0)
        for method, worse in (("crosscoder", 0.0), ("sae", 0.01), ("chain", 0.03))
        for sparsity, explained, l0 in ((0.1, 0.95 - worse, 30.0), (0.2, 0.9 - worse, 20.0), (0.4, 0.8 - worse, 10.0))
    ]
    names = ("method", "n_features", "sparsity", "lr", "seed", "explained_variance_last", "l0_last")
    table = {name: [row[index] for row in rows] for index, name in enumerate((*names, "explained_variance", "l0"))}
    table["l0"] = [None if method == "sae" else l0 for method, l0 in zip(table["method"], table["l0"], strict=True)]
    return table


def comparison(emergence: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """With a run in which what emerges early is found again, one snapshot later."""
    n, K = len(emergence), len(STEPS)
    taking = rng.random(n) < 0.9
    nearest = np.where(taking, np.where(emergence < 3, 0.9, 0.4) + 0.05 * rng.random(n), np.nan)
    matched = np.where(taking, np.where(emergence < 3, nearest, 0), 0)
    bars = np.arange(50, 100, 5) / 100
    pairs = np.bincount(emergence[matched > 0.7], minlength=K)
    return {
        "matching.match": np.where(matched > 0, np.arange(n), -1),
        "matching.cosine": matched,
        "matching.nearest": nearest,
        "matching.candidates": np.array(16),
        "matching.loss": np.array(0.0012),
        "n_first": taking.sum(),
        "n_second": taking.sum() + 7,
        "share_stable": (matched >= 0.7).sum() / taking.sum(),
        "share_stable_null": np.array(0.01),
        "bars": bars,
        "share_at": (matched >= bars[:, None]).sum(axis=1) / taking.sum(),
        "share_at_null": np.where(bars < 0.6, 0.05, 0),
        "nearest_null": np.where(taking, 0.3 + 0.1 * rng.random(n), np.nan),
        "emergence_pairs": np.diag(pairs[:-1], 1),
        "n_pairs_emerging": np.array(20),
        "emergence_same_emerging": np.array(0.1),
        "emergence_same_emerging_null": np.array(0.3),
        "emergence_within_one_emerging": np.array(0.8),
        "emergence_within_one_emerging_null": np.array(0.5),
    }


def results(n: int = 60, seed: int = 0, compared: tuple[str, ...] = ("seed1", "seed2")) -> Made:
    """Results of every analysis that makes figures, of `n` features, and comparisons with the runs `compared`."""
    rng = np.random.default_rng(seed)
    lives = life(n, rng)
    cosines = np.where(rng.random((n, len(STEPS))) < 0.1, np.nan, rng.random((n, len(STEPS))))
    cosines[:, 0] = np.nan
    measured = np.arange(0, n, 3)
    K, relative, auc = len(STEPS), rng.random((measured.size, len(STEPS))), rng.random((measured.size, len(STEPS)))
    flags = rng.random((n, K)) < 0.2
    arrays = {
        "probes": {
            "features": measured,
            "relative": relative,
            "areas.auc": auc,
            "areas.shuffled": np.full_like(auc, 0.5),
            "areas.random": np.full_like(auc, 0.6),
            "honesty.bins": np.array([0, 0.5, 1]),
            "honesty.bin_auc": np.array([0.7, 0.9]),
            "honesty.bin_auc_without": np.array([0.65, 0.85]),
            "honesty.bin_count": np.array([30, 40]),
            "honesty.correlation_overall": np.array(0.7),
            "honesty.correlation_median": np.array(0.6),
            "honesty.correlation_median_null": np.array(0.05),
            "honesty.share_hidden": np.array(0.025),
            "honesty.share_hollow": np.array(np.nan),
            "honesty.hidden": np.array([[measured[2], 1], [measured[0], 3]]),
            "honesty.hollow": np.array([[measured[1], 4]]),
        },
        "latent_scaling": {
            "low": flags,
            "shrunk": flags & (rng.random((n, K)) < 0.3),
            "decoupled": flags & (rng.random((n, K)) < 0.3),
            "share_shrunk": np.array(0.3),
            "share_decoupled": np.array(0.3),
        },
        "life": lives,
        "kind_dimensionality": {
            f"{name}.{kind}": height * (1 + np.arange(K)) / K
            for kind, height in (("initialization", 0.5), ("emergent", 0.7))
            for name, height in (("rate_within", height), ("null_within", height + 0.2))
        },
        "rotation": rotation(cosines),
        "types": types(n, lives["cycles.emergence"], rng),
        "complexity": {
            "entropy.here": np.where(rng.random(n) < 0.1, np.nan, rng.random(n) * 5),
            "context.feature": measured,
            "context.needed": 2 ** rng.integers(0, 8, measured.size),
            **{
                f"{part}.{measure}.{name}": value
                for part in ("all", "emergent")
                for measure in MEASURES
                for name, value in correlation(n, 0.4, 0.01).items()
            },
        },
    }
    tables = {"explanations": explanations(n, rng), "sweep": sweep()}
    comparisons = {name: comparison(lives["cycles.emergence"], rng) for name in compared}
    return Made(arrays, tables, comparisons)
