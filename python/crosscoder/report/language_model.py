"""What is known of the language model's training that a reader of the figures must know."""

from __future__ import annotations

from typing import NamedTuple

from crosscoder.files import read_json, reading
from crosscoder.report.data import StepMark
from crosscoder.runs import Run

PYTHIA_WARMUP = 1_430
"""The step at which the learning rate of the Pythia models reaches its maximum: 1 % of their 143,000 steps."""


class _Recipe(NamedTuple):
    """How the language model of a quickstart was trained: shares of sequences, and steps."""

    repeat_fraction: float
    late_repeat_fraction: float
    warmup_steps: int
    short_steps: int


def _recipe(run: Run) -> _Recipe | None:
    """None where the language model is not a quickstart's. Raises `DataError` naming a malformed record."""
    training = run.path / "language_model" / "training.json"
    if not training.exists():
        return None
    config = read_json(training, config=dict)["config"]
    with reading(training):
        return _Recipe(
            float(config["repeat_fraction"]),
            float(config["late_repeat_fraction"]),
            int(config["warmup_steps"]),
            int(config["short_steps"]),
        )


def notes(run: Run, model: str) -> list[str]:
    """What may have shaped the figures beside the features."""
    recipe = _recipe(run)
    if recipe is not None:
        return [
            f"The language model is small and saw little text. {recipe.repeat_fraction:.0%} of its first and "
            f"{recipe.late_repeat_fraction:.0%} of its later training sequences were a window of real text said "
            "again and again, and its heads begin by attending to near tokens: without, induction would not form so "
            "early.",
            f"Its learning rate rises over the first {recipe.warmup_steps} steps and its sequences grow longer at "
            f"step {recipe.short_steps} (dotted in the figures): turning points near these may have to do with them "
            "as well.",
        ]
    if "pythia" in model.lower():
        return [
            f"Pythia's learning rate rises until step {PYTHIA_WARMUP:,} (dotted in the figures), close to where the "
            "paper sees features turn: what happens near it may have to do with it as well."
        ]
    return []


def marks(run: Run, model: str) -> list[StepMark]:
    """Steps of the language model's training at which something else happens, where they are known."""
    recipe = _recipe(run)
    if recipe is not None:
        return [StepMark(recipe.warmup_steps, "warm-up ends"), StepMark(recipe.short_steps, "longer sequences")]
    return [StepMark(PYTHIA_WARMUP, "warm-up ends")] if "pythia" in model.lower() else []
