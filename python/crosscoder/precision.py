"""The arithmetic that results are made with, whatever torch has been told: float32 products in float32.

`torch.set_float32_matmul_precision("high")`, TF32 flags and autocast are for models that do not mind. Here whitening
takes differences of numbers ten times as large, and gates compare: three digits are too few.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Meanwhile products of float32 numbers are float32's, sums of bf16 products are kept in float32, and autocast is
    off on `device`. Everything is afterwards as it was."""
    flags = torch.backends.cuda.matmul
    sums = flags.allow_bf16_reduced_precision_reduction
    flags.allow_bf16_reduced_precision_reduction = False
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, flags, "allow_bf16_reduced_precision_reduction", sums)
        _refuse_tf32(stack)
        if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _refuse_tf32(stack: contextlib.ExitStack) -> None:
    """torch has two settings for one thing, and refuses to read the older one where only the newer was written."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        newer: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul")]  # noqa: B009 - untyped
        for flags in newer:
            stack.callback(setattr, flags, "fp32_precision", flags.fp32_precision)
            flags.fp32_precision = "ieee"
        return
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
        stack.callback(torch.set_float32_matmul_precision, precision)
