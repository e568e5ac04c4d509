"""Snapshots that are equal, or nearly: some hubs serve one set of weights under several steps.

A feature of such snapshots seems to live, or to be born, where nothing was trained. Letters: K snapshots, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.activations.store import ActivationStore
from crosscoder.progress import warn

NEARLY = 1e-3
"""Snapshots are nearly equal if their activations differ by at most this share of their deviation from the mean."""
_TOKENS = 128


@dataclass(frozen=True)
class Alike:
    """Snapshots whose activations of the same tokens are equal, or nearly."""

    snapshots: tuple[str, ...]
    difference: float
    """Largest root mean square difference of one from the first of them, in root mean square deviations; 0: equal."""

    def to_dict(self) -> dict[str, Any]:
        """For `snapshots.json`."""
        return {"snapshots": list(self.snapshots), "difference": self.difference}


def find_alike(store: ActivationStore) -> list[Alike]:
    """Groups of snapshots of a complete store that are (nearly) equal to their first one, on the first tokens."""
    x_TKD = store.read(0, slice(0, _TOKENS)).double().numpy()
    deviation_K = np.sqrt(np.square(x_TKD - x_TKD.mean(axis=0)).sum(axis=(0, 2)))
    groups: list[list[int]] = []
    differences: list[float] = []
    for k in range(store.n_snapshots):
        for number, group in enumerate(groups):
            first = group[0]
            apart = float(np.sqrt(np.square(x_TKD[:, k] - x_TKD[:, first]).sum()))
            if apart <= NEARLY * max(deviation_K[first], deviation_K[k]):
                group.append(k)
                scale = max(deviation_K[first], deviation_K[k])
                differences[number] = max(differences[number], apart / scale if apart else 0.0)
                break
        else:
            groups.append([k])
            differences.append(0.0)
    names = store.snapshot_names
    return [
        Alike(tuple(names[k] for k in group), difference)
        for group, difference in zip(groups, differences, strict=True)
        if len(group) > 1
    ]


def recorded(record: Mapping[str, Any]) -> list[Alike]:
    """The groups that are in a run's `snapshots.json`."""
    return [Alike(tuple(group["snapshots"]), float(group["difference"])) for group in record.get("alike", ())]


def describe(alike: Sequence[Alike]) -> list[str]:
    """A sentence for each group."""
    return [
        f"{', '.join(group.snapshots)} have "
        + (
            "equal activations"
            if group.difference == 0
            else f"nearly equal activations (within {group.difference:.1e})"
        )
        for group in alike
    ]


def warn_alike(alike: Sequence[Alike]) -> None:
    """A line for each group of snapshots that are (nearly) equal."""
    for sentence in describe(alike):
        warn(
            f"{sentence}, so no feature can be born or die between them; if they are one checkpoint under several "
            "names, name only one of them"
        )
