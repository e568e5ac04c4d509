"""The overview figures, each as a table of columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from crosscoder.figures.spec import Axis, Bars, Heat, Lines, Measure, Panel, Series
from crosscoder.figures.table import Column, FigureTable, plain_column
from crosscoder.report.behaviour import SNAPSHOTS, task_tables
from crosscoder.report.data import Features, PageData
from crosscoder.report.sections import CROSSCODER, DIMENSIONALITY, NGRAMS, ROTATION, STRENGTH, in_order

BAND = (0.1, 0.9)
"""Quantiles over features that bands are drawn between."""


def _by_snapshot(data: PageData, curves: Mapping[str, Any]) -> dict[str, Column]:
    """Columns snapshot, step and every curve that is there."""
    columns: dict[str, Column] = {"snapshot": list(range(len(data.steps))), "step": plain_column(data.steps)}
    columns.update({name: plain_column(curve) for name, curve in curves.items() if curve is not None})
    return columns


def _presence(features: Features) -> str:
    tau = features.presence_threshold
    return "a threshold on its relative norm" if tau is None else f"{tau:g} of its maximum"


def _living_kinds(features: Features) -> list[int]:
    """Codes of the kinds that have features with a curve to show."""
    alive = np.asarray(features.max_norm) > 0
    present = np.bincount(np.asarray(features.kind)[alive], minlength=len(features.kind_names))
    return [code for code, name in enumerate(features.kind_names) if present[code] and name != "dead"]


def _chosen_examples(features: Features, kinds: Sequence[int], per_kind: int = 9) -> list[int]:
    """Features spread over emergence and peak, of those that fire most: shape is shown, not luck."""
    chosen: list[int] = []
    rate = np.asarray(features.firing_rate).max(axis=1)
    for code in kinds:
        members = np.flatnonzero((np.asarray(features.kind) == code) & (np.asarray(features.max_norm) > 0))
        frequent = members[np.argsort(-rate[members], kind="stable")][: max(per_kind, members.size // 4)]
        emergence, peak = np.asarray(features.emergence)[frequent], np.asarray(features.peak)[frequent]
        order = frequent[np.lexsort((frequent, peak, emergence))]
        picks = np.unique(np.linspace(0, order.size - 1, min(per_kind, order.size)).round().astype(int))
        chosen.extend(int(feature) for feature in order[picks])
    return chosen


def _norms(data: PageData) -> FigureTable | None:
    features = data.features
    if features is None or not _living_kinds(features):
        return None
    kinds = [code for code in _living_kinds(features) if features.kind_names[code] in ("initialization", "emergent")]
    kinds = kinds or _living_kinds(features)[:2]
    examples = data.figures.norm_examples
    examples = _chosen_examples(features, kinds) if examples is None else list(examples)
    columns: dict[str, Column] = {
        name: [] for name in ("series", "feature", "kind", "snapshot", "step", "norm", "q10", "q90")
    }
    steps = plain_column(data.steps)
    nothing: Column = [None] * len(steps)

    def add(series: str, feature: int | None, code: int, curve: Any, low: Any = None, high: Any = None) -> None:
        n = len(steps)
        columns["series"].extend([series] * n)
        columns["feature"].extend([feature] * n)
        columns["kind"].extend([features.kind_names[code]] * n)
        columns["snapshot"].extend(range(n))
        columns["step"].extend(steps)
        columns["norm"].extend(plain_column(curve))
        columns["q10"].extend(nothing if low is None else plain_column(low))
        columns["q90"].extend(nothing if high is None else plain_column(high))

    norms, kind = np.asarray(features.norms), np.asarray(features.kind)
    counts = {}
    for code in kinds:
        members = (kind == code) & (np.asarray(features.max_norm) > 0)
        counts[features.kind_names[code]] = int(members.sum())
        add("median", None, code, *np.quantile(norms[members], (0.5, *BAND), axis=0))
    for feature in examples:
        if int(kind[feature]) in kinds:
            add(f"feature {feature}", int(feature), int(kind[feature]), norms[feature])
    tau = features.presence_threshold
    axis = Axis("norm / own maximum", domain=(0, 1))
    panels = [
        Panel(
            axis,
            [Series("norm", "norm", "q10", "q90", colour=name)],
            f"{name}, {count:,} features",
            {"kind": name},
            None if tau is None else {"τ": tau},
        )
        for name, count in counts.items()
    ]
    return FigureTable(
        "norms",
        STRENGTH,
        "Decoder norm against training step",
        "both",
        "Norm of a feature's decoder at each snapshot, divided by the feature's own maximum (the paper's "
        "measure of strength). Thick line and band: median, 10 % and 90 % quantiles over all features of the kind. "
        f"Thin lines: {len(examples)} of them, spread over emergence among those that fire most; click one to open "
        f"it. The kinds are told apart by our rule: a feature is present where its norm exceeds {_presence(features)}; "
        "it is an initialization feature if present at the first snapshot, else emergent.",
        columns,
        Lines(panels, split="series"),
        wide=True,
    )


def _by_kind(features: Features, values: Any, n_bins: int, chosen: Any) -> dict[str, Column]:
    values, kind = np.asarray(values), np.asarray(features.kind)
    return {
        features.kind_names[code]: plain_column(np.bincount(values[chosen & (kind == code)], minlength=n_bins))
        for code in _living_kinds(features)
    }


def _kind_series(kinds: Mapping[str, Any]) -> list[Series]:
    return [Series(name, name, colour=name) for name in kinds]


def _emergence(data: PageData) -> FigureTable | None:
    features = data.features
    if features is None:
        return None
    chosen = (np.asarray(features.emergence) >= 0) & (np.asarray(features.max_norm) > 0)
    counts = _by_kind(features, features.emergence, len(data.steps), chosen)
    if not counts:
        return None
    return FigureTable(
        "emergence",
        STRENGTH,
        "When features emerge",
        "ours",
        "Features by the snapshot of their emergence, the first of two snapshots in a row at which the "
        f"norm exceeds {_presence(features)}. Features without an emergence are not counted. Snapshots are "
        "not evenly spaced in training steps.",
        _by_snapshot(data, counts),
        Bars("snapshot", SNAPSHOTS, Axis("features", "count"), _kind_series(counts), lists=True),
    )


def _lifetimes(data: PageData) -> FigureTable | None:
    features = data.features
    if features is None:
        return None
    n = len(data.steps)
    snapshots = np.rint(np.asarray(features.lifetime, dtype=np.float64) * n).astype(np.int64)
    counts = _by_kind(features, snapshots, n + 1, np.asarray(features.max_norm) > 0)
    if not counts:
        return None
    columns: dict[str, Column] = {"snapshots": list(range(n + 1)), **counts}
    back = ""
    if features.revived is not None:
        back_F = np.asarray(features.revived) & (np.asarray(features.max_norm) > 0)
        columns["come back"] = plain_column(np.bincount(snapshots[back_F], minlength=n + 1))
        n_living = sum(map(sum, counts.values()))
        back = f" {back_F.sum():,} of these {n_living:,} features disappear and come back."
    return FigureTable(
        "lifetimes",
        STRENGTH,
        "How long features live",
        "ours",
        f"Number of snapshots, of {n}, at which a feature's norm exceeds {_presence(features)}. The paper "
        "reports that most emergent features live in 60 % or more of its snapshots; one "
        f"that is born after 40 % of them cannot.{back}",
        columns,
        Bars("snapshots", f"snapshots present, of {n}", Axis("features", "count"), _kind_series(counts)),
    )


def _turnover(data: PageData) -> FigureTable | None:
    figures = data.figures
    if figures.births is None:
        return None
    return FigureTable(
        "turnover",
        STRENGTH,
        "Births and deaths",
        "ours",
        "Features that become present at a snapshot (up) and features no longer present from it on (down).",
        _by_snapshot(data, {"births": figures.births, "deaths": figures.deaths}),
        Bars(
            "snapshot",
            SNAPSHOTS,
            Axis("features", "count"),
            [Series("births", "births"), Series("deaths", "deaths")],
            down=["deaths"],
        ),
    )


def _interval(turning: dict[str, Any]) -> str:
    if turning["low"] is None or turning["high"] is None:
        return ""
    level = "" if turning["level"] is None else f"{100 * turning['level']:g} % "
    return f", with its {level}bootstrap interval"


def _turning(data: PageData) -> dict[str, Any] | None:
    turning = data.figures.turning_point
    if turning is None or not np.isfinite(turning.step):
        return None
    name = "turning point" if turning.sharp else "best split (no sharp turn)"
    ends = {"low": turning.low, "high": turning.high, "level": turning.level}
    return {"name": name, "sharp": turning.sharp, "step": turning.step, **ends}


def _cosines(data: PageData) -> FigureTable | None:
    cosines = data.figures.cosines
    if cosines is None:
        return None
    n = len(data.steps)
    steps = plain_column(data.steps)
    rows, columns_of = np.divmod(np.arange(n * n), n)
    columns: dict[str, Column] = {
        "snapshot": plain_column(rows),
        "step": [steps[row] for row in rows],
        "other_snapshot": plain_column(columns_of),
        "other_step": [steps[column] for column in columns_of],
        "mean": plain_column(np.asarray(cosines.mean).ravel()),
    }
    if cosines.quantiles is not None:
        for level, matrix in zip(cosines.levels, np.asarray(cosines.quantiles), strict=True):
            columns[f"q{level:g}"] = plain_column(matrix.ravel())
    measures = [Measure("mean", "mean", (0, 1))]
    measures += [Measure(f"q{level:g}", f"{100 * level:g} % quantile", (0, 1)) for level in cosines.levels]
    for kind, matrix in cosines.by_kind.items():
        columns[f"mean, {kind}"] = plain_column(np.asarray(matrix).ravel())
        measures.append(Measure(f"mean, {kind}", f"mean, {kind} features", (0, 1)))
    details = []
    if cosines.n_features is not None:
        details.append("n_features")
        columns["n_features"] = plain_column(np.asarray(cosines.n_features).ravel())
    if cosines.null is not None:
        details.append("null")
        columns["null"] = plain_column(np.asarray(cosines.null).ravel())
    caption = (
        "Mean cosine between a feature's decoder directions at two snapshots (as in the paper's Figure "
        "3c), over the features alive at both."
    )
    turning = _turning(data)
    if turning is not None:
        caption += " White, broken: "
        caption += (
            (
                "the turning point, our change-point estimate"
                if turning["sharp"]
                else "the best split of the snapshots in two, which is no sharp turn here (see the text above)"
            )
            + _interval(turning)
            + "."
        )
    if cosines.null is not None:
        caption += " Null: the spread of a mean cosine of random directions, the level of no relation."
    return FigureTable(
        "cosines",
        ROTATION,
        "Rotation of decoder directions",
        "both" if turning else "paper",
        caption,
        columns,
        Heat("other_snapshot", "snapshot", "training step", "training step", measures, details, square=True),
        {"turning": turning},
    )


def _curve_figure(
    key: str,
    group: str,
    title: str,
    definition: str,
    caption: str,
    axis: Axis,
    curves: Callable[[PageData], Mapping[str, Any]],
) -> Callable[[PageData], FigureTable | None]:
    def make(data: PageData) -> FigureTable | None:
        chosen = {name: curve for name, curve in curves(data).items() if curve is not None}
        if not chosen:
            return None
        series = [Series(name, name, colour=name) for name in chosen]
        columns = _by_snapshot(data, chosen)
        return FigureTable(key, group, title, definition, caption, columns, Lines([Panel(axis, series)]))

    return make


def _explained_variance(data: PageData) -> FigureTable | None:
    figures = data.figures
    curves = {"mean of ratios": figures.explained_variance, "ratio of sums": figures.explained_variance_total}
    present = {name: np.asarray(curve, dtype=np.float64) for name, curve in curves.items() if curve is not None}
    if not present:
        return None
    known = np.concatenate(list(present.values()))
    low = float(np.nanmin(known)) if np.isfinite(known).any() else 0.0
    # the interesting part is near 1; a few bad snapshots must not squeeze the others
    axis = Axis("explained variance", domain=(max(-0.2, low - (1 - low) * 0.15), 1))
    return FigureTable(
        "explained_variance",
        CROSSCODER,
        "Explained variance",
        "both",
        "Held-out tokens, each snapshot on its own. Mean of ratios (the paper's): mean over tokens of 1 − "
        "|x − x̂|² / |x − mean|². Ratio of sums (ours): 1 − ΣSSE / ΣSST, which tokens of small norm do not "
        "dominate.",
        _by_snapshot(data, present),
        Lines([Panel(axis, [Series(name, name) for name in present])]),
    )


def _kl(data: PageData) -> FigureTable | None:
    figures = data.figures
    curves = {
        "unigram": figures.kl_unigram,
        "bigram": figures.kl_bigram,
        "bigram, corrected": figures.kl_bigram_corrected,
        "per prediction": figures.kl_bigram_row,
    }
    present = {name: curve for name, curve in curves.items() if curve is not None}
    if not present:
        return None
    sentences = {
        "unigram": "Unigram: KL divergence from the text's token frequencies to the model's mean prediction.",
        "bigram": "Bigram: from the text's bigram rows to the mean prediction after each token.",
        "bigram, corrected": "Corrected (ours): the same less the first-order estimate (Miller–Madow) of what the "
        "finite counts add to it; on sparse counts still too high.",
        "per prediction": "Per prediction: from the bigram row to each single prediction, averaged.",
    }
    caption = " ".join(sentences[name] for name in present)
    return FigureTable(
        "kl",
        NGRAMS,
        "Distance to n-gram statistics",
        "both",
        f"{caption} The paper shows such curves; the formulas are ours, since it gives none.",
        _by_snapshot(data, present),
        Lines([Panel(Axis("KL divergence, nats", zero=True), [Series(name, name) for name in present])]),
    )


def _loss(data: PageData) -> FigureTable | None:
    figures = data.figures
    if figures.model_loss is None:
        return None
    lines = {label: float(f"{value:.6g}") for label, value in figures.entropies.items()}
    caption = "Mean cross-entropy of the language model on the evaluation text, at each snapshot (solid)."
    if lines:
        caption += " Dashed: entropies of n-gram models, the levels that a model with only those statistics reaches."
    turning = figures.turning_point
    extra: dict[str, Any] = {}
    if turning is not None and np.isfinite(turning.step):
        label = "directions turn" if turning.sharp else "best split"
        extra["marks"] = [{"step": turning.step, "low": turning.low, "high": turning.high, "label": label}]
        interval = _interval(_turning(data) or {}).removeprefix(", ") or "found here"
        caption += " The paper tells a phase of statistics from one of features: " + (
            f"the turning point of decoder directions {interval} parts them (shaded)."
            if turning.sharp
            else f"decoder directions show no sharp turn here that parts them; shaded is their best split {interval}."
        )
    return FigureTable(
        "loss",
        NGRAMS,
        "Loss and the n-gram levels" + (" and the two phases" if turning is not None and turning.sharp else ""),
        "paper",
        caption,
        _by_snapshot(data, {"loss": figures.model_loss}),
        Lines([Panel(Axis("nats a token"), [Series("loss", "model")], rules=lines)]),
        extra,
        wide=True,
    )


_MAKERS: dict[str, Callable[[PageData], FigureTable | None]] = {
    "norms": _norms,
    "emergence": _emergence,
    "lifetimes": _lifetimes,
    "turnover": _turnover,
    "cosines": _cosines,
    "dimensionality": _curve_figure(
        "dimensionality",
        DIMENSIONALITY,
        "Total feature dimensionality",
        "both",
        "Sum over features of |w|² / Σⱼ (ŵ·wⱼ)², divided by the width D: the share of the residual "
        "stream's dimensions that the decoders of a snapshot take up (the paper's). By kind (ours): the part of the "
        "sum that a kind's features have; the denominators run over all features.",
        Axis("share of D", "percent", domain=(0, 1)),
        lambda data: {"all": data.figures.dimensionality, **data.figures.dimensionality_by_kind},
    ),
    "loss": _loss,
    "kl": _kl,
    "induction": _curve_figure(
        "induction",
        NGRAMS,
        "Induction",
        "standard",
        "Random tokens repeated twice: loss on the first copy minus loss on the second. Above 0, the model "
        "copies from its context.",
        Axis("loss difference, nats", zero=True),
        lambda data: {"gap": data.figures.induction_gap},
    ),
    "explained_variance": _explained_variance,
    "l0": _curve_figure(
        "l0",
        CROSSCODER,
        "Active features a token (L0)",
        "paper",
        "Mean number of features active on a token at each snapshot, on held-out tokens.",
        Axis("active features a token", zero=True),
        lambda data: {"l0": data.figures.l0},
    ),
}

FIGURE_KEYS: tuple[str, ...] = tuple(_MAKERS)
"""Keys of the figures, in the order of the page."""


def figure_tables(data: PageData) -> list[FigureTable]:
    """The figures that `data` has numbers for, in the order of the page."""
    tables = []
    for key, make in _MAKERS.items():
        table = make(data)
        if table is not None:
            tables.append(replace(table, caption=data.figures.captions.get(key, table.caption)))
    return in_order([*tables, *data.tables, *task_tables(data)])
