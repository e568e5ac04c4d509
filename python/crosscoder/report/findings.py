"""What was found, in sentences made from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.evolution.arrays import Arrays
from crosscoder.report.sections import CROSSCODER, DIMENSIONALITY, NGRAMS, ROTATION, STRENGTH


@dataclass(frozen=True)
class Finding:
    """A sentence, and the section of the page that it stands in."""

    section: str
    sentence: str


def findings(summary: Mapping[str, Any], results: Mapping[str, Arrays], steps_K: np.ndarray) -> list[Finding]:
    """What was found, in the order of the page: births, the turning point, dimensions, the model, the crosscoder."""
    return [
        Finding(STRENGTH, _births(summary, results["life"], steps_K)),
        Finding(ROTATION, _turning_point(results["rotation"])),
        Finding(DIMENSIONALITY, _dimensions(results["dimensionality"]["rate"], steps_K)),
        Finding(NGRAMS, _model(summary, results["ngrams"], steps_K)),
        Finding(NGRAMS, _induction(results["induction"]["gap"], steps_K)),
        Finding(CROSSCODER, _crosscoder(summary)),
    ]


def leads(found: Sequence[Finding]) -> dict[str, str]:
    """Section -> its sentences, one after the other."""
    sections = dict.fromkeys(finding.section for finding in found)
    return {name: " ".join(one.sentence for one in found if one.section == name) for name in sections}


def task_finding(record: Mapping[str, Any]) -> str:
    """One sentence on a task's attribution: whether the model can do it, then what carries it."""
    name, figures = record["task"], record["figures"]
    accuracy = list(figures["clean_accuracy"].values())
    above = figures["above_chance"]
    if not above:
        return (
            f"The model does not do {name} at any snapshot: accuracy {min(accuracy):.0%} to {max(accuracy):.0%}, where "
            "chance gives 50%, so nothing is attributed."
        )
    last = figures["clean_accuracy"][above[-1]]
    start = (
        f"The model does {name} at {len(above)} of {len(accuracy)} snapshots, from {above[0]} on ({last:.0%} right at"
    )
    start += f" {above[-1]})"
    if figures["disrupt_top50"] is None:
        return f"{start}; fewer than 50 features take part."
    sentence = f"{start}; ablating the 50 strongest features costs {figures['disrupt_top50']:.0%} of the metric"
    if figures["disrupt_random50"] is not None:
        sentence += f", 50 random ones matched in rate and norm {figures['disrupt_random50']:.0%}"
    sizes = [k for k in figures["by_ablation"].get("resample", {}).get("k_for_80_percent", {}).values() if k]
    if sizes:
        few = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{sizes[0]}"
        sentence += f"; with the others as on the corrupted prompts, {few} features keep 80% of it"
    return f"{sentence}."


def _model(summary: Mapping[str, Any], ngrams: Arrays, steps_K: np.ndarray) -> str:
    loss_K, bigram = ngrams["curves.loss"], summary["bigram_entropy"]
    below = np.flatnonzero(loss_K < bigram)
    start = f"The language model's loss on held-out text falls from {loss_K[0]:.2f} to {loss_K[-1]:.2f} nats a token"
    if not len(below):
        return (
            f"{start}, still above the {bigram:.2f} of a bigram model: it has not left the phase of plain statistics."
        )
    if below[0] == 0:
        return f"{start}, under the {bigram:.2f} of a bigram model from the first snapshot on."
    return (
        f"{start}; between steps {steps_K[below[0] - 1]:,} and {steps_K[below[0]]:,} it passes under the "
        f"{bigram:.2f} of a bigram model."
    )


def _crosscoder(summary: Mapping[str, Any]) -> str:
    overall = summary["explained_variance"]["overall"]
    by_snapshot = list(summary["explained_variance"]["by_snapshot"].values())
    return (
        f"The crosscoder explains {overall:.1%} of the variance of held-out activations "
        f"({min(by_snapshot):.1%} to {max(by_snapshot):.1%} by snapshot) with {summary['l0']['mean']:.1f} of its "
        f"{summary['n_features']:,} features active a token and snapshot; {summary['dead_fraction']:.1%} are dead."
    )


def _births(summary: Mapping[str, Any], life: Arrays, steps_K: np.ndarray) -> str:
    births_K = life["cycles.births"]
    kinds = summary["features_by_kind"]
    start = f"{kinds['initialization']:,} features are there at step 0 and {kinds['emergent']:,} emerge during training"
    if births_K.sum() == 0:
        return f"{start}."
    first, last = _middle(births_K)
    lifetime_F = life["cycles.lifetime"][life["cycles.emergence"] > 0]
    return (
        f"{start}, half of these from step {steps_K[first]:,} to step {steps_K[last]:,}; "
        f"{np.mean(lifetime_F >= 0.6):.0%} of the emergent ones are present at 60 % or more of the snapshots."
    )


def _turning_point(rotation: Arrays) -> str:
    prefix = "turning_point."
    point = {
        name.removeprefix(prefix): float(value)
        for name, value in rotation.items()
        if name.startswith(prefix) and value.ndim == 0 and value.dtype.kind in "fi"
    }
    if not np.isfinite(point["step"]) or point["p_shuffled"] > 0.05:
        return (
            "There is no turning point to speak of: splitting the snapshots in two explains the rotation of the "
            f"decoder directions no better than in shuffled snapshots (p = {point['p_shuffled']:.2g})."
        )
    return (
        f"Decoder directions turn between steps {point['step_before']:,.0f} and {point['step_after']:,.0f} "
        f"({point['level']:.0%} interval over features: steps {point['step_low']:,.0f} to {point['step_high']:,.0f}): "
        f"cosines average {point['within']:.2f} on one side and {point['across']:.2f} across "
        f"(p = {point['p_shuffled']:.2g} against shuffled snapshots); such a split accounts for "
        f"{point['explained_by_blocks']:.0%} of how the cosines vary, a steady drift for "
        f"{point['explained_by_lag']:.0%}."
    )


def _dimensions(rate_K: np.ndarray, steps_K: np.ndarray) -> str:
    low = int(np.argmin(rate_K))
    return (
        f"Total feature dimensionality goes from {rate_K[0]:.0%} of the width at step {steps_K[0]:,} over a minimum of "
        f"{rate_K[low]:.0%} at step {steps_K[low]:,} to {rate_K[-1]:.0%}."
    )


def _induction(gap_K: np.ndarray, steps_K: np.ndarray) -> str:
    rise = int(np.argmax(np.diff(gap_K)))
    if gap_K[-1] < 0.1:
        return f"Induction does not form (gap {gap_K[-1]:.2f} nats)."
    return (
        f"Induction forms: repeated random tokens are {gap_K[-1]:.2f} nats cheaper at the end, the steepest rise lies "
        f"between steps {steps_K[rise]:,} and {steps_K[rise + 1]:,}."
    )


def _middle(counts_K: np.ndarray) -> tuple[int, int]:
    """Snapshots between which the middle half of the counts lies."""
    share_K = np.cumsum(counts_K) / counts_K.sum()
    return int(np.searchsorted(share_K, 0.25)), int(np.searchsorted(share_K, 0.75))
