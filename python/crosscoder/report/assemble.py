"""From a run's results to what the page shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crosscoder.activations.tokens import TokenSet
from crosscoder.attribution.study import finished_tasks, load_circuit
from crosscoder.common.arrays import Arrays, flatten
from crosscoder.common.byte_text import byte_level_text
from crosscoder.common.tables import read_table
from crosscoder.errors import DataError
from crosscoder.evolution.analyses import analyses
from crosscoder.evolution.strength import KIND_NAMES
from crosscoder.evolution.study import Study
from crosscoder.files import read_json
from crosscoder.report.analysis_tables import analysis_tables
from crosscoder.report.data import (
    Contexts,
    Cosines,
    Fact,
    Features,
    Figures,
    PageData,
    StepMark,
    TaskResult,
    TurningPoint,
)
from crosscoder.report.findings import findings, leads, task_finding
from crosscoder.report.finished import finished
from crosscoder.report.life_tables import THRESHOLDS
from crosscoder.report.results import SHOWN_KINDS, Results
from crosscoder.report.turning import is_sharp, turning_figures
from crosscoder.runs import Run

NEEDED = {
    "train": {"dead_fraction", "n_train_tokens"},
    "eval": {"explained_variance", "l0", "n_heldout_tokens"},
    "evolve": {"features_by_kind", "presence_threshold", "model_loss", "bigram_entropy", "induction_gap"},
}
"""The figures of `summary.json` that the page rests on, by the verb that writes them."""


OPTIONAL = ("kind_dimensionality", "positions", "types", "complexity", "probes", "latent_scaling")
"""Analyses whose sections are left out where they were not run."""


def assemble(run: Run) -> PageData:
    """The page of a run. Raises `DataError` with the remedy where a result is missing."""
    summary = run.summary()
    for verb, figures in NEEDED.items():
        if not figures <= summary.keys():
            raise DataError(f"{run.path} lacks results; run first: crosscoder {verb} {run.path}")
    study = Study.of(run)
    studied = finished_tasks(run)
    known = {one.name: study.finished(one) if one.name in OPTIONAL else study.result(one) for one in analyses()}
    typed = {name: result for name, result in known.items() if result is not None}
    arrays = {name: flatten(result) for name, result in typed.items()}
    comparisons, tables, stale = finished(study)
    found = {type(result): result for result in typed.values()}
    results = Results(study.steps, arrays, tables, comparisons, study.settings.induction_length, found)
    told = findings(summary, results)
    source = read_json(run.activations("train") / "manifest.json")["source"]
    return PageData(
        title="Features over training",
        subtitle=(
            f"{source['model']}, residual stream after block {source['layer']}, "
            f"{study.snapshots.n_snapshots} snapshots, {study.folded.config.n_features:,} features"
        ),
        sentences=[one.sentence for one in told] + [task_finding(record) for _, record in studied],
        steps=[int(step) for step in study.steps],
        facts=_facts(summary, study),
        settings=_settings(run),
        notes=_notes(run, summary, source["model"]) + stale,
        figures=_figures(summary, arrays),
        features=_features(study, arrays),
        tables=analysis_tables(results),
        leads=leads(told) | {f"Behaviour: {record['task']}": task_finding(record) for _, record in studied},
        marks=_marks(run, source["model"]),
        tasks=[_task(folder, record, study) for folder, record in studied],
    )


def _task(folder: Path, record: Mapping[str, Any], study: Study) -> TaskResult:
    """The results of a task's attribution study. Raises `DataError` for one of other snapshots."""
    figures, found = record["figures"], load_circuit(folder)
    revisions = list(study.snapshots.revisions)
    if list(figures["clean_accuracy"]) != revisions:
        raise DataError(
            f"{folder} is of other snapshots than the run; run again: crosscoder attribute {study.run.path} "
            f"--task {record['task']}"
        )
    metric = record["settings"]["metric"]
    curves = read_table(folder / "curves.parquet", "run crosscoder attribute again with --no-resume")
    if curves:
        curves["snapshot"] = np.array([revisions.index(name) for name in curves["snapshot"]])
    return TaskResult(
        name=record["task"],
        note=record["note"],
        metric=metric,
        n_prompts=record["n_prompts"],
        accuracy=np.array(list(figures["clean_accuracy"].values())),
        clean=np.array(list(figures[metric.replace("-", "_")].values())),
        corrupted=np.array(list(figures["corrupted_metric"].values())),
        above_chance=np.isin(revisions, figures["above_chance"]),
        features=found.features,
        emergence=found.emergence,
        attribution=found.attribution,
        share=found.share,
        relative_effect=found.relative_effect,
        relative_norm=found.relative_norm,
        dominant=found.dominant,
        fidelity=figures["rank_correlation_with_exact"],
        n_exact=figures["n_exact"],
        completeness_error=figures["ig_completeness_error"],
        curves=curves,
    )


