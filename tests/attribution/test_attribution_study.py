"""`crosscoder attribute` as a user meets it: results, resuming, refusals. The run is the planted circuit's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attribution import planted
from support.command_line import error

from crosscoder import cli, weights
from crosscoder.activations.tokens import TokenSet
from crosscoder.attribution import attribution_study as study_module
from crosscoder.attribution.attribution_study import AttributionStudy
from crosscoder.attribution.coding import LeftOut
from crosscoder.attribution.finished import finished_tasks
from crosscoder.attribution.gradients import METHODS
from crosscoder.common.tables import read_table
from crosscoder.config import AttributionSettings
from crosscoder.errors import DataError
from crosscoder.files import read_json, write_json
from crosscoder.runs import Run

REVISIONS = ("step0", "step1", "step10")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything but results, and a file with the planted task."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    run = Run(tmp_path_factory.mktemp("template") / "run")
    words = ["<|endoftext|>", *(f"w{token}" for token in range(1, planted.VOCABULARY))]
    core = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    new: Any = PreTrainedTokenizerFast
    tokenizer = new(tokenizer_object=core, eos_token=words[0], unk_token=words[0])
    for k, revision in enumerate(REVISIONS):
        planted.model(k).save_pretrained(run.path / "language_model" / revision)
        tokenizer.save_pretrained(run.path / "language_model" / revision)
    write_json(run.snapshots_file, {"model": "language_model", "revisions": list(REVISIONS), "layer": 0})
    crosscoder = planted.crosscoder()
    run.crosscoder.mkdir()
    weights.save(crosscoder.config, crosscoder.state_dict(), run.crosscoder)
    source = {"model": "language_model", "layer": 0}
    write_json(run.crosscoder / "training.json", {"store": {"snapshots": list(REVISIONS), "source": source}})
    rows = []
    for example in planted.task().examples:
        clean, corrupted = (" ".join(words[token] for token in side[1:]) for side in (example.clean, example.corrupted))
        rows.append(
            {"clean": clean, "corrupted": corrupted, "right": f" w{planted.RIGHT}", "wrong": f" w{planted.WRONG}"}
        )
    (run.path.parent / "nouns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run.path


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Run:
    import shutil

    shutil.copytree(template, tmp_path / "run")
    shutil.copy(template.parent / "nouns.jsonl", tmp_path / "nouns.jsonl")
    return Run(tmp_path / "run")


def attribute(run: Run, *more: object) -> int:
    command = ["attribute", str(run.path), "--task", str(run.path.parent / "nouns.jsonl"), "--n-random", "1"]
    return cli.main([*command, *map(str, more)])


def tables(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run.path / "attribution" / "nouns").iterdir() if path.is_file()}


def test_results_and_summary(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert attribute(run) == 0
    printed = capsys.readouterr().out
    assert "above chance at 2 of 3 snapshots: step1, step10" in printed and "crosscoder report" in printed
    figures = run.summary()["attribution"]["nouns"]
    assert figures["clean_accuracy"] == {"step0": 0.0, "step1": 1.0, "step10": 1.0}
    assert figures["logit_difference"]["step10"] == pytest.approx(2 * figures["logit_difference"]["step1"], rel=1e-3)
    assert figures["k_for_80_percent"] == figures["by_ablation"]["mean"]["k_for_80_percent"]
    assert figures["by_ablation"]["resample"]["k_for_80_percent"] == {"step1": 2, "step10": 2}
    assert figures["ig_completeness_error"] < 1e-3
    assert set(figures["rank_correlation_with_exact"]) == set(METHODS)
    assert figures["disrupt_top50"] is None and figures["disrupt_random50"] is None, "there are only 20 features"
    assert (run.path / "config" / "attribute.yaml").exists()

    [task] = finished_tasks(run, REVISIONS)
    assert task.figures == figures and task.record["settings"]["steps"] == 10
    assert task.circuit.dominant.tolist() == [-1, 3, 3]
    folder = run.path / "attribution" / task.name
    attributions = read_table(folder / "attributions.parquet")
    last = attributions["snapshot"] == "step10"
    best = attributions["feature"][last][np.argmax(attributions["integrated_gradients"][last])]
    assert best == 3 and set(attributions["snapshot"]) == {"step1", "step10"}
    curves = read_table(folder / "curves.parquet")
    assert set(curves["ablation"]) == {"mean", "resample"} and set(curves["set"]) >= {"top", "active"}
    whole = (curves["k"] == curves["k"].max()) & (curves["set"] == "top")
    np.testing.assert_allclose(curves["faithfulness"][whole], 1, atol=1e-3)  # all that were active on the train half
    assert (curves["drop_low"] <= curves["drop"] + 1e-9).all() and (curves["drop"] <= curves["drop_high"] + 1e-9).all()
    metric = read_table(folder / "metric.parquet")
    clean = metric["clean"][(metric["snapshot"] == "step1") & (metric["prompt"] >= 12)].mean()
    chosen = curves["snapshot"] == "step1"
    np.testing.assert_allclose(curves["drop"][chosen], 1 - curves["disrupt"][chosen] / clean, atol=1e-6)
    by_prompt = read_table(folder / "by_prompt.parquet")
    mean = (
        by_prompt["integrated_gradients"][(by_prompt["snapshot"] == "step10") & (by_prompt["feature"] == 3)].sum() / 12
    )
    assert mean == pytest.approx(attributions["integrated_gradients"][last].max(), rel=1e-5)
    prompts = read_table(folder / "prompts.parquet")
    assert set(prompts["right"]) == {f"w{planted.RIGHT}"} and len(read_table(folder / "metric.parquet")["clean"]) == 72
    assert not list(folder.glob("work-*")), "what was needed on the way is gone"


def test_a_second_run_computes_nothing_and_other_settings_anew(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attribute(run) == 0
    before = tables(run)
    with monkeypatch.context() as patched:
        patched.setattr(study_module, "measure_snapshot", lambda *_: pytest.fail("computed again"))
        assert attribute(run) == 0
    assert tables(run) == before
    assert attribute(run, "--steps", 3) == 0
    assert json.loads((run.path / "attribution" / "nouns" / "results.json").read_text())["settings"]["steps"] == 3
    other = tables(run)
    assert attribute(run, "--no-resume") == 0
    assert tables(run) == other != before, "what is left out is as before, and gives the same bytes"
    assert attribute(run, "--no-resume", "--steps", 10) == 0
    assert tables(run) == before


def test_an_interrupted_study_goes_on(
    run: Run, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = study_module.measure_snapshot
    done: list[int] = []

    def stop_at_the_third(model: Any, k: int, *rest: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(k)
        return measure(model, k, *rest)

    monkeypatch.setattr(study_module, "measure_snapshot", stop_at_the_third)
    assert attribute(run) == cli.INTERRUPTED
    assert "attribution" not in run.summary() and finished_tasks(run, REVISIONS) == []
    resumed: list[int] = []
    monkeypatch.setattr(
        study_module, "measure_snapshot", lambda m, k, *rest: (resumed.append(k), measure(m, k, *rest))[1]
    )
    assert attribute(run) == 0
    assert resumed == [2], "the two snapshots that were done are kept"
    interrupted = tables(run)
    assert attribute(run, "--no-resume") == 0
    assert tables(run) == interrupted


def test_a_task_at_chance_is_reported_as_such(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (run.path.parent / "nouns.jsonl").read_text().splitlines()]
    wrong_way = [{**row, "right": row["wrong"], "wrong": row["right"]} for row in rows]
    (run.path.parent / "nouns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong_way))
    assert attribute(run) == 0
    assert "at chance, so nothing is attributed" in capsys.readouterr().out
    figures = run.summary()["attribution"]["nouns"]
    assert figures["above_chance"] == [] and figures["disrupt_top50"] is None and figures["k_for_80_percent"] == {}
    assert set(figures["clean_accuracy"].values()) == {0.0}
    assert set(read_table(run.path / "attribution" / "nouns" / "metric.parquet")) == {
        "snapshot",
        "prompt",
        "clean",
        "corrupted",
    }


def test_refusals(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.path.parent / "nouns.jsonl"
    good = path.read_text()
    first = json.loads(good.splitlines()[0])

    path.write_text(json.dumps({**first, "right": " w1 w2"}) + "\n" + good)
    assert attribute(run) == 3
    assert "line 1: the right answer ' w1 w2' is 2 tokens" in error(capsys)
    long = {**first, "clean": "w17 " * 64 + "w1", "corrupted": "w17 " * 64 + "w9"}
    path.write_text(json.dumps(long) + "\n" + good)
    assert attribute(run) == 3
    assert "a prompt has 66 tokens, the language model reads 64; shorten it" in error(capsys)
    path.write_text(good)
    assert cli.main(["attribute", str(run.path), "--task", "sva"]) == 2
    assert "there is no task 'sva'; known are induction" in error(capsys)
    assert cli.main(["attribute", str(run.path), "--task", "ioi"]) == 3
    assert "task ioi: of" in error(capsys)
    assert not (run.path / "attribution").exists(), "refused before any work"

    snapshots = json.loads(run.snapshots_file.read_text())
    write_json(run.snapshots_file, {**snapshots, "layer": 1})
    assert attribute(run) == 3
    assert "was trained on another layer (0) than" in (line := error(capsys)) and "crosscoder train" in line
    write_json(run.snapshots_file, {**snapshots, "revisions": ["step1", "step0", "step10"]})
    assert attribute(run) == 3
    assert "was trained on another snapshots (step0, step1, step10)" in error(capsys)
    write_json(run.snapshots_file, {**snapshots, "revisions": ["step0", "step10"]})
    assert attribute(run) == 3
    assert "is of another model: it reads 3 snapshots of width 32" in error(capsys)
    run.snapshots_file.unlink()
    assert attribute(run) == 3
    assert "snapshots.json does not exist; collect first" in error(capsys)
    assert cli.main(["attribute", str(run.path.parent / "nothing"), "--task", "induction"]) == 3
    assert "train it first" in error(capsys)


def test_another_end_of_text_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.ones((1, 4), dtype=np.int32)
    TokenSet(ids, np.zeros_like(ids), ["text"], "tokenizer", end_of_text=1).save(run.tokens("heldout"))
    assert attribute(run) == 3
    assert "the end-of-text token of this model is 1; the prompts of tasks begin with token 0" in error(capsys)


def test_a_crosscoder_of_another_site_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(run.snapshots_file, {**read_json(run.snapshots_file), "site": "mlp"})
    assert attribute(run) == 3
    assert "reads what the MLP adds to the residual stream; attribution puts" in error(capsys)


def test_what_was_left_out_of_the_training_tokens_is_left_out_of_the_prompts(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = np.ones((1, 4), dtype=np.int32)
    source = {"left_out": {"positions": 2, "ids": [7, 9], "norm": 8.0}}
    TokenSet(ids, np.zeros_like(ids), ["text"], "tokenizer", source=source).save(run.tokens("train"))
    study = AttributionStudy(run, AttributionSettings())
    assert study.left_out == LeftOut(2, (7, 9))
    assert "without the tokens of 8 times the median norm or more" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--steps", "0"], ["--test-share", "1"], ["--ablations", "mean", "mean"]])
def test_bad_settings(run: Run, capsys: pytest.CaptureFixture[str], option: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        attribute(run, *option)
    assert stop.value.code == 2 and option[0].strip("-").replace("-", "_").split("_")[0] in capsys.readouterr().err


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match="t.parquet cannot be read"):
        read_table(tmp_path / "t.parquet")
