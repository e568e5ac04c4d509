"""What torch's CPU build lacks to have tensors on "cuda" at all: a device guard for views, and the accelerator's hooks
for autograd. Both are compiled here, doing nothing, once for a torch, and loaded *before* torch, which asks for the
hooks once when it is imported (tests/conftest.py). Off until a test turns them on.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

static bool on = false;

struct CUDAHooks : at::CUDAHooksInterface {  // torch looks for this name
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return on; }
  bool isAvailable() const override { return on; }
  bool isBuilt() const override { return on; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return false; }
  at::DeviceIndex deviceCount() const override { return 2; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
static thread_local DeviceIndex current = 0;

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static Device at(DeviceIndex index) { return Device(c10::DeviceType::CUDA, index); }
  static Stream stream(Device device) { return Stream(Stream::DEFAULT, device.has_index() ? device : at(current)); }
  Device exchangeDevice(Device device) const override {
    Device before = at(current);
    uncheckedSetDevice(device);
    return before;
  }
  Device getDevice() const override { return at(current); }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  Stream getStream(Device device) const noexcept override { return stream(device); }
  Stream getNewStream(Device device, int) const override { return stream(device); }
  Stream exchangeStream(Stream other) const noexcept override { return stream(other.device()); }
  DeviceIndex deviceCount() const noexcept override { return 2; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard);

extern "C" void ghost(int there) { on = there != 0; }
extern "C" int ghost_device() { return current; }
extern "C" void ghost_set_device(int index) { current = index; }
"""
_found: dict[str, ctypes.CDLL | str] = {"guard": "tests/conftest.py has not loaded the device guard"}
"""The library, or why there is none."""


def load() -> None:
    """Compile where it is not there, and load. What fails is told by `missing`, and the tests that need it skip."""
    _found["guard"] = "torch was imported before tests/conftest.py" if "torch" in sys.modules else _library()


def _library() -> ctypes.CDLL | str:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    if not re.search(r"^cuda\b.*= None$", (root / "version.py").read_text(), re.MULTILINE):
        return "torch is built with CUDA, the ghost is for its CPU build"
    try:
        library = _compiled(root)
        ctypes.CDLL(str(root / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        return f"no device guard: {error}"


def _compiled(root: Path) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "crosscoder-tests"
    version = (root / "version.py").read_text()
    library = folder / f"ghost-{hashlib.sha256(f'{SOURCE}{version}{root}'.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("there is no C++ compiler")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        source, made = Path(temporary) / "guard.cpp", Path(temporary) / "guard.so"
        source.write_text(SOURCE)
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{root / 'include'}", str(source)]
        command += ["-o", str(made), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"it does not compile: {done.stderr.strip()[-200:]}")
        made.replace(library)
    return library


def missing() -> str | None:
    """Why there can be no ghost; None: there can."""
    guard = _found["guard"]
    return guard if isinstance(guard, str) else None


@contextlib.contextmanager
def turned_on() -> Iterator[None]:
    """torch believes in CUDA meanwhile."""
    guard = _found["guard"]
    assert not isinstance(guard, str), guard
    guard.ghost(1)
    try:
        yield
    finally:
        guard.ghost(0)


def current_device() -> int:
    """This thread's."""
    guard = _found["guard"]
    assert not isinstance(guard, str), guard
    return int(guard.ghost_device())


def set_device(index: int) -> None:
    """As torch.cuda.set_device; autograd's threads set their own."""
    guard = _found["guard"]
    assert not isinstance(guard, str), guard
    guard.ghost_set_device(index)
