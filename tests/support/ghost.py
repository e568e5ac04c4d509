"""A ghost of a GPU: tensors that say they are on "cuda", behave there as a GPU's do, and are computed on the CPU.

Real values, so whole trainings and analyses run to their end, and must give what they give on the CPU. Watched:

- an operation on tensors of two devices raises, as on a GPU (torch's exceptions to the rule are allowed);
- a value that the host reads, and whatever else makes the host wait for the device, is noted with its place;
- an operation whose result on a GPU depends on the order of its threads is noted;
- a Triton kernel gets tensors of one device, contiguous, a grid within CUDA's limits; the interpreter runs it.

What a ghost does not tell: speed, memory (`support.ghost_memory`), rounding of another device, races.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.ghost_guard import current_device, missing, set_device, turned_on
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
GRID_LIMITS = (2**31 - 1, 65_535, 65_535)
PACKAGE = Path(__file__).parents[2]
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
"""What gives the host a value."""
SHAPED_BY_VALUES = {
    "nonzero", "nonzero_static", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount",
    "_linalg_eigh", "linalg_eigh", "_linalg_svd", "linalg_lstsq", "linalg_inv_ex", "_linalg_solve_ex",
}  # fmt: skip
"""Where the host waits for the size or the success of the result."""
DEPENDS_ON_THREADS = {
    "index_add_",
    "index_add",
    "scatter_add_",
    "scatter_add",
    "_embedding_bag_dense_backward",
    "histc",
}
"""Float sums in the order in which threads come (torch's own list: torch.use_deterministic_algorithms)."""
MAY_MIX = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "set_", "lift_fresh"}


@dataclass
class Watch:
    """What was seen."""

    waits: Counter[str] = field(default_factory=Counter)
    """"operation @ file:function" -> how often the host waited there."""
    unordered: Counter[str] = field(default_factory=Counter)
    """The same of operations whose result depends on the order of threads."""
    launches: Counter[str] = field(default_factory=Counter)
    """Kernels by name."""
    largest: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    """Place -> elements and shape of the largest tensor made there."""

    def clear(self) -> None:
        for counter in (self.waits, self.unordered, self.launches, self.largest):
            counter.clear()

    def waited(self) -> dict[str, int]:
        """Where the host waited, and how often."""
        return dict(sorted(self.waits.items()))


