"""What was found, in sentences made from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.common.arrays import Arrays
from crosscoder.common.statistics import bootstrap_interval, correlate
from crosscoder.evolution.induction import N_SEQUENCES
from crosscoder.evolution.stability import STABLE
from crosscoder.evolution.strength import KIND_NAMES
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
from crosscoder.report.turning import is_sharp, is_split, turning_figures
from crosscoder.sweep.tables import comparisons

LONG = 0.6
"""Share of the snapshots at which a long-lived feature is present (the paper's)."""


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
        (NGRAMS, _induction(results)),
        (TYPES, _types(results)),
        (COMPLEXITY, _complexity(results)),
        (COMPLEXITY, _explanations(results)),
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
    start = (
        f"The language model's loss on {int(ngrams['curves.n_predictions']):,} held-out tokens falls from "
        f"{loss_K[0]:.2f} to {loss_K[-1]:.2f} nats a token"
    )
    passing = _passes(loss_K, bigram, steps_K)
    if passing is None:
        return (
            f"{start}, still above the {bigram:.2f} of a bigram model there: it has not left the phase of plain "
            "statistics."
        )
    lower = float(ngrams["entropies.bigram_corrected"])
    below = _passes(loss_K, lower, steps_K)
    also = f"{below} under" if below is not None else "at no snapshot under"
    return (
        f"{start}; {passing} it passes under the {bigram:.2f} of a bigram model on the same tokens, {also} the "
        f"{lower:.2f} that the counts' bigram entropy is with its sampling bias removed to first order. It is one text "
        "and one training: no interval is known."
    )


def _passes(loss_K: np.ndarray, level: float, steps_K: np.ndarray) -> str | None:
    """Where the loss is below a level for the first time, in words; None if nowhere."""
    below = np.flatnonzero(loss_K < level)
    if not len(below):
        return None
    return f"between steps {steps_K[below[0] - 1]:,} and {steps_K[below[0]]:,}" if below[0] else "at the first snapshot"


def _crosscoder(summary: Mapping[str, Any]) -> str:
    overall = summary["explained_variance"]["overall"]
    by_snapshot = list(summary["explained_variance"]["by_snapshot"].values())
    return (
        f"The crosscoder explains {overall:.1%} of the variance of the activations on {summary['n_heldout_tokens']:,} "
        f"held-out tokens ({min(by_snapshot):.1%} to {max(by_snapshot):.1%} by snapshot) with "
        f"{summary['l0']['mean']:.1f} of its {summary['n_features']:,} features active a token and snapshot; "
        f"{summary['dead_fraction']:.1%} are dead."
    )


def _births(summary: Mapping[str, Any], life: Arrays, steps_K: np.ndarray) -> str:
    births_K = life["cycles.births"]
    counts = {kind: f"{summary['features_by_kind'][kind]:,}" for kind in ("initialization", "emergent")}
    told = {kind: "" for kind in counts}
    if "interval.n_by_kind_low" in life:
        for kind in counts:
            low, high = (life[f"interval.n_by_kind_{end}"][KIND_NAMES.index(kind)] for end in ("low", "high"))
            told[kind] = f" ({float(life['interval.level']):.0%} interval over features: {low:,.0f} to {high:,.0f})"
    parts = [
        f"{counts['initialization']} features are there at step 0{told['initialization']} and {counts['emergent']} "
        f"emerge during training{told['emergent']}"
    ]
    null = _null(life, "emergent")
    if null is not None:
        observed, mean, p, words = null
        parts[0] += f": {observed:.1%} of those alive, where {words}"
        more = "more" if observed > mean else "fewer"
        parts.append(
            f"So {more} emerge than in a random order of the snapshots" if p <= 0.05 else
            "The number alone shows no more than chance: no difference from a random order of the snapshots is shown"
        )  # fmt: skip
    if births_K.sum():
        first, last = _middle(births_K)
        most = int(np.argmax(births_K))
        busiest = f"most at step {steps_K[most]:,}: {births_K[most]:,}"
        if "interval.births_low" in life:
            low, high = (life[f"interval.births_{end}"][most] for end in ("low", "high"))
            busiest += f" ({low:,.0f} to {high:,.0f})"
        null = _null(life, "largest_births")
        if null is not None:
            observed, _, p, words = null
            verdict = "more than" if p <= 0.05 else "not shown to be more than"
            busiest += f", {observed:.1%} of those alive, {verdict} in random order (at the busiest snapshot {words})"
        parts.append(f"Half of them emerge from step {steps_K[first]:,} to step {steps_K[last]:,}, {busiest}")
        # Present from birth to the end, a feature reaches the share only if this much is left.
        emergence_F = life["cycles.emergence"]
        able_F = (emergence_F > 0) & (len(steps_K) - emergence_F >= LONG * len(steps_K))
        if able_F.any():
            n, long = int(able_F.sum()), int((life["cycles.lifetime"][able_F] >= LONG).sum())
            parts.append(f"Of the {n:,} born early enough to be present at {LONG:.0%} of the snapshots, {long:,} are")
    return "".join(f"{part}. " for part in parts).strip()


def _null(life: Arrays, statistic: str) -> tuple[float, float, float, str] | None:
    """Observed, mean of the shuffles, p, and the shuffles in words; None where it was not computed or no feature
    lives."""
    names = ("observed", "null_mean", "null_low", "null_high", "p")
    if any(f"null.{statistic}.{name}" not in life for name in names):
        return None
    observed, mean, low, high, p = (float(life[f"null.{statistic}.{name}"]) for name in names)
    if not np.isfinite(observed):
        return None
    words = f"shuffled snapshots give {mean:.1%} (90 % of the shuffles {low:.1%} to {high:.1%}; p = {p:.2g})"
    return observed, mean, p, words


def _turning_point(rotation: Arrays) -> str:
    point = turning_figures(rotation)
    p = f"p = {point['p_shuffled']:.2g} against shuffled snapshots"
    if "p_random" in point:
        p += f", {point['p_random']:.2g} against random directions"
    if not is_split(point):
        return (
            "No turning point is shown: no difference from shuffled snapshots in how well a split of the snapshots in "
            f"two explains the rotation of the decoder directions ({p})."
        )
    where = (
        f"between steps {point['step_before']:,.0f} and {point['step_after']:,.0f} ({point['level']:.0%} interval over "
        f"features: steps {point['step_low']:,.0f} to {point['step_high']:,.0f})"
    )
    cosines = f"cosines average {point['within']:.2f} on the same side and {point['across']:.2f} across ({p})"
    split, drift = f"{point['explained_by_blocks']:.0%}", f"{point['explained_by_lag']:.0%}"
    if is_sharp(point):
        return (
            f"Decoder directions turn {where}: {cosines}; such a split accounts for {split} of how the cosines vary, a "
            f"steady drift for {drift}."
        )
    return (
        f"Decoder directions make no sharp turn: a steady drift accounts for {drift} of how their cosines vary, the "
        f"best split of the snapshots in two for no more than {split}. If there is a turn, it lies {where}: {cosines}."
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
    return f"{sentence}. Exact for this dictionary; how far other trainings differ is not known."


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


def _induction(results: Results) -> str:
    gap_K, steps_K, length = results.arrays["induction"]["gap"], results.steps, results.induction_length
    rise = int(np.argmax(np.diff(gap_K)))
    measured = "" if length is None else f"; measured on {N_SEQUENCES} sequences of {length} random tokens said twice"
    if gap_K[-1] < 0.1:
        return f"Induction does not form (gap {gap_K[-1]:.2f} nats at the end, {gap_K[0]:.2f} at the start{measured})."
    return (
        f"Induction forms: repeated random tokens are {gap_K[-1]:.2f} nats cheaper at the end ({gap_K[0]:.2f} at the "
        f"start), the steepest rise lies between steps {steps_K[rise]:,} and {steps_K[rise + 1]:,}{measured}."
    )


def _order_of_snapshots(results: Results) -> str:
    """Whether there is more order in the lives than the same snapshots shuffled have."""
    names = ("observed", "null_mean", "null_low", "null_high", "p")
    found = results.get("life", *(f"null.contiguous.{name}" for name in names))
    if found is None or not np.isfinite(found[0]):
        return ""
    observed, mean, low, high, p = (float(value) for value in found)
    verdict = "more than" if p <= 0.05 else "not shown to be more than"
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
        return f"{start}; no difference in when types emerge is shown (Kruskal–Wallis p = {p:.2g}): no order is told."
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


def _explanations(results: Results) -> str:
    """Whether a language model's explanations hold, and whether what it calls complex emerges later."""
    table = results.tables.get("explanations")
    if table is None:
        return ""
    marks = np.array(table["complexity"], dtype=float)
    parts = [
        f"A language model explained {int(np.isfinite(marks).sum()):,} of the {marks.size:,} features that it was "
        "asked about"
    ]
    for kind, what in (("detection", "the active passages"), ("fuzzing", "the rightly marked ones")):
        score, control = (np.array(table.get(name, []), dtype=float) for name in (kind, f"{kind}_control"))
        known = score[np.isfinite(score)]
        if not known.size:
            continue
        part = f"by its words it tells {what} with the median balanced accuracy {np.median(known):.2f} ({kind}, "
        part += f"{known.size:,} features; chance: 0.50"
        both = np.isfinite(score) & np.isfinite(control) if control.size else np.zeros(score.size, dtype=bool)
        if both.any():
            low, high = bootstrap_interval(lambda sample: float(sample.mean()), (score - control)[both])
            part += (
                f"; with another feature's words: {np.median(control[both]):.2f}, on average "
                f"{(score - control)[both].mean():.2f} less, 95 % interval {low:.2f} to {high:.2f}"
            )
        parts.append(f"{part})")
    sentence = f"{'; '.join(parts)}."
    found = correlate(marks, np.log10(1 + np.array(table["emergence"], dtype=float)))
    if np.isfinite(found.spearman):
        later = found.spearman_p <= 0.05 and found.spearman > 0
        sentence += (
            f" What it calls complex {'emerges later' if later else 'is not shown to emerge later'}: rank correlation "
            f"{found.spearman:.2f} (95 % interval {found.spearman_low:.2f} to {found.spearman_high:.2f}, p = "
            f"{found.spearman_p:.2g}, {found.n:,} features)."
        )
    return sentence


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
