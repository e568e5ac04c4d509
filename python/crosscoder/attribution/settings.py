"""What an attribution study leaves open."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crosscoder.attribution.ablation import Ablation, Errors
from crosscoder.attribution.task import Metric
from crosscoder.errors import ConfigError


@dataclass(frozen=True)
class AttributionSettings:
    """Settings of a study of one task."""

    n_prompts: int = 200
    """Pairs of prompts, clean and corrupted. Fewer where the word lists or the file have not as many."""
    test_share: float = 0.5
    """Share of the pairs for ablation; features are ranked on the others."""
    metric: Metric = "logit-difference"
    """What a prompt scores: right minus wrong answer, as logits or as probabilities."""
    steps: int = 10
    """Steps of integrated gradients."""
    ablation: Ablation = "mean"
    """What an ablated feature becomes: its mean over the task's tokens, 0, or its value on the corrupted prompt."""
    errors: Errors = "kept"
    """Whether the crosscoder's error is kept when features are ablated, or ablated alike."""
    n_exact: int = 100
    """Features whose effect is also measured by ablating each alone: the ground truth of the attributions."""
    n_random: int = 3
    """Matched random sets for each number of features."""
    n_circuit: int = 30
    """Features shown as the circuit."""
    seed: int = 0
    """Seed of prompts, split, random sets and bootstrap."""

    def __post_init__(self) -> None:
        for name in ("n_prompts", "steps", "n_random", "n_circuit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_exact < 0:
            raise ConfigError(f"n_exact must be 0 or more, not {self.n_exact}")
        if not (math.isfinite(self.test_share) and 0 < self.test_share < 1):
            raise ConfigError(f"test_share must lie between 0 and 1, not {self.test_share}")
