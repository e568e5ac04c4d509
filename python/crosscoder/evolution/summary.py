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
    return figures


def _by(revisions: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(revisions, values, strict=True)}
