"""`crosscoder collect`: it checks everything first and writes last, and says what became of the text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from activations.tiny import C, tiny_model, tokenizer_of

from crosscoder import cli
from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.store import ActivationStore
from crosscoder.activations.tokens import TokenSet
from crosscoder.runs import Run

NAMES = ("step0", "step1", "step16")


def snapshots(folder: Path, seeds: tuple[int, ...] = (0, 1, 2), names: tuple[str, ...] = NAMES, **changes: Any) -> Path:
    for name, seed in zip(names, seeds, strict=True):
        tiny_model(seed, **changes).save_pretrained(folder / name)
        tokenizer_of("abcdefg hijk abc def").save_pretrained(folder / name)
    return folder


def texts(folder: Path, words: str = "abc def gab ") -> Path:
    folder.mkdir(parents=True)
    for number in range(8):
        (folder / f"{number}.txt").write_text(words * (20 + number) + "abcdefgh"[number])
    return folder


def collect(run: Path, models: Path, *options: object) -> int:
    return cli.main(["collect", str(run), "--model", str(models), "--layer", "1", *map(str, options)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    snapshots(tmp_path / "models")
    texts(tmp_path / "text")
    assert collect(tmp_path / "run", tmp_path / "models", "--text", tmp_path / "text", "--context", C) == 0
    return tmp_path / "run"


def contents(run: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file() and ".lock" not in p.name}


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--layer", "2"], "layer: 1 there, 2 now"),
        (["--site", "mlp"], "site: residual there, mlp now"),
        (["--context", "8"], f"context: {C} there, 8 now"),
        (["--by-document"], "by-document: False there, True now"),
        (["--heldout-fraction", "0.4"], "heldout-fraction: 0.2 there, 0.4 now"),
        (["--tokens", "50"], "tokens: None there, 50 now"),
        (["--leave-out-positions", "1"], "left-out: {} there, {'positions': 1} now"),
        (["--seed", "3"], "seed: 0 there, 3 now"),
        (["--model-dtype", "bf16"], 'model_dtype: "fp32" there, "bf16" now'),
        (["--dtype", "int8"], 'dtype: "bf16" there, "int8" now'),
        (["--revisions", "step0", "step16"], "step1 there, not named now"),
        (["--text", "OTHER"], "text: "),
    ],
)
def test_other_settings_on_a_run_that_has_data_are_refused_and_nothing_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], difference: str
) -> None:
    other = texts(tmp_path / "other", "hij kab ")
    before = contents(run)
    asked = [str(other) if option == "OTHER" else option for option in options]
    assert collect(run, tmp_path / "models", *asked) == 2
    assert difference in capsys.readouterr().err
    assert contents(run) == before


def test_the_same_settings_again_change_nothing(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    assert collect(run, tmp_path / "models") == 0
    assert collect(run, tmp_path / "models", "--text", tmp_path / "text", "--context", C) == 0
    assert contents(run) == before


def test_a_process_that_goes_on_proves_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between two commands transformers may have changed; where nothing is left to collect, no model is loaded."""
    before = contents(run)
    load = SnapshotSet.load_trunk

    def wrong(self: SnapshotSet, k: int, dtype: torch.dtype | None = None) -> Any:
        model = load(self, k, dtype)
        with torch.no_grad():
            model.layers[0].mlp.dense_4h_to_h.bias.add_(1.0)
        return model

    monkeypatch.setattr(SnapshotSet, "load_trunk", wrong)
    assert collect(run, tmp_path / "models") == 0
    assert contents(run) == before
    ActivationStore.open(Run(run).activations("train")).segment_path(0, 1).unlink()
    assert collect(run, tmp_path / "models") == 2
    assert "does not give the whole model's residual stream" in capsys.readouterr().err
    monkeypatch.undo()
    assert collect(run, tmp_path / "models") == 0
    assert contents(run) == before


