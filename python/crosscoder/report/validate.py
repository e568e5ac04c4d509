"""Checks of a `PageData` before anything is written; every message names the field and what it must be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from crosscoder.errors import DataError
from crosscoder.figures.table import FigureTable
from crosscoder.report.data import Contexts, Features, PageData


class Must(NamedTuple):
    """What an array must be."""

    axes: str
    """A letter an axis: F features, K snapshots, C kinds, N contexts, L tokens, V vocabulary, M documents, n
    neighbours. A letter has one length throughout."""
    low: float
    high: float | str
    """A letter stands for the last index of such an axis."""
    slack: float = 0.0
    """Of the two ends."""
    whole: bool = False
    """Whether it holds integers."""


FEATURES = {
    "norms": Must("FK", 0, 1, slack=1e-4),
    "firing_rate": Must("FK", 0, 1, slack=1e-6),
    "max_norm": Must("F", 0, math.inf),
    "max_activation": Must("F", 0, math.inf),
    "lifetime": Must("F", 0, 1, slack=1e-6),
    "kind": Must("F", 0, "C", whole=True),
    "emergence": Must("F", -1, "K", whole=True),
    "peak": Must("F", 0, "K", whole=True),
    "neighbours": Must("Fn", -1, "F", whole=True),
    "neighbour_cosines": Must("Fn", -1, 1, slack=1e-3),
}
CONTEXTS = {
    "tokens": Must("NL", -1, "V", whole=True),
    "feature": Must("N", 0, "F", whole=True),
    "activations": Must("NL", 0, math.inf),
    "document": Must("N", -1, "M", whole=True),
    "position": Must("N", -math.inf, math.inf, whole=True),
}


def _check_arrays(group: str, data: Features | Contexts, wanted: Mapping[str, Must], lengths: dict[str, int]) -> None:
    """`lengths`: those known; the others are learned from the first array that has such an axis."""
    for name, must in wanted.items():
        array = getattr(data, name)
        if array is not None:
            _check_array(f"{group}.{name}", np.asarray(array), must, lengths)


def _check_array(name: str, array: np.ndarray[Any, Any], must: Must, lengths: dict[str, int]) -> None:
    if array.ndim == len(must.axes):
        lengths |= {axis: n for axis, n in zip(must.axes, array.shape, strict=True) if axis not in lengths}
    expected = tuple(lengths.get(axis, axis) for axis in must.axes)
    if array.shape != expected:
        raise DataError(f"page: {name} has shape {array.shape}, expected ({', '.join(map(str, expected))})")
    if must.whole and array.dtype.kind not in "iu":
        raise DataError(f"page: {name} has dtype {array.dtype}, expected integers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"page: {name} holds NaN or infinity")
    high = lengths[must.high] - 1 if isinstance(must.high, str) else must.high
    if array.size and (array.min() < must.low - must.slack or array.max() > high + must.slack):
        raise DataError(
            f"page: {name} must lie in [{must.low:g}, {high:g}], but spans [{array.min():g}, {array.max():g}]"
        )


def _texts(name: str, values: Sequence[str]) -> None:
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        raise DataError(f"page: {name} must be a list of strings")


def _check_table(table: FigureTable) -> None:
    if len({len(column) for column in table.columns.values()}) != 1:
        raise DataError(f"page: the columns of the figure {table.key!r} have different lengths")
    for name, column in table.columns.items():
        if any(isinstance(value, float) and not math.isfinite(value) for value in column):
            raise DataError(f"page: the column {name!r} of the figure {table.key!r} holds NaN or infinity")


def _check_maximum(contexts: Contexts, max_activation: Any) -> None:
    """A context stronger than its feature's maximum would be shown clipped."""
    if np.size(contexts.activations) == 0:
        return
    inside = np.where(np.asarray(contexts.tokens) >= 0, np.asarray(contexts.activations), 0)
    largest = np.asarray(max_activation)[np.asarray(contexts.feature)]
    excess = np.flatnonzero(inside.max(axis=1) > largest * 1.01 + 1e-6)
    if excess.size:
        feature = int(np.asarray(contexts.feature)[excess[0]])
        raise DataError(f"page: a context of feature {feature} is stronger than its features.max_activation")


def _check_features(features: Features, n_snapshots: int) -> None:
    if not len(features.norms):
        raise DataError("page: features has no rows; leave it None instead")
    _texts("features.kind_names", features.kind_names)
    lengths = {"K": n_snapshots, "C": len(features.kind_names)}
    _check_arrays("features", features, FEATURES, lengths)
    if (features.neighbours is None) != (features.neighbour_cosines is None):
        raise DataError("page: features.neighbours and features.neighbour_cosines must be given together")
    contexts = features.contexts
    if contexts is not None:
        _texts("contexts.vocabulary", contexts.vocabulary)
        _texts("contexts.documents", contexts.documents)
        lengths |= {"V": len(contexts.vocabulary), "M": len(contexts.documents)}
        _check_arrays("contexts", contexts, CONTEXTS, lengths)
        _check_maximum(contexts, features.max_activation)


def check(data: PageData) -> None:
    """Raise `DataError` with one line naming the field where `data` does not fit together."""
    _texts("sentences", data.sentences)
    _texts("notes", data.notes)
    steps = np.asarray(data.steps)
    if steps.ndim != 1 or steps.size == 0 or steps.dtype.kind not in "iu":
        raise DataError("page: steps must be a list of at least one integer")
    if steps[0] < 0 or (np.diff(steps) <= 0).any():
        raise DataError("page: steps must increase strictly from 0 or more")
    if data.features is not None:
        _check_features(data.features, steps.size)
    for table in data.tables:
        _check_table(table)
    if len({table.key for table in data.tables}) < len(data.tables):
        raise DataError("page: two figures have one key")
