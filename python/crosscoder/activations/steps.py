"""The training step in a snapshot's name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from crosscoder.errors import ConfigError

REMEDY = "give the steps with --steps, one for each of --revisions"
_NAMED = re.compile(r"(?:step|checkpoint|ckpt|iteration|iter)s?[-_=]?(\d+)(k?)(?![a-z0-9])", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")


def step_of(name: str) -> int | None:
    """The training step that a snapshot's name carries, None if it carries none that is certain.

    `step1000` (Pythia), `stage1-step1000-tokens3B` (OLMo), `checkpoint-500` (transformers' Trainer), `global_step8`,
    `iter_0005000`, `ckpt_10k`; also a name with one number, at its end (`snapshot3`).
    """
    named = {int(number) * (1000 if thousands else 1) for number, thousands in _NAMED.findall(name)}
    if len(named) == 1:
        return named.pop()
    numbers = _NUMBER.findall(name)
    return int(numbers[0]) if not named and len(numbers) == 1 and name.endswith(numbers[0]) else None


def steps_of(names: Sequence[str], given: Sequence[int] = ()) -> list[int]:
    """The steps of `names`: those `given`, or those that the names carry.

    Raises `ConfigError` where a name carries none, or the steps do not increase (the analyses need time to pass).
    """
    if given and len(given) != len(names):
        raise ConfigError(f"{len(given)} steps for {len(names)} snapshots; {REMEDY}")
    steps: list[int | None] = [*given] if given else [step_of(name) for name in names]
    found: list[int] = []
    for name, step in zip(names, steps, strict=True):
        if step is None:
            raise ConfigError(
                f"the snapshot name {name!r} does not carry its training step (as step1000 does); {REMEDY}"
            )
        if step < 0 or (found and step <= found[-1]):
            raise ConfigError(
                f"snapshot {name} (step {step}) does not come after {names[len(found) - 1]} (step {found[-1]}): name "
                f"the snapshots in the order of training, or {REMEDY}"
                if found
                else f"snapshot {name} has step {step}; a step is 0 or more"
            )
        found.append(step)
    return found
