"""The quickstart's tokenizer: lossless, reproducible, readable offline through AutoTokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosscoder.activations.text import Document
from crosscoder.activations.tokens import END_OF_TEXT, pack
from crosscoder.errors import ConfigError, DataError
from crosscoder.quickstart.tokenizer import load_tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")

DOCUMENTS = [
    Document(f"d{number}", f"The quick brown fox number {number} jumps over the lazy dog, again and again. " * 5)
    for number in range(40)
]
STRANGE = "Ünïcödé — 漢字 🙂 \t tabs\n\n  and  spaces <b>&amp;</b> don't"


def test_any_text_survives_encoding_and_decoding(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(DOCUMENTS, tmp_path / "tokenizer", vocabulary=320)
    assert tokenizer.convert_ids_to_tokens(0) == "<|endoftext|>" and tokenizer.eos_token_id == END_OF_TEXT
    assert 257 < len(tokenizer) <= 320
    for text in (STRANGE, DOCUMENTS[0].text):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(DOCUMENTS[0].text)["input_ids"]) < len(DOCUMENTS[0].text) / 2


def test_auto_tokenizer_reads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = train_tokenizer(DOCUMENTS, tmp_path / "tokenizer", vocabulary=300)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    assert auto(STRANGE)["input_ids"] == tokenizer(STRANGE)["input_ids"]


def test_the_same_documents_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(DOCUMENTS, tmp_path / name, vocabulary=320)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_of_a_long_text_a_sample_is_used(tmp_path: Path) -> None:
    documents = [*DOCUMENTS[:1], Document("odd", "zyxwvut " * 400), *DOCUMENTS[1:]]
    size = sum(len(document.text) for document in documents)
    sampled = train_tokenizer(documents, tmp_path / "a", vocabulary=400, sample_characters=size // 2)
    full = train_tokenizer(documents, tmp_path / "b", vocabulary=400)
    assert len(full(" zyxwvut")["input_ids"]) == 1 < len(sampled(" zyxwvut")["input_ids"])


def test_an_end_of_text_marker_written_in_a_text_stays_text(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(DOCUMENTS, tmp_path / "tokenizer", vocabulary=300)
    tokens = pack([("a", "hello <|endoftext|> world")], tokenizer, context=8)
    assert tokens.ids[0, 0] == END_OF_TEXT and (tokens.ids == END_OF_TEXT).sum() == 1
    assert tokens.tokenizer == str(tmp_path / "tokenizer")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocabulary of 257 is too small"):
        train_tokenizer(DOCUMENTS, tmp_path / "tokenizer", vocabulary=257)
    with pytest.raises(DataError, match="there is no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)
