"""The figures of tasks: what the model can do, which features carry it at which snapshot, and what ablation does.

Each task has its own group of figures; their keys are a kind of `TASK_FIGURES`, `--` and the task's name.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from crosscoder.figures.spec import Axis, Bars, Field, Heat, Lines, Listing, Measure, Panel, Series, Spec
from crosscoder.figures.table import Column, FigureTable, plain_column
from crosscoder.report.data import Features, PageData, TaskResult

TASK_FIGURES = ("ability", "circuit", "dominance", "ablation", "carriers")
"""Kinds of figures that a task has, in the order of the page; a task at chance has the first alone."""
STACKED = 8
"""Features with a band of their own in the figure of dominance."""
SNAPSHOTS = "snapshot (training step)"
AROUND = 12
"""Tokens shown before and after the strongest one of a context."""


def kind_of(key: str) -> str:
    """The kind of a figure, from its key."""
    return key.split("--", maxsplit=1)[0]


def task_tables(data: PageData) -> list[FigureTable]:
    """The figures of all tasks."""
    tables = []
    for task in data.tasks:
        tables.append(_ability(data, task))
        if task.features.size:
            tables += [_circuit(data, task), _dominance(data, task), _ablation(data, task), _carriers(data, task)]
    return tables


def _table(
    task: TaskResult,
    kind: str,
    title: str,
    definition: str,
    caption: str,
    columns: Any,
    spec: Spec | None,
    extra: Any = None,
) -> FigureTable:
    key, group, wide = f"{kind}--{task.name}", f"Behaviour: {task.name}", kind in ("ability", "ablation", "carriers")
    return FigureTable(key, group, title, definition, caption, columns, spec, extra or {}, wide)


def _steps(data: PageData) -> dict[str, Column]:
    return {"snapshot": list(range(len(data.steps))), "step": plain_column(data.steps)}


def _ability(data: PageData, task: TaskResult) -> FigureTable:
    above = np.asarray(task.above_chance)
    known = "At no snapshot is it above chance, so nothing is attributed." if not above.any() else (
        f"Above chance at {int(above.sum())} of {above.size} snapshots; elsewhere nothing is attributed."
    )  # fmt: skip
    return _table(
        task,
        "ability",
        "What the model can do",
        "ours",
        f"{task.note[:1].upper()}{task.note[1:]}. {task.n_prompts} pairs of prompts. Accuracy: share of prompts "
        f"where the right answer beats the wrong one; chance is one half. {known} Above chance: right answers more "
        f"often than a coin gives with a probability of 0.001. Right: the {task.metric.replace('-', ' ')} of right "
        "and wrong answer on clean and on corrupted prompts; on those the other answer is right.",
        {
            **_steps(data),
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
    )


def _circuit(data: PageData, task: TaskResult) -> FigureTable:
    n, K = np.shape(task.attribution)
    known = np.tile(np.asarray(task.above_chance), n)

    def flat(values: Any) -> Column:
        return plain_column(np.where(known, np.asarray(values).ravel(), np.nan))

    return _table(
        task,
        "circuit",
        "Which features carry it, when",
        "both",
        "Attribution by integrated gradients from corrupted to clean prompts (the paper's; mean over prompts), "
        "features in order of emergence. Share: of the positive attribution of all features at the snapshot "
        "(ours). RelIE: which snapshot a feature's effect belongs to, |attribution| over its sum over snapshots "
        "(Bayazit et al. 2025); relative norm likewise. Empty columns are at chance. Click a row to open its "
        f"feature.{_fidelity(task)}",
        {
            "feature": [int(feature) for feature in np.repeat(task.features, K)],
            "snapshot": list(range(K)) * n,
            "step": plain_column(data.steps) * n,
            "attribution": flat(task.attribution),
            "share": flat(task.share),
            "RelIE": flat(task.relative_effect),
            "relative norm": plain_column(np.asarray(task.relative_norm).ravel()),
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


def _dominance(data: PageData, task: TaskResult) -> FigureTable:
    share = np.where(np.asarray(task.above_chance), np.asarray(task.share), np.nan)
    largest = np.nan_to_num(share).max(axis=1)
    stacked = np.sort(np.argsort(-largest, kind="stable")[:STACKED])  # in the circuit's order, that of emergence
    names = [f"feature {task.features[row]}" for row in stacked]
    columns = {**_steps(data), **{name: plain_column(share[row]) for name, row in zip(names, stacked, strict=True)}}
    columns["other features"] = plain_column(1 - share[stacked].sum(axis=0))
    columns["dominant"] = [int(feature) for feature in task.dominant]
    return _table(
        task,
        "dominance",
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


def _ablation(data: PageData, task: TaskResult) -> FigureTable:
    columns: dict[str, Column] = {}
    for name, values in task.curves.items():
        text = np.asarray(values).dtype.kind in "UO"
        columns[name] = [str(value) for value in values] if text else plain_column(values)
    columns["step"] = plain_column(np.asarray(data.steps)[np.asarray(task.curves["snapshot"])])
    return _table(
        task,
        "ablation",
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
    )


def _carriers(data: PageData, task: TaskResult) -> FigureTable:
    attribution = np.where(np.asarray(task.above_chance), np.asarray(task.attribution), 0)
    order = np.argsort(-attribution.max(axis=1), kind="stable")
    peak = attribution.argmax(axis=1)[order]
    features = np.asarray(task.features)[order]
    steps = np.asarray(data.steps)
    columns: dict[str, Column] = {
        "feature": [int(feature) for feature in features],
        "emergence": [int(steps[index]) if index >= 0 else None for index in np.asarray(task.emergence)[order]],
        "attribution": plain_column(attribution[order, peak]),
        "at step": plain_column(steps[peak]),
        "share": plain_column(np.asarray(task.share)[order, peak]),
        "firing rate": plain_column(np.full(len(features), np.nan)),
    }
    snippets: list[tuple[str, str, str]] = [("", "", "")] * len(features)
    if data.features is not None:
        rate = np.asarray(data.features.firing_rate)
        columns["firing rate"] = plain_column(rate[features, peak])
        snippets = [_snippet(data.features, int(feature)) for feature in features]
    for place, name in enumerate(("before", "token", "after")):
        columns[name] = [snippet[place] for snippet in snippets]
    return _table(
        task,
        "carriers",
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
    )


def _snippet(features: Features, feature: int) -> tuple[str, str, str]:
    """Text before, at and after the strongest token of a feature's first context."""
    contexts = features.contexts
    if contexts is None:
        return "", "", ""
    rows = np.flatnonzero(np.asarray(contexts.feature) == feature)
    if not rows.size:
        return "", "", ""
    tokens = np.asarray(contexts.tokens)[rows[0]]
    inside = tokens >= 0
    peak = int(np.where(inside, np.asarray(contexts.activations)[rows[0]], -1).argmax())

    def text(start: int, stop: int) -> str:
        chosen = range(max(0, start), min(len(tokens), stop))
        return "".join(contexts.vocabulary[tokens[place]] for place in chosen if inside[place])

    return text(peak - AROUND, peak), text(peak, peak + 1), text(peak + 1, peak + 1 + AROUND)
