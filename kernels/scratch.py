"""Large buffers that one step after the other uses again: no page faults, and large pages where the system has them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.kernels.arrays import array


class Scratch:
    """Buffers by name, grown when needed. What `take` returned is overwritten after the next `take` of that name."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor, not filled."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != dtype or buffer.numel() < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype)
            _core.prefer_huge_pages(array(buffer))
        return buffer[:size].view(shape)


class NoScratch(Scratch):
    """Fresh memory every time, for what outlives the step."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor of its own, not filled."""
        return torch.empty(shape, dtype=dtype)
