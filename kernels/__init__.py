"""The operations of the training step, one folder each, every one with a dense twin that is its specification.

`encode` -> `decode` -> `code_grad` -> `transpose` -> `update`, and `threshold`. In each folder `reference.py` is plain
dense torch in any floating dtype (float64 included): short and obvious, the oracle of every faster path; `native.py`
is the C++ path for CPUs, `triton.py` the one for GPUs. `SparseCode` is what passes between them.

Letters: B tokens, K snapshots, D width of one activation, F features, N non-zero (token, feature) pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crosscoder.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("auto", "reference", "native", "triton")


def choose_backend(backend: str, weights: Tensor) -> str:
    """ "reference", "native" or "triton" for a crosscoder with these `weights`.

    "auto": native on a CPU in float32 or bfloat16, triton on a CUDA device in these, else the reference. Raises
    `ConfigError` for an unknown backend or one that cannot work with the weights' device or dtype.
    """
    import torch

    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    fits = weights.dtype in (torch.float32, torch.bfloat16)
    if backend == "auto":
        kinds = {"cpu": "native", "cuda": "triton"}
        return kinds.get(weights.device.type, "reference") if fits else "reference"
    if backend == "native" and not (fits and weights.device.type == "cpu"):
        raise ConfigError(
            f'backend "native" needs float32 or bfloat16 weights on a CPU, not {weights.dtype} on {weights.device}; '
            'use "auto"'
        )
    if backend == "triton" and not fits:
        raise ConfigError(f'backend "triton" needs float32 or bfloat16 weights, not {weights.dtype}; use "auto"')
    return backend
