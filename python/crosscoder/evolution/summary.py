"""The main figures of the analyses, as `summary.json` has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crosscoder.evolution.statistics import Correlation
from crosscoder.evolution.strength import KIND_NAMES
from crosscoder.evolution.types import OTHER, TYPE_NAMES


def main_figures(results: Mapping[str, Mapping[str, np.ndarray]], revisions: Sequence[str]) -> dict[str, Any]:
    """Main figures of the analyses in `results`; what is missing there is left out."""
    figures: dict[str, Any] = {}
    if "life" in results:
        kinds = np.bincount(results["life"]["cycles.kind"], minlength=len(KIND_NAMES))
        figures["features_by_kind"] = {name: int(count) for name, count in zip(KIND_NAMES, kinds, strict=True)}
        figures["n_initialization"] = figures["features_by_kind"]["initialization"]
        figures["n_emergent"] = figures["features_by_kind"]["emergent"]
        figures["presence_threshold"] = float(results["life"]["cycles.threshold"])
    if "rotation" in results:
        point = {
            name.removeprefix("turning_point."): value
            for name, value in results["rotation"].items()
            if name.startswith("turning_point.")
        }
        names = ("step", "step_low", "step_high", "level", "within", "across", "p_shuffled", "p_random")
        figures["turning_point"] = {name: float(point[name]) for name in names}
    if "ngrams" in results:
        ngrams = results["ngrams"]
        figures["model_loss"] = float(ngrams["curves.loss"][-1])
        figures["model_loss_by_snapshot"] = _by(revisions, ngrams["curves.loss"])
        figures["bigram_entropy"] = float(ngrams["entropies.bigram"])
        figures["entropies"] = {
            name: float(ngrams[f"entropies.{name}"])
            for name in (
                "uniform",
                "unigram",
                "bigram",
                "unigram_plugin",
                "bigram_plugin",
                "bigram_corrected",
            )
        }
    if "induction" in results:
        figures["induction_gap"] = float(results["induction"]["gap"][-1])
        figures["induction_gap_by_snapshot"] = _by(revisions, results["induction"]["gap"])
    if "dimensionality" in results:
        figures["dimensionality_by_snapshot"] = _by(revisions, results["dimensionality"]["rate"])
    if "types" in results:
        figures["features_by_type"] = _types(results["types"])
    if "complexity" in results:
        figures["complexity"] = _complexity(results["complexity"])
    return figures


def _types(types: Mapping[str, np.ndarray]) -> dict[str, Any]:
    counts = np.bincount(types["features.type"], minlength=len(TYPE_NAMES))
    rules = {
        name: {
            "judged": int(types["features.judged"][:, rule].sum()),
            "false_calls_in_control": _number(types["features.control"][rule]),
            "control_features": int(types["features.n_control"][rule]),
        }
        for rule, name in enumerate(TYPE_NAMES[:OTHER])
    }
    emergence = {}
    for part in ("all", "emergent"):
        median = {
            name: {
                "n": int(types[f"{part}.n"][code]),
                "median_step": _number(types[f"{part}.median"][code]),
                "low": _number(types[f"{part}.median_low"][code]),
                "high": _number(types[f"{part}.median_high"][code]),
            }
            for code, name in enumerate(TYPE_NAMES)
            if types[f"{part}.n"][code]
        }
        tests = {name: _number(types[f"{part}.{name}"]) for name in ("statistic", "p", "effect")}
        emergence[part] = {**tests, "by_type": median}
    return {
        "counts": {name: int(count) for name, count in zip(TYPE_NAMES, counts, strict=True)},
        "rules": rules,
        "emergence": emergence,
    }


def _complexity(complexity: Mapping[str, np.ndarray]) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(Correlation)]
    needed = complexity["context.needed"]
    return {
        "features_measured": int(needed.size),
        "median_context": _number(np.median(needed)) if needed.size else None,
        "correlation_with_emergence": {
            part: {
                measure: {field: _number(complexity[f"{part}.{measure}.{field}"]) for field in fields}
                for measure in ("entropy", "entropy_before", "context")
            }
            for part in ("all", "emergent")
        },
    }


def _number(value: Any) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else float(value)


def _by(revisions: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(revisions, values, strict=True)}
