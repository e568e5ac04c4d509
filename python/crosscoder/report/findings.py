"""What was found, in sentences made from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.evolution.arrays import Arrays
from crosscoder.evolution.stability import STABLE
from crosscoder.evolution.strength import EMERGENT
from crosscoder.evolution.types import OTHER, TYPE_NAMES
from crosscoder.report.results import Results
from crosscoder.report.sections import (
    COMPLEXITY,
    CROSSCODER,
    DIMENSIONALITY,
    HONESTY,
    NGRAMS,
    ROTATION,
    STABILITY,
    STRENGTH,
    TYPES,
)
from crosscoder.sweep.tables import comparisons


@dataclass(frozen=True)
class Finding:
    """A sentence, and the section of the page that it stands in."""

    section: str
    sentence: str


def findings(summary: Mapping[str, Any], results: Results) -> list[Finding]:
    """What was found, in the order of the page; of analyses that were not run there is no sentence."""
    arrays, steps_K = results.arrays, results.steps
    sentences = [
        (STRENGTH, _births(summary, arrays["life"], steps_K)),
        (STRENGTH, _order_of_snapshots(results)),
        (ROTATION, _turning_point(arrays["rotation"])),
        (DIMENSIONALITY, _dimensions(arrays["dimensionality"], steps_K)),
        (DIMENSIONALITY, _within_kinds(results)),
        (NGRAMS, _model(summary, arrays["ngrams"], steps_K)),
        (NGRAMS, _induction(arrays["induction"]["gap"], steps_K)),
        (TYPES, _types(results)),
        (COMPLEXITY, _complexity(results)),
        (HONESTY, _honesty(results)),
        *((STABILITY, _stability(name, results)) for name in results.comparisons),
        (CROSSCODER, _crosscoder(summary)),
        (CROSSCODER, _baselines(results)),
    ]
    return [Finding(section, sentence) for section, sentence in sentences if sentence]


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
    if "interval.n_by_kind_low" in life:
        low, high = (life[f"interval.n_by_kind_{end}"][EMERGENT] for end in ("low", "high"))
        start += f" ({float(life['interval.level']):.0%} interval over features: {low:,.0f} to {high:,.0f})"
    if births_K.sum() == 0:
        return f"{start}."
    first, last = _middle(births_K)
    most = int(np.argmax(births_K))
    busiest = f"most of all at step {steps_K[most]:,}: {births_K[most]:,}"
    if "interval.births_low" in life:
        low, high = (life[f"interval.births_{end}"][most] for end in ("low", "high"))
        busiest += f" ({low:,.0f} to {high:,.0f})"
    lifetime_F = life["cycles.lifetime"][life["cycles.emergence"] > 0]
    return (
        f"{start}, half of these from step {steps_K[first]:,} to step {steps_K[last]:,}, {busiest}; "
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


def _dimensions(dimensionality: Arrays, steps_K: np.ndarray) -> str:
    rate_K = dimensionality["rate"]
    low = int(np.argmin(rate_K))
    sentence = (
        f"Total feature dimensionality goes from {rate_K[0]:.0%} of the width at step {steps_K[0]:,} over a minimum of "
        f"{rate_K[low]:.0%} at step {steps_K[low]:,} to {rate_K[-1]:.0%}"
    )
    if "null_rate" in dimensionality:
        null_K = dimensionality["null_rate"]
        sentence += (
            f"; random directions with the same norms would take up {null_K[0]:.0%}, {null_K[low]:.0%} and "
            f"{null_K[-1]:.0%}"
        )
    return f"{sentence}."


def _within_kinds(results: Results) -> str:
    """What each kind fills at the end, beside random directions."""
    parts: list[str] = []
    for kind in results.kinds:
        found = results.get("kind_dimensionality", f"rate_within.{kind}", f"null_within.{kind}")
        if found is not None:
            own, null = found[0][-1], found[1][-1]
            parts.append(
                f"the {kind} features {own:.0%} ({null:.0%})" if parts else
                f"the {kind} features would fill {own:.0%} of the width at the last snapshot (random directions: "
                f"{null:.0%})"
            )  # fmt: skip
    return f"By themselves {', '.join(parts)}." if parts else ""


def _stability(name: str, results: Results) -> str:
    """How much of the dictionary another run has too, and whether what is matched emerges at the same time."""
    found = results.comparisons[name]
    if not np.isfinite(found["share_stable"]):
        return f"Nothing is compared with {name}: no features are present at the last snapshot of both."
    size = min(int(found["n_first"]), int(found["n_second"]))
    sentence = (
        f"Of {size:,} features that are present at the last snapshot, {float(found['share_stable']):.0%} have a match "
        f"of cosine {STABLE:g} or more in {name} (random directions: {float(found['share_stable_null']):.0%})"
    )
    shares = [
        f"{np.mean(found['matching.cosine'][members] >= STABLE):.0%} of the {kind} ones"
        for kind, mask in results.kinds.items()
        if (members := mask & np.isfinite(found["matching.nearest"])).any()
    ]
    if len(shares) > 1:
        sentence += f": {' and '.join(shares)}"
    same, null = float(found["emergence_same_emerging"]), float(found["emergence_same_emerging_null"])
    if np.isfinite(same):
        within, within_null = (float(found[f"emergence_within_one_emerging{end}"]) for end in ("", "_null"))
        sentence += (
            f"; of the {int(found['n_pairs_emerging']):,} such pairs that emerge in training, {same:.0%} do so at the "
            f"same snapshot and {within:.0%} at most one apart (pairs permuted: {null:.0%} and {within_null:.0%})"
        )
    return f"{sentence}."


def _induction(gap_K: np.ndarray, steps_K: np.ndarray) -> str:
    rise = int(np.argmax(np.diff(gap_K)))
    if gap_K[-1] < 0.1:
        return f"Induction does not form (gap {gap_K[-1]:.2f} nats)."
    return (
        f"Induction forms: repeated random tokens are {gap_K[-1]:.2f} nats cheaper at the end, the steepest rise lies "
        f"between steps {steps_K[rise]:,} and {steps_K[rise + 1]:,}."
    )


def _order_of_snapshots(results: Results) -> str:
    """Whether there is more order in the lives than the same snapshots shuffled have."""
    names = ("observed", "null_mean", "null_low", "null_high", "p")
    found = results.get("life", *(f"null.contiguous.{name}" for name in names))
    if found is None or not np.isfinite(found[0]):
        return ""
    observed, mean, low, high, p = (float(value) for value in found)
    verdict = "more than" if p <= 0.05 else "no more than"
    return (
        f"{observed:.0%} of the features live without a gap, {verdict} where the snapshots are shuffled ({mean:.0%}, "
        f"90 % of the shuffles {low:.0%} to {high:.0%}; p = {p:.2g})."
    )


def _types(results: Results) -> str:
    found = results.get("types", "features.type", "features.control", "features.judged")
    if found is None:
        return ""
    types_F, control_R, judged_FR = found
    counts = np.bincount(types_F, minlength=len(TYPE_NAMES))
    listed = ", ".join(f"{counts[code]:,} are {TYPE_NAMES[code]}" for code in range(OTHER))
    known = control_R[np.isfinite(control_R)]
    worst = f" (false calls in the controls: at most {known.max():.1%})" if known.size else ""
    start = f"Of {int(judged_FR.any(axis=1).sum()):,} features that the rules judge, {listed}{worst}"
    test = results.get("types", "emergent.p", "emergent.n", "emergent.compared")
    if test is None or not np.isfinite(test[0]):
        return f"{start}; too few of the emergent ones have a type to say in which order types emerge."
    p, compared = float(test[0]), np.flatnonzero(test[2])
    if p > 0.05:
        return f"{start}; the types do not differ in when they emerge (Kruskal–Wallis p = {p:.2g}): no order is told."
    medians = {name: results.arrays["types"][f"emergent.median{name}"] for name in ("", "_low", "_high")}
    order = compared[np.argsort(medians[""][compared], kind="stable")]
    steps = ", ".join(
        f"{TYPE_NAMES[code]} {medians[''][code]:,.0f} ({medians['_low'][code]:,.0f} to {medians['_high'][code]:,.0f})"
        for code in order
    )
    return f"{start}; types differ in when they emerge (Kruskal–Wallis p = {p:.2g}), median steps: {steps}."


def _complexity(results: Results) -> str:
    names = ("n", "spearman", "spearman_low", "spearman_high", "spearman_p")
    parts, sure, rho = [], True, 0.0
    for measure, words in (("entropy", "the entropy of their tokens"), ("context", "the context that they need")):
        found = results.get("complexity", *(f"emergent.{measure}.{name}" for name in names))
        if found is not None and np.isfinite(found[1]):
            n, rho, low, high, p = (float(value) for value in found)
            parts.append(f"{words} {rho:.2f} (95 % interval {low:.2f} to {high:.2f}, p = {p:.2g}, {n:,.0f} features)")
            sure = sure and p <= 0.05 and rho > 0
    if not parts:
        return ""
    start = "Emergent features that emerge later are more complex" if sure else (
        "Whether emergent features that emerge later are more complex is not settled"
    )  # fmt: skip
    return f"{start}: rank correlation of emergence with {', with '.join(parts)}."


def _honesty(results: Results) -> str:
    names = ("correlation_median", "correlation_median_null", "share_hidden", "share_hollow")
    found = results.get("probes", *(f"honesty.{name}" for name in names))
    parts = []
    if found is not None and np.isfinite(found[0]):
        median, null, hidden, hollow = (float(value) for value in found)
        n = len(results.arrays["probes"]["features"])
        verdict = "follows" if median - null > 0.2 else "hardly follows"
        part = (
            f"The norm {verdict} how separable a feature is: over the snapshots of {n:,} probed features the rank "
            f"correlation of AUC and norm has the median {median:.2f} ({null:.2f} with another feature's norms)"
        )
        shares = ((hidden, "norms near 0", "separable all the same"), (hollow, "high norms", "not separable"))
        parts.append(
            part + "".join(f"; {share:.1%} of the {what} are {how}" for share, what, how in shares if share == share)
        )
    scaled = results.get("latent_scaling", "share_shrunk", "share_decoupled", "low")
    if scaled is not None and np.isfinite(scaled[0]):
        parts.append(
            f"By latent scaling {float(scaled[0]):.1%} of the {int(scaled[2].sum()):,} norms near 0 are shrunk by the "
            f"penalty and {float(scaled[1]):.1%} taken over by other features"
        )
    return "".join(f"{part}. " for part in parts).strip()


def _baselines(results: Results) -> str:
    """The crosscoder's lead at common L0, averaged over them, with its range."""
    table = results.tables.get("sweep")
    if table is None:
        return ""
    leads_by = {"last": {"sae": "an SAE trained on it alone"}, "all": {"chain": "a chain of warm-started SAEs"}}
    parts, seeds = [], len(set(table["seed"]))
    found = comparisons({name: list(column) for name, column in table.items()})
    for (scope, _), comparison in found.items():
        for method, words in leads_by.get(scope, {}).items():
            if method in comparison.explained_SG and len(comparison.l0_G):
                lead = 100 * comparison.difference("crosscoder", method)
                where = "of the last snapshot's variance" if scope == "last" else "of all snapshots' variance"
                parts.append(
                    f"{abs(lead.mean()):.1f} points {'more' if lead.mean() >= 0 else 'less'} {where} than {words} "
                    f"({lead.min():+.1f} to {lead.max():+.1f} over L0 {comparison.l0_G[0]:.0f} to "
                    f"{comparison.l0_G[-1]:.0f})"
                )
    if not parts:
        return ""
    sure = "one seed, so without an interval" if seeds == 1 else f"{seeds} seeds"
    return f"At the same L0 the crosscoder explains {', and '.join(parts)}; {sure}."


def _middle(counts_K: np.ndarray) -> tuple[int, int]:
    """Snapshots between which the middle half of the counts lies."""
    share_K = np.cumsum(counts_K) / counts_K.sum()
    return int(np.searchsorted(share_K, 0.25)), int(np.searchsorted(share_K, 0.75))