def _place() -> str:
    """The innermost function of this package that is under way."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        inside = path.is_relative_to(PACKAGE) and not path.is_relative_to(PACKAGE / "tests" / "support")
        if inside and ".venv" not in path.parts:
            return f"{path.relative_to(PACKAGE)}:{frame.name}".removeprefix("python/crosscoder/")
    return "outside"


class Ghost(Tensor):
    """A tensor on "cuda:N" whose values lie in `inner`, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Ghost:
        assert type(inner) is Tensor, type(inner)
        strided = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), dtype=inner.dtype, layout=inner.layout, device=device,
            **(strided if inner.layout == torch.strided else {}),
        )  # fmt: skip
        self.inner = inner
        return self  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].inner = args[1].inner
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        if func is Tensor.data_ptr:  # of the host: nobody may use it, but it tells one tensor from another
            return args[0].inner.data_ptr()
        if func is Tensor.is_pinned:
            return False
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"a ghost outside of its machine: {func}")

    def record_stream(self, stream: Any) -> None:
        """Nothing: the memory is the host's."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Ghost({tuple(self.shape)}, {self.dtype}, {self.device})"


class Machine(TorchDispatchMode):
    """While it is on, "cuda" is a ghost."""

    def __init__(self, n_devices: int = 1) -> None:
        super().__init__()
        self.n_devices = n_devices
        self.watch = Watch()
        self.pinned: set[int] = set()
        """Addresses of pinned memory."""

    @property
    def device_now(self) -> int:
        """CUDA's current device in this thread."""
        return current_device()

    # ------------------------------------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func._can_decompose() and torch.is_inference_mode_enabled():  # else autograd has taken it apart
            with self:
                return func.decompose(*args, **kwargs)
        flat, _ = tree_flatten((args, kwargs))
        ghosts = [value for value in flat if isinstance(value, Ghost)]
        name = func._schema.name.removeprefix("aten::")
        asked = kwargs.get("device")
        target = torch.device(asked) if asked is not None else None
        if func is aten.is_pinned.default:
            return not ghosts and args[0].untyped_storage().data_ptr() in self.pinned
        if name in ("pin_memory", "_pin_memory"):
            assert not ghosts, "pinned memory is the host's"
            return self._pin(args[0].clone())
        if not ghosts and (target is None or target.type != "cuda"):
            pin = kwargs.pop("pin_memory", False)
            found = func(*args, **kwargs)
            return self._pin(found) if pin else found

        device = self._device(name, ghosts, flat, target)
        self._note(func, name, ghosts, flat, args, kwargs, target)
        if target is not None and target.type == "cuda":
            kwargs["device"] = torch.device("cpu")
            kwargs.pop("pin_memory", None)
        if name in ("_to_copy", "copy_"):
            kwargs.pop("non_blocking", None)
        wrappers = {id(ghost.inner): ghost for ghost in ghosts}

        def wrap(value: Any) -> Any:
            if type(value) is not Tensor:
                return value
            return wrappers[id(value)] if id(value) in wrappers else Ghost(value, device)

        if func in (aten.mm.dtype, aten.bmm.dtype):  # products with sums in another dtype: only a GPU has them
            a, b, dtype = (_inner(value) for value in args)
            found = a.to(dtype) @ b.to(dtype)
        else:
            found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if target is not None and target.type == "cpu":
            return found
        if name == "copy_" and not isinstance(args[0], Ghost):
            return args[0]
        found = tree_map(wrap, found)
        for value in tree_flatten(found)[0]:
            if isinstance(value, Ghost):
                place = _place() if value.numel() > 1 << 12 else ""
                if place and value.numel() > self.watch.largest.get(place, (0,))[0]:
                    self.watch.largest[place] = value.numel(), tuple(value.shape)
        return found

    def _device(self, name: str, ghosts: list[Ghost], flat: list[Any], target: torch.device | None) -> torch.device:
        """Where the result is. Raises as torch does where the operands are on two devices."""
        if not ghosts:
            assert target is not None
            return torch.device("cuda", self.device_now if target.index is None else target.index)
        devices = {ghost.device for ghost in ghosts}
        plain = [v for v in flat if isinstance(v, Tensor) and not isinstance(v, Ghost) and v.ndim > 0]
        if name not in MAY_MIX and (len(devices) > 1 or plain):
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {name} of {[_told(v) for v in flat if _is(v)]}"
            )
        if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            first = flat[0]
            values = flat[-1] if name == "index" else next(v for v in reversed(flat) if isinstance(v, Tensor))
            if not isinstance(first, Ghost) or (
                name != "index" and isinstance(values, Tensor) and values.ndim and not isinstance(values, Ghost)
            ):
                raise RuntimeError(f"{name}: {[_told(v) for v in flat if _is(v)]}: the indexed tensor is elsewhere")
        if target is not None and target.type == "cuda":
            return torch.device("cuda", self.device_now if target.index is None else target.index)
        return ghosts[0].device

    def _note(
        self, func: Any, name: str, ghosts: list[Ghost], flat: list[Any], args: Any, kwargs: Any, target: Any
    ) -> None:
        """Does the host wait here?"""
        waits = func in READS or name in SHAPED_BY_VALUES
        if name == "repeat_interleave":
            waits = kwargs.get("output_size") is None
        if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            indices = [v for v in flat[1:] if isinstance(v, Tensor)]
            waits = any(v.dtype == torch.bool or not isinstance(v, Ghost) for v in indices[: len(args[1])])
        if name == "_to_copy" and target is not None:
            to_host, from_host = target.type == "cpu", not isinstance(args[0], Ghost)
            ready = kwargs.get("non_blocking", False) and from_host and self._is_pinned(args[0])
            waits = (to_host or from_host) and not ready
        if name == "copy_" and isinstance(args[0], Ghost) != isinstance(args[1], Ghost):
            host = args[1] if isinstance(args[0], Ghost) else args[0]
            ready = (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)) and self._is_pinned(host)
            waits = not ready and not (host.ndim == 0 and isinstance(args[0], Ghost))
        if waits:
            self.watch.waits[f"{name} @ {_place()}"] += 1
        floating = any(isinstance(v, Tensor) and v.is_floating_point() for v in flat)
        summed = name in DEPENDS_ON_THREADS or (
            name in ("index_put_", "_index_put_impl_") and any(v is True for v in flat)
        )
        if name == "bincount" and len(ghosts) > 1:
            summed = True
        if summed and floating:
            self.watch.unordered[f"{name} @ {_place()}"] += 1

    def _pin(self, tensor: Tensor) -> Tensor:
        self.pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() in self.pinned

    # ------------------------------------------------------------------------------------------- kernels

    def launch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Triton's `run`: checks, then the interpreter on the inner tensors."""

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
            name = kernel.fn.__name__
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            devices = {tensor.device for tensor in tensors}
            assert len(devices) == 1 and all(isinstance(t, Ghost) for t in tensors), f"{name}: tensors of {devices}"
            assert next(iter(devices)).index == self.device_now, f"{name}: launched while cuda:{self.device_now} is on"
            for tensor in tensors:
                assert tensor.is_contiguous(), f"{name}: a tensor of strides {tensor.stride()}"
            if not callable(grid):
                sizes = tuple(int(size) for size in grid)
                assert all(0 <= s <= limit for s, limit in zip(sizes, GRID_LIMITS, strict=False)), f"{name}: {sizes}"
                if 0 in sizes:
                    raise AssertionError(f"{name}: an empty grid {sizes} is an error on a GPU")
            self.watch.launches[name] += 1
            with torch.utils._python_dispatch._disable_current_modes():
                return original(
                    kernel, *map(_inner, args), grid=grid, warmup=warmup,
                    **{key: _inner(value) for key, value in kwargs.items()},
                )  # fmt: skip

        return run


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Ghost) else value


