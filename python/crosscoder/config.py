"""What a crosscoder is, how it is trained and studied, as dataclasses. Torch-free, so that `--help` stays fast."""

from __future__ import annotations

import dataclasses
import math
import numbers
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from crosscoder.errors import ConfigError
from crosscoder.registry import check_name, described

MAX_SNAPSHOTS = 64
"""The gates of one (token, feature) pair are the bits of one 64-bit integer."""

GateKind = Literal["snapshot", "shared", "topk", "batchtopk"]
PenaltyKind = Literal["tanh-quad", "tanh", "l1"]
ThresholdMode = Literal["exact", "sampled", "narrow"]
Metric = Literal["logit-difference", "probability-difference"]
Ablation = Literal["mean", "zero", "resample"]
Errors = Literal["kept", "ablated"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _plain_numbers(config: Any) -> None:
    """numpy's numbers become Python's, which JSON takes. Raises `ConfigError` for what is not of the field's type."""
    for name, kind in typing.get_type_hints(type(config)).items():
        kinds, value = typing.get_args(kind) or (kind,), getattr(config, name)
        if value is None and type(None) in kinds:
            continue
        for number, wanted, words in ((int, numbers.Integral, "a whole number"), (float, numbers.Real, "a number")):
            if number in kinds:
                good = isinstance(value, wanted) and not isinstance(value, bool)
                _require(good, f"{name} must be {words}, not {value!r}")
                if not isinstance(value, (int, float)):
                    object.__setattr__(config, name, number(value))


@dataclass(frozen=True)
class _Shape:
    n_snapshots: int
    """K: snapshots (checkpoints of the language model), 1 to 64. K = 1 is a sparse autoencoder."""
    d_model: int
    """D: width of one snapshot's activation."""
    n_features: int
    """F: features, the size of the dictionary."""


@dataclass(frozen=True)
class CrosscoderOptions:
    """What a crosscoder computes, apart from its shape."""

    gate: GateKind = "snapshot"
    """When a feature is on: "snapshot" h n_fk > theta_f for each snapshot k by itself; "shared" h > theta_f for all
    snapshots at once; "topk" the top_k largest of each token; "batchtopk" the B x top_k largest of the batch."""
    penalty: PenaltyKind = "tanh-quad"
    """Sparsity penalty: "tanh-quad" sum_f p_f (1 + p_f / s), "tanh" sum_f p_f, "l1" sum of f n."""
    tanh_scale: float = 4.0
    """c in the smooth firing t = tanh(c f n)."""
    frequency_scale: float = 0.01
    """s: the firing frequency above which "tanh-quad" grows quadratically."""
    threshold_window: float = 0.02
    """eps: width of the straight-through window around the threshold. The paper's is 4, with threshold_mode "exact"."""
    threshold_init: float = 0.1
    """theta at the start. 0 keeps the threshold at 0: a ReLU."""
    threshold_mode: ThresholdMode = "narrow"
    """How the threshold's gradient is computed: exactly, for a window of at most 0.1 whose pairs join the sparse code
    ("narrow": costs next to nothing); for any window on all pairs ("exact": two more dense products in float32), or
    on a fresh random subset of the tokens, scaled up ("sampled")."""
    threshold_sample: float = 0.125
    """Share of the tokens that "sampled" looks at."""
    top_k: int | None = None
    """Active features a token, for the gates "topk" and "batchtopk" (a mean over the batch for the latter)."""

    @property
    def selects_by_rank(self) -> bool:
        """True for the gates that keep the largest values instead of comparing with a learned threshold."""
        return self.gate in ("topk", "batchtopk")


@dataclass(frozen=True)
class CrosscoderConfig(CrosscoderOptions, _Shape):
    """Shape and nonlinearity of a crosscoder (docs/method.md, sections 1 to 3).

    Fields in order: n_snapshots, d_model, n_features, then those of `CrosscoderOptions`.
    """

    def __post_init__(self) -> None:
        _plain_numbers(self)
        _require(
            1 <= self.n_snapshots <= MAX_SNAPSHOTS,
            f"n_snapshots must be 1 to {MAX_SNAPSHOTS}, not {self.n_snapshots}",
        )
        _require(self.d_model >= 1, f"d_model must be at least 1, not {self.d_model}")
        _require(1 <= self.n_features < 2**31, f"n_features must be 1 to 2^31 - 1, not {self.n_features}")
        for name, choices in (("gate", GateKind), ("penalty", PenaltyKind), ("threshold_mode", ThresholdMode)):
            allowed = choices.__args__  # type: ignore[attr-defined]
            value = getattr(self, name)
            _require(value in allowed, f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        for name in ("tanh_scale", "frequency_scale", "threshold_window"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"{name} must be positive, not {value}")
        _require(
            math.isfinite(self.threshold_init) and self.threshold_init >= 0,
            f"threshold_init must be 0 or more, not {self.threshold_init}",
        )
        _require(0 < self.threshold_sample <= 1, f"threshold_sample must be in (0, 1], not {self.threshold_sample}")
        if self.threshold_mode == "narrow":
            _require(
                self.threshold_window <= 0.1,
                f'threshold_mode "narrow" needs a threshold_window of at most 0.1, not {self.threshold_window}; '
                'lower it, or choose "exact"',
            )
        if self.selects_by_rank:
            _require(
                self.top_k is not None and 1 <= self.top_k <= self.n_features,
                f'gate "{self.gate}" needs top_k between 1 and n_features = {self.n_features}, not {self.top_k}',
            )
        else:
            _require(self.top_k is None, f'top_k has no effect with gate "{self.gate}"; leave it out')

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TrainConfig:
    """How a crosscoder is trained (docs/method.md, sections 2, 4 and 6)."""

    n_steps: int = 1_000
    """Steps of training in all."""
    batch_size: int = 2_048
    """B: tokens in a batch."""
    lr: float = 5e-5
    """Adam's learning rate after the warm-up."""
    threshold_lr_factor: float = 0.1
    """Learning rate of log_threshold, as a multiple of lr. As large as lr itself lets thresholds run away."""
    warmup_steps: int = 5_000
    """Steps over which the learning rate rises linearly from 0 (at most a tenth of n_steps)."""
    cooldown_fraction: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to 1/32."""
    sparsity_coefficient: float = 0.3
    """lambda: weight of the sparsity penalty."""
    sparsity_warmup_fraction: float = 0.1
    """Share of the steps over which lambda rises linearly from 0."""
    preactivation_coefficient: float = 0.0
    """lambda_P: weight of the penalty on closed gates that revives dead features; 0 turns it off."""
    revival: Literal["residual", "none"] = "residual"
    """"residual": a dead feature restarts as the residual of a badly reconstructed token; "none": it stays dead."""
    revival_every: int = 250
    """Steps between two revivals, during the first 70 % of training."""
    revival_rate: float = 1e-3
    """A feature that fires on a smaller share of the tokens (mean over about 100 steps) is revived."""
    joining_cosine: float | None = 0.95
    """Before each revival and near the end, two features whose activations have at least this cosine over tokens (or
    less, if their decoders are similar) are joined to one: a feature that turns is else easily learned as two, and
    seems to be born at the turn. Part of revival. None: never (the paper)."""
    dead_after_tokens: int = 10_000_000
    """A feature that has not fired for so many tokens counts as dead in the metrics."""
    seed: int = 0
    """Seed of everything random in training: initialisation, batches, revival, sampling."""
    backend: Annotated[str, Doc(f"What computes the step: {described()}. crosscoder.registry adds your own.")] = "auto"
    optimizer_mode: Literal["lazy", "exact"] = "lazy"
    """"lazy": Adam on the rows of the features that fired, the others wait (their moments decay meanwhile); "exact":
    torch.optim.Adam's step on every parameter at every step."""
    state: Literal["fp32", "low-memory"] = "fp32"
    """Weights and Adam's moments: "fp32", 12 bytes a parameter and 2 for the products; "low-memory", 4 bytes: bf16
    weights with stochastic rounding, 8-bit moments."""
    candidates: Literal["exact", "int8"] = "exact"
    """How the active pairs are looked for: "exact" finds them all; "int8" is faster and is audited while training (the
    metric candidate_recall, at least 0.9999, or the run falls back to "exact" with a warning)."""
    whitening: Literal["snapshots", "none"] = "snapshots"
    """What the encoder reads while it is trained: activations whitened over the snapshots, in which small differences
    between snapshots are learned as fast as what they share ("snapshots"), or as they are ("none", the paper's). The
    trained crosscoder reads them as they are."""
    start: Literal["search", "calibrated"] = "search"
    """Thresholds and decoder norm at the start: "search", the paper's (threshold_init, the norm that reconstructs
    best: half of all features fire at first); "calibrated", thresholds at which about start_l0 fire."""
    start_l0: float = 64.0
    """Active features a token at a calibrated start."""
    clip_norm: float | None = None
    """The gradient is scaled down to this Euclidean norm where it is larger."""
    decoder_norm_limit: float | None = None
    """After each update a feature's largest decoder norm is at most this."""
    checkpoint_every: int | None = 250
    """Steps between two checkpoints; None: by the clock alone."""
    checkpoint_minutes: float = 30.0
    """A checkpoint is also written when so many minutes have passed since the last. On a GPU it is written beside the
    training, and one that comes before the last is written is left out."""
    log_every: int = 10
    """Steps between two lines in metrics.jsonl."""

    def __post_init__(self) -> None:
        _plain_numbers(self)
        for name in (
            "n_steps",
            "batch_size",
            "log_every",
            "revival_every",
            "dead_after_tokens",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        every = self.checkpoint_every
        _require(every is None or every >= 1, f"checkpoint_every must be at least 1, not {every}")
        for name in ("lr", "threshold_lr_factor", "start_l0", "checkpoint_minutes"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"{name} must be positive, not {value}")
        for name in ("sparsity_coefficient", "preactivation_coefficient", "warmup_steps", "revival_rate"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, f"{name} must be 0 or more, not {value}")
        cosine = self.joining_cosine
        _require(cosine is None or 0 < cosine <= 1, f"joining_cosine must lie in (0, 1], not {cosine}")
        for name in ("cooldown_fraction", "sparsity_warmup_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} must be between 0 and 1, not {value}")
        for name in ("clip_norm", "decoder_norm_limit"):
            value = getattr(self, name)
            _require(value is None or (math.isfinite(value) and value > 0), f"{name} must be positive, not {value}")
        check_name(self.backend)
        for name in ("revival", "optimizer_mode", "state", "candidates", "whitening", "start"):
            allowed = typing.get_args(typing.get_type_hints(TrainConfig)[name])
            value = getattr(self, name)
            _require(value in allowed, f"{name} must be one of {', '.join(allowed)}, not {value!r}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class StudySettings:
    """What the definitions of the analyses leave open."""

    tau: float = 0.3
    """A feature is present at a snapshot where its decoder norm is above tau times its own maximum."""
    contexts: int = 8
    """Strongest contexts kept for each feature."""
    samples: int = 32
    """Contexts kept for each feature of a random sample of the tokens where it is active."""
    neighbours: int = 8
    """Neighbours kept for each feature."""
    n_probed: int = 200
    """Features that are probed at every snapshot, as equally many of each kind and emergence as there are."""
    induction_length: int = 50
    """Random tokens in a sequence that is repeated once, to measure induction."""
    positions: int = 64
    """Strongest positions, and randomly chosen active ones, kept for each feature, to tell types and entropies."""
    complexity_features: int = 200
    """Features whose need of context is measured, evenly over the snapshots of emergence."""
    seed: int = 0
    """Seed of samples, bootstrap, nulls and random sequences."""

    def __post_init__(self) -> None:
        _require(0 < self.tau < 1, f"tau must lie between 0 and 1, not {self.tau}")
        least = {"induction_length": 3, "complexity_features": 0, "seed": 0}
        for name in ("contexts", "samples", "neighbours", "n_probed", "positions", *least):
            value, low = getattr(self, name), least.get(name, 1)
            _require(value >= low, f"{name} must be at least {low}, not {value}")


@dataclass(frozen=True)
class AttributionSettings:
    """What the attribution of one task leaves open."""

    n_prompts: int = 200
    """Pairs of prompts, clean and corrupted. Fewer where the word lists or the file have not as many."""
    test_share: float = 0.5
    """Share of the pairs for ablation; features are ranked on the others."""
    metric: Metric = "logit-difference"
    """What a prompt scores: right minus wrong answer, as logits or as probabilities."""
    steps: int = 10
    """Steps of integrated gradients."""
    ablations: tuple[Ablation, ...] = ("mean", "resample")
    """What an ablated feature becomes: its mean over the task's tokens ("mean"), 0 ("zero"), or what it is on the
    corrupted prompt ("resample"). The first gives the main figures."""
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
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        _require(self.n_exact >= 0, f"n_exact must be 0 or more, not {self.n_exact}")
        _require(0 < self.test_share < 1, f"test_share must lie between 0 and 1, not {self.test_share}")
        for name, choices in (("metric", Metric), ("errors", Errors)):
            allowed = choices.__args__  # type: ignore[attr-defined]
            value = getattr(self, name)
            _require(value in allowed, f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        kinds = Ablation.__args__  # type: ignore[attr-defined]
        _require(
            bool(self.ablations)
            and set(self.ablations) <= set(kinds)
            and len(set(self.ablations)) == len(self.ablations),
            f"ablations must be one or more of {', '.join(kinds)}, each once, not {list(self.ablations)}",
        )
