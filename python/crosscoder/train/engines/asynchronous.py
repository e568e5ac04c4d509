"""The engine for a device that runs behind the host: what has to be done so that nobody waits for it.

The number of pairs that may be on is copied to the host while the step goes on; buffers hold four times the last
number. If a batch has more than fits, its update is a no-op on the device, and the engine does the batch again before
anything else: at the end of the step where the last number left less than a factor of two, else at the start of the
next step (`settle`). Where a loss is not finite, this and all later updates are no-ops; `pending_error` tells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.backends.base import Room, StepSettings, StepStatistics, Update
from crosscoder.config import TrainConfig
from crosscoder.devices import on_own_device
from crosscoder.model import Crosscoder
from crosscoder.train.engines.engine import Engine

ROOM = 4
"""Capacity of the buffers, as a multiple of the last number of pairs."""
LEAST_CAPACITY = 4096


class HostCopy:
    """The last value of a device tensor (1,) int64, copied to the host while the device works on."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._host = torch.zeros(1, dtype=torch.int64, pin_memory=cuda)
        self._event = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    def send(self, value: Tensor) -> None:
        self._host.copy_(value, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def wait(self) -> int:
        """The value sent last. Waits for what the device did before `send`, not for what came after it."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._host)

    def peek(self) -> int:
        """The newest value that has arrived."""
        return int(self._host)


@dataclass(frozen=True)
class _Sent:
    """A step whose number of pairs the host does not know yet."""

    x_BKD: Tensor
    settings: StepSettings
    statistics: StepStatistics
    capacity: int


class AsynchronousEngine(Engine):
    """Steps whose outcome the host learns later."""

    def __init__(self, model: Crosscoder, config: TrainConfig) -> None:
        super().__init__(model, config)
        self.device = device = model.W_enc.device
        self.capacity = 0
        """Pairs that the buffers hold."""
        self._last_count: int | None = None
        self._sent: _Sent | None = None
        self._count = HostCopy(device)
        self._fits: Tensor | None = None
        """(1,) bool: do the pairs of the step under way fit the buffers?"""
        self._used = 0
        """The capacity of the step under way."""
        self._first_bad = torch.full((1,), -1, dtype=torch.int64, device=device)
        self._error = HostCopy(device)
        self._error.send(self._first_bad)

    @torch.no_grad()
    @on_own_device
    def step(self, x_BKD: Tensor, settings: StepSettings) -> StepStatistics:
        """Loss, gradients and update for one batch.

        `x_BKD` must not be overwritten before the next step or `settle`. The statistics stay on the device; where the
        batch has to be done again they are written anew in place.
        """
        self.settle()
        x_BKD = self._training.input(self._model.weights(), x_BKD)
        statistics = self._attempt(x_BKD, settings)
        if self._fits is not None:  # the sparse way
            self._sent = _Sent(x_BKD, settings, statistics, self._used)
            if 2 * (self._last_count or 0) > self.capacity:
                self.settle()
        return statistics

    @torch.no_grad()
    @on_own_device
    def settle(self) -> None:
        """Makes sure that the last step is done, and does it again if its pairs did not fit."""
        sent, self._sent = self._sent, None
        if sent is None:
            return
        count = self._count.wait()
        self._last_count = count
        self.capacity = min(self.capacity, 4 * room_for(count))
        if count > sent.capacity:
            self._last_count = None  # so that the next attempt waits for its number
            again = self._attempt(sent.x_BKD, sent.settings)
            for there, value in zip(_tensors(sent.statistics), _tensors(again), strict=True):
                there.copy_(value)

    def pending_error(self, *, wait: bool = False) -> int | None:
        """The first step whose loss was not finite, as far as the host knows by now (or shall `wait` to know)."""
        if wait:
            self.settle()
        first = self._error.wait() if wait else self._error.peek()
        return None if first < 0 else first

    @on_own_device
    def clear_error(self) -> None:
        """Updates take effect again after such a step."""
        self.settle()  # a step that has to be done again is still without effect
        self._first_bad.fill_(-1)
        self._error.send(self._first_bad)
        self._error.wait()

    def _room(self, x_BKD: Tensor) -> Room | None:
        limit = int(self.dense_above * len(x_BKD) * self._model.config.n_features)
        self._fits = None

        def room(found: Tensor) -> int | None:
            self._count.send(found)
            if self._last_count is None or self._last_count > min(self.capacity, limit):
                self._last_count = count = self._count.wait()
                if count > limit:
                    return None
                self.capacity = max(self.capacity, room_for(count))
            self._used = min(self.capacity, limit)
            self._fits = found <= self._used
            return self._used

        return room

    def _update(self, statistics: StepStatistics, settings: StepSettings, *, sparse: bool) -> Update | None:
        """An update that the device takes or leaves. Notes the first step whose loss is not finite."""
        finite = torch.isfinite(statistics.loss.total).reshape(1)
        judged = self._fits if sparse and self._fits is not None else torch.ones_like(finite)
        bad = judged & ~finite & (self._first_bad < 0)
        self._first_bad.copy_(torch.where(bad, settings.number, self._first_bad))
        self._error.send(self._first_bad)
        allowed = (finite & judged & (self._first_bad < 0)).to(torch.int32)
        lazy = self._config.optimizer_mode == "lazy"
        return Update(settings, lazy, self._config.decoder_norm_limit, allowed=allowed)


def room_for(count: int) -> int:
    """Pairs that buffers are made for: a power of two."""
    return max(LEAST_CAPACITY, 1 << max(0, ROOM * count - 1).bit_length())


def _tensors(statistics: StepStatistics) -> Iterator[Tensor]:
    values = [getattr(statistics.loss, field.name) for field in dataclasses.fields(statistics.loss)]
    values += [getattr(statistics, f.name) for f in dataclasses.fields(statistics) if f.name != "loss"]
    return (value for value in values if value is not None)
