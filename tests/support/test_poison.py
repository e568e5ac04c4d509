"""Every test runs with poisoned memory; what is filled on purpose stays as it was."""

from __future__ import annotations

import numpy as np
import torch


def test_torch_hands_out_poison() -> None:
    grown = torch.zeros(2).resize_(100)
    strided = torch.empty_strided((3, 4), (1, 3))
    for tensor in (torch.empty(5), torch.empty_like(torch.zeros(3)), torch.zeros(1).new_empty(4), strided, grown[2:]):
        assert tensor.isnan().all()
    assert (torch.empty(4, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert not grown[:2].any() and not torch.zeros(3).any()


def test_numpy_hands_out_poison() -> None:
    assert np.isnan(np.empty(3)).all() and np.isnan(np.empty_like(np.zeros(2))).all()
    assert (np.empty(3, dtype=np.int16) == np.iinfo(np.int16).max).all()
    assert not np.zeros(3).any() and np.empty(2, dtype=object).tolist() == [None, None]


def test_blocks_of_the_c_library_are_overwritten() -> None:
    """What C++ allocates: a block that was full of zeros is handed out again, and holds none."""
    for _ in range(4):
        block = np.ndarray(5000, dtype=np.uint8)  # not np.empty: straight from the allocator
        assert (block == 0xFE).all()
        block[:] = 0
        del block
