"""The explanations of a run's features: which are asked about, what is asked, and what comes of it.

`evolution/explanations.parquet` has a row a feature, `evolution/explanations.json` says how it was made and has the
main figures. `evolution/explanations/` holds the answers (`answers.jsonl`, each with its prompt) and the passages.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscoder.common.arrays import load_result, record_beside, save_described
from crosscoder.common.statistics import bootstrap_interval, correlate
from crosscoder.common.tables import Table, read_table, write_table
from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution.analyses.examples import EXAMPLES
from crosscoder.evolution.analyses.life import LIFE
from crosscoder.evolution.strength import KIND_NAMES
from crosscoder.evolution.study import Study
from crosscoder.explain.asking import Answer, Asker, Question
from crosscoder.explain.passages import (
    TOP,
    ChosenEncoder,
    FeatureContexts,
    collect_contexts,
    features_with_contexts,
    scanned_sequences,
    strongest_places,
)
from crosscoder.explain.prompts import PROMPTS, VERSION, explain_prompt, read_explanation, read_passages, scoring_prompt
from crosscoder.explain.scoring import HALF, KINDS, PASSES, Test, Texts, balanced_accuracy, make_test, top_passages
from crosscoder.files import write_json
from crosscoder.progress import Progress

DEFINITION = (
    "explanation, consistency and complexity (1-5) by a language model that reads the 7 strongest passages of 50 "
    "tokens, tokens above 0.7 of the passage's maximum marked (the paper's); features drawn evenly over the snapshots "
    "of emergence (ours); detection and fuzzing with 5 passages of each kind, from other sequences, drawn uniformly "
    "from the tokens where the feature is active; balanced accuracy, 0.7 passes (the paper's); control: another "
    "feature's explanation on the same passages (ours); complexity against log10(1 + step of emergence)"
)
CONTROL = " control"
_CONTEXTS_VERSION = 1
_EXPLANATION_TOKENS, _PASSAGES_TOKENS = 90, 20
"""Length of an answer, for the estimate."""
_PLACEHOLDER = "active on " + "some word " * 20


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked."""

    n_requests: int
    n_cached: int
    tokens_in: int
    tokens_out: int

    @property
    def n_to_ask(self) -> int:
        return self.n_requests - self.n_cached


