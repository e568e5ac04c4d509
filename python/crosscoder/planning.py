"""The arithmetic of a run: FLOPs, bytes and hours, from the numbers of a configuration. Nothing is loaded or run.

Letters: K snapshots, D width, F features, B tokens in a batch, N tokens in all, C context, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosscoder.activations.presets import PRESETS
from crosscoder.errors import ConfigError, DataError
from crosscoder.step_time import GPUS, MEMORY_SHARE, PRODUCT_SHARE, Gpu, Mode, Step

FORWARD_SHARE = 0.4
"""Share of the peak rate that a language model's forward pass reaches."""
STATE_BYTES = {"fp32": 13.0, "low-memory": 4.04}
"""Bytes a parameter: weight and two moments, and in fp32 the bf16 copy of the encoder's half. No gradient is kept."""
WORK_BYTES = 24
"""Bytes a value of a batch (B, K, D): itself, whitened, in bf16, its residual, and the two batches before it."""
USABLE_MEMORY = 0.92


@dataclass(frozen=True)
class Shape:
    """The numbers of a language model that the arithmetic needs."""

    d_model: int
    n_layers: int
    d_mlp: int
    vocabulary: int
    gated_mlp: bool = False
    kv_share: float = 1.0
    """Key and value heads, as a share of the query heads."""

    @property
    def block_parameters(self) -> float:
        """Weights of the matrices of one block."""
        attention = (2 + 2 * self.kv_share) * self.d_model**2
        return attention + (3 if self.gated_mlp else 2) * self.d_model * self.d_mlp


PYTHIA = {
    f"EleutherAI/pythia-{size}": Shape(d_model, n_layers, 4 * d_model, vocabulary)
    for size, d_model, n_layers, vocabulary in (
        ("14m", 128, 6, 50_304),
        ("31m", 256, 6, 50_304),
        ("70m", 512, 6, 50_304),
        ("160m", 768, 12, 50_304),
        ("410m", 1_024, 24, 50_304),
        ("1b", 2_048, 16, 50_304),
        ("1.4b", 2_048, 24, 50_304),
        ("2.8b", 2_560, 32, 50_304),
        ("6.9b", 4_096, 32, 50_432),
        ("12b", 5_120, 36, 50_688),
    )
}
"""Pythia's sizes, so that planning for them needs no network."""


