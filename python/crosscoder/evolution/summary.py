"""The main figures of the analyses, as `summary.json` has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crosscoder.common.statistics import Correlation
from crosscoder.evolution.stability import Stability
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
        figures["life_intervals"] = _life_intervals(results["life"], revisions)
        figures["life_null"] = {
            name: {part: _finite(results["life"][f"null.{name}.{part}"]) for part in ("observed", "null_mean", "p")}
            for name in ("contiguous", "emergent", "largest_births", "excess_variation")
        }
    if "rotation" in results:
        point = turning_figures(results["rotation"])
        interval, explained = ("step_low", "step_high", "level"), ("explained_by_blocks", "explained_by_lag")
        names = ("step", *interval, "within", "across", "p_shuffled", "p_random", *explained)
        figures["turning_point"] = {name: _finite(point[name]) for name in names}
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
    if "types" in results:
        figures["features_by_type"] = _types(results["types"])
    if "complexity" in results:
        figures["complexity"] = _complexity(results["complexity"])
    if "probes" in results:
        figures["norm_honesty"] = _norm_honesty(results["probes"])
    if "latent_scaling" in results:
        scaling = results["latent_scaling"]
        pairs = {name: int(scaling[name].sum()) for name in ("low", "shrunk", "decoupled")}
        features = {name: int(scaling[name].any(axis=1).sum()) for name in ("low", "shrunk", "decoupled")}
        shares = {
            name: _finite(scaling[name])
            for name in ("share_shrunk", "share_shrunk_null", "share_decoupled", "share_decoupled_null")
        }
        figures["latent_scaling"] = {"pairs": pairs, "features": features, **shares}
    return figures


def _types(types: Mapping[str, np.ndarray]) -> dict[str, Any]:
    counts = np.bincount(types["features.type"], minlength=len(TYPE_NAMES))
    rules = {
        name: {
            "judged": int(types["features.judged"][:, rule].sum()),
            "false_calls_in_control": _finite(types["features.control"][rule]),
            "control_features": int(types["features.n_control"][rule]),
        }
        for rule, name in enumerate(TYPE_NAMES[:OTHER])
    }
    emergence = {}
    for part in ("all", "emergent"):
        median = {
            name: {
                "n": int(types[f"{part}.n"][code]),
                "median_step": _finite(types[f"{part}.median"][code]),
                "low": _finite(types[f"{part}.median_low"][code]),
                "high": _finite(types[f"{part}.median_high"][code]),
            }
            for code, name in enumerate(TYPE_NAMES)
            if types[f"{part}.n"][code]
        }
        tests = {name: _finite(types[f"{part}.{name}"]) for name in ("statistic", "p", "effect")}
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
        "median_context": _finite(np.median(needed)) if needed.size else None,
        "correlation_with_emergence": {
            part: {
                measure: {field: _finite(complexity[f"{part}.{measure}.{field}"]) for field in fields}
                for measure in ("entropy", "entropy_before", "context")
            }
            for part in ("all", "emergent")
        },
    }


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


def _norm_honesty(probes: Mapping[str, np.ndarray]) -> dict[str, Any]:
    auc_nK, peak_n = probes["areas.auc"], probes["relative"].argmax(axis=1)
    at_peak = auc_nK[np.arange(len(peak_n)), peak_n]
    names = (
        "correlation_overall",
        "correlation_median",
        "correlation_median_null",
        "share_hidden",
        "share_hollow",
    )
    edges, counts = probes["honesty.bins"], probes["honesty.bin_count"]
    return {
        "n_probed": len(auc_nK),
        **{name: _finite(probes[f"honesty.{name}"]) for name in names},
        "n_hidden_pairs": len(probes["honesty.hidden"]),
        "n_hollow_pairs": len(probes["honesty.hollow"]),
        "median_auc_at_peak": _finite(np.nanmedian(at_peak)) if np.isfinite(at_peak).any() else None,
        "mean_auc_by_relative_norm": {
            f"{low:g}-{high:g}": _finite(value)
            for low, high, value in zip(edges[:-1], edges[1:], probes["honesty.bin_auc"], strict=True)
        },
        "pairs_by_relative_norm": {
            f"{low:g}-{high:g}": int(count) for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        },
        **{f"mean_auc_{name}": _finite(_mean(probes[f"areas.{name}"])) for name in ("shuffled", "random")},
    }


def stability_figures(stability: Stability) -> dict[str, Any]:
    """Main figures of a comparison with another crosscoder."""
    names = [field.name for field in dataclasses.fields(stability) if field.type in ("int", "float")]
    figures = {name: _finite(getattr(stability, name)) for name in names}
    return {
        **figures,
        "loss": stability.matching.loss,
        "n_cut": stability.matching.n_cut,
        "candidates": stability.matching.candidates,
    }


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def turning_figures(rotation: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The numbers of `rotation.TurningPoint` in the result of the analysis."""
    prefix = "turning_point."
    return {
        name.removeprefix(prefix): float(value)
        for name, value in rotation.items()
        if name.startswith(prefix) and value.ndim == 0 and value.dtype.kind in "fi"
    }


def _finite(value: Any) -> float | int | None:
    """A number for JSON, which has no NaN."""
    number = float(value)
    return None if not np.isfinite(number) else int(value) if isinstance(value, int) else number


def _by(revisions: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(revisions, values, strict=True)}
