"""What a run will take: FLOPs, disk and memory, with the arithmetic shown. Nothing is downloaded or run."""

from __future__ import annotations

from dataclasses import dataclass

EXAMPLE = "crosscoder plan --n-snapshots 32 --d-model 768 --n-features 98304 --n-tokens 800000000"


@dataclass(frozen=True)
class PlanConfig:
    """Options of `crosscoder plan`."""

    n_snapshots: int
    """K."""
    d_model: int
    """D: width of one snapshot's activation."""
    n_features: int
    """F."""
    n_tokens: int
    """Tokens of training (and of the store: each is seen once)."""
    batch_size: int = 2_048
    """B."""
    bytes_per_value: int = 2
    """Size of a stored activation: 2 for bf16 and fp16, 4 for fp32."""


def estimates(config: PlanConfig) -> dict[str, tuple[float, str, str]]:
    """Name -> (value, unit, arithmetic)."""
    K, D, F, B = config.n_snapshots, config.d_model, config.n_features, config.batch_size
    parameters = 2.0 * F * K * D + 2 * F + K * D
    product = 2.0 * B * K * D * F
    steps = config.n_tokens / B
    return {
        "activations on disk": (
            float(config.n_tokens) * K * D * config.bytes_per_value / 1e9,
            "GB",
            f"{config.n_tokens:,} tokens x {K} x {D} x {config.bytes_per_value} bytes",
        ),
        "parameters": (parameters / 1e6, "M", f"2 x {F:,} x {K} x {D} weights, biases and thresholds"),
        "weights and optimiser": (16 * parameters / 1e9, "GB", "16 bytes a parameter: weight, gradient, two moments"),
        "dense work space": (
            (4.0 * B * F * 4 + 3.0 * B * K * D * 4) / 1e9,
            "GB",
            f"about 4 arrays of {B:,} x {F:,} and 3 of {B:,} x {K} x {D}, fp32",
        ),
        "steps": (steps, "", f"{config.n_tokens:,} tokens / {B:,}"),
        "training": (5 * product * steps / 1e15, "PFLOP", f"5 products of 2 x {B:,} x {K} x {D} x {F:,} a step"),
    }


def run(config: PlanConfig) -> int:
    """Print the estimates."""
    from crosscoder.errors import ConfigError

    for name in ("n_snapshots", "d_model", "n_features", "n_tokens", "batch_size", "bytes_per_value"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(config, name)}")
    for name, (value, unit, arithmetic) in estimates(config).items():
        print(f"{name:<22} {value:>14,.1f} {unit:<6} {arithmetic}")
    return 0
