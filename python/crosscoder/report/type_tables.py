"""Figures of feature types, of complexity, and of a language model's explanations.

Letters: F features, K snapshots, T types, M features whose need of context was measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from crosscoder.evolution.complexity import STAYS
from crosscoder.evolution.types import OTHER, TYPE_NAMES
from crosscoder.figures.spec import Axis, Bars, Field, Lines, Listing, Panel, Scatter, Series
from crosscoder.figures.table import Column, FigureTable, drawn, plain_column
from crosscoder.report.results import SHOWN_KINDS, Results
from crosscoder.report.sections import COMPLEXITY, TYPES

LISTED = 100
"""Explanations that the page lists; the run's table has all."""
SCORE_BINS = 11
"""Bars of the balanced accuracies, which are multiples of 0.1."""


def type_counts(results: Results) -> FigureTable | None:
    """How many features are of each type, and how often the rules call falsely."""
    found = results.get("types", "features.type", "features.control")
    if found is None:
        return None
    kinds = results.kinds
    of = {name: found[0][mask] for name, mask in kinds.items()} or {"all": found[0]}
    columns: dict[str, Column] = {"type": list(TYPE_NAMES)}
    columns.update({name: plain_column(np.bincount(types, minlength=len(TYPE_NAMES))) for name, types in of.items()})
    controls = [
        f"{name} {value:.1%}" for name, value in zip(TYPE_NAMES[:OTHER], found[1], strict=True) if np.isfinite(value)
    ]
    return FigureTable(
        "types",
        TYPES,
        "What features respond to",
        "ours",
        "Features by type; the names are the paper's, the rules ours. Single-token: one token holds 80 % of the "
        "strongest positions; previous-token: the token before does; induction: at least three times as active on the "
        "second of two copies of random tokens, and no longer when the copies are broken; context-sensitive: none of "
        "these, ten active tokens in one passage and active in under 5 % of them; unjudged: too few positions. "
        f"Share of false calls where no rule can hold: {', '.join(controls)}.",
        columns,
        Bars("type", "type", Axis("features", "count"), [Series(name, name, colour=name) for name in of]),
    )


def type_emergence(results: Results) -> FigureTable | None:
    """Emergence of each type's emergent features, as shares."""
    found = results.get("types", "emergent.counts", "emergent.p", "emergent.effect")
    if found is None or not found[0].any():
        return None
    counts_TK, p, effect = found
    shown = [code for code in range(len(TYPE_NAMES)) if counts_TK[code].any()]
    columns = results.by_snapshot
    columns.update({TYPE_NAMES[code]: plain_column(counts_TK[code]) for code in shown})
    test = (
        f"Kruskal–Wallis over the types with five features or more: p = {float(p):.2g}, ε² = {float(effect):.2f}."
        if np.isfinite(p)
        else "Too few types have five features or more to test whether they differ."
    )
    return FigureTable(
        "type_emergence",
        TYPES,
        "When types emerge",
        "ours",
        f"Emergent features by the snapshot of their emergence and by type. {test}",
        columns,
        Bars(
            "snapshot",
            "snapshot (training step)",
            Axis("features", "count"),
            [Series(TYPE_NAMES[code], TYPE_NAMES[code]) for code in shown],
        ),
    )


def type_medians(results: Results) -> FigureTable | None:
    """Median emergence of each type with its interval, as a listing."""
    found = results.get("types", "emergent.n", "emergent.median", "emergent.median_low", "emergent.median_high")
    if found is None or not found[0].any():
        return None
    n_T, *medians = found
    shown = np.flatnonzero(n_T)
    shown = shown[np.argsort(medians[0][shown], kind="stable")]
    columns: dict[str, Column] = {"type": [TYPE_NAMES[code] for code in shown], "features": plain_column(n_T[shown])}
    for name, values in zip(("median", "low", "high"), medians, strict=True):
        columns[name] = plain_column(values[shown])
    return FigureTable(
        "type_medians",
        TYPES,
        "Order of emergence",
        "ours",
        "Emergent features of each type: median training step of emergence with its 95 % bootstrap interval over "
        "features, in the order of the medians. Where intervals overlap, the order is not told.",
        columns,
        Listing(
            [
                Field("type", "type", "text"),
                Field("features", "features", "count"),
                Field("median", "median", "count", "step "),
                Field("low", "from", "count"),
                Field("high", "to", "count"),
            ],
            "median",
        ),
    )


