"""What features respond to, and whether types of features emerge at different times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.evolution.analyses.life import LIFE, shown_kinds
from crosscoder.evolution.analyses.positions import POSITIONS
from crosscoder.evolution.reading import snapshot_reader
from crosscoder.evolution.study import Analysis, Study
from crosscoder.evolution.summary import finite
from crosscoder.evolution.types import (
    OTHER,
    TYPE_NAMES,
    EmergenceByType,
    FeatureTypes,
    emergence_by_type,
    feature_types,
    induction_responses,
)
from crosscoder.figures.results import Part, Results
from crosscoder.figures.spec import SNAPSHOTS, Axis, Bars, Field, Listing, Series
from crosscoder.figures.table import Column, FigureTable, plain_column


@dataclass(frozen=True)
class TypesResult:
    """Types, and emergence by type over all features and over the emergent ones alone."""

    features: FeatureTypes
    all: EmergenceByType
    emergent: EmergenceByType


def compute(study: Study) -> TypesResult:
    """From positions, and from random sequences that are read twice."""
    seed = study.settings.seed
    repeated, unrelated = induction_responses(
        snapshot_reader(study.snapshots, study.folded, title="types"),
        study.folded.config.n_features,
        len(study.snapshots.load_tokenizer()),
        length=study.settings.induction_length,
        end_of_text=study.train.end_of_text,
        seed=seed,
    )
    found = feature_types(study.result(POSITIONS), study.train, repeated, unrelated, seed=seed)
    parts = {
        part: emergence_by_type(found.type, emergence_F, study.steps, seed=seed)
        for part, emergence_F in study.result(LIFE).emergence_by_part().items()
    }
    return TypesResult(found, **parts)


def summary(types: TypesResult, revisions: Sequence[str]) -> dict[str, Any]:
    """Counts, how often the rules call falsely, and emergence by type."""
    features = types.features
    rules = {
        name: {
            "judged": int(features.judged[:, rule].sum()),
            "false_calls_in_control": finite(features.control[rule]),
            "control_features": int(features.n_control[rule]),
        }
        for rule, name in enumerate(TYPE_NAMES[:OTHER])
    }
    emergence = {"all": _emergence(types.all), "emergent": _emergence(types.emergent)}
    return {"features_by_type": {"counts": features.n_by_type, "rules": rules, "emergence": emergence}}


def _emergence(found: EmergenceByType) -> dict[str, Any]:
    by_type = {
        name: {
            "n": int(found.n[code]),
            "median_step": finite(found.median[code]),
            "low": finite(found.median_low[code]),
            "high": finite(found.median_high[code]),
        }
        for code, name in enumerate(TYPE_NAMES)
        if found.n[code]
    }
    tests = {name: finite(getattr(found, name)) for name in ("statistic", "p", "effect")}
    return {**tests, "by_type": by_type}


def counts(found: TypesResult, results: Results) -> FigureTable | None:
    """How many features are of each type, and how often the rules call falsely."""
    types_F, control_R = found.features.type, found.features.control
    of = {name: types_F[mask] for name, mask in shown_kinds(results).items()} or {"all": types_F}
    columns: dict[str, Column] = {"type": list(TYPE_NAMES)}
    columns |= {name: plain_column(np.bincount(types, minlength=len(TYPE_NAMES))) for name, types in of.items()}
    controls = [
        f"{name} {value:.1%}" for name, value in zip(TYPE_NAMES[:OTHER], control_R, strict=True) if np.isfinite(value)
    ]
    return FigureTable(
        "types",
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


def emergence(types: TypesResult, results: Results) -> FigureTable | None:
    """Emergence of each type's emergent features."""
    if not types.emergent.counts.any():
        return None
    found = types.emergent
    shown = {TYPE_NAMES[code]: plain_column(row_K) for code, row_K in enumerate(found.counts) if row_K.any()}
    test = (
        f"Kruskal–Wallis over the types with five features or more: p = {found.p:.2g}, ε² = {found.effect:.2f}."
        if np.isfinite(found.p)
        else "Too few types have five features or more to test whether they differ."
    )
    return FigureTable(
        "type_emergence",
        "When types emerge",
        "ours",
        f"Emergent features by the snapshot of their emergence and by type. {test}",
        results.by_snapshot | shown,
        Bars("snapshot", SNAPSHOTS, Axis("features", "count"), [Series(name, name) for name in shown]),
    )


