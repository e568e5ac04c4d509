"""From features to behaviour: tasks, attribution, ablation, and how circuits change over training.

One module a subject; docs/attribution.md has the definitions and says which are the paper's (arXiv 2509.17196).
"""

from __future__ import annotations

from crosscoder.attribution.ablation import Ablator, Curves, curves, matched_random
from crosscoder.attribution.coding import CodedTask, PromptActivations, code_task
from crosscoder.attribution.exact import exact_effects
from crosscoder.attribution.gradients import METHODS, PromptAttributions, attribute
from crosscoder.attribution.splice import CutModel, Pairs, SnapshotPrompts, Splice
from crosscoder.attribution.task import Example, Task

__all__ = [
    "METHODS",
    "Ablator",
    "CodedTask",
    "Curves",
    "CutModel",
    "Example",
    "Pairs",
    "PromptActivations",
    "PromptAttributions",
    "SnapshotPrompts",
    "Splice",
    "Task",
    "attribute",
    "code_task",
    "curves",
    "exact_effects",
    "matched_random",
]