def _facts(summary: Mapping[str, Any], study: Study) -> list[Fact]:
    config = study.folded.config
    heldout = f"on {summary['n_heldout_tokens']:,} tokens of held-out documents"
    return [
        Fact("Explained variance", f"{summary['explained_variance']['overall']:.3f}", f"1 − ΣSSE/ΣSST {heldout}"),
        Fact("L0", f"{summary['l0']['mean']:.1f}", "active features a token and snapshot, mean"),
        Fact("L0, union", f"{summary['l0']['union']:.1f}", "features active at one snapshot or more, a token"),
        Fact("Dead features", f"{summary['dead_fraction']:.1%}", "silent over the last tokens of training"),
        Fact("Features", f"{config.n_features:,}", "size of the dictionary, F"),
        Fact("Snapshots", f"{config.n_snapshots}", f"of width {config.d_model}"),
        Fact("Training tokens", f"{summary['n_train_tokens']:,}", "distinct tokens that the crosscoder trained on"),
        Fact("Model loss", f"{summary['model_loss']:.2f} nats", "the last snapshot's, a token, on held-out documents"),
        Fact("Bigram entropy", f"{summary['bigram_entropy']:.2f} nats", "Kneser–Ney bigram model, same tokens"),
        Fact("Induction gap", f"{summary['induction_gap']:.2f} nats", "last snapshot; random tokens, repeated"),
    ]


def _settings(run: Run) -> dict[str, Any]:
    import yaml

    files = sorted((run.path / "config").glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files if file.stem != "report"}


def _notes(run: Run, summary: Mapping[str, Any], model: str) -> list[str]:
    notes = [
        "Kinds, emergence and lifetime depend on the presence threshold "
        f"τ = {summary['presence_threshold']:g}, a choice of ours; the figure “{THRESHOLDS}” shows others.",
        "A decoder norm near 0 says that the crosscoder does not use a feature at a snapshot; the sparsity penalty can "
        "push norms to 0 where a weak version of the feature exists.",
    ]
    training = run.path / "language_model" / "training.json"
    if training.exists():
        recipe = read_json(training)["config"]
        notes.append(
            f"The language model is small and saw little text. {recipe['repeat_fraction']:.0%} of its first and "
            f"{recipe['late_repeat_fraction']:.0%} of its later training sequences were a window of real text said "
            "again and again, and its heads begin by attending to near tokens: without, induction would not form so "
            "early."
        )
        notes.append(
            f"Its learning rate rises over the first {recipe['warmup_steps']} steps and its sequences grow longer at "
            f"step {recipe['short_steps']} (dotted in the figures): turning points near these may have to do with them "
            "as well."
        )
    elif "pythia" in model.lower():
        notes.append(
            f"Pythia's learning rate rises until step {PYTHIA_WARMUP:,} (dotted in the figures), close to where the "
            "paper sees features turn: what happens near it may have to do with it as well."
        )
    return notes


PYTHIA_WARMUP = 1_430
"""The step at which the learning rate of the Pythia models reaches its maximum: 1 % of their 143,000 steps."""


def _marks(run: Run, model: str) -> list[StepMark]:
    """Steps of the language model's training at which something else happens, where they are known."""
    training = run.path / "language_model" / "training.json"
    if training.exists():
        recipe = read_json(training)["config"]
        return [
            StepMark(recipe["warmup_steps"], "warm-up ends"),
            StepMark(recipe["short_steps"], "longer sequences"),
        ]
    return [StepMark(PYTHIA_WARMUP, "warm-up ends")] if "pythia" in model.lower() else []


