"""Which device a command computes on: decided here, for all of them.

Torch-free until it is asked, so that `--help` stays fast.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from crosscoder.errors import ConfigError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
_F = TypeVar("_F", bound=Callable[..., Any])


def choose(name: str | torch.device = AUTO) -> torch.device:
    """The device called `name`: "auto" (the GPU if there is one, else the CPU), "cpu", "cuda" or "cuda:N".

    Where several processes share a machine (torchrun), "auto" and "cuda" are the GPU of this process's LOCAL_RANK.
    Raises `ConfigError` for another name, and for a GPU that is not there.
    """
    import torch

    found = re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(name))
    if found is None:
        raise ConfigError(f"there is no device {str(name)!r}; name auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if str(name) == "cpu" or (str(name) == AUTO and not count):
        return torch.device("cpu")
    if not count:
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA GPU"
        raise ConfigError(
            f"device {str(name)!r} was asked for, and {built} (crosscoder doctor says what is missing); use cpu"
        )
    if found[1] is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)
    number = int(found[1][1:])
    if number >= count:
        raise ConfigError(f"there is no device cuda:{number}; this machine has {count}, from cuda:0 on")
    return torch.device("cuda", number)


def describe(device: torch.device) -> str:
    """The device and its product's name, for records and the terminal."""
    import torch

    from crosscoder.hardware import cpu_name

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return f"{device} ({name})"


def announced(name: str) -> torch.device:
    """`choose`, said on the terminal: what every command that computes begins with."""
    device = choose(name)
    print(f"device: {describe(device)}")
    return device


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """`device` is CUDA's current one meanwhile: kernels, events and streams go where their tensors are."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on `device`, for which the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def on_own_device(method: _F) -> _F:
    """For a method of an object with a `device`: that is CUDA's current one while it runs."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **more: Any) -> Any:
        with current(self.device):
            return method(self, *args, **more)

    return run  # type: ignore[return-value]


def finish(device: torch.device) -> None:
    """Wait for all that was begun on `device`: what is timed must be done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