def type_pairs(results: Results) -> FigureTable | None:
    """Whether each two types differ in when they emerge, as a listing."""
    found = results.get("types", *(f"emergent.{name}" for name in ("pairs", "pair_effect", "pair_p", "pair_holm")))
    if found is None or not len(found[0]):
        return None
    pairs, effect, p, corrected = found
    order = np.argsort(corrected, kind="stable")
    columns: dict[str, Column] = {
        "types": [f"{TYPE_NAMES[first]}, {TYPE_NAMES[second]}" for first, second in pairs[order]],
        "delta": plain_column(effect[order]),
        "p": plain_column(p[order]),
        "p, Holm": plain_column(corrected[order]),
    }
    return FigureTable(
        "type_pairs",
        TYPES,
        "Types two by two",
        "ours",
        "Emergent features of two types, Mann–Whitney: Cliff's δ is above 0 where the first named emerges later (1: "
        "all of it after all of the other). Two types differ in when they emerge where p is small after Holm's "
        f"correction, which is for looking at {len(pairs)} {'pair' if len(pairs) == 1 else 'pairs'}.",
        columns,
        Listing(
            [
                Field("types", "types", "text"),
                Field("delta", "Cliff's δ"),
                Field("p", "p", narrow=False),
                Field("p, Holm", "p after Holm"),
            ],
            "delta",
        ),
    )


def _correlation(results: Results, part: str, measure: str) -> str:
    """ "Spearman 0.43 (95 % interval 0.25 to 0.59, p = 0.001, 84 emergent features)"."""
    names = ("n", "spearman", "spearman_low", "spearman_high", "spearman_p")
    found = results.get("complexity", *(f"{part}.{measure}.{name}" for name in names))
    if found is None or not np.isfinite(found[1]):
        return ""
    n, rho, low, high, p = (float(value) for value in found)
    return (
        f"Spearman {rho:.2f} (95 % interval {low:.2f} to {high:.2f}, p = {p:.2g} by permutation, {n:,.0f} {part} "
        "features)"
    )


def _against_emergence(
    results: Results, key: str, title: str, caption: str, features: np.ndarray, y: Any, y_axis: Axis, measure: str
) -> FigureTable:
    kind = np.full(len(results.arrays["life"]["cycles.kind"]), "", dtype=object)
    for name, mask in results.kinds.items():
        kind[mask] = name
    step = results.emergence_step()
    assert step is not None
    columns: dict[str, Column] = {
        "feature": [int(feature) for feature in features],
        "kind": list(kind[features]),
        "step": [int(value) for value in step[features]],
        y_axis.label: plain_column(y),
    }
    words = [text for part in ("all", "emergent") if (text := _correlation(results, part, measure))]
    return FigureTable(
        key,
        COMPLEXITY,
        title,
        "ours",
        f"{caption} {'; '.join(words)}{'.' if words else ''}".strip(),
        columns,
        Scatter("step", None, y_axis.label, y_axis, "kind", [name for name in SHOWN_KINDS if name in results.kinds],
                jitter=True),
    )  # fmt: skip


def complexity(results: Results) -> FigureTable | None:
    """Entropy of the token at active positions against emergence."""
    found, step = results.get("complexity", "entropy.here"), results.emergence_step()
    if found is None or step is None:
        return None
    features, sentence = drawn(np.flatnonzero(np.isfinite(found[0]) & np.isfinite(step)))
    if not features.size:
        return None
    return _against_emergence(
        results,
        "complexity",
        "Entropy of the tokens against emergence",
        "Entropy of the tokens at randomly chosen active positions (Chao and Shen's estimate): 0 for one token, more "
        f"for a feature that many tokens set off. {sentence} Points are spread a little; hover names the feature, a "
        "click opens it.",
        features,
        found[0][features],
        Axis("entropy, nats", zero=True),
        "entropy",
    )


def context_needed(results: Results) -> FigureTable | None:
    """How far back a feature's input must be kept, against emergence."""
    found, step = results.get("complexity", "context.feature", "context.needed"), results.emergence_step()
    if found is None or step is None:
        return None
    known = np.isfinite(step[found[0]])
    if not known.any():
        return None
    return _against_emergence(
        results,
        "context_needed",
        "Context that features need, against emergence",
        f"Tokens that must be kept for the activation to stay at {STAYS:.0%} of itself or more at the strongest "
        f"positions; for {known.sum():,} features, drawn evenly over the snapshots of emergence, which bends the "
        "correlation over all of them.",
        found[0][known],
        found[1][known],
        Axis("context needed, tokens", "count", "log"),
        "context",
    )


