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


@dataclass(frozen=True)
class Gpu:
    """Peak bf16 rate without sparsity, memory, and its bandwidth, as the maker gives them."""

    tflops: float
    memory_gb: float
    memory_tb_per_s: float


GPUS = {
    "a100-40": Gpu(312, 40, 1.56),
    "a100": Gpu(312, 80, 2.04),
    "h100": Gpu(989, 80, 3.35),
    "h200": Gpu(989, 141, 4.8),
    "b200": Gpu(2250, 180, 8.0),
    "l40s": Gpu(362, 48, 0.86),
    "4090": Gpu(165, 24, 1.01),
}
PRODUCT_SHARE = 0.6
"""Share of the peak rate that large matrix products reach."""
FORWARD_SHARE = 0.4
"""The same for a language model's forward pass."""
BANDWIDTH_SHARE = 0.8
"""The same for memory."""
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

    def hours(self, flop: float, share: float) -> float:
        return flop / (self.gpus * GPUS[self.gpu].tflops * 1e12 * share) / 3600

    @property
    def sparse_bytes(self) -> float:
        """Memory traffic of a step beside its product: rows of active features, and the update of the weights."""
        rows = 4 * self.batch_size * self.l0 * self.n_snapshots * self.shape.d_model * 2
        return rows + 2 * 6 * self.parameters

    @property
    def step_seconds(self) -> float:
        """Of the sparse step."""
        product = self.hours(self.product_flop * self.batch_size, PRODUCT_SHARE) * 3600
        bandwidth = self.gpus * GPUS[self.gpu].memory_tb_per_s * 1e12 * BANDWIDTH_SHARE
        return product + self.sparse_bytes / bandwidth

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
                Line("state, fp32", 16 * parameters / 1e9, "GB", "16 bytes a parameter: weight, gradient, two moments"),
                Line("state, low memory", 6 * parameters / 1e9, "GB", "6 bytes: bf16 weight and two 8-bit moments"),
                Line(
                    "work space",
                    (3.0 * B * K * D * 4 + 2.0 * B * F * 4 + B * self.l0 * 16) / 1e9,
                    "GB",
                    f"3 arrays of {B:,} x {K} x {D} and 2 of {B:,} x {F:,}, fp32",
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
                    self.hours(forward, FORWARD_SHARE),
                    "h",
                    f"at {FORWARD_SHARE:.0%} of {self.gpus} x {gpu.tflops:g} TFLOP/s",
                ),
            ],
        )
        dense, product = 5 * self.product_flop * N, self.product_flop * N
        sparse = steps * self.step_seconds / 3600
        yield (
            "training",
            [
                Line("dense step", dense / 1e15, "PFLOP", f"5 products of 2 x {K} x {D} x {F:,} a token"),
                Line("time, dense", self.hours(dense, PRODUCT_SHARE), "h", f"at {PRODUCT_SHARE:.0%} of the peak rate"),
                Line("sparse step", product / 1e15, "PFLOP", "1 product; the rest are rows of active features"),
                Line(
                    "time, sparse",
                    sparse,
                    "h",
                    f"the product and {self.sparse_bytes / 1e9:,.1f} GB a step (L0 {self.l0:g}, weights read and "
                    f"written once) at {BANDWIDTH_SHARE:.0%} of {gpu.memory_tb_per_s:g} TB/s",
                ),
                Line(
                    "reading the store",
                    B * K * D * self.bytes_per_value / self.step_seconds / 1e9,
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
                Line("time, sparse", sparse + self.hours(forward, FORWARD_SHARE), "h", "with the forward passes"),
            ],
        )

    def verdicts(self) -> list[str]:
        """What fits into the GPUs' memory."""
        lines = {(title, line.name): line.value for title, group in self.sections() for line in group}
        room = self.gpus * GPUS[self.gpu].memory_gb * USABLE_MEMORY
        work = lines["the crosscoder", "work space"]
        extra = lines["live, without a store", "models in memory"] + lines["live, without a store", "shuffle buffer"]
        result = []
        for state in ("state, fp32", "state, low memory"):
            for what, more in (("from a store", 0.0), ("live", extra)):
                need = lines["the crosscoder", state] + work + more
                fits = "fits" if need <= room else "does not fit"
                result.append(f"training {what}, {state}: {need:,.1f} GB {fits} into {room:,.1f} GB")
        return result


def layer_of(model: str, shape: Shape) -> int:
    """The paper's layer for its models, else the middle one."""
    known = {preset.model: preset.layer for preset in PRESETS.values()}
    return known.get(model, shape.n_layers // 2)
