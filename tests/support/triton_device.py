"""Where the Triton kernels run in the tests: a GPU, or else Triton's interpreter (tests/conftest.py chooses it).

The interpreter takes some 10 ms a program, so shapes are small there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hypothesis import settings
from support import crosscoders
from triton.runtime import interpreter

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
make = partial(crosscoders.make, device=DEVICE)
random_code = partial(crosscoders.random_code, device=DEVICE)
SMALL_SHAPES = [(9, 3, 33, 40), (4, 32, 8, 12), (3, 33, 300, 6), (3, 64, 5, 5)]
"""(B, K, D, F), small enough for the interpreter."""
FEW = settings(max_examples=200 if ON_GPU else 6, deadline=None, derandomize=True)
"""How many examples Hypothesis draws."""


def _patch_once() -> None:
    """Each call of a jit function by another patches triton.language anew, 3 ms every time; once a module is enough."""
    patch = getattr(interpreter, "_patch_lang", None)
    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if patch is not None and id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    if patch is not None and hasattr(interpreter.InterpretedFunction, "rewrite"):
        interpreter.InterpretedFunction.__call__ = call


if not ON_GPU:
    _patch_once()