def test_a_text_of_the_same_name_with_another_content_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text" / "3.txt").write_text("abc")
    assert collect(run, tmp_path / "models", "--text", tmp_path / "text") == 2
    assert "with another content" in capsys.readouterr().err


def test_another_model_under_the_same_names_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its weights, not by the name of its folder; the same weights in another place are the same model."""
    before = contents(run)
    other = snapshots(tmp_path / "elsewhere" / "models", (10, 1, 12))
    assert collect(run, other) == 2
    assert "other weights or another configuration under the names step0, step16" in capsys.readouterr().err
    assert contents(run) == before
    (tmp_path / "models").rename(tmp_path / "moved")
    assert collect(run, tmp_path / "moved") == 0
    assert json.loads((run / "snapshots.json").read_text())["model"] == str(tmp_path / "moved")


def test_a_relative_model_is_that_of_the_place_where_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots(tmp_path / "here" / "models")
    texts(tmp_path / "text")
    monkeypatch.chdir(tmp_path / "here")
    options = ["--text", "../text", "--context", str(C), "--tokens-only"]
    assert cli.main(["collect", "run", "--model", "models", "--layer", "1", *options]) == 0
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    found = Run(tmp_path / "here" / "run").snapshots()
    assert found.model == str(tmp_path / "here" / "models") and found.load(0) is not None
    record = yaml.safe_load((tmp_path / "here" / "run" / "config" / "collect.yaml").read_text())
    assert (record["model"], record["text"]) == (found.model, str(tmp_path / "text"))


def test_a_snapshot_that_changed_since_it_was_collected_is_not_loaded(run: Path, tmp_path: Path) -> None:
    tiny_model(7).save_pretrained(tmp_path / "models" / "step1")
    found = Run(run).snapshots()
    with pytest.raises(ValueError, match="snapshot step1 of .* is not the one that was collected"):
        found.load_trunk(1)
    found.load_trunk(0)


def test_snapshots_added_later_stand_in_the_order_of_training(tmp_path: Path) -> None:
    models, text = snapshots(tmp_path / "models"), texts(tmp_path / "text")
    run = tmp_path / "run"
    options = ["--text", text, "--context", C, "--dtype", "fp32"]
    assert collect(run, models, *options, "--revisions", "step0", "step16") == 0
    assert collect(run, models, *options) == 0
    assert ActivationStore.open(run / "activations" / "train").snapshot_names == ["step0", "step16", "step1"]
    store = Run(run).store("train")
    assert store.snapshot_names == list(NAMES) == list(Run(run).snapshots().revisions)
    assert collect(tmp_path / "once", models, *options) == 0
    assert torch.equal(store.read(0), Run(tmp_path / "once").store("train").read(0))


def test_one_line_says_what_became_of_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models, text = snapshots(tmp_path / "models"), texts(tmp_path / "text")
    (text / "empty.txt").write_text(" \n")
    shutil.copy(text / "3.txt", text / "again.txt")
    assert collect(tmp_path / "run", models, "--text", text, "--context", C, "--tokens-only") == 0
    said = capsys.readouterr().out
    assert "text: 8 documents, " in said and "1 empty documents, 1 that occur before" in said
    kept = {split: TokenSet.load(tmp_path / "run" / "tokens" / split).n_tokens for split in ("train", "heldout")}
    assert f"(train {kept['train']:,}, heldout {kept['heldout']:,})" in said
    assert collect(tmp_path / "few", models, "--text", text, "--context", C, "--tokens-only", "--tokens", 400) == 0
    assert "reading stopped at --tokens 400" in capsys.readouterr().out


def test_equal_snapshots_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("step0", "step1", "step512", "step4000")
    models, text = snapshots(tmp_path / "models", (7, 7, 3, 7), names), texts(tmp_path / "text")
    assert collect(tmp_path / "run", models, "--text", text, "--context", C) == 0
    assert "step0, step1, step4000 have equal activations" in capsys.readouterr().err
    alike = json.loads((tmp_path / "run" / "snapshots.json").read_text())["alike"]
    assert alike == [{"snapshots": ["step0", "step1", "step4000"], "difference": 0.0}]


def test_a_context_beyond_the_models_is_refused_at_the_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models, text = snapshots(tmp_path / "models"), texts(tmp_path / "text")
    assert collect(tmp_path / "run", models, "--text", text, "--context", 2 * C) == 2
    assert f"longer than {models} was made for ({C}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "tokens").exists() and not (tmp_path / "run" / "config").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "0"], "--context is 0 tokens; it must be at least 2"),
        (["--heldout-fraction", "nan"], "--heldout-fraction is nan; it must be above 0 and under 1"),
        (["--leave-out-positions", "-1"], "--leave-out-positions is -1; it must be 0 or more"),
        (["--leave-out-positions", str(C)], f"--leave-out-positions {C} leaves nothing of sequences of {C} tokens"),
        (["--leave-out-norm", "0"], "--leave-out-norm is 0 median norms; it must be above 1"),
        (["--leave-out-norm", "nan"], "--leave-out-norm is nan median norms; it must be above 1"),
        (["--leave-out-ids", "5", "-7"], "--leave-out-ids has -7; ids of tokens are 0 or more"),
        (["--seed", "-1"], "--seed is -1; it must be 0 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_door(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    models, text = snapshots(tmp_path / "models", (0,), ("step0",)), texts(tmp_path / "text")
    assert collect(tmp_path / "run", models, "--text", text, "--context", C, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "tokens").exists() and not (tmp_path / "run" / "config").exists()


def test_names_without_a_step_need_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = snapshots(tmp_path / "models", (0, 1), ("stage1-step1000-tokens3B", "main"))
    text = texts(tmp_path / "text")
    options = ["--text", text, "--context", C, "--tokens-only", "--revisions", "stage1-step1000-tokens3B", "main"]
    assert collect(tmp_path / "run", models, *options) == 2
    assert "'main' does not carry its training step" in capsys.readouterr().err
    assert collect(tmp_path / "run", models, *options, "--steps", 1000, 9000) == 0
    assert Run(tmp_path / "run").snapshots().steps.tolist() == [1000, 9000]


def test_tokens_are_left_out_by_id_position_and_norm(tmp_path: Path) -> None:
    models, text = snapshots(tmp_path / "models"), texts(tmp_path / "text")
    options = ["--text", text, "--context", C, "--dtype", "fp32"]
    assert collect(tmp_path / "all", models, *options) == 0
    whole = Run(tmp_path / "all").store("train")
    rows = np.concatenate([whole.tokens(shard) for shard in range(len(whole.shard_rows))])
    some = int(rows[0, 0])
    left = ["--leave-out-ids", some, "--leave-out-positions", 2]
    assert collect(tmp_path / "few", models, *options, *left) == 0
    store = Run(tmp_path / "few").store("train")
    kept = np.concatenate([store.tokens(shard) for shard in range(len(store.shard_rows))])
    wanted = rows[(rows[:, 0] != some) & (rows[:, 3] >= 2)]
    assert sorted(map(tuple, kept)) == sorted(map(tuple, wanted))
    assert store.manifest["source"]["left_out"] == {"ids": [some], "positions": 2}
    # By norm: what is left has, at the last snapshot, less than 1.2 median norms.
    assert collect(tmp_path / "norm", models, *options, "--leave-out-norm", 1.2) == 0
    store = Run(tmp_path / "norm").store("train")
    norms = whole.read(0)[:, -1].norm(dim=1)
    small = norms < 1.2 * np.median(norms.numpy())
    assert 0 < int(small.sum()) < len(norms)
    places = {tuple(row) for row in whole.tokens(0)[small.numpy()]}
    assert {tuple(row) for row in store.tokens(0)} == places
    assert store.manifest["source"]["left_out"] == {"norm": 1.2}
