"""The loader: every token once an epoch, fixed by the seed, well mixed, resumable anywhere."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscoder import ActivationLoader, ActivationStore
from crosscoder.activations import loader as loader_module
from crosscoder.activations.collect import plan_shards
from crosscoder.activations.dealing import Dealer
from crosscoder.activations.tokens import TokenSet
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


# ------------------------------------------------------------------------------------------- what is read


@pytest.fixture
def wide(tmp_path: Path) -> ActivationStore:
    """Segments of several blocks, several runs a shard: 6,000 rows, five blocks a shard."""
    x = torch.randn(6_000, 3, 128, generator=torch.Generator().manual_seed(2))
    x[:, 0, 0] = torch.arange(6_000) + 1.0
    return ActivationStore.from_array(tmp_path / "wide", x, "fp32", rows_per_shard=2_500)


SMALL = 14 << 20
"""Bytes of memory with which `wide` takes several windows of several runs."""


def everything(loader: ActivationLoader) -> torch.Tensor:
    return torch.cat([x.clone() for x in loader])


def test_batches_hold_the_stores_rows_scaled(wide: ActivationStore) -> None:
    scale = np.array([1.0, 0.3, 7.0])
    x = everything(ActivationLoader(wide, 100, scale=scale, drop_last=False, memory_bytes=SMALL))
    raw = torch.cat([wide.read(shard) for shard in range(3)])
    order = x[:, 0, 0].long() - 1
    assert sorted(order.tolist()) == list(range(6_000))
    assert torch.equal(x, raw[order] * torch.tensor(scale, dtype=torch.float32)[:, None])


def test_the_number_of_threads_and_the_way_of_reading_do_not_matter(wide: ActivationStore) -> None:
    first = everything(ActivationLoader(wide, 128, seed=5, memory_bytes=SMALL, n_threads=1))
    for n_threads in (2, 5, 16):
        assert torch.equal(
            first, everything(ActivationLoader(wide, 128, seed=5, memory_bytes=SMALL, n_threads=n_threads))
        )
    loader = ActivationLoader(wide, 128, seed=5, memory_bytes=SMALL + (16 << 20), n_threads=2, direct=True)
    assert loader.run_rows == ActivationLoader(wide, 128, memory_bytes=SMALL).run_rows
    assert torch.equal(first, everything(loader))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_bf16_batches_are_the_fp32_ones_rounded(wide: ActivationStore, tmp_path: Path, dtype: str) -> None:
    x = torch.cat([wide.read(shard) for shard in range(3)])[:1_000, :, 5:106]  # a width that is no multiple of anything
    store = ActivationStore.from_array(tmp_path / "s", x, dtype, rows_per_shard=400)
    whole = everything(ActivationLoader(store, 50, shuffle=False))
    half = everything(ActivationLoader(store, 50, shuffle=False, dtype="bf16"))
    assert half.dtype == torch.bfloat16 and torch.equal(half, whole.bfloat16())
    raw = torch.cat([store.read(shard) for shard in range(3)])
    exact = raw.double() * torch.from_numpy(store.scales())[:, None]
    torch.testing.assert_close(whole.double(), exact, rtol=1e-6, atol=1e-6)


def test_subsets_of_snapshots(wide: ActivationStore) -> None:
    part = wide.select(["snapshot2", "snapshot0"])
    whole = everything(ActivationLoader(wide, 100, shuffle=False))
    assert torch.equal(everything(ActivationLoader(part, 100, shuffle=False)), whole[:, [2, 0]])


def test_neighbours_in_a_batch_are_as_unrelated_as_random_tokens(tmp_path: Path) -> None:
    """Tokens of one document share a direction. Reading is sequential; what shuffles is the order of shards and rows
    when the store is made, and the windows of the loader."""
    generator = torch.Generator().manual_seed(4)
    documents, length, D, shards = 640, 30, 64, 16
    topic = torch.randn(documents, 1, D, generator=generator)
    text = (topic + torch.randn(documents, length, D, generator=generator)).reshape(-1, 1, D)
    tokens = TokenSet(
        np.ones((documents, length), np.int32),
        np.repeat(np.arange(documents, dtype=np.int32), length).reshape(documents, length),
        [str(document) for document in range(documents)],
        "none",
    )
    T = documents // shards * length
    plan = plan_shards(tokens, T, seed=0)
    rows = [(shard.sequences[:, None] * length + np.arange(length)).reshape(-1)[shard.rows] for shard in plan]
    store = ActivationStore.from_array(tmp_path / "s", text[np.concatenate(rows)], "fp32", rows_per_shard=T)
    loader = ActivationLoader(store, 512, memory_bytes=4 << 20)
    assert loader.run_rows > 512, "reads are longer than a batch"

    def neighbours(batches: list[torch.Tensor]) -> float:
        directions = [torch.nn.functional.normalize(batch[:, 0], dim=1) for batch in batches]
        return float(torch.cat([(d[1:] * d[:-1]).sum(dim=1) for d in directions]).mean())

    assert neighbours(list(text.split(512))) > 0.4
    random = list(text[torch.randperm(len(text), generator=generator)].split(512))
    # Directions of 64 dimensions: the mean of 19,000 cosines is known to 0.001; sharing a document is worth 0.5.
    assert abs(neighbours(random)) < 0.005
    assert abs(neighbours(list(loader))) < 0.005


def test_a_damaged_block_is_refused_and_named(wide: ActivationStore) -> None:
    file = wide.segment_path(1, 2)
    data = bytearray(file.read_bytes())
    data[4096 + (1 << 18) + 5] ^= 4
    file.write_bytes(data)
    for direct in (False, True):
        loader = ActivationLoader(wide, 100, direct=direct)
        with pytest.raises(DataError, match=rf"{file}: block 1 of 5 is damaged"):
            everything(loader)


def test_a_foreign_segment_and_a_vanished_one_are_named(wide: ActivationStore) -> None:
    loader = ActivationLoader(wide, 100)
    file = wide.segment_path(1, 2)
    good = file.read_bytes()
    file.write_bytes(wide.segment_path(1, 1).read_bytes())
    with pytest.raises(DataError, match=r"snapshot-002\.seg does not belong there"):
        everything(loader)
    file.unlink()
    with pytest.raises(DataError, match=r"snapshot-002\.seg does not exist"):
        everything(ActivationLoader(wide, 100, scale=np.ones(3)) if wide.missing() == [] else loader)
    file.write_bytes(good)
    assert len(everything(loader)) == 6_000, "the loader goes on when the file is back"


def test_a_file_cut_while_it_is_read_is_an_error_not_a_crash(wide: ActivationStore) -> None:
    loader = ActivationLoader(wide, 100, memory_bytes=SMALL)
    batches = iter(loader)
    next(batches)
    for k in range(3):
        os.truncate(wide.segment_path(0, k), 4096)
    with pytest.raises(DataError, match=r"snapshot-00\d\.seg"):
        list(batches)
        list(loader)


def test_memory_is_bounded_and_an_impossible_bound_says_what_is_needed(wide: ActivationStore) -> None:
    with pytest.raises(ConfigError, match=r"do not fit into 0.0 GiB of memory; allow memory_bytes=(\d+)") as refused:
        ActivationLoader(wide, 1_000, memory_bytes=1 << 20)
    need = int(str(refused.value).split("memory_bytes=")[1].split()[0])
    assert len(everything(ActivationLoader(wide, 1_000, memory_bytes=need))) == 6_000


def test_batches_stay_when_they_are_kept(wide: ActivationStore) -> None:
    kept = list(ActivationLoader(wide, 128, memory_bytes=SMALL))
    again = everything(ActivationLoader(wide, 128, memory_bytes=SMALL))
    assert torch.equal(torch.cat(kept), again)


@pytest.mark.parametrize("rows", [600, 1_500, 3_000])
def test_the_next_batch_is_on_its_way_while_this_one_is_used(
    wide: ActivationStore, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a window of `rows` rows holds less than a batch, about one or several; and within the memory allowed."""
    batch_size, row_bytes = 1_200, wide.n_snapshots * wide.d_model * 4
    memory_bytes = (2 * rows + 4 * batch_size) * row_bytes
    loader = ActivationLoader(wide, batch_size, memory_bytes=memory_bytes)
    on_the_way, held = [], []
    following = loader_module._Reading.next

    def spy(self: loader_module._Reading) -> object:
        batch = following(self)
        on_the_way.append(self._is_submitted(self.delivered) if self.delivered in self.batches else None)
        held.append(1 + sum(other.memory is not None for other in self.batches.values()))
        return batch

    monkeypatch.setattr(loader_module._Reading, "next", spy)
    assert len(everything(loader)) == 6_000
    assert on_the_way == [True] * (len(loader) - 1) + [None] * 2
    assert max(held) * batch_size * row_bytes <= memory_bytes


