"""The live source: the batches of a store, without the store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from activations.tiny import break_with_nan

from crosscoder import ActivationLoader, Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.activations.collect import collect
from crosscoder.activations.live import LiveSource
from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.source import Source
from crosscoder.activations.tokens import TokenSet
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.train.run import _tell_waits

SHARD, B = 48, 11


def both(models: Path, tokens: TokenSet, folder: Path, windows: int = 2) -> tuple[ActivationLoader, LiveSource]:
    """A store's loader and a live source of the same settings."""
    snapshots = SnapshotSet.open(str(models), 1)
    store = collect(snapshots, tokens, folder / "s", dtype="fp32", rows_per_shard=SHARD, batch_sequences=2, together=3)
    loader = ActivationLoader(store, B, seed=3)
    loader.window_runs = windows
    loader._begin_epoch(0)
    return loader, live(models, tokens, windows, scale=store.scales())


def live(models: Path, tokens: TokenSet, windows: int = 2, **options: object) -> LiveSource:
    snapshots = SnapshotSet.open(str(models), 1)
    settings = {"rows_per_shard": SHARD, "window_shards": windows, "batch_sequences": 2, **options}
    return LiveSource(snapshots, tokens, B, seed=3, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("windows", [1, 2, 100])
def test_the_same_batches_as_from_a_store(models: Path, tokens: TokenSet, tmp_path: Path, windows: int) -> None:
    loader, source = both(models, tokens, tmp_path, windows)
    for _ in range(2):
        stored, computed = list(loader), list(source)
        assert len(stored) == len(computed) == len(source) > 10
        assert all(torch.equal(a, b) for a, b in zip(stored, computed, strict=True))


def test_a_training_that_waits_is_told_what_it_waits_for(
    models: Path, tokens: TokenSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, reason in zip(both(models, tokens, tmp_path), ("the disk is slower", "forward passes"), strict=True):
        source.wait_seconds, source.waits = 3.0, 7
        _tell_waits(source, 10.0)
        told = " ".join(capsys.readouterr().err.split())
        assert "30% of the time (7 batches)" in told and reason in told
        assert ("disk is slower" in told) == (source.wait_reason == ActivationLoader.wait_reason)


def test_the_same_training_as_from_a_store(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    def losses(source: Source) -> list[float]:
        trainer = Trainer(
            Crosscoder(CrosscoderConfig(3, 8, 32), seed=0), TrainConfig(n_steps=30, batch_size=B, lr=1e-3)
        )
        seen: list[float] = []
        while len(seen) < 30:
            for x_BKD in source:
                seen.append(float(trainer.step(x_BKD)["loss"]))
                if len(seen) == 30:
                    break
        return seen

    loader, source = both(models, tokens, tmp_path)
    assert losses(loader) == losses(source)


@pytest.mark.parametrize("before", [0, 1, 9, 16, 17])
def test_going_on_in_the_middle(models: Path, tokens: TokenSet, before: int) -> None:
    def take(source: LiveSource, count: int) -> list[torch.Tensor]:
        taken: list[torch.Tensor] = []
        while len(taken) < count:
            for x in source:
                taken.append(x)
                if len(taken) == count:
                    break
        return taken

    whole = take(live(models, tokens), 25)
    first = live(models, tokens)
    begun = take(first, before) if before else []
    second = live(models, tokens, scale=np.ones(3))
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(begun + take(second, 25 - before), whole, strict=True))


def test_ranks_share_the_tokens(models: Path, tokens: TokenSet) -> None:
    ones = np.ones(3)
    whole = torch.cat(list(live(models, tokens, scale=ones, drop_last=False)))
    parts = [
        torch.cat(list(live(models, tokens, scale=ones, drop_last=False, rank=rank, world_size=3))) for rank in range(3)
    ]

    def in_order(x: torch.Tensor) -> torch.Tensor:
        return x[np.lexsort(x[:, 0, :2].T.numpy())]

    assert torch.equal(in_order(torch.cat(parts)), in_order(whole))


def test_forward_passes_are_spread_between_the_batches(
    models: Path,
    tokens: TokenSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = live(models, tokens, scale=np.ones(3))
    passes: list[int] = []
    forward = source._forward

    def counted(shard: int) -> object:
        for x in forward(shard):
            passes.append(shard)
            yield x

    monkeypatch.setattr(source, "_forward", counted)
    per_batch, before = [], 0
    for _ in source:
        per_batch.append(len(passes) - before)
        before = len(passes)
    assert sum(per_batch) == 8, "6 sequences a window of two shards, 2 a pass, and the first ones"
    assert max(per_batch[1:]) <= 2
    assert source.waits == 0


def test_its_own_scales_are_those_of_the_first_window(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    loader, _ = both(models, tokens, tmp_path)
    source = live(models, tokens, 100)
    np.testing.assert_allclose(source.scale_K, loader.store.scales(), rtol=1e-6)


def test_errors(models: Path, tokens: TokenSet) -> None:
    with pytest.raises(DataError, match="less than one batch"):
        live(models, tokens, world_size=100)
    state = live(models, tokens).state_dict()
    with pytest.raises(ConfigError, match="another window_runs"):
        live(models, tokens, 3).load_state_dict(state)
    break_with_nan(models, "step1")
    with pytest.raises(NonFiniteError, match="snapshot step1"):
        list(live(models, tokens, scale=np.ones(3)))
    (models / "step16" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="cannot load snapshot step16"):
        live(models, tokens)