class ExplanationStudy:
    """The questions about one run's features, and their results."""

    def __init__(self, study: Study, n_features: int, seed: int) -> None:
        self._study, self._n_features, self._seed = study, n_features, seed
        self.folder = study.run.evolution / "explanations"

    @cached_property
    def features(self) -> NDArray[np.int64]:
        """(N,) the features asked about, ascending: as many of each snapshot of emergence as there are, drawn at
        random. With a larger `n_features` the same ones and more. Raises `DataError` where none can be."""
        if self._study.settings.contexts < TOP:
            raise ConfigError(
                f"{TOP} contexts a feature are needed, the run has {self._study.settings.contexts}; run again: "
                f"crosscoder evolve {self._study.run.path} --contexts {TOP + 1}"
            )
        known = features_with_contexts(self._study.result(EXAMPLES).contexts)
        emergence = self._study.result(LIFE).cycles.emergence[known]
        known, emergence = known[emergence >= 0], emergence[emergence >= 0]
        if not len(known):
            raise DataError(f"{self._study.run.path} has no feature that emerges and has {TOP} contexts to explain it")
        return known[stratified_sample(emergence, self._n_features, self._seed)]

    @cached_property
    def contexts(self) -> FeatureContexts:
        """The passages. Kept on disk: computed on another machine they may differ in the last bits, and a mark."""
        study, features = self._study, self.features
        path = self.folder / "contexts.npz"
        rests_on = [_CONTEXTS_VERSION, study.record(EXAMPLES)["of"], features.tolist(), self._seed]
        of = hashlib.sha256(json.dumps(rests_on).encode()).hexdigest()
        if record_beside(path).get("of") == of:
            return load_result(FeatureContexts, path)
        places = strongest_places(study.result(EXAMPLES).contexts, study.train, features)
        scanned = scanned_sequences(study.train.n_sequences, study.train.context, self._seed)
        wanted = np.union1d(scanned, places.sequence)

        encoder = ChosenEncoder(study.folded, features)
        with Progress("passages", len(wanted), "sequences") as progress:
            batches = study.store.whole_sequences(1024, sequences=wanted)
            contexts = collect_contexts(batches, study.train, encoder, places, scanned, self._seed, progress)
        save_described(path, contexts, {"of": of, "n_sequences": len(wanted)})
        return contexts

    @cached_property
    def _tokenizer(self) -> Any:
        return self._study.snapshots.load_tokenizer()

    @cached_property
    def _texts(self) -> Texts:
        return Texts(self._tokenizer, self._study.train.end_of_text)

    @cached_property
    def _tests(self) -> dict[str, list[Test | str]]:
        return {
            kind: [make_test(kind, self.contexts, n, self._texts, self._seed) for n in range(len(self.features))]
            for kind in KINDS
        }

    def explanation_questions(self) -> list[Question]:
        """One a feature."""
        return [
            self._question("explanation", int(feature), explain_prompt(top_passages(self.contexts, n, self._texts)))
            for n, feature in enumerate(self.features)
        ]

    def scoring_questions(self, explanations: Sequence[str | None]) -> dict[tuple[int, str], Question]:
        """By (index of the feature, kind), control included: what can be asked, given the explanations."""
        other = partners([text is not None for text in explanations], self._seed)
        questions = {}
        for n, feature in enumerate(self.features.tolist()):
            for kind in KINDS:
                test = self._tests[kind][n]
                if isinstance(test, str):
                    continue
                for name, source in ((kind, n), (kind + CONTROL, int(other[n]))):
                    text = explanations[source] if source >= 0 and explanations[n] is not None else None
                    if text is not None:
                        questions[n, name] = self._question(name, feature, scoring_prompt(kind, text, test.passages))
        return questions

    def _question(self, kind: str, feature: int, prompt: str) -> Question:
        # Another tokenizer than the endpoint's, but it is here; a byte in four is what large vocabularies come to.
        length = max(len(self._tokenizer.encode(prompt)), len(prompt.encode()) // 4)
        read = read_explanation if kind == "explanation" else lambda text: read_passages(text, 2 * HALF)
        return Question(kind, feature, prompt, read, length)

    def estimate(self, asker: Asker) -> Estimate:
        """Requests that are not answered on disk, and their length. Explanations that are not there yet are taken to
        come, at a typical length."""
        first = self.explanation_questions()
        known = [asker.known(question) for question in first]
        texts = [_PLACEHOLDER if answer is None else _explanation(answer) for answer in known]
        questions = [*first, *self.scoring_questions(texts).values()]
        todo = [question for question in questions if asker.known(question) is None]
        explanations = sum(question.kind == "explanation" for question in todo)
        return Estimate(
            n_requests=len(questions),
            n_cached=len(questions) - len(todo),
            tokens_in=sum(question.tokens_in for question in todo),
            tokens_out=explanations * _EXPLANATION_TOKENS + (len(todo) - explanations) * _PASSAGES_TOKENS,
        )

    def compute(self, asker: Asker) -> dict[str, Any]:
        """Ask everything, write the results, return the main figures. Raises `EndpointError`."""
        explained = asker.ask("explanations", self.explanation_questions())
        questions = self.scoring_questions([_explanation(answer) for answer in explained])
        answers = dict(zip(questions, asker.ask("scores", list(questions.values())), strict=True))
        table = self._table(explained, answers)
        figures = main_figures(table, self._seed)
        model = asker.endpoint.model
        tokens_in, tokens_out = asker.answers.tokens_of(model)
        figures = {
            "model": model,
            "prompt_version": VERSION,
            **figures,
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "cost": asker.spending.cost(tokens_in, tokens_out),
        }
        self._write(table, figures, asker)
        return figures

    @property
    def results(self) -> Path:
        return self.folder.with_suffix(".parquet")

    def _write(self, table: Table, figures: Mapping[str, Any], asker: Asker) -> None:
        described = self.folder.with_suffix(".json")
        described.unlink(missing_ok=True)
        write_table(self.results, table)
        record = {
            "analysis": "explanations",
            "definition": DEFINITION,
            "settings": {"n_features": self._n_features, "seed": self._seed, "max_output": asker.endpoint.max_output},
            "model": asker.endpoint.model,
            "endpoint": asker.endpoint.url,
            "prompt_version": VERSION,
            "prompts": PROMPTS,
            "examples": self._study.record(EXAMPLES)["of"],
            "life": self._study.record(LIFE)["of"],
            "figures": dict(figures),
        }
        write_json(described, record)

    def _table(self, explained: Sequence[Answer], answers: Mapping[tuple[int, str], Answer]) -> Table:
        cycles = self._study.result(LIFE).cycles
        emergence = cycles.emergence[self.features]
        rows: list[dict[str, Any]] = []
        for n, answer in enumerate(explained):
            value = answer.value or {}
            reasons = [] if answer.missing is None else [f"explanation: {answer.missing}"]
            row: dict[str, Any] = {
                "feature": int(self.features[n]),
                "kind": KIND_NAMES[cycles.kind[self.features[n]]],
                "emergence": int(self._study.steps[emergence[n]]),
                "explanation": value.get("explanation", ""),
                "consistency": float(value.get("consistency", math.nan)),
                "complexity": float(value.get("complexity", math.nan)),
            }
            for kind in KINDS:
                test = self._tests[kind][n]
                if isinstance(test, str):
                    reasons.append(f"{kind}: {test}")
                for name in (kind, kind + CONTROL):
                    score = answers.get((n, name), Answer(None, None))
                    row[name.replace(" ", "_")] = (
                        balanced_accuracy(test.truth, score.value)
                        if isinstance(test, Test) and score.value is not None
                        else math.nan
                    )
                    if score.missing is not None:
                        reasons.append(f"{name}: {score.missing}")
            rows.append({**row, "missing": "; ".join(reasons)})
        return {name: [row[name] for row in rows] for name in rows[0]}


def finished_explanations(study: Study) -> Table | None:
    """The explanations on disk if they are of this crosscoder: of the examples and lives that the run has now."""
    path = study.run.evolution / "explanations.parquet"
    record = record_beside(path)
    current = all(record.get(analysis.name) == study.record(analysis)["of"] for analysis in (EXAMPLES, LIFE))
    return read_table(path, "run crosscoder explain again") if current else None


def stratified_sample(stratum: NDArray[np.integer], n: int, seed: int) -> NDArray[np.int64]:
    """Up to `n` indices, ascending, as evenly over the strata as these allow; a smaller sample is part of a larger."""
    rng = np.random.default_rng([seed, 0])
    order = rng.permutation(len(stratum))
    by_stratum = order[np.argsort(stratum[order], kind="stable")]
    sorted_strata = stratum[by_stratum]
    rank = np.arange(len(stratum)) - np.searchsorted(sorted_strata, sorted_strata)
    return np.sort(by_stratum[np.lexsort((rng.random(len(stratum)), rank))[:n]])


def partners(explained: Sequence[bool], seed: int) -> NDArray[np.int64]:
    """(N,) for each feature that is explained another one that is, each used once; -1 where there is none."""
    index = np.random.default_rng([seed, 4]).permutation(np.flatnonzero(explained))
    other = np.full(len(explained), -1, dtype=np.int64)
    if len(index) > 1:
        other[index] = np.roll(index, 1)
    return other


def main_figures(table: Table, seed: int) -> dict[str, Any]:
    """Figures for `summary.json`; None where there are too few values."""
    columns = {name: np.array(values) for name, values in table.items()}
    complexity = columns["complexity"]
    known = ~np.isnan(complexity)
    log_step = np.log10(1.0 + columns["emergence"])
    return {
        "n_features": len(complexity),
        "n_explained": int(known.sum()),
        "n_incomplete": sum(reason != "" for reason in table["missing"]),
        "complexity": _mean(complexity, seed),
        "complexity_counts": {str(grade): int((complexity == grade).sum()) for grade in range(1, 6)},
        "consistency": _mean(columns["consistency"], seed),
        "complexity_and_emergence": _finite(asdict(correlate(complexity, log_step, seed=seed))),
        **{kind: _score(columns[kind], columns[f"{kind}_control"], seed) for kind in KINDS},
    }


def _score(score: NDArray[np.float64], control: NDArray[np.float64], seed: int) -> dict[str, Any]:
    """Over the features that have both the score and its control."""
    both = ~(np.isnan(score) | np.isnan(control))
    score, control = score[both], control[both]
    return {
        "n": len(score),
        "score": _mean(score, seed),
        "control": _mean(control, seed),
        "difference": _mean(score - control, seed),
        "passed": float((score >= PASSES).mean()) if len(score) else None,
        "control_passed": float((control >= PASSES).mean()) if len(score) else None,
    }


def _mean(values: NDArray[np.float64], seed: int) -> dict[str, float | None]:
    values = values[~np.isnan(values)]
    low, high = bootstrap_interval(lambda sample: float(sample.mean()), values, seed=seed)
    mean = float(values.mean()) if len(values) else math.nan
    return _finite({"mean": mean, "low": low, "high": high})


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in figures.items()}


def _explanation(answer: Answer) -> str | None:
    return None if answer.value is None else str(answer.value["explanation"])
