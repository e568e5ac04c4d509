"""`crosscoder explain` as a user meets it, on a run whose features are words."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explain.planted_run import DENSE, WORDS, born, make_run
from explain.server import Fault, Server, guessing, knowing
from faults.killing import crosscoder
from support.command_line import error

from crosscoder import Crosscoder, cli, weights
from crosscoder.common.tables import read_table
from crosscoder.config import StudySettings
from crosscoder.evolution.study import Study
from crosscoder.explain import asking
from crosscoder.explain.figures import Explanations
from crosscoder.files import read_json
from crosscoder.report.finished import finished
from crosscoder.runs import Run

KEY = "sk-secret-0123456789"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its passages, and no answer."""
    run = make_run(tmp_path_factory.mktemp("template") / "run")
    with Server(lambda prompt: "") as server:
        assert explain(run, server) == 2, "not agreed to"
        assert server.prompts == []
    return run.path


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Run:
    shutil.copytree(template, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CROSSCODER_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(variable, raising=False)


def explain(run: Run, server: Server | str, *more: object, model: str = "m") -> int:
    url = server if isinstance(server, str) else server.url
    return cli.main(["explain", str(run.path), "--endpoint", url, "--model", model, *map(str, more)])


def results(run: Run) -> dict[str, np.ndarray]:
    return read_table(run.evolution / "explanations.parquet")


def written(run: Run) -> dict[str, bytes]:
    return {suffix: (run.evolution / f"explanations.{suffix}").read_bytes() for suffix in ("parquet", "json")}


def test_a_model_that_knows_scores_high(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with Server(knowing) as server:
        assert explain(run, server, "--yes") == 0
        assert set(server.counts.values()) == {1}
    table = results(run)
    assert table["feature"].tolist() == list(range(WORDS + 1)), "all but the dead one"
    words = table["feature"] < WORDS
    assert table["explanation"][words].tolist() == [f"active on [w{f + 1}]" for f in range(WORDS)]
    assert table["emergence"][words].tolist() == [(0, 10, 1000)[born(f)] for f in range(WORDS)]
    assert set(table["kind"]) == {"initialization", "emergent"}
    for kind in ("detection", "fuzzing"):
        assert table[kind][words].min() == 1.0, kind
        assert 0.4 <= table[f"{kind}_control"][words].mean() <= 0.6, kind
    assert np.isnan(table["detection"][~words]).all()
    assert "detection: 10 active and 0 silent passages" in table["missing"][DENSE]
    assert "fuzzing: it is active on every token" in table["missing"][DENSE]
    assert set(table["missing"][words]) == {""}

    figures = run.summary()["explanations"]
    assert figures["n_features"] == figures["n_explained"] == WORDS + 1 and figures["n_incomplete"] == 1
    assert figures["detection"]["score"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert figures["detection"]["passed"] == 1.0 and figures["detection"]["control_passed"] < 0.1
    assert figures["fuzzing"]["difference"]["low"] > 0.4 and figures["fuzzing"]["n"] == WORDS
    assert figures["complexity_and_emergence"]["pearson"] is None, "all of complexity 1"
    assert figures["complexity_counts"] == {"1": WORDS + 1, "2": 0, "3": 0, "4": 0, "5": 0}
    record = read_json(run.evolution / "explanations.json")
    assert record["figures"] == figures and "complexity" in record["prompts"]["explanation"]
    assert record["prompt_version"] == 1 and record["model"] == "m"
    assert read_table(run.evolution / "explanations.parquet").keys() == {
        "feature", "kind", "emergence", "explanation", "consistency", "complexity",
        "detection", "detection_control", "fuzzing", "fuzzing_control", "missing",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "31 features, 151 requests to m: 0 are answered already, 151 to ask" in printed
    assert "price unknown" in printed and "detection: balanced accuracy 1.00 [1.00, 1.00]" in printed


def test_explanations_of_an_earlier_crosscoder_are_not_shown(run: Run) -> None:
    with Server(knowing) as server:
        assert explain(run, server, "--yes") == 0
    study = Study(run, StudySettings())
    [_, shown], notes = finished(study)
    assert isinstance(shown, Explanations) and notes == []
    assert shown.columns["explanation"] == results(run)["explanation"].tolist()
    described = run.evolution / "explanations.json"
    kept = described.read_bytes()
    described.unlink()
    [_], [_] = finished(study)  # without a record nobody knows what they are of
    described.write_bytes(kept)

    model = Crosscoder.from_pretrained(run.crosscoder)
    with torch.no_grad():
        model.W_dec[0] *= 2
    weights.save(model.config, model.state_dict(), run.crosscoder)
    [_], [note] = finished(Study(run, StudySettings()))
    assert "The explanations by a language model are of an earlier crosscoder" in note
    assert f"crosscoder explain {run.path}" in note


def test_a_model_that_guesses_scores_half(run: Run) -> None:
    with Server(guessing) as server:
        assert explain(run, server, "--yes") == 0
    figures = run.summary()["explanations"]
    for kind in ("detection", "fuzzing"):
        assert 0.42 <= figures[kind]["score"]["mean"] <= 0.58
        assert figures[kind]["difference"]["low"] < 0 < figures[kind]["difference"]["high"]
    relation = figures["complexity_and_emergence"]
    assert relation["n"] == WORDS + 1 and relation["pearson_p"] > 0.01 and relation["spearman_p"] > 0.01


def test_complexity_that_follows_emergence_is_found(run: Run) -> None:
    def model(prompt: str) -> str:
        answer = json.loads(knowing(prompt))
        if "explanation" in answer:
            word = answer["explanation"].removeprefix("active on [w").removesuffix("]")
            feature = int(word) - 1
            answer["complexity"] = 1 + 2 * born(feature) if feature < WORDS else 1
        return json.dumps(answer)

    with Server(model) as server:
        assert explain(run, server, "--yes") == 0
    relation = run.summary()["explanations"]["complexity_and_emergence"]
    assert relation["spearman"] > 0.97 and relation["spearman_p"] <= 0.001 and relation["pearson_low"] > 0.9


def test_prompts_show_what_they_should(run: Run) -> None:
    with Server(knowing) as server:
        assert explain(run, server, "--yes", "--n-features", 6) == 0
    answers = [json.loads(line) for line in (run.evolution / "explanations" / "answers.jsonl").open()]
    table = results(run)
    assert np.bincount([born(f) for f in table["feature"]]).tolist() == [2, 2, 2], "evenly over emergence"
    for record in answers:
        passages = [line for line in record["prompt"].splitlines() if line[:1].isdigit()]
        word = f" w{record['feature'] + 1}"
        if record["kind"] == "explanation":
            assert len(passages) == 7 and all(f"<<{word}>>" in passage for passage in passages)
        elif record["kind"] == "detection":
            holding = [f"{word} " in f"{passage} " for passage in passages]
            assert len(passages) == 10 and sum(holding) == 5 and "<<" not in record["prompt"]
        elif record["kind"] == "fuzzing":
            assert sum(f"<<{word}>>" in passage for passage in passages) == 5
            assert all(word in passage and "<<" in passage for passage in passages)
    own = {r["feature"]: r["prompt"] for r in answers if r["kind"] == "detection"}
    control = {r["feature"]: r["prompt"] for r in answers if r["kind"] == "detection control"}
    for feature, prompt in own.items():
        assert prompt.replace(f"[w{feature + 1}]", "[]") != control[feature].replace(f"[w{feature + 1}]", "[]")
        assert prompt.split("Passages are cut")[1] == control[feature].split("Passages are cut")[1]
    explained = {r["feature"]: set(r["prompt"].splitlines()) for r in answers if r["kind"] == "explanation"}
    assert not any(explained[f] & set(own[f].splitlines()[4:-3]) - {""} for f in own), "scored on other passages"


def test_a_second_run_asks_nothing_and_a_larger_one_only_the_rest(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with Server(knowing) as server:
        assert explain(run, server, "--yes", "--n-features", 10) == 0
        first, n = written(run), len(server.prompts)
        assert explain(run, server, "--n-features", 10) == 0, "nothing to agree to"
        assert len(server.prompts) == n and written(run) == first
        assert f"{n} are answered already, 0 to ask" in capsys.readouterr().out
        assert explain(run, server, "--yes", "--n-features", 20) == 0
        assert set(server.counts.values()) == {1}
        explanations = [prompt for prompt in server.prompts if '"explanation"' in prompt]
        assert len(explanations) == 20, "the first ten are among the twenty"
        assert explain(run, server, "--yes", "--n-features", 10, model="other") == 0
        assert set(server.counts.values()) == {1, 2}


def test_every_fault_at_once_changes_nothing(run: Run, template: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.002)
    malformed = [
        '{"explanation": "x", "consistency": 9, "complexity": 1, "passages": [0]}',
        '{"explanation": 1, "passages": "1, 2"}',
        "I think that",
        '{"explanation": "cut',
    ]
    good = json.dumps({"choices": [{"message": {"content": '{"passages": []}'}}]}).encode()
    kinds = [
        Fault(429),
        Fault(429, {"Retry-After": "0"}),
        Fault(500),
        Fault(503, {"Retry-After": "soon"}, body=b"busy"),
        Fault(body=b'{"choices": [{"message": '),
        Fault(body=good, cut=True),
        Fault(body=good, cut=True, chunked=True),
        Fault(close=True),
        *(Fault(body=json.dumps({"choices": [{"message": {"content": text}}]}).encode()) for text in malformed),
    ]

    def faults(prompt: str, attempt: int) -> Fault | None:
        dice = random.Random(prompt)
        return dice.sample(kinds, 2)[attempt - 1] if attempt <= 2 else None

    options = ["--n-features", 12, "--yes"]
    with Server(knowing, faults) as server:
        server.usage = False
        assert explain(run, server, *options) == 0
        assert set(server.counts.values()) == {3}
    shutil.copytree(template, tmp_path / "other")
    with Server(lambda prompt: f"Well.\n```json\n{knowing(prompt)}\n```") as server:
        assert explain(Run(tmp_path / "other"), server, *options) == 0
    assert written(run)["parquet"] == written(Run(tmp_path / "other"))["parquet"]


def test_missing_answers_have_a_reason_in_the_table(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def model(prompt: str) -> str:
        answer = knowing(prompt)
        return "no" if "[w4]" in prompt or "on [w1]" in answer else answer

    with Server(model) as server:
        assert explain(run, server, "--yes") == 0
    table = results(run)
    assert table["missing"][0].startswith("explanation: no JSON object in it: no")
    assert table["explanation"][0] == "" and np.isnan(table["complexity"][0]) and np.isnan(table["detection"][0])
    assert table["missing"][3] == "detection: no JSON object in it: no; fuzzing: no JSON object in it: no"
    assert np.isnan(table["detection"][3]) and not np.isnan(table["detection_control"][3])
    assert run.summary()["explanations"]["n_explained"] == WORDS
    assert "features lack something" in capsys.readouterr().out


def test_killed_and_run_again_asks_nothing_twice(run: Run, template: Path, tmp_path: Path) -> None:
    """kill -9 while two answers are held back: those two alone are asked again."""
    enough = 50

    def faults(prompt: str, attempt: int) -> Fault | None:
        number = list(server.counts).index(prompt)
        return Fault(delay=60, close=True) if number >= enough and not released else None

    released: list[bool] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with Server(knowing, faults) as server:
        command = crosscoder("explain", run.path, "--endpoint", server.url, "--model", "m", "--yes")
        command += ["--max-in-flight", "2"]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            until = time.monotonic() + 120
            while len(server.counts) < enough + 2 and process.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
            process.kill()
            process.wait()
        assert len(server.counts) == enough + 2, (tmp_path / "log").read_text()[-3000:]
        answers = run.evolution / "explanations" / "answers.jsonl"
        assert len(answers.read_bytes().splitlines()) == enough
        with answers.open("ab") as file:
            file.write(b'{"key": "torn')
        assert not (run.evolution / "explanations.parquet").exists()
        held = set(list(server.counts)[enough:])
        released.append(True)
        assert explain(run, server, "--yes") == 0
        assert {prompt for prompt, count in server.counts.items() if count > 1} == held
        assert len(server.counts) == 151
    shutil.copytree(template, tmp_path / "whole")
    with Server(knowing) as server:
        assert explain(Run(tmp_path / "whole"), server, "--yes") == 0
    assert written(run)["parquet"] == written(Run(tmp_path / "whole"))["parquet"]


def test_the_key_is_nowhere(run: Run, monkeypatch: Any, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CROSSCODER_API_KEY", KEY)

    def model(prompt: str) -> str:
        return f"Your key is {KEY}. {knowing(prompt)}"

    def faults(prompt: str, attempt: int) -> Fault | None:
        return Fault(400, body=f"bad prompt of {KEY}".encode()) if "[w2]" in prompt else None

    with Server(model, faults) as server:
        assert explain(run, server, "--yes", "--max-in-flight", 1, "--n-features", 9) == 0
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    with Server(model, lambda prompt, attempt: Fault(401, body=f"no such key: {KEY}".encode())) as server:
        for debug in ((), ("--debug",)):
            assert explain(run, server, "--yes", *debug, model="other") == 1
    monkeypatch.setenv("CROSSCODER_API_KEY", f"{KEY}\n{KEY}")
    assert explain(run, server, "--yes", "--debug", model="other") == 2
    for file in (path for path in run.path.rglob("*") if path.is_file()):
        assert KEY.encode() not in file.read_bytes(), file
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err and "no such key: [key]" in printed.err
    saved = (run.path / "config" / "explain.yaml").read_text()
    assert "model: other\n" in saved and "yes': false" in saved, "agreed to once, not for good"


def test_the_cost_is_told_and_asked_for(run: Run, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    prices = ["--price-in", 3, "--price-out", 15, "--n-features", 5]
    replies = iter(["", "n", "Y"])
    monkeypatch.setattr("builtins.input", lambda question: next(replies))
    with Server(knowing) as server:
        assert explain(run, server, *prices) == 2
        assert "without a terminal nobody can agree to the cost; add --yes" in error(capsys)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        for _ in range(2):
            assert explain(run, server, *prices) == 2
            printed = capsys.readouterr()
            assert "error: nothing was sent" in printed.err
            assert "25 to ask" in printed.out and "at 3 and 15 per million tokens" in printed.out
        assert server.prompts == [] and "explanations" not in run.summary()
        assert explain(run, server, *prices) == 0
        told = float(printed.out.split("about ")[2].split(" ")[0])
    cost = run.summary()["explanations"]["cost"]
    assert cost > 0 and abs(told - cost) < 0.02


def test_the_budget_ends_it_in_order(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    prices = ["--price-in", 1000, "--price-out", 1000, "--n-features", 5, "--yes", "--max-output", 100]
    with Server(knowing) as server:
        assert explain(run, server, *prices, "--budget", 4, "--max-in-flight", 1) == 0
        assert 0 < len(server.prompts) < 25
        assert "the budget will probably not reach" in capsys.readouterr().out
        assert run.summary()["explanations"]["cost"] <= 4
        assert any("not asked: it could exceed the budget of 4" in reason for reason in results(run)["missing"])
        assert explain(run, server, *prices) == 0
        assert set(server.counts.values()) == {1} and run.summary()["explanations"]["n_incomplete"] <= 1


def test_refusals(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(run, "https://api.openai.com/v1", "--yes") == 2
    assert "api.openai.com needs a key: put it into the environment as OPENAI_API_KEY or CROSSCODER_API_KEY" in error(
        capsys
    )
    assert explain(run, f"http://{KEY}@localhost/v1", "--yes") == 2
    assert KEY not in (line := error(capsys)) and "CROSSCODER_API_KEY" in line
    assert explain(Run(tmp_path / "nothing"), "http://localhost:1/v1", "--yes") == 3
    assert "crosscoder evolve" in error(capsys)
    Study(run, StudySettings(contexts=4)).save_settings()
    assert explain(run, "http://localhost:1/v1", "--yes") == 2
    assert "7 contexts a feature are needed" in (line := error(capsys)) and "--contexts 8" in line


@pytest.mark.parametrize(
    "options",
    [["--n-features", "0"], ["--max-in-flight", "0"], ["--timeout", "nan"], ["--price-in", "-1"], ["--budget", "3"]],
)
def test_bad_options(run: Run, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        explain(run, "http://localhost:1/v1", *options)
    assert stop.value.code == 2 and options[0].strip("-").split("-")[0] in capsys.readouterr().err
