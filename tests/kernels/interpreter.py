"""Where there is no GPU, Triton's interpreter runs the kernels: importing this chooses it, before Triton is loaded."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def _interpret() -> None:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton was imported before its interpreter was chosen; import tests/kernels/interpreter first")
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    patched: set[int] = set()

    def once(function: Any) -> Any:
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            return patch(function)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        once(self.fn)
        return self.rewrite()(*args, **kwargs)

    # Each call of a jit function by another patches triton.language anew, 3 ms every time, though the launch has done
    # so already; once a module is enough, and halves the time of these tests.
    if patch is not None and hasattr(interpreter.InterpretedFunction, "rewrite"):
        interpreter.InterpretedFunction.__call__ = call


if not ON_GPU:
    _interpret()