def _told(tensor: Tensor) -> str:
    return f"{tensor.device}{list(tensor.shape)}"


class Event:
    """torch.cuda.Event: the ghost has done everything at once, but the host waits where it asks."""

    machine: Machine

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device: int | None = None

    def record(self, stream: Any = None) -> None:
        assert self.device in (None, self.machine.device_now), "an event is recorded on another device than before"
        self.device = self.machine.device_now

    def synchronize(self) -> None:
        self.machine.watch.waits[f"event @ {_place()}"] += 1

    def query(self) -> bool:
        return True


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, device: Any = None, **kwargs: Any) -> None:
        self.device = torch.device(device)

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def ghost_machine(n_devices: int = 1, machine: Machine | None = None) -> Iterator[Machine]:
    """ "cuda" is a ghost inside. Skips the test, saying why, where that cannot be."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    machine = machine or Machine(n_devices)

    class OnDevice:
        def __init__(self, device: Any) -> None:
            index = torch.device(device).index if not isinstance(device, int) else device
            self.index = machine.device_now if index is None else index

        def __enter__(self) -> None:
            self.before = machine.device_now
            set_device(self.index)

        def __exit__(self, *error: Any) -> None:
            set_device(self.before)

    def synchronize(device: Any = None) -> None:
        machine.watch.waits[f"synchronize @ {_place()}"] += 1

    from triton.runtime import interpreter

    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: n_devices,
        "current_device": lambda: machine.device_now,
        "get_device_name": lambda device=None: "a ghost",
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="a ghost", total_memory=80 * 10**9, major=9, minor=0, multi_processor_count=132
        ),
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (80 * 10**9, 80 * 10**9),
        "synchronize": synchronize,
        "Event": type("Event", (Event,), {"machine": machine}),
        "Stream": Stream,
        "current_stream": lambda device=None: Stream("cuda" if device is None else device),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": OnDevice,
        "empty_cache": lambda: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(interpreter.InterpretedFunction, "run", machine.launch(interpreter.InterpretedFunction.run))
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter cannot become a ghost in place
        try:
            torch._C._set_only_lift_cpu_tensors(
                True
            )  # torch.tensor(..., device="cuda"): from the CPU, seen by the mode
            with turned_on(), machine:
                yield machine
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