def _figures(summary: Mapping[str, Any], results: Mapping[str, Arrays]) -> Figures:
    rotation, life, ngrams = results["rotation"], results["life"], results["ngrams"]
    explained, turning = summary["explained_variance"], turning_figures(rotation)
    return Figures(
        explained_variance=np.array(list(explained["mean_of_ratios_by_snapshot"].values())),
        explained_variance_total=np.array(list(explained["by_snapshot"].values())),
        l0=np.array(list(summary["l0"]["by_snapshot"].values())),
        cosines=Cosines(
            mean=rotation["overall.mean"],
            quantiles=rotation["overall.quantiles"],
            levels=tuple(float(level) for level in rotation["levels"]),
            n_features=rotation["overall.counts"],
            null=rotation["turning_point.null_mean"],
            by_kind={
                kind: rotation[f"by_mask.{kind}.mean"]
                for kind in SHOWN_KINDS
                if rotation[f"by_mask.{kind}.counts"].any()
            },
        ),
        turning_point=TurningPoint(
            step=turning["step"],
            low=turning["step_low"],
            high=turning["step_high"],
            level=turning["level"],
            sharp=is_sharp(turning),
        ),
        births=life["cycles.births"],
        deaths=life["cycles.deaths"],
        dimensionality=results["dimensionality"]["rate"],
        dimensionality_by_kind=_dimensions(results["dimensionality"]),
        kl_unigram=ngrams["curves.kl_unigram"],
        kl_bigram=ngrams["curves.kl_bigram"],
        kl_bigram_corrected=_corrected(ngrams),
        kl_bigram_row=ngrams["curves.kl_bigram_each"],
        model_loss=ngrams["curves.loss"],
        entropies={
            "uniform (ln V)": float(ngrams["entropies.uniform"]),
            "unigram": float(ngrams["entropies.unigram"]),
            "bigram (Kneser–Ney)": float(ngrams["entropies.bigram"]),
            "bigram (counts, corrected)": float(ngrams["entropies.bigram_corrected"]),
        },
        induction_gap=results["induction"]["gap"],
    )


def _corrected(ngrams: Arrays) -> np.ndarray | None:
    """(K,) the bigram KL less the sampling bias of the counts. Results from before it was saved have that bias for all
    rows together in their entropies: the same where (nearly) all rows are tracked, and not known where they are not."""
    if "curves.kl_bigram_corrected" in ngrams:
        return ngrams["curves.kl_bigram_corrected"]
    if ngrams["curves.coverage"] < 0.99:
        return None
    bias = ngrams["entropies.bigram_corrected"] - ngrams["entropies.bigram_plugin"]
    return np.asarray(ngrams["curves.kl_bigram"] - bias)


def _dimensions(found: Arrays) -> dict[str, np.ndarray]:
    """Curves beside the total: by kind, and what random directions with the same norms would have."""
    curves = {kind: found[f"rate_by_mask.{kind}"] for kind in SHOWN_KINDS}
    return curves | ({"random directions": found["null_rate"]} if "null_rate" in found else {})


def _features(study: Study, results: Mapping[str, Arrays]) -> Features:
    life, examples, neighbours = results["life"], results["examples"], results["neighbours"]
    return Features(
        norms=life["cycles.relative"],
        max_norm=life["norms"].max(axis=1),
        kind=life["cycles.kind"],
        kind_names=KIND_NAMES,
        emergence=life["cycles.emergence"],
        peak=life["cycles.peak"],
        lifetime=life["cycles.lifetime"],
        firing_rate=examples["firing_rate"],
        max_activation=examples["max_activation"],
        neighbours=neighbours["features"],
        neighbour_cosines=neighbours["cosines"],
        neighbour_note="cosine of the decoder directions over all snapshots together",
        presence_threshold=study.settings.tau,
        revived=life["cycles.revived"],
        contexts=_contexts(study, examples),
    )


def _contexts(study: Study, examples: Arrays) -> Contexts:
    tokenizer = study.snapshots.load_tokenizer()
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return Contexts(
        feature=examples["contexts.feature"],
        tokens=examples["contexts.tokens"],
        activations=examples["contexts.activations"],
        vocabulary=[byte_level_text(piece) for piece in pieces],
        document=examples["contexts.document"],
        documents=TokenSet.load(study.run.tokens("train")).names,
        position=examples["contexts.position"],
    )