def shape_of(model: str) -> Shape:
    """The shape of a known Pythia, a folder with a `config.json` (or snapshots that have one), or a hub model.

    Of the last only the configuration is fetched. Raises `DataError` if there is none.
    """
    if model in PYTHIA:
        return PYTHIA[model]
    folder = Path(model)
    if folder.is_dir():
        found = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        model = str(next((path for path in found if (path / "config.json").is_file()), folder))
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(model)
        heads = int(config.num_attention_heads)
        d_model = int(config.hidden_size)
        d_mlp = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * d_model
        return Shape(
            d_model=d_model,
            n_layers=int(config.num_hidden_layers),
            d_mlp=int(d_mlp),
            vocabulary=int(config.vocab_size),
            gated_mlp=config.model_type not in ("gpt_neox", "gpt2"),
            kv_share=int(getattr(config, "num_key_value_heads", None) or heads) / heads,
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot read the configuration of {model}: {reason}") from error


def parse_count(text: str) -> int:
    """Read "800M" as 800,000,000; k, M, B (or G) and T. Raises `ConfigError`."""
    units = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
    digits, unit = (text[:-1], units[text[-1].lower()]) if text and text[-1].lower() in units else (text, 1.0)
    try:
        count = round(float(digits.replace("_", "").replace(",", "")) * unit)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise ConfigError(f"{text!r} is not a number of tokens; write 800M, 2.5B or 100000")
    return count


@dataclass(frozen=True)
class Line:
    """One figure: name, value, unit, and how it comes about."""

    name: str
    value: float
    unit: str
    arithmetic: str


@dataclass(frozen=True)
class Plan:
    """A run on paper."""

    shape: Shape
    layer: int
    n_snapshots: int
    n_features: int
    n_tokens: int
    batch_size: int
    context: int
    bytes_per_value: float
    l0: float
    gpu: str
    gpus: int
    mode: Mode = "narrow"

    def __post_init__(self) -> None:
        for name in ("n_snapshots", "n_features", "n_tokens", "batch_size", "context", "gpus"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.layer < self.shape.n_layers:
            raise ConfigError(f"layer {self.layer} does not exist: the model has layers 0 to {self.shape.n_layers - 1}")
        if self.gpu not in GPUS:
            raise ConfigError(f"gpu must be one of {', '.join(GPUS)}, not {self.gpu!r}")

    # ------------------------------------------------------------------------------------------- sizes

    @property
    def parameters(self) -> float:
        """Of the crosscoder."""
        K, D, F = self.n_snapshots, self.shape.d_model, self.n_features
        return 2.0 * F * K * D + 2 * F + K * D

    @property
    def trunk_parameters(self) -> float:
        """Of one snapshot up to its layer."""
        return self.shape.vocabulary * self.shape.d_model + (self.layer + 1) * self.shape.block_parameters

    @property
    def forward_flop(self) -> float:
        """A token through one snapshot up to its layer."""
        return (self.layer + 1) * (2 * self.shape.block_parameters + 2 * self.context * self.shape.d_model)

    @property
    def product_flop(self) -> float:
        """A token through the encoder."""
        return 2.0 * self.n_snapshots * self.shape.d_model * self.n_features

    def forward_hours(self, flop: float) -> float:
        """Of language models, on all GPUs."""
        return flop / (self.gpus * GPUS[self.gpu].tflops * 1e12 * FORWARD_SHARE) / 3600

    def step(self, state: str) -> Step:
        """A training step, on one GPU."""
        low_memory = state == "low-memory"
        sizes = self.batch_size, self.n_snapshots, self.shape.d_model, self.n_features
        return Step(*sizes, low_memory, self.mode, active=self.l0)

    # ------------------------------------------------------------------------------------------- the page

    def sections(self) -> Iterator[tuple[str, list[Line]]]:
        """Title and figures of each part."""
        K, D, F, B, N = self.n_snapshots, self.shape.d_model, self.n_features, self.batch_size, self.n_tokens
        L, gpu, steps = self.layer + 1, GPUS[self.gpu], self.n_tokens / self.batch_size
        parameters, trunk = self.parameters, self.trunk_parameters
        forward = self.forward_flop * K * N
        window = 2 * 8 * 4_096 * K * D * 2
        yield (
            "the crosscoder",
            [
                Line("parameters", parameters / 1e6, "M", f"2 x {F:,} x {K} x {D} weights, biases and thresholds"),
                Line(
                    "state, fp32",
                    STATE_BYTES["fp32"] * parameters / 1e9,
                    "GB",
                    f"{STATE_BYTES['fp32']:g} bytes a parameter: weight, two moments, bf16 copy of the encoder",
                ),
                Line(
                    "state, low memory",
                    STATE_BYTES["low-memory"] * parameters / 1e9,
                    "GB",
                    f"{STATE_BYTES['low-memory']:g} bytes: bf16 weight, two 8-bit moments and their scales",
                ),
                Line(
                    "work space",
                    WORK_BYTES * B * K * D / 1e9,
                    "GB",
                    f"{WORK_BYTES} bytes for each of {B:,} x {K} x {D} values",
                ),
                Line("steps", steps, "", f"{N:,} tokens / {B:,}"),
            ],
        )
        yield (
            "collecting into a store",
            [
                Line(
                    "activations on disk",
                    N * K * D * self.bytes_per_value / 1e9,
                    "GB",
                    f"{N:,} tokens x {K} x {D} x {self.bytes_per_value:g} bytes",
                ),
                Line("model in memory", 2 * trunk / 1e9, "GB", f"one snapshot to layer {self.layer}, bf16"),
                Line(
                    "forward passes",
                    forward / 1e15,
                    "PFLOP",
                    f"{N:,} x {K} x {L} blocks x (2 x {self.shape.block_parameters / 1e6:,.1f} M weights "
                    f"+ 2 x {self.context:,} x {D} of attention)",
                ),
                Line(
                    "time",
                    self.forward_hours(forward),
                    "h",
                    f"at {FORWARD_SHARE:.0%} of {self.gpus} x {gpu.tflops:g} TFLOP/s",
                ),
            ],
        )
        taken = {state: self.step(state).seconds(gpu) for state in STATE_BYTES}
        yield (
            "training, on one GPU",
            [
                Line("dense step", 5 * self.product_flop * B / 1e12, "TFLOP", f"5 products of 2 x {K} x {D} x {F:,}"),
                Line(
                    "time, dense bf16",
                    steps * self.step("low-memory").dense_seconds(gpu) / 3600,
                    "h",
                    f"at {PRODUCT_SHARE:.0%} of the peak rate, and all weights at {MEMORY_SHARE:.0%} of the memory's",
                ),
                Line("sparse step", self.product_flop * B / 1e12, "TFLOP", "1 product; the rest are active features"),
                *(
                    Line(
                        f"time, {state.replace('-', ' ')} state",
                        steps * seconds / 3600,
                        "h",
                        f"{1e3 * seconds:,.1f} ms a step, modelled: {_parts(self.step(state), gpu)}",
                    )
                    for state, seconds in taken.items()
                ),
                Line(
                    "reading the store",
                    B * K * D * self.bytes_per_value / min(taken.values()) / 1e9,
                    "GB/s",
                    "so that no sparse step waits for the disk",
                ),
            ],
        )
        yield (
            "live, without a store",
            [
                Line("models in memory", 2 * K * trunk / 1e9, "GB", f"{K} snapshots to layer {self.layer}, bf16"),
                Line("shuffle buffer", window / 1e9, "GB", f"two windows of 8 x 4,096 tokens x {K} x {D}, bf16"),
                Line(
                    "forward / encode",
                    self.forward_flop * K / self.product_flop,
                    "x",
                    "work of the snapshots beside that of the one product",
                ),
                Line(
                    "time",
                    steps * min(taken.values()) / 3600 + self.forward_hours(forward),
                    "h",
                    "with the forward passes, the faster state",
                ),
            ],
        )

    def verdicts(self) -> list[str]:
        """What fits into the GPUs' memory."""
        lines = {(title, line.name): line.value for title, group in self.sections() for line in group}
        room = GPUS[self.gpu].memory_gb * USABLE_MEMORY
        work = lines["the crosscoder", "work space"]
        extra = lines["live, without a store", "models in memory"] + lines["live, without a store", "shuffle buffer"]
        result = []
        for state in ("state, fp32", "state, low memory"):
            for what, more in (("from a store", 0.0), ("live", extra)):
                need = lines["the crosscoder", state] + work + more
                fits = "fits" if need <= room else "does not fit"
                result.append(f"training {what}, {state}: {need:,.1f} GB {fits} into {room:,.1f} GB")
        return result


def _parts(step: Step, gpu: Gpu) -> str:
    """The operations that take most of a step, and what they wait for."""
    longest = sorted(step.operations(), key=lambda operation: -operation.seconds(gpu))[:3]
    return ", ".join(f"{one.name} {1e3 * one.seconds(gpu):,.1f} ({one.bound_by(gpu)})" for one in longest)


def layer_of(model: str, shape: Shape) -> int:
    """The paper's layer for its models, else the middle one."""
    known = {preset.model: preset.layer for preset in PRESETS.values()}
    return known.get(model, shape.n_layers // 2)
