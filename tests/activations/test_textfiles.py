"""Text as it lies around: JSON lines, JSON, parquet, compressed; rows that are null; what is none of these."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crosscoder.activations.text import load_documents, text_identity
from crosscoder.errors import DataError

ROWS = ["first\n\nrow", "second {row}", "thïrd"]


def texts(source: object) -> list[str]:
    return [document.text for document in load_documents(str(source), minimum_characters=1)]


def test_rows_of_json_lines_are_documents_whatever_the_file_is_called(tmp_path: Path) -> None:
    lines = "\n\n".join(json.dumps({"text": row, "meta": {"source": "x"}}) for row in [None, *ROWS])
    for name in ("a.jsonl", "b.txt", "c"):
        (tmp_path / name).write_text(lines)
        assert texts(tmp_path / name) == ROWS
    (tmp_path / "d.json").write_text(json.dumps([{"text": row} for row in ROWS], indent=2))
    (tmp_path / "e.json").write_text(json.dumps(ROWS))
    assert texts(tmp_path / "d.json") == texts(tmp_path / "e.json") == ROWS


def test_parquet_and_compressed_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [None, *ROWS], "n": [0, 1, 2, 3]}), tmp_path / "rows.parquet")
    assert texts(tmp_path / "rows.parquet") == ROWS
    lines = "\n".join(json.dumps({"text": row}) for row in ROWS).encode()
    for suffix, pack in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        (tmp_path / f"rows.jsonl.{suffix}").write_bytes(pack(lines))
        (tmp_path / f"plain.txt.{suffix}").write_bytes(pack(b"plain text"))
        assert texts(tmp_path / f"rows.jsonl.{suffix}") == ROWS
        assert texts(tmp_path / f"plain.txt.{suffix}") == ["plain text"]


def test_a_folder_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plain.txt").write_text("plain")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in ROWS))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    found = load_documents(tmp_path, minimum_characters=1)
    assert [document.text for document in found] == ["plain", *ROWS]
    assert [document.name for document in found] == ["plain", "rows/0", "rows/1", "rows/2"]
    assert "left out: .png" in capsys.readouterr().err


def test_null_in_the_first_row_of_a_dataset(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": [None, *ROWS]}).save_to_disk(tmp_path / "none")
    assert texts(f"dataset:{tmp_path / 'none'}") == ROWS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"a\.jsonl: line 2 has no text: .* \(its keys: body\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl: line 2 is not JSON"),
        ("a.txt.gz", gzip.compress(b"some text")[:-6], r"cannot read .*a\.txt\.gz"),
        ("a.parquet", b"PAR1 cut", r"cannot read .*a\.parquet"),
        ("a.parquet", b"text", r"a\.parquet is not a parquet file"),
        ("a.txt.zst", b"\x28\xb5\x2f\xfd....", "unpack it first: zstd -d"),
        ("a.zip", b"PK\x03\x04....", "unpack it first and name the folder"),
        ("a.pdf", b"%PDF-1.7\xe9", "extract its text first"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_remedy(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_documents(tmp_path / name, minimum_characters=1)


def test_the_identity_of_a_text_is_its_content(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("text")
    first = text_identity(str(tmp_path / "one"))
    assert first == text_identity(str(tmp_path / "other"))
    (tmp_path / "other" / "a.txt").write_text("tezt")
    assert first != text_identity(str(tmp_path / "other"))
    with pytest.raises(DataError, match="no such text"):
        text_identity(str(tmp_path / "missing"))