def medians(types: TypesResult, results: Results) -> FigureTable | None:
    """Median emergence of each type with its interval, as a listing."""
    if not types.emergent.n.any():
        return None
    found = types.emergent
    shown = np.flatnonzero(found.n)
    shown = shown[np.argsort(found.median[shown], kind="stable")]
    columns: dict[str, Column] = {
        "type": [TYPE_NAMES[code] for code in shown],
        "features": plain_column(found.n[shown]),
        "median": plain_column(found.median[shown]),
        "low": plain_column(found.median_low[shown]),
        "high": plain_column(found.median_high[shown]),
    }
    return FigureTable(
        "type_medians",
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


def pairs(types: TypesResult, results: Results) -> FigureTable | None:
    """Whether each two types differ in when they emerge, as a listing."""
    if not len(types.emergent.pairs):
        return None
    found = types.emergent
    order, n = np.argsort(found.pair_holm, kind="stable"), len(found.pairs)
    columns: dict[str, Column] = {
        "types": [f"{TYPE_NAMES[first]}, {TYPE_NAMES[second]}" for first, second in found.pairs[order]],
        "delta": plain_column(found.pair_effect[order]),
        "p": plain_column(found.pair_p[order]),
        "p, Holm": plain_column(found.pair_holm[order]),
    }
    return FigureTable(
        "type_pairs",
        "Types two by two",
        "ours",
        "Emergent features of two types, Mann–Whitney: Cliff's δ is above 0 where the first named emerges later (1: "
        "all of it after all of the other). Two types differ in when they emerge where p is small after Holm's "
        f"correction, which is for looking at {n} {'pair' if n == 1 else 'pairs'}.",
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


def order_of_types(found: TypesResult, results: Results) -> str:
    """What features are, and whether types emerge in an order."""
    features, emergent = found.features, found.emergent
    n_by_type = np.bincount(features.type, minlength=len(TYPE_NAMES))
    listed = ", ".join(f"{n_by_type[code]:,} are {TYPE_NAMES[code]}" for code in range(OTHER))
    known = features.control[np.isfinite(features.control)]
    worst = f" (false calls in the controls: at most {known.max():.1%})" if known.size else ""
    start = f"Of {int(features.judged.any(axis=1).sum()):,} features that the rules judge, {listed}{worst}"
    p = emergent.p
    if not np.isfinite(p):
        return f"{start}; too few of the emergent ones have a type to say in which order types emerge."
    if p > 0.05:
        return f"{start}; no difference in when types emerge is shown (Kruskal–Wallis p = {p:.2g}): no order is told."
    compared = np.flatnonzero(emergent.compared)
    steps = ", ".join(
        f"{TYPE_NAMES[code]} {emergent.median[code]:,.0f} ({emergent.median_low[code]:,.0f} to "
        f"{emergent.median_high[code]:,.0f})"
        for code in compared[np.argsort(emergent.median[compared], kind="stable")]
    )
    return f"{start}; types differ in when they emerge (Kruskal–Wallis p = {p:.2g}), median steps: {steps}."


TYPES = Analysis(
    "types",
    version=1,
    definition="type of each feature: single-token, previous-token, induction, context-sensitive (the paper's names) "
    "by rules over its strongest positions and random sequences said twice, with controls, and whether types differ in "
    "emergence (ours)",
    result=TypesResult,
    compute=compute,
    summary=summary,
    settings=("induction_length", "seed"),
    needs=(POSITIONS, LIFE),
    page=Part(TypesResult, "Feature types", (counts, emergence, medians, pairs), (order_of_types,)),
)
