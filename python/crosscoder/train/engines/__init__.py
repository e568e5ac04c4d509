"""The ways to compute a training step: dense torch, C++ on a CPU, Triton on a GPU."""

from __future__ import annotations

from crosscoder.config import TrainConfig
from crosscoder.kernels import choose_backend
from crosscoder.model import Crosscoder
from crosscoder.train.engines.base import Engine


def make_engine(model: Crosscoder, config: TrainConfig) -> Engine:
    """The engine that `config.backend` names for `model`. Raises `ConfigError` if it does not fit."""
    match choose_backend(config.backend, model.W_enc):
        case "native":
            from crosscoder.train.engines.native import NativeEngine

            return NativeEngine(model, config)
        case "triton":
            from crosscoder.train.engines.triton import TritonEngine

            return TritonEngine(model, config)
    from crosscoder.train.engines.reference import ReferenceEngine

    return ReferenceEngine(model, config)
