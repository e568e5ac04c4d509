"""What computes: one protocol (`base.py`), three backends, and the choice between them.

`README.md` says what is held against what. `crosscoder.registry.register` adds a backend of your own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crosscoder.errors import ConfigError
from crosscoder.registry import AUTO, automatic_names, check_name, load

if TYPE_CHECKING:
    from crosscoder.backends.base import Backend
    from crosscoder.parameters import Weights


def choose(name: str, weights: Weights, candidates: str = "exact") -> str:
    """The name of the backend that computes with `weights`: the one check that every call and the trainer go through.

    "auto" is native on a CPU and triton on a CUDA device for float32 and bfloat16 weights (after what was registered as
    automatic), and the reference for other dtypes. Only the backends up to the first that fits are loaded, and one that
    cannot be loaded does not fit. Where CUDA weights are left to the reference, a warning says why. Raises
    `ConfigError` with the reason and the remedy: an unknown backend, one that does not fit the weights, candidates
    that it does not have, weights that no kernel could read (of two dtypes or devices, or not contiguous).
    """
    check_name(name)
    if name != "reference":
        _require_plain(weights)
    if name == AUTO:
        name = _automatic(weights)
    else:
        reason = load(name).fits(weights)
        if reason is not None:
            raise ConfigError(f'backend "{name}" {reason}; use "auto"')
    known: tuple[str, ...] = load(name).candidates
    if candidates not in known:
        if candidates not in ("exact", "int8"):
            raise ConfigError(f"candidates must be one of exact, int8, not {candidates!r}")
        raise ConfigError(
            f'backend "{name}" has no candidates "{candidates}", only {", ".join(known)}; '
            f'leave candidates at "exact", or use backend "native" (float32 or bfloat16 weights on a CPU)'
        )
    return name


def make(name: str) -> Backend:
    """A new backend, which keeps what it derives from one crosscoder's weights."""
    backend: Backend = load(name)()
    return backend


def _require_plain(weights: Weights) -> None:
    """Raises `ConfigError` for W_enc and W_dec that kernels would misread."""
    W_enc, W_dec = weights.W_enc, weights.W_dec
    if (W_enc.dtype, W_enc.device) != (W_dec.dtype, W_dec.device):
        raise ConfigError(
            f"W_enc is {W_enc.dtype} on {W_enc.device}, W_dec {W_dec.dtype} on {W_dec.device}; "
            "bring the whole crosscoder to one: model.to(...)"
        )
    for name in ("W_enc", "W_dec"):
        if not getattr(weights, name).is_contiguous():
            raise ConfigError(
                f"{name} is not contiguous in memory; model.{name}.data = model.{name}.data.contiguous(), or use "
                'backend="reference"'
            )


def _automatic(weights: Weights) -> str:
    """The first of the automatic backends that fits. One that cannot be loaded does not fit."""
    reasons = {}
    for name in automatic_names():
        reason = _misfit(name, weights)
        if reason is None:
            return name
        reasons[name] = reason
    if weights.W_enc.device.type == "cuda" and str(weights.W_enc.dtype) in ("torch.float32", "torch.bfloat16"):
        from crosscoder.progress import warn

        reasons.pop("native", None)  # that it is for a CPU is no news
        why = "; ".join(f'backend "{name}" {reason}' for name, reason in reasons.items())
        warn(f"{why}; going on in dense torch, which is slower and needs more memory")
    return "reference"


def _misfit(name: str, weights: Weights) -> str | None:
    """Why backend `name` cannot compute with `weights`; None if it can."""
    try:
        reason: str | None = load(name).fits(weights)
    except ConfigError as error:
        return str(error).removeprefix(f'backend "{name}" ')
    return reason
