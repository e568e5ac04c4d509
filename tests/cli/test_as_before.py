"""Options that are left out of a second call on a run are as the run has them, and that is told."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from crosscoder import cli
from crosscoder.config import StudySettings
from crosscoder.runs import Run
from crosscoder.verbs import attribute, compare, eval, evolve, explain


def parsed(module: types.ModuleType, config_class: type, *arguments: object) -> object:
    return cli.parse(module.__name__.rpartition(".")[2], module, config_class, list(map(str, arguments)))


def test_settings_of_the_analyses_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = parsed(evolve, evolve.EvolveConfig, tmp_path, "--tau", 0.2, "--n-probed", 50, "--only", "life")
    assert capsys.readouterr().out == "" and isinstance(first, evolve.EvolveConfig)
    Run(tmp_path).begin("evolve", first)
    again = parsed(evolve, evolve.EvolveConfig, tmp_path, "--n-probed", 60)
    assert again == evolve.EvolveConfig(tmp_path, study=StudySettings(tau=0.2, n_probed=60)), "`only` is for once"
    record = tmp_path / "config" / "evolve.yaml"
    assert capsys.readouterr().out == f"left out, so as before ({record}): tau 0.2\n"
    assert parsed(evolve, evolve.EvolveConfig, tmp_path, "--tau", 0.3, "--n-probed", 200) == evolve.EvolveConfig(
        tmp_path
    ), "the default, when it is asked for"
    assert capsys.readouterr().out == ""


def test_a_file_of_options_stands_for_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(tmp_path).begin("evolve", evolve.EvolveConfig(tmp_path, study=StudySettings(tau=0.2)))
    file = tmp_path / "mine.yaml"
    file.write_text("study:\n  n_probed: 70\n")
    config = parsed(evolve, evolve.EvolveConfig, tmp_path, "--config", file)
    assert config == evolve.EvolveConfig(tmp_path, study=StudySettings(n_probed=70))
    assert capsys.readouterr().out == ""


def test_a_damaged_record_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(tmp_path).begin("evolve", evolve.EvolveConfig(tmp_path, study=StudySettings(tau=0.2)))
    record = tmp_path / "config" / "evolve.yaml"
    record.write_bytes(record.read_bytes().replace(b"0.2", b"0.7"))
    assert parsed(evolve, evolve.EvolveConfig, tmp_path) == evolve.EvolveConfig(tmp_path)
    assert f"options that are left out have their defaults, since {record}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "config_class", "given", "option", "kept"),
    [
        (attribute, attribute.AttributeConfig, ["--task", "ioi"], ["--n-prompts", 30], "n_prompts 30"),
        (eval, eval.EvalConfig, [], ["--loss-tokens", 99], "loss_tokens 99"),
        (compare, compare.CompareConfig, ["other"], ["--seed", 4], "seed 4"),
        (
            explain,
            explain.ExplainConfig,
            ["--endpoint", "http://localhost:1", "--model", "m"],
            ["--n-features", 7],
            "n_features 7",
        ),
    ],
)
def test_other_verbs_keep_theirs(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    module: types.ModuleType,
    config_class: type,
    given: list[object],
    option: list[object],
    kept: str,
) -> None:
    first = parsed(module, config_class, tmp_path, *given, *option)
    Run(tmp_path).begin(module.__name__.rpartition(".")[2], first)
    assert parsed(module, config_class, tmp_path, *given) == first
    assert capsys.readouterr().out.endswith(f": {kept}\n")
