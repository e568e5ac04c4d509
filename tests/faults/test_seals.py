"""Every record notices each flipped bit in it, and what is cut off; what a user wrote is taken as it is."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from activations.tiny import tokenizer_of
from faults.damage import flips, put
from support.language_models import neox

from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.common import arrays
from crosscoder.common.arrays import load_arrays, load_mapped, load_result, save_arrays, save_mapped
from crosscoder.configfile import read_config, read_options, write_config
from crosscoder.errors import ConfigError, DataError
from crosscoder.explain.answers import Answers
from crosscoder.files import read_json, read_lines, write_json
from crosscoder.runs import Run
from crosscoder.seals import BrokenSealError, digest, open_json, seal_json
from crosscoder.train.log import forget_after, logged_seconds, read_metrics


@dataclass(frozen=True)
class Options:
    steps: int = 10
    lr: float = 1e-3
    name: str = "a"


RECORD = {"step": 35, "names": ["a", "é", '"checksum": "'], "threshold": 4.0, "done": True, "more": {"x": None}}
ROWS = [{"step": step, "loss": step / 7, "seconds": 2.5 * step} for step in (10, 20, 30)]
ANSWER = {
    "key": "k", "model": "m", "prompt": "p", "missing": None, "max_output": 9, "tokens_in": 3, "tokens_out": 4,
}  # fmt: skip


def write_rows(path: Path) -> None:
    path.write_bytes(b"".join(map(seal_json, ROWS)))


WRITERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], Any], Any]] = {
    "record.json": (lambda path: write_json(path, RECORD), read_json, RECORD),
    "metrics.jsonl": (write_rows, read_metrics, ROWS),
    "train.yaml": (
        lambda path: write_config(path, Options(name="é")),
        lambda path: read_config(path, Options, record=True),
        Options(name="é"),
    ),
    "step0-clean.npy": (
        lambda path: save_mapped(path, np.arange(6, dtype=np.int16).reshape(2, 3)),
        lambda path: load_mapped(path).tolist(),
        [[0, 1, 2], [3, 4, 5]],
    ),
    "life.npz": (
        lambda path: save_arrays(path, {"a": np.arange(3)}),
        lambda path: {name: array.tolist() for name, array in load_arrays(path).items()},
        {"a": [0, 1, 2]},
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_flipped_bit_and_every_cut_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write, read, wanted = WRITERS[name]
    path = tmp_path / name
    write(path)
    whole = path.read_bytes()
    assert read(path) == wanted
    for data in [*flips(whole), *(whole[:end] for end in range(0, len(whole) - 1))]:
        put(path, data)
        if name == "metrics.jsonl" and whole.startswith(data):  # cut off: what a kill leaves
            assert read(path) == wanted[: data.count(b"\n")]
            continue
        with pytest.raises(DataError, match=name):
            read(path)


def test_the_checksum_is_compared_before_anything_is_parsed() -> None:
    for text in (b"[" * 100_000, b'{"a": ' * 100_000, b"", b"\x00" * 100, b'{"checksum": "0123456789abcdef"}'):
        with pytest.raises(BrokenSealError, match="checksum"):
            open_json(text)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "-1e400", "9" * 5000])
def test_numbers_that_json_or_doubles_do_not_have_are_refused(number: str) -> None:
    sealed = seal_json({"a": "HERE"}).replace(b'"HERE"', number.encode())
    head, _, rest = sealed.rpartition(b'"checksum": "')
    zeros = head + b'"checksum": "' + b"0" * 16 + rest[16:]
    with pytest.raises(BrokenSealError, match="is not readable JSON"):
        open_json(zeros.replace(b"0" * 16, digest(zeros).encode()))


def test_a_users_file_is_taken_as_it_is_and_a_changed_record_is_told(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    write_config(path, Options())
    sealed = path.read_text()
    assert sealed.startswith("steps: 10\n") and read_config(path, Options) == Options()
    path.write_text(sealed.replace("steps: 10", "steps: 11"))
    with pytest.raises(ConfigError, match=r"train\.yaml is damaged, or was changed by hand.*--config a copy"):
        read_config(path, Options)
    with pytest.raises(DataError, match=r"train\.yaml is damaged"):
        read_options(path, record=True)
    path.write_text("".join(sealed.replace("steps: 10", "steps: 11").splitlines(keepends=True)[:-1]))
    assert read_config(path, Options) == Options(steps=11)
    with pytest.raises(DataError, match=r"train\.yaml has no checksum in its last line"):
        read_options(path, record=True)


def test_aliases_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("a: &a [x, x]\nb: [*a, *a]\n")
    with pytest.raises(ConfigError, match=r"train\.yaml is not valid YAML: aliases"):
        read_options(path)


def test_settings_of_a_run_are_compared_with_a_whole_record_alone(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.begin("verb", Options())
    run.require_same("verb", Options())
    record = run.path / "config" / "verb.yaml"
    record.write_text(record.read_text().replace("steps: 10", "steps: 14"))
    with pytest.raises(DataError, match=r"verb\.yaml is damaged"):
        run.require_same("verb", Options(steps=14))


def test_a_damaged_line_of_a_log_is_told_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "metrics.jsonl"
    write_rows(log)
    whole = log.read_bytes()
    log.write_bytes(whole.replace(b'"step": 20', b'"step": 28') + b'{"step": 4')
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2 is damaged"):
        read_metrics(log)
    assert logged_seconds(log) == 75.0
    forget_after(log, 30)
    assert "metrics.jsonl: 1 damaged line(s) left out, the first is line 2" in capsys.readouterr().err
    assert read_metrics(log) == [ROWS[0], ROWS[2]]
    forget_after(log, 10)
    assert log.read_bytes() == whole[: whole.index(b"\n") + 1], "the same bytes"
    log.write_bytes(whole.replace(b'"step": 30', b'"step": 31'))
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 3, the last, is damaged"):
        logged_seconds(log)


def test_a_damaged_answer_is_told_and_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "answers.jsonl"
    answers = Answers(path)
    for key in "abc":
        answers.add({**ANSWER, "key": key})
    whole = path.read_bytes()
    at = whole.index(b"\n")
    for data in flips(whole, every=3):
        put(path, data)
        found = Answers(path)
        assert "answers.jsonl: " in capsys.readouterr().err
        kept = [record for record in map(found.find, "abc", [9] * 3) if record is not None]
        assert 1 <= len(kept) <= 2 and all(record == {**ANSWER, "key": record["key"]} for record in kept)
    put(path, whole[: at + 1] + whole[at + 1 :][:-5])
    assert len(Answers(path)) == 2 and path.read_bytes().count(b"\n") == 2, "what a kill cut off is dropped"
    assert capsys.readouterr().err == ""
    path.write_bytes(whole.replace(b', "tokens_in": 3', b"", 1))
    assert len(Answers(path)) == 2
    assert "1 line(s) damaged" in capsys.readouterr().err


@dataclass(frozen=True)
class Result:
    norms: np.ndarray
    n: int


def forged(path: Path, archive: bytes) -> None:
    """An archive of arrays by another writer, with a right checksum."""
    head = archive[:-2] + (16).to_bytes(2, "little")
    path.write_bytes(head + digest(head).encode())


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def test_numpy_reads_sealed_arrays(tmp_path: Path) -> None:
    for compressed in (True, False):
        save_arrays(tmp_path / "a.npz", {"x": np.eye(3), "y.z": np.array("é")}, compressed=compressed)
        with np.load(tmp_path / "a.npz") as found:
            assert (found["x"] == np.eye(3)).all() and found["y.z"] == "é"


def test_forged_arrays_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "ALWAYS_UNPACKED", 1 << 20)
    path = tmp_path / "life.npz"
    forged(path, npz(norms=np.ones(3), n=np.array(3)))
    assert load_result(Result, path).n == 3
    for archive, reason in (
        (npz(norms=np.array([{}], dtype=object), n=np.array(3)), "allow_pickle"),
        (npz(norms=np.zeros(1 << 23, np.uint8), n=np.array(3)), "it unpacks to far more"),
        (npz(norms=np.ones(3)), "results lack n"),
        (npz(norms=np.ones(3), n=np.array("three")), "invalid literal"),
        (npz(norms=np.ones(3), n=np.ones(2)), "size 1"),
        (b"PK\x05\x06" + bytes(18), "results lack norms"),
        (bytes(30), "not a zip file"),
    ):
        forged(path, archive)
        with pytest.raises(DataError, match=rf"life\.npz is (damaged|malformed).*{reason}"):
            load_result(Result, path)
    path.write_bytes(npz(norms=np.ones(3), n=np.array(3)))
    with pytest.raises(DataError, match=r"life\.npz is damaged \(its checksum differs"):
        load_result(Result, path)


def test_lines_of_a_file_that_is_no_log_are_none(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\x00\xff\n\n[]\n" + b'{"a": ' * 3000 + b"\n" + seal_json({"a": 1}))
    assert [record for _, record in read_lines(path)] == [None, None, None, None, {"a": 1}]
    path.write_bytes(b"")
    assert list(read_lines(path)) == []


def test_a_snapshot_or_tokenizer_that_changed_since_collection_is_named(tmp_path: Path) -> None:
    model = tmp_path / "models"
    for seed, name in enumerate(("step0", "step1")):
        neox(seed).save_pretrained(model / name)
        tokenizer_of("a few words of text").save_pretrained(model / name)
    opened = SnapshotSet.open(str(model), 1)
    known = {"content": opened.identified().content, "tokenizer": opened.tokenizer_content()}
    snapshots = replace(opened, given_steps=(0, 1), **known)  # type: ignore[arg-type]
    run = Run(tmp_path / "run")
    run.write_snapshots(snapshots)
    assert run.snapshots() == snapshots and snapshots.only(["step0"]).tokenizer == ""
    snapshots.load_trunk(0)
    words = snapshots.load_tokenizer().get_vocab()
    for name, change, read in (
        ("config.json", (b'"hidden_size": 16', b'"hidden_size": 18'), lambda: snapshots.load(1)),
        ("config.json", (b'"gpt_neox"', b'"gpt^neox"'), lambda: snapshots.load_trunk(1)),
        ("model.safetensors", (b"\x00\x00", b"\x01\x00"), lambda: snapshots.load(1)),
        ("tokenizer.json", (b'"a"', b'"c"'), snapshots.load_tokenizer),
        ("tokenizer_config.json", (b"eos_token", b"eos_tokeo"), snapshots.load_tokenizer),
    ):
        path = model / "step1" / name
        whole = path.read_bytes()
        put(path, whole.replace(*change, 1))
        assert path.read_bytes() != whole
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            read()
        put(path, whole)
    assert snapshots.load_tokenizer().get_vocab() == words
