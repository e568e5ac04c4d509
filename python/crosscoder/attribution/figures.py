"""What a task (`crosscoder attribute`) adds to the page: what the model can do, which features carry it at which
snapshot, and what ablation does. Keys of its figures are a kind, `--` and the task's name.

Letters: n features of the circuit, K snapshots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from crosscoder.attribution.finished import TaskResult
from crosscoder.common.byte_text import Vocabulary
from crosscoder.evolution.analyses.examples import ExamplesResult
from crosscoder.evolution.examples import ContextWindows
from crosscoder.figures.results import Part, Results
from crosscoder.figures.spec import SNAPSHOTS, Axis, Bars, Field, Heat, Lines, Listing, Measure, Panel, Series
from crosscoder.figures.table import Column, FigureTable, plain_column

STACKED = 8
"""Features with a band of their own in the figure of dominance."""
AROUND = 12
"""Tokens shown before and after the strongest one of a context."""


def part(task: TaskResult) -> Part[TaskResult]:
    """The section of a task; one at chance has its first figure alone."""
    kinds = _KINDS if task.circuit.features.size else _KINDS[:1]
    return Part(task, f"Behaviour: {task.name}", kinds, (sentence,))


def _ability(task: TaskResult, results: Results) -> FigureTable:
    above = task.above_chance
    known = "At no snapshot is it above chance, so nothing is attributed." if not above.any() else (
        f"Above chance at {int(above.sum())} of {above.size} snapshots; elsewhere nothing is attributed."
    )  # fmt: skip
    return FigureTable(
        f"ability--{task.name}",
        "What the model can do",
        "ours",
        f"{task.note[:1].upper()}{task.note[1:]}. {task.n_prompts} pairs of prompts. Accuracy: share of prompts "
        f"where the right answer beats the wrong one; chance is one half. {known} Above chance: right answers more "
        f"often than a coin gives with a probability of 0.001. Right: the {task.metric.replace('-', ' ')} of right "
        "and wrong answer on clean and on corrupted prompts; on those the other answer is right.",
        {
            **results.by_snapshot,
            "accuracy": plain_column(task.accuracy),
            "clean": plain_column(task.clean),
            "corrupted": plain_column(task.corrupted),
            "above_chance": [int(value) for value in above],
        },
        Lines(
            [
                Panel(
                    Axis("prompts answered right", "percent", domain=(0, 1)),
                    [Series("accuracy", "accuracy")],
                    "accuracy",
                    rules={"chance": 0.5},
                ),
                Panel(
                    Axis("mean over prompts", zero=True),
                    [Series("clean", "clean"), Series("corrupted", "corrupted")],
                    task.metric.replace("-", " "),
                ),
            ]
        ),
        wide=True,
    )


def _circuit(task: TaskResult, results: Results) -> FigureTable:
    n, K = task.circuit.attribution.shape
    known = np.tile(task.above_chance, n)

    def flat(values: Any) -> Column:
        return plain_column(np.where(known, np.asarray(values).ravel(), np.nan))

    return FigureTable(
        f"circuit--{task.name}",
        "Which features carry it, when",
        "both",
        "Attribution by integrated gradients from corrupted to clean prompts (the paper's; mean over prompts), "
        "features in order of emergence. Share: of the positive attribution of all features at the snapshot "
        "(ours). RelIE: which snapshot a feature's effect belongs to, |attribution| over its sum over snapshots "
        "(Bayazit et al. 2025); relative norm likewise. Empty columns are at chance. Click a row to open its "
        f"feature.{_fidelity(task)}",
        {
            "feature": [int(feature) for feature in np.repeat(task.circuit.features, K)],
            "snapshot": list(range(K)) * n,
            "step": plain_column(results.steps) * n,
            "attribution": flat(task.circuit.attribution),
            "share": flat(task.circuit.share),
            "RelIE": flat(task.circuit.relative_effect),
            "relative norm": plain_column(task.circuit.relative_norm.ravel()),
        },
        Heat(
            "snapshot",
            "feature",
            SNAPSHOTS,
            "feature, in order of emergence",
            [
                Measure("share", "share", (0, None)),
                Measure("attribution", "attribution", signed=True),
                Measure("RelIE", "RelIE", (0, None)),
                Measure("relative norm", "relative norm", (0, None)),
            ],
        ),
    )


def _fidelity(task: TaskResult) -> str:
    """How well the attributions agree with really ablating features."""
    known = {name.replace("_", " "): value for name, value in task.fidelity.items() if value is not None}
    if not known:
        return ""
    agreement = ", ".join(f"{name} {value:.2f}" for name, value in known.items())
    sentence = f" Rank correlation with ablating each of the {task.n_exact} strongest alone: {agreement}."
    if task.completeness_error is not None:
        sentence += f" Completeness error of integrated gradients: {task.completeness_error:.2%}."
    return sentence


def _dominance(task: TaskResult, results: Results) -> FigureTable:
    share = np.where(task.above_chance, task.circuit.share, np.nan)
    largest = np.nan_to_num(share).max(axis=1)
    stacked = np.sort(np.argsort(-largest, kind="stable")[:STACKED])  # in the circuit's order, that of emergence
    names = [f"feature {task.circuit.features[row]}" for row in stacked]
    columns = {
        **results.by_snapshot,
        **{name: plain_column(share[row]) for name, row in zip(names, stacked, strict=True)},
    }
    columns["other features"] = plain_column(1 - share[stacked].sum(axis=0))
    columns["dominant"] = [int(feature) for feature in task.circuit.dominant]
    return FigureTable(
        f"dominance--{task.name}",
        "Who dominates when",
        "ours",
        f"Shares of the positive attribution of all features, for the {len(stacked)} features with the largest; "
        "those of one colour take over from others where its band widens. Snapshots at chance are left out.",
        columns,
        Bars(
            "snapshot",
            SNAPSHOTS,
            Axis("share of positive attribution", "percent", domain=(0, 1)),
            [Series(name, name) for name in [*names, "other features"]],
        ),
    )


def _ablation(task: TaskResult, results: Results) -> FigureTable:
    columns: dict[str, Column] = {}
    for name, values in task.curves.items():
        text = np.asarray(values).dtype.kind in "UO"
        columns[name] = [str(value) for value in values] if text else plain_column(values)
    columns["step"] = plain_column(np.asarray(results.steps)[np.asarray(task.curves["snapshot"])])
    return FigureTable(
        f"ablation--{task.name}",
        "Ablating the top features, and all others",
        "both",
        "Features ranked by integrated gradients on one half of the prompts, ablated on the other half (the "
        "paper's two curves; intervals over prompts, 95 %). Disrupt: the first k are ablated; the drop is the "
        "share of the clean metric that is lost, above 100 % where the wrong answer wins. Restore: all but the "
        "first k are ablated; faithfulness is 0 with every feature ablated and 100 % with none. Controls (ours): "
        "k random features matched in firing rate and norm, and random features that together are as active as "
        "the top k. Matching has its limits where the top features fire more than any others: compare the active "
        "features a token.",
        columns,
        None,
        {"main": task.curves["ablation"][0], "metric": task.metric.replace("-", " ")},
        wide=True,
    )


def _carriers(task: TaskResult, results: Results) -> FigureTable:
    attribution = np.where(task.above_chance, task.circuit.attribution, 0)
    order = np.argsort(-attribution.max(axis=1), kind="stable")
    peak = attribution.argmax(axis=1)[order]
    features = task.circuit.features[order]
    steps = np.asarray(results.steps)
    columns: dict[str, Column] = {
        "feature": [int(feature) for feature in features],
        "emergence": [int(steps[index]) if index >= 0 else None for index in task.circuit.emergence[order]],
        "attribution": plain_column(attribution[order, peak]),
        "at step": plain_column(steps[peak]),
        "share": plain_column(task.circuit.share[order, peak]),
        "firing rate": plain_column(np.full(len(features), np.nan)),
    }
    examples, vocabulary = results.of(ExamplesResult), results.of(Vocabulary)
    snippets = [("", "", "")] * len(features)
    if examples is not None:
        columns["firing rate"] = plain_column(examples.firing_rate[features, peak])
        if vocabulary is not None:
            snippets = [_snippet(examples.contexts, vocabulary.texts, int(feature)) for feature in features]
    for place, name in enumerate(("before", "token", "after")):
        columns[name] = [snippet[place] for snippet in snippets]
    return FigureTable(
        f"carriers--{task.name}",
        "The features, with their contexts",
        "both",
        "The circuit's features by their largest attribution, at the snapshot where they have it; each with the "
        "context of the corpus where it is most active. Click one to see all its contexts.",
        columns,
        Listing(
            [
                Field("feature", "feature", "text"),
                Field("emergence", "emerges", "count", "step "),
                Field("attribution", "attribution"),
                Field("at step", "at", "count", "step ", narrow=False),
                Field("firing rate", "fires on", "percent", narrow=False),
            ],
            "attribution",
            "where it is most active",
        ),
        wide=True,
    )


def _snippet(contexts: ContextWindows, texts: Sequence[str], feature: int) -> tuple[str, str, str]:
    """Text before, at and after the strongest token of a feature's first context."""
    rows = np.flatnonzero(contexts.feature == feature)
    if not rows.size:
        return "", "", ""
    tokens = contexts.tokens[rows[0]]
    inside = tokens >= 0
    peak = int(np.where(inside, contexts.activations[rows[0]], -1).argmax())

    def text(start: int, stop: int) -> str:
        chosen = range(max(0, start), min(len(tokens), stop))
        return "".join(texts[tokens[place]] for place in chosen if inside[place])

    return text(peak - AROUND, peak), text(peak, peak + 1), text(peak + 1, peak + 1 + AROUND)


def sentence(task: TaskResult, results: Results) -> str:
    """One sentence on a task's attribution: whether the model can do it, then what carries it."""
    name, figures, accuracy = task.name, task.figures, task.accuracy
    above = figures["above_chance"]
    if not above:
        return (
            f"The model does not do {name} at any snapshot: accuracy {accuracy.min():.0%} to {accuracy.max():.0%}, "
            "where chance gives 50%, so nothing is attributed."
        )
    last = figures["clean_accuracy"][above[-1]]
    start = (
        f"The model does {name} at {len(above)} of {accuracy.size} snapshots, from {above[0]} on ({last:.0%} right at"
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


_KINDS: tuple[Callable[[TaskResult, Results], FigureTable], ...] = (
    _ability,
    _circuit,
    _dominance,
    _ablation,
    _carriers,
)
"""In the order of the page."""