# ----------------------------------------------------------------------------- explanations of a language model


def explained_complexity(results: Results) -> FigureTable | None:
    """The language model's marks against emergence."""
    table = results.tables.get("explanations")
    if table is None:
        return None
    marks, step = np.array(table["complexity"], dtype=float), np.array(table["emergence"], dtype=float)
    known = np.flatnonzero(np.isfinite(marks))
    if not known.size:
        return None
    known, sentence = drawn(known)
    columns: dict[str, Column] = {
        "feature": [int(table["feature"][row]) for row in known],
        "kind": [str(table["kind"][row]) for row in known],
        "step": [int(value) for value in step[known]],
        "complexity": plain_column(marks[known]),
        "explanation": [str(table["explanation"][row]) for row in known],
    }
    from crosscoder.common.statistics import correlate

    everyone = np.isfinite(marks)
    found = correlate(marks[everyone], np.log10(1 + step[everyone]))
    groups = [name for name in dict.fromkeys(columns["kind"])]
    return FigureTable(
        "explained_complexity",
        COMPLEXITY,
        "Complexity by a language model against emergence",
        "paper",
        "Marks from 1 (one token) to 5 (a theme over diverse contexts) that a language model gave after reading the "
        f"strongest passages (the paper's; the prompt is ours). {sentence} Points are spread a little. Pearson "
        f"{found.pearson:.2f} (95 % interval {found.pearson_low:.2f} to {found.pearson_high:.2f}, p = "
        f"{found.pearson_p:.2g}, {found.n:,} features; the paper: 0.309).",
        columns,
        Scatter(
            "step", None, "complexity", Axis("complexity", domain=(0.5, 5.5)), "kind", groups, ["explanation"], True
        ),
    )


def explanation_scores(results: Results) -> FigureTable | None:
    """Detection and fuzzing, beside the explanations of other features."""
    table = results.tables.get("explanations")
    if table is None:
        return None
    edges = (np.arange(SCORE_BINS + 1) - 0.5) / (SCORE_BINS - 1)
    columns: dict[str, Column] = {"accuracy": plain_column(np.arange(SCORE_BINS) / (SCORE_BINS - 1))}
    for name in ("detection", "fuzzing", "detection_control", "fuzzing_control"):
        values = np.array(table.get(name, []), dtype=float)
        values = values[np.isfinite(values)]
        if values.size:
            columns[name] = plain_column(np.histogram(values, edges)[0] / values.size)
    series = [Series(name, name.replace("_", ", ")) for name in columns if name != "accuracy"]
    if not series:
        return None
    return FigureTable(
        "explanation_scores",
        COMPLEXITY,
        "How good explanations are",
        "both",
        "Balanced accuracy with which a language model finds the active passages (detection) and the rightly marked "
        "ones (fuzzing) by the explanation alone; 0.7 passes, 0.5 is chance (the paper's). Control (ours): the same "
        "with another feature's explanation.",
        columns,
        Lines(
            [Panel(Axis("share of features", "percent", zero=True), series)],
            x="accuracy",
            x_axis=Axis("balanced accuracy", domain=(0, 1)),
        ),
    )


def explanations(results: Results) -> FigureTable | None:
    """The explanations themselves."""
    table = results.tables.get("explanations")
    if table is None:
        return None
    rows = [row for row, text in enumerate(table["explanation"]) if text][:LISTED]
    if not rows:
        return None
    names = [name for name in ("feature", "emergence", "complexity", "detection", "fuzzing") if name in table]
    columns: dict[str, Column] = {name: plain_column([table[name][row] for row in rows]) for name in names}
    columns["explanation"] = [str(table["explanation"][row]) for row in rows]
    fields = [Field("feature", "feature", "text")]
    fields += [Field(name, name, narrow=name == "complexity") for name in names[1:]]
    return FigureTable(
        "explanations",
        COMPLEXITY,
        "Explanations",
        "ours",
        f"What the language model wrote, for {len(rows)} of the {len(table['explanation']):,} features that it was "
        "asked about. Click one to see what it is active on.",
        columns,
        Listing(fields, "complexity", text="explanation"),
        wide=True,
    )
