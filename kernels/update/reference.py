"""Adam, densely. The weight gradients from the pairs are the closed form's: `crosscoder/backends/closed_form.py`."""

from __future__ import annotations

from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""Adam's constants, torch's defaults."""


def adam(w: Tensor, m: Tensor, v: Tensor, gradient: Tensor, *, lr: float, t: int, elapsed: Tensor | int = 1) -> None:
    """One Adam step in place, torch.optim.Adam's with its defaults; `t` counts steps from 1.

    `elapsed` is how many steps ago the moments were last brought up to date (row-lazy Adam: by row).
    """
    m.mul_(BETA1**elapsed).add_(gradient, alpha=1 - BETA1)
    v.mul_(BETA2**elapsed).addcmul_(gradient, gradient, value=1 - BETA2)
    root = v.sqrt().div_((1 - BETA2**t) ** 0.5).add_(EPSILON)
    w.addcdiv_(m, root, value=-lr / (1 - BETA1**t))
