"""The main figures of the analyses, as `summary.json` has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crosscoder.evolution.strength import KIND_NAMES


def main_figures(results: Mapping[str, Mapping[str, np.ndarray]], revisions: Sequence[str]) -> dict[str, Any]:
    """Main figures of the analyses in `results`; what is missing there is left out."""
    figures: dict[str, Any] = {}
    if "life" in results:
        kinds = np.bincount(results["life"]["cycles.kind"], minlength=len(KIND_NAMES))
        figures["features_by_kind"] = {name: int(count) for name, count in zip(KIND_NAMES, kinds, strict=True)}
        figures["n_initialization"] = figures["features_by_kind"]["initialization"]
        figures["n_emergent"] = figures["features_by_kind"]["emergent"]
        figures["presence_threshold"] = float(results["life"]["cycles.threshold"])
        figures["life_intervals"] = _life_intervals(results["life"], revisions)
        figures["life_null"] = {
            name: {part: _number(results["life"][f"null.{name}.{part}"]) for part in ("observed", "null_mean", "p")}
            for name in ("contiguous", "emergent", "largest_births", "excess_variation")
        }
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
        figures["dimensionality_null_by_snapshot"] = _by(revisions, results["dimensionality"]["null_rate"])
    if "kind_dimensionality" in results:
        figures["kind_dimensionality_by_snapshot"] = {
            name: _by(revisions, results["kind_dimensionality"][f"rate_within.{name}"]) for name in KIND_NAMES
        }
    return figures


def _life_intervals(life: Mapping[str, np.ndarray], revisions: Sequence[str]) -> dict[str, Any]:
    """[low, high] of each figure."""

    def pairs(name: str, keys: Sequence[str]) -> dict[str, list[float]]:
        ends = zip(life[f"interval.{name}_low"], life[f"interval.{name}_high"], strict=True)
        return {key: [float(low), float(high)] for key, (low, high) in zip(keys, ends, strict=True)}

    def pair(name: str) -> list[float] | None:
        low, high = float(life[f"interval.{name}_low"]), float(life[f"interval.{name}_high"])
        return None if np.isnan(low) else [low, high]

    return {
        "level": float(life["interval.level"]),
        "features_by_kind": pairs("n_by_kind", KIND_NAMES),
        "births_by_snapshot": pairs("births", revisions),
        "median_emergence_step": pair("median_emergence_step"),
        "median_lifetime": pair("median_lifetime"),
    }


def _number(value: np.ndarray) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else float(value)


def _by(revisions: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(revisions, values, strict=True)}
