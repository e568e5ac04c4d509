"""What explanations by a language model (`crosscoder explain`) add to the page.

Letters: M features that were asked about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.common.statistics import Correlation, bootstrap_interval, correlate
from crosscoder.evolution.analyses.complexity import SECTION
from crosscoder.figures.results import Part, Results
from crosscoder.figures.spec import Axis, Field, Lines, Listing, Panel, Scatter, Series
from crosscoder.figures.table import Column, FigureTable, drawn, plain_column

LISTED = 100
"""Explanations that the page lists; the run's table has all."""
SCORE_BINS = 11
"""Bars of the balanced accuracies, which are multiples of 0.1."""


@dataclass(frozen=True)
class Explanations:
    """The run's table of explanations."""

    columns: Mapping[str, Sequence[Any]]
    """As `crosscoder.explain.explanation_study` has them, M long."""

    def numbers(self, name: str) -> np.ndarray:
        """(M,) a column, NaN where it is not known; empty where the table lacks it."""
        return np.array(self.columns.get(name, []), dtype=float)

    def later(self) -> Correlation:
        """Of the marks for complexity with the logarithm of emergence."""
        marks, step = self.numbers("complexity"), self.numbers("emergence")
        known = np.isfinite(marks)
        return correlate(marks[known], np.log10(1 + step[known]))


def complexity(table: Explanations, results: Results) -> FigureTable | None:
    """The language model's marks against emergence."""
    known = np.flatnonzero(np.isfinite(table.numbers("complexity")))
    if not known.size:
        return None
    shown, sentence = drawn(known)
    columns: dict[str, Column] = {
        "feature": [int(table.columns["feature"][row]) for row in shown],
        "kind": [str(table.columns["kind"][row]) for row in shown],
        "step": [int(step) for step in table.numbers("emergence")[shown]],
        "complexity": plain_column(table.numbers("complexity")[shown]),
        "explanation": [str(table.columns["explanation"][row]) for row in shown],
    }
    found = table.later()
    return FigureTable(
        "explained_complexity",
        "Complexity by a language model against emergence",
        "paper",
        "Marks from 1 (one token) to 5 (a theme over diverse contexts) that a language model gave after reading the "
        f"strongest passages (the paper's; the prompt is ours). {sentence} Points are spread a little. Pearson "
        f"{found.pearson:.2f} (95 % interval {found.pearson_low:.2f} to {found.pearson_high:.2f}, p = "
        f"{found.pearson_p:.2g}, {found.n:,} features; the paper: 0.309).",
        columns,
        Scatter(
            "step",
            None,
            "complexity",
            Axis("complexity", domain=(0.5, 5.5)),
            "kind",
            list(dict.fromkeys(columns["kind"])),
            ["explanation"],
            jitter=True,
        ),
    )


def scores(table: Explanations, results: Results) -> FigureTable | None:
    """Detection and fuzzing, beside the explanations of other features."""
    edges = (np.arange(SCORE_BINS + 1) - 0.5) / (SCORE_BINS - 1)
    columns: dict[str, Column] = {"accuracy": plain_column(np.arange(SCORE_BINS) / (SCORE_BINS - 1))}
    for name in ("detection", "fuzzing", "detection_control", "fuzzing_control"):
        values = table.numbers(name)
        values = values[np.isfinite(values)]
        if values.size:
            columns[name] = plain_column(np.histogram(values, edges)[0] / values.size)
    series = [Series(name, name.replace("_", ", ")) for name in columns if name != "accuracy"]
    if not series:
        return None
    return FigureTable(
        "explanation_scores",
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


def listing(found: Explanations, results: Results) -> FigureTable | None:
    """The explanations themselves."""
    table = found.columns
    rows = [row for row, text in enumerate(table.get("explanation", ())) if text][:LISTED]
    if not rows:
        return None
    names = [name for name in ("feature", "emergence", "complexity", "detection", "fuzzing") if name in table]
    columns: dict[str, Column] = {name: plain_column([table[name][row] for row in rows]) for name in names}
    columns["explanation"] = [str(table["explanation"][row]) for row in rows]
    fields = [Field("feature", "feature", "text")]
    fields += [Field(name, name, narrow=name == "complexity") for name in names[1:]]
    return FigureTable(
        "explanations",
        "Explanations",
        "ours",
        f"What the language model wrote, for {len(rows)} of the {len(table['explanation']):,} features that it was "
        "asked about. Click one to see what it is active on.",
        columns,
        Listing(fields, "complexity", text="explanation"),
        wide=True,
    )


def hold(table: Explanations, results: Results) -> str:
    """Whether the explanations hold, and whether what is called complex emerges later."""
    marks = table.numbers("complexity")
    parts = [
        f"A language model explained {int(np.isfinite(marks).sum()):,} of the {marks.size:,} features that it was "
        "asked about"
    ]
    for kind, what in (("detection", "the active passages"), ("fuzzing", "the rightly marked ones")):
        score, control = table.numbers(kind), table.numbers(f"{kind}_control")
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
    sentence, found = f"{'; '.join(parts)}.", table.later()
    if np.isfinite(found.spearman):
        later = found.spearman_p <= 0.05 and found.spearman > 0
        sentence += (
            f" What it calls complex {'emerges later' if later else 'is not shown to emerge later'}: rank correlation "
            f"{found.spearman:.2f} (95 % interval {found.spearman_low:.2f} to {found.spearman_high:.2f}, p = "
            f"{found.spearman_p:.2g}, {found.n:,} features)."
        )
    return sentence


PART = Part(Explanations, SECTION, (complexity, scores, listing), (hold,))
