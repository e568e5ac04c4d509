"""From a run's results to what the page shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from crosscoder.activations.alike import describe, recorded
from crosscoder.activations.tokens import TokenSet
from crosscoder.activations.trunk import SITES
from crosscoder.attribution.figures import part as task_part
from crosscoder.attribution.finished import finished_tasks
from crosscoder.common.byte_text import Vocabulary
from crosscoder.configfile import read_options
from crosscoder.errors import DataError
from crosscoder.evolution import comparison_figures
from crosscoder.evolution.analyses import analyses
from crosscoder.evolution.study import Study
from crosscoder.explain import figures as explanation_figures
from crosscoder.figures.results import Part, Results
from crosscoder.files import read_json
from crosscoder.report import evaluation, language_model
from crosscoder.report.data import PageData
from crosscoder.report.features import features_of
from crosscoder.report.finished import finished
from crosscoder.runs import Run
from crosscoder.sweep import figures as sweep_figures


def parts() -> list[Part[Any]]:
    """All that a page may have, in its order: the analyses' parts in theirs, then those of other verbs."""
    others: list[Part[Any]] = [explanation_figures.PART, comparison_figures.PART, evaluation.PART, sweep_figures.PART]
    return [*(one.page for one in analyses() if one.page is not None), *others]


def _sections(shown: Iterable[Part[Any]]) -> dict[str, list[Part[Any]]]:
    """Section -> its parts. Sections stand in the order of their first parts."""
    by_section: dict[str, list[Part[Any]]] = {}
    for part in shown:
        by_section.setdefault(part.section, []).append(part)
    return by_section


def findings(results: Results, shown: Iterable[Part[Any]]) -> dict[str, list[str]]:
    """Section -> its sentences, in the order of the page; a section without any is left out."""
    told = {
        section: [sentence for part in of_section for sentence in part.found(results)]
        for section, of_section in _sections(shown).items()
    }
    return {section: sentences for section, sentences in told.items() if sentences}


def page_of(results: Results, shown: Sequence[Part[Any]], **more: Any) -> PageData:
    """The page of what was found: each of the parts `shown` as far as the results go; `more`: fields of `PageData`."""
    told = findings(results, shown)
    in_order = [part for of_section in _sections(shown).values() for part in of_section]
    return PageData(
        title="Features over training",
        steps=[int(step) for step in results.steps],
        sentences=[sentence for sentences in told.values() for sentence in sentences],
        leads={section: " ".join(sentences) for section, sentences in told.items()},
        tables=[table for part in in_order for table in part.tables(results)],
        **more,
    )


def assemble(run: Run, device: torch.device | str = "cpu") -> PageData:
    """The page of a run; `device`: where an analysis is brought up to date.

    Raises `DataError` with the remedy where a result is missing.
    """
    summary = evaluation.require(run)
    study = Study.of(run, device)
    analysed = _analysed(study)
    tasks = finished_tasks(run, study.snapshots.revisions)
    others, stale = finished(study)
    config = study.folded.config
    measured = evaluation.Evaluated(summary, config.n_features, config.n_snapshots, config.d_model)
    vocabulary = Vocabulary.of(study.snapshots.load_tokenizer())
    results = Results(study.steps, [*analysed, *others, measured, vocabulary, study.settings])
    shown = [*parts(), *map(task_part, tasks)]
    source = read_json(run.activations("train") / "manifest.json")["source"]
    # what the crosscoder is, before what was found with it
    told = [evaluation.PART, *(part for part in shown if part is not evaluation.PART)]
    return page_of(
        results,
        shown,
        subtitle=(
            f"{source['model']}, block {source['layer']} ({SITES[study.snapshots.site]}), "
            f"{study.snapshots.n_snapshots} snapshots, {config.n_features:,} features"
        ),
        facts=[fact for part in told for fact in part.tiles(results)],
        settings=_settings(run),
        notes=[
            *(note for part in shown for note in part.caveats(results)),
            *alike_notes(read_json(run.snapshots_file)),
            *language_model.notes(run, source["model"]),
            *stale,
        ],
        features=features_of(results, TokenSet.load(run.tokens("train")).names),
        marks=language_model.marks(run, source["model"]),
    )


def alike_notes(record: Mapping[str, Any]) -> list[str]:
    """From a run's `snapshots.json`: which of its snapshots are equal, or nearly, and what follows."""
    return [
        f"The snapshots {sentence}: nothing is born or dies between them." for sentence in describe(recorded(record))
    ]


def _analysed(study: Study) -> Sequence[object]:
    """The results of all analyses that are there; required ones are brought up to date."""
    found: list[object] = []
    for analysis in analyses():
        if analysis.required and not (study.run.evolution / f"{analysis.name}.npz").exists():
            raise DataError(f"{study.run.path} lacks results; run first: crosscoder evolve {study.run.path}")
        result = study.result(analysis) if analysis.required else study.finished(analysis)
        found += [] if result is None else [result]
    return found


def _settings(run: Run) -> dict[str, Any]:
    files = sorted((run.path / "config").glob("*.yaml"))
    return {file.stem: read_options(file, record=True) for file in files if file.stem != "report"}
