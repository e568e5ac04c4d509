"""The training step around a backend's part: one engine, and what is added where the host runs ahead of the device."""

from __future__ import annotations

from crosscoder.config import TrainConfig
from crosscoder.devices import current
from crosscoder.model import Crosscoder
from crosscoder.train.engines.asynchronous import AsynchronousEngine
from crosscoder.train.engines.engine import Engine


def make_engine(model: Crosscoder, config: TrainConfig) -> Engine:
    """The engine for `model` and the backend that `config` names. Raises `ConfigError` if that does not fit."""
    backend = model.backend(config.backend, config.candidates)
    with current(model.W_enc.device):  # where its events belong
        return (AsynchronousEngine if backend.asynchronous else Engine)(model, config)
