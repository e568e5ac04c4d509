"""Snapshots and collection, on tiny GPT-NeoX checkpoints in the hub's form: local folders and the hub's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from activations.tiny import REVISIONS_OF_TEST, C, D, S, V, break_with_nan, tiny_model, tokenizer_of

from crosscoder.activations.collect import collect, plan_shards
from crosscoder.activations.content import snapshot_digest
from crosscoder.activations.presets import PRESETS, PYTHIA_STEPS, REVISIONS
from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.store import ActivationStore
from crosscoder.activations.tokens import TokenSet, pack
from crosscoder.activations.trunk import Trunks, activations, decoder_layers
from crosscoder.errors import ConfigError, DataError, NonFiniteError


def test_local_snapshots_come_in_the_order_of_training(models: Path) -> None:
    snapshots = SnapshotSet.open(str(models), 1)
    assert snapshots.revisions == REVISIONS_OF_TEST
    assert snapshots.steps.tolist() == [0, 1, 16]
    assert SnapshotSet.open(str(models), 1, ("step16", "step0")).revisions == ("step16", "step0")


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_activations_are_transformers_own_hidden_states(models: Path, tokens: TokenSet, layer: int) -> None:
    """`hidden_states[layer + 1]`, but for the last block, where transformers applies the final norm first."""
    snapshots = SnapshotSet.open(str(models), layer)
    ids = torch.from_numpy(tokens.ids).long()
    whole = snapshots.load(2)
    base = snapshots.load_trunk(2)
    ours = activations(base, layer, ids)
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
    assert store.snapshot_names == list(REVISIONS_OF_TEST)
    seen = set()
    for shard in range(3):
        rows, x = store.tokens(shard), store.read(shard)
        assert (rows[:, 0] != 0).all()
        assert not np.array_equal(rows, rows[np.lexsort((rows[:, 3], rows[:, 2]))]), "rows are shuffled"
        for k in range(3):
            expected = activations(snapshots.load(k), 1, torch.from_numpy(tokens.ids).long())
            torch.testing.assert_close(x[:, k], expected[rows[:, 2], rows[:, 3]], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(rows[:, 0], tokens.ids[rows[:, 2], rows[:, 3]])
        np.testing.assert_array_equal(rows[:, 1], tokens.document[rows[:, 2], rows[:, 3]])
        seen |= {(int(row[2]), int(row[3])) for row in rows}
    assert len(seen) == store.n_tokens


def test_whole_sequences(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    store = collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "store", rows_per_shard=70)
    by_place = {}
    for shard in range(len(store.shard_rows)):
        for row, x in zip(store.tokens(shard), store.read(shard), strict=True):
            by_place[int(row[2]), int(row[3])] = x
    for batch_tokens in (1, 40, 10_000):
        seen: list[list[tuple[int, int]]] = []
        for x, sequence, position in store.whole_sequences(batch_tokens):
            batch = list(zip(sequence.tolist(), position.tolist(), strict=True))
            assert all(torch.equal(row, by_place[place]) for row, place in zip(x, batch, strict=True))
            assert batch == sorted(batch)
            seen.append(batch)
        assert sorted(place for batch in seen for place in batch) == sorted(by_place)
        of_batch = [{sequence for sequence, _ in batch} for batch in seen]
        assert sum(map(len, of_batch)) == len(set().union(*of_batch)), "batches hold whole sequences"
        for done in range(len(seen) + 1):
            rest = store.whole_sequences(batch_tokens, skip=sum(map(len, seen[:done])))
            left = [list(zip(s.tolist(), p.tolist(), strict=True)) for _, s, p in rest]
            assert left == seen[done:]
        some = np.array([1, 4, 5])
        parts = list(store.whole_sequences(batch_tokens, sequences=some))
        found = [place for _, *at in parts for place in zip(*(a.tolist() for a in at), strict=True)]
        assert found == [place for batch in seen for place in batch if place[0] in some]
        assert torch.equal(torch.cat([x for x, _, _ in parts]), torch.stack([by_place[place] for place in found]))


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
    for number, revision in enumerate(REVISIONS_OF_TEST):
        commit = f"{number:040x}"
        (repository / "snapshots").mkdir(exist_ok=True)
        (models / revision).rename(repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshots = SnapshotSet.open("someone/pythia-tiny", 1, REVISIONS_OF_TEST)
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
    with pytest.raises(ConfigError, match="name the layer of someone/model with --layer"):
        SnapshotSet.open("someone/model", None, ("step0",))
    with pytest.raises(ConfigError, match="site must be one of residual, mlp, attention"):
        SnapshotSet.open("someone/model", 1, ("step0",), "head")
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
    break_with_nan(models, "step1")
    with pytest.raises(NonFiniteError, match="snapshot step1"):
        collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "store")
    assert ActivationStore.open(tmp_path / "store").missing() == [(0, 1)]
    # The snapshot is mended and the same command run again.
    tiny_model(1).save_pretrained(models / "step1")
    collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "store").verify()


def test_bad_snapshots_are_skipped_on_demand(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    """NaN, a damaged file, other weights, another tokenizer: each recorded, the good ones whole."""
    snapshots = SnapshotSet.open(str(models), 1)
    good = collect(snapshots, tokens, tmp_path / "good").read(0)
    for number, damage in enumerate(
        [
            lambda: break_with_nan(models, "step1"),
            lambda: (models / "step1" / "model.safetensors").write_bytes(b"short"),
            (models / "step1" / "model.safetensors").unlink,
            lambda: tiny_model(1, num_hidden_layers=1).save_pretrained(models / "step1"),
        ]
    ):
        damage()
        store = collect(snapshots, tokens, tmp_path / str(number), skip_bad=True)
        assert list(store.skipped()) == ["step1"] and store.missing() == []
        assert torch.equal(store.without_skipped().read(0), good[:, [0, 2]])
        tiny_model(1).save_pretrained(models / "step1")
    with pytest.raises(DataError, match="was skipped|collection skipped step1"):
        store.require_complete()


def test_a_model_that_is_loaded_in_part_says_nothing_of_it(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    SnapshotSet.open(str(models), 1).load_trunk(0)
    assert caplog.messages == []


def test_a_snapshot_that_lacks_weights_is_not_filled_with_random_ones(
    models: Path, tokens: TokenSet, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    file = models / "step1" / "model.safetensors"
    weights = load_file(file)
    del weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(DataError, match=r"snapshot step1 of .* lacks weights: layers\.1\.mlp\.dense_h_to_4h\.weight"):
        collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "store")
    # What comes after the layer is not needed, and not looked for.
    collect(SnapshotSet.open(str(models), 0), tokens, tmp_path / "first layer").verify()


def test_a_tokenizer_that_differs_between_snapshots(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    for revision in REVISIONS_OF_TEST:
        tokenizer_of("abc abd abe").save_pretrained(models / revision)
    collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "same").verify()
    tokenizer_of("xyz xyy xxx").save_pretrained(models / "step1")
    with pytest.raises(DataError, match="snapshot step1 of .* has another tokenizer than step16"):
        collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "other")
    assert ActivationStore.open(tmp_path / "other").missing() == [(0, 1)]


def test_tokens_of_another_vocabulary(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    large = TokenSet(tokens.ids + V, tokens.document, tokens.names, "none")
    with pytest.raises(DataError, match="the tokens have ids up to .*, .* knows 40"):
        collect(SnapshotSet.open(str(models), 1), large, tmp_path / "store")


# ------------------------------------------------------------------------------------------- architectures and sites


def architectures() -> dict[str, Any]:
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Olmo2Config, OlmoConfig

    sizes = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": C, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = {"vocab_size": V, "n_embd": D, "n_layer": 3, "n_head": 2, "n_positions": C}
    return {
        "gpt_neox": GPTNeoXConfig(**sizes),
        "gpt_neox sequential": GPTNeoXConfig(**sizes, use_parallel_residual=False),
        "olmo": OlmoConfig(**sizes, pad_token_id=0),
        "olmo2": Olmo2Config(**sizes, pad_token_id=0),
        "llama": LlamaConfig(**sizes),
        "gpt2": GPT2Config(**gpt2, bos_token_id=0, eos_token_id=0),
    }


@pytest.mark.parametrize("name", list(architectures()))
def test_sites_of_all_architectures(name: str, tmp_path: Path) -> None:
    """The residual stream is transformers' hidden state; what the two branches add makes it from the one before."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    for step in (0, 1):
        model = AutoModelForCausalLM.from_config(architectures()[name])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / f"step{step}")
    ids = torch.randint(1, V, (5, C), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model.eval()(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in (0, 1, 2):
        got = {}
        for site in ("residual", "mlp", "attention"):
            snapshots = SnapshotSet.open(str(tmp_path), layer, site=site)
            trunk = snapshots.load_trunk(1)
            assert len(decoder_layers(trunk)) == layer + 1
            got[site] = activations(trunk, layer, ids, site)
            both = Trunks([snapshots.load_trunk(k) for k in (0, 1)], layer, site)(ids)
            torch.testing.assert_close(both[1], got[site], rtol=1e-5, atol=1e-6)
        # hidden_states[i + 1] is what leaves block i, but for the last, where it has been through the final norm.
        if layer < 2:
            torch.testing.assert_close(got["residual"], hidden[layer + 1], rtol=0, atol=0)
        else:
            assert not torch.allclose(got["residual"], hidden[3], atol=1e-3)
        torch.testing.assert_close(hidden[layer] + got["attention"] + got["mlp"], got["residual"], rtol=1e-4, atol=1e-5)


def test_padding_and_the_beginning_of_a_text(models: Path, tmp_path: Path) -> None:
    """By document: each starts a row, padding is never stored, and does not change what is before it."""
    tokenizer = tokenizer_of("abcdefg hijk abc def")
    documents = [("one", "abc def abc"), ("two", "a"), ("three", "hijk" * 12)]
    tokens = pack(documents, tokenizer, C, by_document=True)
    assert tokens.n_sequences > 3, "the long one takes several rows"
    assert all(len(set(row)) == 1 for row in tokens.document.tolist())
    starts = [int(np.flatnonzero(tokens.document[:, 0] == d)[0]) for d in range(3)]
    assert all(tokens.ids[row, 0] == 0 and tokens.ids[row, 1] != 0 for row in starts)
    store = collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "store", dtype="fp32")
    rows, x = store.tokens(0), store.read(0)
    assert len(rows) == (tokens.ids != 0).sum() and (rows[:, 0] != 0).all()
    trunk = SnapshotSet.open(str(models), 1).load_trunk(2)
    row = tokens.ids[starts[0]]
    length = int((row != 0).sum()) + 1
    alone = activations(trunk, 1, torch.from_numpy(row[None, :length]).long())[0]
    for index in np.flatnonzero(rows[:, 2] == starts[0]):
        torch.testing.assert_close(x[index, 2], alone[rows[index, 3]], rtol=1e-5, atol=1e-6)


def test_presets_are_pythias_and_the_papers() -> None:
    assert len(PYTHIA_STEPS) == 154 and PYTHIA_STEPS[:12] == (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
    assert PYTHIA_STEPS[-1] == 143_000
    for name, steps in REVISIONS.items():
        assert set(steps) <= set(PYTHIA_STEPS) and list(steps) == sorted(set(steps)), name
    assert {name: len(steps) for name, steps in REVISIONS.items()} == {
        "paper": 32, "paper-text": 32, "log": 20, "all": 154,
    }  # fmt: skip
    assert set(REVISIONS["paper"]) - set(REVISIONS["paper-text"]) >= {10_000, 20_000, 127_000}
    assert 1 in REVISIONS["paper-text"] and 1 not in REVISIONS["paper"]
    paper = SnapshotSet.open("pythia-6.9b-paper")
    assert (paper.model, paper.layer, paper.n_snapshots) == ("EleutherAI/pythia-6.9b", 16, 32)
    assert paper.revisions[-1] == "step143000"
    assert SnapshotSet.open("pythia-160m-paper", 3, ("all",)).n_snapshots == 154
    assert {preset.model for preset in PRESETS.values()} == {"EleutherAI/pythia-160m", "EleutherAI/pythia-6.9b"}


# ------------------------------------------------------------------------------------------- together and in parallel


@pytest.mark.parametrize("together", [2, 3, 5])
def test_snapshots_side_by_side_give_the_same_activations(
    models: Path, tokens: TokenSet, tmp_path: Path, together: int
) -> None:
    snapshots = SnapshotSet.open(str(models), 1)
    alone = collect(snapshots, tokens, tmp_path / "alone", dtype="fp32", rows_per_shard=70)
    beside = collect(snapshots, tokens, tmp_path / "beside", dtype="fp32", rows_per_shard=70, together=together)
    for shard in range(3):
        torch.testing.assert_close(beside.read(shard), alone.read(shard), rtol=1e-5, atol=1e-6)
    # A part of a group that is missing is made again to the same bits.
    before = bytes_of(tmp_path / "beside")
    beside.segment_path(1, 1).unlink()
    collect(snapshots, tokens, tmp_path / "beside", dtype="fp32", rows_per_shard=70, together=together)
    assert bytes_of(tmp_path / "beside") == before


def test_a_snapshot_is_added_to_a_store_later(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    collect(SnapshotSet.open(str(models), 1, ("step0", "step16")), tokens, tmp_path / "s", rows_per_shard=70)
    before = bytes_of(tmp_path / "s")
    store = collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "s", rows_per_shard=70)
    assert store.snapshot_names == list(REVISIONS_OF_TEST)
    after = bytes_of(tmp_path / "s")
    assert all(after[name] == data for name, data in before.items() if name.endswith(".seg"))
    whole = collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "whole", rows_per_shard=70)
    assert all(torch.equal(store.read(shard), whole.read(shard)) for shard in range(3))


def test_other_tokens_do_not_go_into_the_same_store(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    snapshots = SnapshotSet.open(str(models), 1)
    collect(snapshots, tokens, tmp_path / "store")
    other = TokenSet(tokens.ids[::-1].copy(), tokens.document, tokens.names, "none")
    with pytest.raises(ConfigError, match="already holds other activations"):
        collect(snapshots, other, tmp_path / "store")


def test_a_model_is_known_by_its_content_and_not_by_the_name_of_its_folder(
    models: Path, tokens: TokenSet, tmp_path: Path
) -> None:
    store = collect(SnapshotSet.open(str(models), 1, ("step0", "step1")), tokens, tmp_path / "store")
    before = {path: path.read_bytes() for path in sorted(store.path.rglob("*.seg"))}
    other = tmp_path / "elsewhere" / "models"
    for seed, name in ((10, "step0"), (1, "step1"), (12, "step16")):
        tiny_model(seed).save_pretrained(other / name)
    with pytest.raises(ConfigError, match=r"other weights or another configuration under the names step0\)"):
        collect(SnapshotSet.open(str(other), 1), tokens, tmp_path / "store")
    with pytest.raises(ConfigError, match="other weights"):
        collect(SnapshotSet.open(str(other), 1, ("step0",)), tokens, tmp_path / "store")
    assert {path: path.read_bytes() for path in sorted(store.path.rglob("*.seg"))} == before
    models.rename(tmp_path / "moved")
    assert collect(SnapshotSet.open(str(tmp_path / "moved"), 1), tokens, tmp_path / "store").n_snapshots == 3


def test_a_snapshot_of_which_nothing_is_stored_may_be_replaced(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    break_with_nan(models, "step1")
    with pytest.raises(NonFiniteError):
        collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "store")
    tiny_model(1).save_pretrained(models / "step1")
    assert collect(SnapshotSet.open(str(models), 1), tokens, tmp_path / "store").missing() == []


def test_stores_of_other_weights_are_not_merged(models: Path, tokens: TokenSet, tmp_path: Path) -> None:
    first = collect(SnapshotSet.open(str(models), 1, ("step0", "step1")), tokens, tmp_path / "first")
    tiny_model(11).save_pretrained(models / "step1")
    second = collect(SnapshotSet.open(str(models), 1, ("step1", "step16")), tokens, tmp_path / "second")
    with pytest.raises(ConfigError, match=r"other weights .* under the names step1\)"):
        first.merge(second)
    assert ActivationStore.open(tmp_path / "first").snapshot_names == ["step0", "step1"]
    assert first.merge(second.select(["step16"])) > 0
    merged = ActivationStore.open(tmp_path / "first")
    assert merged.snapshot_names == ["step0", "step1", "step16"]
    assert merged.manifest["contents"]["step16"] == second.manifest["contents"]["step16"]


def test_every_byte_of_the_weights_counts(tmp_path: Path) -> None:
    """Also in a large file, and where neither size nor name say so; read again only when it has changed."""
    tiny_model(0).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    generator = np.random.default_rng(0)
    file.write_bytes(generator.bytes((40 << 20) + 77))
    digests = {snapshot_digest(tmp_path / "model")}
    for at in (0, 4 << 20, 30_000_001, (40 << 20) + 76):
        with file.open("r+b") as out:
            out.seek(at)
            byte = out.read(1)[0]
            out.seek(at)
            out.write(bytes([byte ^ 1]))
        digests.add(snapshot_digest(tmp_path / "model"))
    assert len(digests) == 5
    told: list[int] = []
    assert snapshot_digest(tmp_path / "model", told.append) in digests and told == [(40 << 20) + 77]
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt_neox"}')
    assert snapshot_digest(tmp_path / "model") not in digests


def test_shards_depend_on_the_seed_alone(tokens: TokenSet) -> None:
    def flat(seed: int) -> list[int]:
        return [int(row) for shard in plan_shards(tokens, 70, seed) for row in shard.rows]

    assert flat(0) == flat(0) != flat(1)
    empty = TokenSet(np.zeros((2, C), np.int32), np.zeros((2, C), np.int32), ["a"], "none")
    with pytest.raises(DataError, match="no token to collect"):
        plan_shards(empty, 70, 0)
