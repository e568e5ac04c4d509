"""Packing documents into rows of tokens, and keeping them on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crosscoder.activations.tokens import TokenSet, pack
from crosscoder.errors import ConfigError, DataError
from crosscoder.files import read_json, write_json

transformers = pytest.importorskip("transformers")


def word_tokenizer(eos_first: bool = True) -> Any:
    """One id a word: `<|endoftext|>` is 0, words `w1`, `w2`, ... are 1, 2, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(1, 50)} | {"<|endoftext|>": 0, "<unk>": 50}
    if not eos_first:
        words["<|endoftext|>"], words["w1"] = 1, 0
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


@pytest.fixture
def tokens() -> TokenSet:
    documents = [("a", words(1, 2, 3)), ("b", words(4, 5)), ("c", words(6, 7, 8, 9))]
    return pack(documents, word_tokenizer(), context=5, tokenizer_name="words")


def test_each_document_follows_an_end_of_text_token_and_the_tail_is_dropped(tokens: TokenSet) -> None:
    assert tokens.ids.tolist() == [[0, 1, 2, 3, 0], [4, 5, 0, 6, 7]]
    assert tokens.document.tolist() == [[0, 0, 0, 0, 1], [1, 1, 2, 2, 2]]
    assert tokens.names == ["a", "b", "c"] and tokens.tokenizer == "words"
    assert tokens.ids.dtype == tokens.document.dtype == np.int32
    assert (tokens.n_sequences, tokens.context, tokens.n_tokens) == (2, 5, 10)


def test_batches_of_documents_do_not_change_the_rows(tokens: TokenSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosscoder.activations.tokens._BATCH_CHARACTERS", 1)
    documents = iter([("a", words(1, 2, 3)), ("b", words(4, 5)), ("c", words(6, 7, 8, 9))])
    assert pack(documents, word_tokenizer(), context=5).fingerprint == tokens.fingerprint


def test_the_callers_tokenizer_keeps_its_settings() -> None:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert pack([("a", words(1, 2, 3))], tokenizer, context=4).ids.tolist() == [[0, 1, 2, 3]]
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2
    assert tokenizer.backend_tokenizer.padding["length"] == 9


def test_what_is_saved_is_loaded(tokens: TokenSet, tmp_path: Path) -> None:
    tokens.save(tmp_path / "tokens")
    loaded = TokenSet.load(tmp_path / "tokens")
    np.testing.assert_array_equal(loaded.ids, tokens.ids)
    np.testing.assert_array_equal(loaded.document, tokens.document)
    assert loaded.names == tokens.names and loaded.tokenizer == tokens.tokenizer
    assert loaded.fingerprint == tokens.fingerprint
    tokens.save(tmp_path / "tokens")  # again, over the first
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_the_fingerprint_tells_sets_apart(tokens: TokenSet) -> None:
    documents = [("a", words(1, 2, 3)), ("b", words(4, 5)), ("c", words(6, 7, 8, 9))]
    others = [
        pack(documents, word_tokenizer(), context=6),
        pack(documents[::-1], word_tokenizer(), context=5),
        pack([("z", documents[0][1]), *documents[1:]], word_tokenizer(), context=5),
        TokenSet(tokens.ids, tokens.document * 0, tokens.names, tokens.tokenizer),
        TokenSet(tokens.ids.reshape(5, 2), tokens.document.reshape(5, 2), tokens.names, tokens.tokenizer),
    ]
    assert len({tokens.fingerprint, *(other.fingerprint for other in others)}) == 6
    moved = TokenSet(tokens.ids, tokens.document, tokens.names, "/another/folder")
    assert moved.fingerprint == tokens.fingerprint


@pytest.mark.parametrize("name", ["ids.npy", "document.npy"])
def test_every_flipped_bit_of_the_arrays_is_refused(tokens: TokenSet, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "tokens"
    tokens.save(folder)
    whole = (folder / name).read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        (folder / name).write_bytes(damaged)
        with pytest.raises(DataError, match=name):
            TokenSet.load(folder)
    (folder / name).write_bytes(whole[:-4])
    with pytest.raises(DataError, match=name):
        TokenSet.load(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=name):
        TokenSet.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["a", "b", "x"]}, "fingerprint"),
        ({"names": ["a"]}, "names"),
        ({"names": None}, "damaged"),
        ({"version": 2}, "upgrade"),
        ({"format": "something"}, "does not describe"),
        ({"sha256": {}}, r"tokens\.json is damaged \(sha256"),
        ({"sha256": ["ids.npy", "document.npy"]}, r"tokens\.json is damaged \(sha256"),
    ],
)
def test_a_changed_header_is_refused(tokens: TokenSet, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = tmp_path / "tokens"
    tokens.save(folder)
    header = read_json(folder / "tokens.json")
    write_json(folder / "tokens.json", header | change)  # with a checksum that holds
    with pytest.raises(DataError, match=message):
        TokenSet.load(folder)


def test_a_folder_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokens\.json does not exist"):
        TokenSet.load(tmp_path)
    (tmp_path / "tokens.json").write_text("[1")
    with pytest.raises(DataError, match="tokens.json has no checksum"):
        TokenSet.load(tmp_path)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(DataError, match="3 tokens, less than one row of 4"):
        pack([("a", words(1, 2))], word_tokenizer(), context=4)
    with pytest.raises(DataError, match="0 tokens"):
        pack([], word_tokenizer(), context=4)
    with pytest.raises(ConfigError, match="context is 1"):
        pack([("a", words(1, 2))], word_tokenizer(), context=1)


def test_the_end_of_text_may_have_any_id(tmp_path: Path) -> None:
    made = pack([("a", words(2, 3))], word_tokenizer(eos_first=False), context=3)
    assert made.end_of_text == 1 and made.ids[0, 0] == 1
    made.save(tmp_path / "tokens")
    again = TokenSet.load(tmp_path / "tokens")
    assert (again.end_of_text, again.fingerprint) == (1, made.fingerprint)
    assert TokenSet(made.ids, made.document, made.names, "").fingerprint != made.fingerprint


def test_arrays_that_do_not_fit_are_refused(tokens: TokenSet) -> None:
    for ids, document in (
        (tokens.ids.astype(np.int64), tokens.document),
        (tokens.ids, tokens.document[:1]),
        (tokens.ids.ravel(), tokens.document.ravel()),
        (tokens.ids[:0], tokens.document[:0]),
        (tokens.ids, tokens.document + 3),
        (tokens.ids, tokens.document - 1),
    ):
        with pytest.raises(DataError):
            TokenSet(ids, document, tokens.names, tokens.tokenizer)
