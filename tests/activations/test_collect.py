"""Snapshots and collection, on tiny GPT-NeoX checkpoints in the hub's form: local folders and the hub's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crosscoder.activations.collect import collect, plan_shards, residual_stream
from crosscoder.activations.snapshots import SnapshotSet, decoder_layers, truncate
from crosscoder.activations.store import ActivationStore
from crosscoder.activations.tokens import TokenSet
from crosscoder.errors import ConfigError, DataError, NonFiniteError

REVISIONS = ("step0", "step1", "step16")
S, C, D, V = 12, 16, 8, 40


def tiny_model(seed: int, **changes: Any) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    options = {
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": C,
        "use_parallel_residual": True,
        **changes,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(**options)).eval()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, revision in enumerate(REVISIONS):
        tiny_model(seed).save_pretrained(tmp_path / "models" / revision)
    return tmp_path / "models"


@pytest.fixture
def tokens() -> TokenSet:
    generator = np.random.default_rng(0)
    ids = generator.integers(1, V, (S, C)).astype(np.int32)
    ids[:, 0] = 0
    ids[3, 7] = 0
    document = np.repeat(np.arange(S, dtype=np.int32), C).reshape(S, C)
    return TokenSet(ids, document, [f"document {i}" for i in range(S)], "none")


def test_local_snapshots_come_in_the_order_of_training(models: Path) -> None:
    snapshots = SnapshotSet.open(str(models), 1)
    assert snapshots.revisions == REVISIONS
    assert snapshots.steps.tolist() == [0, 1, 16]
    assert SnapshotSet.open(str(models), 1, ("step16", "step0")).revisions == ("step16", "step0")


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_activations_are_transformers_own_hidden_states(models: Path, tokens: TokenSet, layer: int) -> None:
    """`hidden_states[layer + 1]`, but for the last block, where transformers applies the final norm first."""
    snapshots = SnapshotSet.open(str(models), layer)
    ids = torch.from_numpy(tokens.ids).long()
    whole = snapshots.load(2)
    base = truncate(snapshots.load(2), layer)
    ours = residual_stream(base, layer, ids)
    with torch.no_grad():
        hidden = whole(input_ids=ids, output_hidden_states=True).hidden_states
    if layer < 2:
        torch.testing.assert_close(ours, hidden[layer + 1], rtol=0, atol=0)
    else:
        assert not torch.allclose(ours, hidden[3], atol=1e-3), "this is behind the final norm"
        torch.testing.assert_close(whole.gpt_neox.final_layer_norm(ours), hidden[3], rtol=1e-6, atol=1e-6)
    assert len(decoder_layers(base)) == layer + 1


def test_collection_holds_every_token_once_in_every_snapshot(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    snapshots = SnapshotSet.open(str(models), 1)
    store = collect(snapshots, tokens, tmp_path / "store", dtype="fp32", rows_per_shard=70, batch_sequences=3)
    assert store.n_tokens == S * (C - 1) - 1 and len(store.shard_rows) == 3
    assert store.snapshot_names == list(REVISIONS)
    seen = set()
    for shard in range(3):
        rows, x = store.tokens(shard), store.read(shard)
        assert (rows[:, 0] != 0).all()
        assert not np.array_equal(rows, rows[np.lexsort((rows[:, 3], rows[:, 2]))]), "rows are shuffled"
        for k in range(3):
            expected = residual_stream(snapshots.load(k), 1, torch.from_numpy(tokens.ids).long())
            torch.testing.assert_close(x[:, k], expected[rows[:, 2], rows[:, 3]], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(rows[:, 0], tokens.ids[rows[:, 2], rows[:, 3]])
        np.testing.assert_array_equal(rows[:, 1], tokens.document[rows[:, 2], rows[:, 3]])
        seen |= {(int(row[2]), int(row[3])) for row in rows}
    assert len(seen) == store.n_tokens


def test_text_order(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    store = collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "store", rows_per_shard=70)
    by_place = {}
    for shard in range(len(store.shard_rows)):
        for row, x in zip(store.tokens(shard), store.read(shard), strict=True):
            by_place[int(row[2]), int(row[3])] = x
    for batch_tokens in (1, 40, 10_000):
        places = []
        for x, sequence, position in store.in_text_order(batch_tokens):
            batch = list(zip(sequence.tolist(), position.tolist(), strict=True))
            assert all(torch.equal(row, by_place[place]) for row, place in zip(x, batch, strict=True))
            assert not places or places[-1][0] < batch[0][0], "batches hold whole sequences"
            places += batch
        assert places == sorted(by_place)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_completed_store_has_the_bytes_of_an_uninterrupted_one(
    models: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = SnapshotSet.open(str(models), 1)
    collect(snapshots, tokens, tmp_path / "whole", rows_per_shard=70)
    write, calls = ActivationStore.write_segment, []

    def stop_after_four(store: ActivationStore, *arguments: Any) -> None:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(arguments[:2])
        write(store, *arguments)

    monkeypatch.setattr(ActivationStore, "write_segment", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        collect(snapshots, tokens, tmp_path / "stopped", rows_per_shard=70)
    monkeypatch.setattr(ActivationStore, "write_segment", write)
    stopped = ActivationStore.open(tmp_path / "stopped")
    assert len(stopped.missing()) == 5
    with pytest.raises(DataError, match="step1, step16 are missing"):
        stopped.require_complete()
    collect(snapshots, tokens, tmp_path / "stopped", rows_per_shard=70)
    assert bytes_of(tmp_path / "stopped") == bytes_of(tmp_path / "whole")


def test_from_the_hubs_cache(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model by its name and revisions, as `EleutherAI/pythia-*` has them, from the cache that the client keeps."""
    repository = tmp_path / "hub" / "models--someone--pythia-tiny"
    (repository / "refs").mkdir(parents=True)
    for number, revision in enumerate(REVISIONS):
        commit = f"{number:040x}"
        (repository / "snapshots").mkdir(exist_ok=True)
        (models / revision).rename(repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshots = SnapshotSet.open("someone/pythia-tiny", 1, REVISIONS)
    weights = [snapshots.load(k).gpt_neox.embed_in.weight for k in range(3)]
    for seed in range(3):
        assert torch.equal(weights[seed], tiny_model(seed).gpt_neox.embed_in.weight)
    with pytest.raises(DataError, match="cannot load snapshot step2 of someone/pythia-tiny"):
        SnapshotSet.open("someone/pythia-tiny", 1, ("step2",)).load(0)


def test_wrong_snapshots_are_named(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lacks the snapshots step5; it has step0, step1, step16"):
        SnapshotSet.open(str(models), 1, ("step0", "step5"))
    with pytest.raises(DataError, match="has no snapshots"):
        SnapshotSet.open(str(tmp_path), 1)
    with pytest.raises(ConfigError, match="name its revisions"):
        SnapshotSet.open("someone/model", 1)
    with pytest.raises(ConfigError, match="named twice"):
        SnapshotSet.open(str(models), 1, ("step0", "step0"))
    with pytest.raises(ConfigError, match="layer 3 does not exist: .* has layers 0 to 2"):
        collect(SnapshotSet.open(str(models), 3), tokens, tmp_path / "a")
    tiny_model(9, hidden_size=12).save_pretrained(models / "step16")
    with pytest.raises(DataError, match="snapshot step16 has width 12, the first one 8"):
        collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "b")
    (models / "step1" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="cannot load snapshot step1"):
        collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "c")


