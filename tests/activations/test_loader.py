"""The loader: every token once an epoch, fixed by the seed, well mixed, resumable anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from crosscoder import ActivationLoader, ActivationStore
from crosscoder.errors import ConfigError, DataError

N, K, D = 1000, 2, 3


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """Row i holds i + 1 everywhere, so that batches say which rows they are of."""
    x = (torch.arange(N) + 1.0)[:, None, None].expand(N, K, D)
    return ActivationStore.from_array(tmp_path / "s", x.contiguous(), "fp32", rows_per_shard=301)


def ids(batches: list[torch.Tensor]) -> list[int]:
    return [int(value) for x in batches for value in x[:, 0, 0]]


ONES = np.ones(K)


def test_an_epoch_sees_every_token_once(store: ActivationStore) -> None:
    loader = ActivationLoader(store, 64, scale=ONES, drop_last=False)
    for _ in range(2):
        batches = list(loader)
        assert [len(x) for x in batches] == [64] * 15 + [40]
        assert sorted(ids(batches)) == list(range(1, N + 1))
    assert len(loader) == 16
    assert len(list(ActivationLoader(store, 64, scale=ONES))) == 15


def test_order_depends_on_seed_and_epoch_alone(store: ActivationStore) -> None:
    first, again = ActivationLoader(store, 64, seed=3, scale=ONES), ActivationLoader(store, 64, seed=3, scale=ONES)
    epochs = [ids(list(first)), ids(list(first))]
    assert epochs == [ids(list(again)), ids(list(again))]
    assert epochs[0] != epochs[1]
    assert epochs[0] != ids(list(ActivationLoader(store, 64, seed=4, scale=ONES)))


def test_without_shuffling_rows_come_in_order(store: ActivationStore) -> None:
    loader = ActivationLoader(store, 64, scale=ONES, shuffle=False, drop_last=False)
    assert ids(list(loader)) == list(range(1, N + 1))


@pytest.mark.parametrize("batches_before", [0, 1, 7, 14, 15, 16, 31])
def test_resume_anywhere(store: ActivationStore, batches_before: int) -> None:
    def stream(loader: ActivationLoader, count: int) -> list[int]:
        taken: list[torch.Tensor] = []
        while len(taken) < count:
            for x in loader:
                taken.append(x)
                if len(taken) == count:
                    break
        return ids(taken)

    whole = stream(ActivationLoader(store, 64, scale=ONES), 40)
    first = ActivationLoader(store, 64, scale=ONES)
    before = stream(first, batches_before) if batches_before else []
    second = ActivationLoader(store, 64, scale=ONES)
    second.load_state_dict(first.state_dict())
    assert before + stream(second, 40 - batches_before) == whole


def test_batches_are_scaled_to_the_mean_norm(store: ActivationStore) -> None:
    x = torch.cat(list(ActivationLoader(store, 100)))
    norms = torch.linalg.vector_norm(x.double(), dim=2).mean(dim=0)
    torch.testing.assert_close(norms, torch.full((K,), D**0.5, dtype=torch.float64), rtol=1e-6, atol=0)


def test_batches_mix_shards(store: ActivationStore) -> None:
    for x in ActivationLoader(store, 256, scale=ONES):
        assert len({(int(value) - 1) // 301 for value in x[:, 0, 0]}) >= 3


def test_errors(store: ActivationStore) -> None:
    with pytest.raises(DataError, match="less than one batch of 2000"):
        ActivationLoader(store, 2000)
    with pytest.raises(ConfigError, match="batch_size"):
        ActivationLoader(store, 0)
    state = ActivationLoader(store, 64).state_dict()
    with pytest.raises(ConfigError, match="another seed"):
        ActivationLoader(store, 64, seed=1).load_state_dict(state)
    with pytest.raises(ConfigError, match="another batch_size"):
        ActivationLoader(store, 65).load_state_dict(state)