def test_waiting_is_counted(wide: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a batch was there in time is what the prefetcher says; the first of a pass is not counted."""
    loader = ActivationLoader(wide, 100, memory_bytes=SMALL)
    for there, waits in ((True, 0), (False, len(loader) - 1)):
        monkeypatch.setattr("crosscoder._core.Prefetcher.is_done", lambda prefetcher, ticket, there=there: there)
        list(loader)
        assert loader.waits == waits and (loader.wait_seconds > 0) == (waits > 0)


# ------------------------------------------------------------------------------------------- ranks


@settings(deadline=None, max_examples=150)
@given(
    windows=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    batch=st.integers(1, 17),
    worlds=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    steps=st.lists(st.integers(0, 8), min_size=5, max_size=5),
)
def test_every_row_is_dealt_once_whatever_the_world(
    windows: list[int], batch: int, worlds: list[int], steps: list[int]
) -> None:
    """The number of ranks changes several times in the middle of an epoch."""
    seen: list[tuple[int, int]] = []
    dealer = Dealer(windows, worlds[0])
    for number, world in enumerate(worlds):
        dealer = Dealer.restore(windows, world, dealer.state_dict())
        last = number == len(worlds) - 1
        left = 10**9 if last else steps[number]
        while left > 0 and dealer.remaining > 0:
            full = dealer.remaining >= batch * world
            cuts = [dealer.remaining * r // world for r in range(world + 1)]
            shares = [batch] * world if full else [b - a for a, b in itertools.pairwise(cuts)]
            if not full and not last:
                break
            for rank, pieces in enumerate(dealer.step(shares)):
                assert sum(e - b for _, b, e in pieces) == shares[rank]
                seen += [(w, row) for w, b, e in pieces for row in range(b, e)]
            left -= 1
    assert dealer.remaining == 0
    assert sorted(seen) == [(w, row) for w, rows in enumerate(windows) for row in range(rows)]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world", [1, 3, 4])
def test_a_step_has_a_batch_for_each_rank_and_the_last_one_what_is_left(
    wide: ActivationStore, world: int, drop_last: bool
) -> None:
    loader = ActivationLoader(wide, 64, world_size=world, drop_last=drop_last)
    step = 64 * world
    for remaining in (step + 1, step, step - 1, world, world - 1, 1, 0):
        shares = loader.shares(Dealer([remaining], world))
        if remaining >= step:
            assert shares == [64] * world
        elif drop_last or remaining == 0:
            assert shares == []
        else:
            assert len(shares) == world and sum(shares) == remaining
            assert max(shares) - min(shares) <= 1, "no rank has more to do than another"
    assert len(list(itertools.islice(loader, len(loader) + 1))) == len(loader)


@pytest.mark.parametrize("rows", [[0, 0], [4, 3], [-1, 2]])
def test_a_step_that_would_never_end_an_epoch_is_refused(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot be dealt from 6"):
        Dealer([6], 2).step(rows)


def test_ranks_come_and_go_within_an_epoch(wide: ActivationStore) -> None:
    """4 ranks, then 2, then 3; each step all together take different rows, and all rows in the end."""

    def ranks(world: int, state: dict[str, object] | None) -> list[ActivationLoader]:
        made = [
            ActivationLoader(
                wide, 64, seed=1, scale=np.ones(3), rank=rank, world_size=world, memory_bytes=SMALL, drop_last=False
            )
            for rank in range(world)
        ]
        for loader in made if state else []:
            loader.load_state_dict(state)
        return made

    seen: list[int] = []
    state = None
    for world, steps in ((4, 7), (2, 11), (3, None)):
        loaders = ranks(world, state)
        streams = [iter(loader) for loader in loaders]
        taken = 0
        while steps is None or taken < steps:
            batches = [next(stream, None) for stream in streams]
            if batches[0] is None:
                assert all(batch is None for batch in batches), "all ranks end together"
                break
            seen += [int(value) for batch in batches for value in batch[:, 0, 0]]
            taken += 1
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert sorted(seen) == list(range(1, 6_001))
    assert state is not None and state["epoch"] == 1


def test_a_rank_outside_of_the_world(wide: ActivationStore) -> None:
    with pytest.raises(ConfigError, match="rank must be 0 to 1, not 2"):
        ActivationLoader(wide, 10, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="fp32 or bf16"):
        ActivationLoader(wide, 10, dtype="fp16")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="less than one batch of 8000"):
        ActivationLoader(wide, 4_000, world_size=2)


@pytest.mark.parametrize("value", [0, -1, 2.5, "64", None, True])
def test_batch_sizes_and_seeds_are_whole_numbers(store: ActivationStore, value: Any) -> None:
    with pytest.raises(ConfigError, match="batch_size must be a whole number of 1 or more, not"):
        ActivationLoader(store, value)
    if value not in (0, True):
        with pytest.raises(ConfigError, match="seed must be a whole number of 0 or more, not"):
            ActivationLoader(store, 4, seed=value)


def test_a_folder_is_no_store(store: ActivationStore) -> None:
    with pytest.raises(ConfigError, match=r"not str: ActivationLoader\(ActivationStore.open"):
        ActivationLoader(str(store.path), 4)  # type: ignore[arg-type]
