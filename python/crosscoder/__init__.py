"""Crosscoders over the checkpoints of a language model: train them fast, watch features evolve.

`import crosscoder` is cheap: the names below are loaded on first use, and with them torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from crosscoder import attribution as attribution
    from crosscoder import evolution as evolution
    from crosscoder.activations.loader import ActivationLoader as ActivationLoader
    from crosscoder.activations.snapshots import SnapshotSet as SnapshotSet
    from crosscoder.activations.store import ActivationStore as ActivationStore
    from crosscoder.activations.tokens import TokenSet as TokenSet
    from crosscoder.code import SparseCode as SparseCode
    from crosscoder.config import CrosscoderConfig as CrosscoderConfig
    from crosscoder.config import TrainConfig as TrainConfig
    from crosscoder.errors import CrosscoderError as CrosscoderError
    from crosscoder.model import Crosscoder as Crosscoder
    from crosscoder.train.trainer import Trainer as Trainer

_HOMES = {
    "ActivationLoader": "crosscoder.activations.loader",
    "ActivationStore": "crosscoder.activations.store",
    "Crosscoder": "crosscoder.model",
    "CrosscoderConfig": "crosscoder.config",
    "CrosscoderError": "crosscoder.errors",
    "SnapshotSet": "crosscoder.activations.snapshots",
    "SparseCode": "crosscoder.code",
    "TokenSet": "crosscoder.activations.tokens",
    "TrainConfig": "crosscoder.config",
    "Trainer": "crosscoder.train.trainer",
}
_SUBPACKAGES = ("attribution", "evolution")

__all__ = [*sorted(_HOMES), *_SUBPACKAGES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"crosscoder.{name}")
    raise AttributeError(f"module 'crosscoder' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
