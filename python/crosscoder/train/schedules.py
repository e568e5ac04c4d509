"""Learning rate and sparsity coefficient over the steps (docs/method.md, sections 2 and 4)."""

from __future__ import annotations

from crosscoder.config import TrainConfig

FINAL_LR_RATIO = 1 / 32


def lr_factor(config: TrainConfig, step: int) -> float:
    """Multiple of the learning rate at `step` (from 0): linear warm-up, constant, linear cool-down to 1/32."""
    warmup = min(config.warmup_steps, config.n_steps // 10)
    cooldown = round(config.cooldown_fraction * config.n_steps)
    factor = min(1.0, (step + 1) / (warmup + 1))
    left = config.n_steps - step
    if cooldown and left <= cooldown:
        factor *= FINAL_LR_RATIO + (1 - FINAL_LR_RATIO) * (left - 1) / cooldown
    return factor


def sparsity_coefficient(config: TrainConfig, step: int) -> float:
    """lambda at `step`: linear from 0 over the first `sparsity_warmup_fraction` of the steps."""
    ramp = config.sparsity_warmup_fraction * config.n_steps
    return config.sparsity_coefficient * min(1.0, step / ramp if ramp else 1.0)
