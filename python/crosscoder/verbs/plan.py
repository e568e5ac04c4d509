"""What a run will take: FLOPs, disk, memory and hours, from a store and live, and whether it fits. Nothing is run.

For Pythia nothing is downloaded; for another model only its configuration is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EXAMPLE = "crosscoder plan --model EleutherAI/pythia-6.9b --features 32768 --tokens 800M --gpu h100 --gpus 1"


@dataclass(frozen=True)
class PlanConfig:
    """Options of `crosscoder plan`."""

    features: int
    """F: size of the dictionary."""
    tokens: str
    """Tokens of training, each seen once: 800M, 2.5B, 100000."""
    model: str = "EleutherAI/pythia-160m"
    """A name on the hub, a folder with a config.json, or a preset of crosscoder collect (pythia-160m-paper, ...)."""
    layer: int | None = None
    """0-based block; the paper's for its two models, else the middle one."""
    snapshots: int = 32
    """K."""
    batch_size: int = 2_048
    """B."""
    context: int = 2_048
    """Tokens in a sequence."""
    dtype: Literal["bf16", "fp16", "fp32", "int8", "int4"] = "bf16"
    """How activations are stored."""
    l0: float = 40
    """Active features a token, all snapshots together."""
    gpu: str = "h100"
    """a100-40, a100, h100, h200, b200, l40s or 4090."""
    gpus: int = 1
    """How many of them collect. One trains."""
    mode: Literal["narrow", "sampled", "paper"] = "narrow"
    """The training step: the default's, with sampled thresholds, or the paper's (exact thresholds and Adam)."""


def run(config: PlanConfig) -> int:
    """Print the plan."""
    from crosscoder.activations.manifest import row_bytes, scale_group
    from crosscoder.activations.presets import PRESETS, REVISIONS
    from crosscoder.planning import Plan, layer_of, parse_count, shape_of

    preset = PRESETS.get(config.model)
    model = preset.model if preset else config.model
    shape = shape_of(model)
    layer = config.layer if config.layer is not None else preset.layer if preset else layer_of(model, shape)
    stored = row_bytes(config.dtype, shape.d_model, scale_group(config.dtype, shape.d_model))
    plan = Plan(
        shape=shape,
        layer=layer,
        n_snapshots=len(REVISIONS[preset.revisions]) if preset else config.snapshots,
        n_features=config.features,
        n_tokens=parse_count(config.tokens),
        batch_size=config.batch_size,
        context=config.context,
        bytes_per_value=stored / shape.d_model,
        l0=config.l0,
        gpu=config.gpu,
        gpus=config.gpus,
        mode=config.mode,
    )
    print(
        f"{model}, {plan.n_snapshots} snapshots, layer {layer} of 0 to {shape.n_layers - 1}, width {shape.d_model}; "
        f"{config.gpus} x {config.gpu}\n"
    )
    for title, lines in plan.sections():
        print(title)
        for line in lines:
            print(f"  {line.name:<20} {line.value:>14,.1f} {line.unit:<6} {line.arithmetic}")
    print("\nmemory of one GPU (92 % of it usable)")
    for verdict in plan.verdicts():
        print(f"  {verdict}")
    return 0