def test_nan_in_one_snapshot_names_it_and_keeps_the_others(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    broken = tiny_model(1)
    with torch.no_grad():
        broken.gpt_neox.layers[0].mlp.dense_4h_to_h.bias[0] = float("nan")
    broken.save_pretrained(models / "step1")
    with pytest.raises(NonFiniteError, match="snapshot step1"):
        collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "store")
    assert ActivationStore.open(tmp_path / "store").missing() == [(0, 1), (0, 2)]


def test_other_tokens_do_not_go_into_the_same_store(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    snapshots = SnapshotSet.open(str(models), 1)
    collect(snapshots, tokens, tmp_path / "store")
    other = TokenSet(tokens.ids[::-1].copy(), tokens.document, tokens.names, "none")
    with pytest.raises(ConfigError, match="already holds other activations"):
        collect(snapshots, other, tmp_path / "store")


def test_shards_depend_on_the_seed_alone(tokens: TokenSet) -> None:
    def flat(seed: int) -> list[int]:
        return [int(row) for shard in plan_shards(tokens, 70, seed) for row in shard.rows]

    assert flat(0) == flat(0) != flat(1)
    empty = TokenSet(np.zeros((2, C), np.int32), np.zeros((2, C), np.int32), ["a"], "none")
    with pytest.raises(DataError, match="no token to collect"):
        plan_shards(empty, 70, 0)
