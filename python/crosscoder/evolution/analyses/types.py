"""What features respond to, and whether types of features emerge at different times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crosscoder.evolution.analyses.life import LIFE
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


TYPES = Analysis(
    "types",
    version=1,
    section="Feature types",
    definition="type of each feature: single-token, previous-token, induction, context-sensitive (the paper's names) "
    "by rules over its strongest positions and random sequences said twice, with controls, and whether types differ in "
    "emergence (ours)",
    result=TypesResult,
    compute=compute,
    summary=summary,
    settings=("induction_length", "seed"),
    needs=(POSITIONS, LIFE),
)
