"""What callers give: torch tensors or numpy arrays, checked at the door.

Letters: B tokens, K snapshots, D width of one activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscoder.errors import DataError, NonFiniteError

Array = np.ndarray[Any, Any]


def as_tensor(values: Tensor | Array, what: str = "activations") -> Tensor:
    """`values` as a dense tensor; a numpy array's memory is shared where torch can share it (it is never written).

    Raises `DataError` for anything else: lists, sparse tensors, masked arrays, arrays without numbers.
    """
    if isinstance(values, np.ndarray):
        return _from_numpy(values, what)
    if not isinstance(values, Tensor):
        raise DataError(f"{what} must be a torch tensor or a numpy array, not {type(values).__name__}")
    if values.layout != torch.strided:
        raise DataError(f"{what} must be a dense tensor, not {values.layout}; use .to_dense()")
    if values.device.type == "meta":
        raise DataError(f'{what} on the device "meta" have no values')
    if values.is_inference() and torch.is_grad_enabled():  # autograd cannot keep those
        values = values.clone()
    return values.resolve_neg()


def floating(values: Tensor | Array, what: str = "activations") -> Tensor:
    """As `as_tensor`, of floating-point numbers; anything else is a `DataError`."""
    tensor = as_tensor(values, what)
    if not tensor.is_floating_point():
        raise DataError(f"{what} must be floating point, not {tensor.dtype}")
    return tensor


def _from_numpy(values: Array, what: str) -> Tensor:
    if isinstance(values, np.ma.MaskedArray):
        raise DataError(f"{what} must not be masked; use .filled(...), or leave the masked ones out")
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    if not values.flags.writeable or any(stride < 0 for stride in values.strides):
        values = values.copy()
    try:
        return torch.from_numpy(values)
    except TypeError as error:
        raise DataError(f"{what} must be numbers that torch knows, not {values.dtype}") from error


def require_finite(x_BKD: Tensor) -> None:
    """Raises `NonFiniteError` that names the first token and snapshot with a NaN or an infinity. Waits for the device.

    A sum of finite numbers is finite, unless it is too large: then each is looked at.
    """
    if bool(torch.isfinite(x_BKD.detach().sum())):
        return
    bad_BK = ~torch.isfinite(x_BKD.detach()).all(dim=2)
    places = bad_BK.nonzero()
    if not len(places):
        return
    token, k = places[0].tolist()
    raise NonFiniteError(
        f"NaN or infinity in the activations of token {token} at snapshot {k} (both from 0), and in "
        f"{int(bad_BK.any(dim=1).sum())} of {len(x_BKD)} tokens; leave these tokens out, or collect them again"
    )


def with_scale(x_BKD: Tensor, scale_K: Array) -> Tensor:
    """`x_BKD` itself, which remembers that it was multiplied by `scale_K` (K,). Whatever is made of it does not."""
    x_BKD.crosscoder_scale_K = scale_K  # type: ignore[attr-defined]
    return x_BKD


def scale_of(x_BKD: Tensor | Array) -> Array | None:
    """What `with_scale` noted; None where nothing is known."""
    scale_K: Array | None = getattr(x_BKD, "crosscoder_scale_K", None)
    return scale_K


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Under `torch.inference_mode`: as under `torch.no_grad`.

    What is made and kept for the next call, or is watched for writes, must be ordinary tensors.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield
