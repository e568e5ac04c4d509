"""The command line as a user meets it: help, errors in one line, exit codes, configuration files."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from faults.test_kill import collection
from support.command_line import error, run

from crosscoder import ActivationStore, cli


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from crosscoder.cli import main; main(['--help']);"
        "print([m for m in ('torch', 'transformers', 'datasets', 'triton', 'numpy', 'tyro') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in cli.VERBS:
        assert f"\n  {verb} " in done.stdout
    assert done.stdout.strip().endswith("[]")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, crosscoder; crosscoder.TrainConfig;"
        "assert not [m for m in ('torch', 'transformers', 'datasets', 'triton') if m in sys.modules];"
        "crosscoder.Crosscoder, crosscoder.Trainer, crosscoder.ActivationLoader;"
        "assert not [m for m in ('transformers', 'datasets', 'triton', 'matplotlib') if m in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    import crosscoder

    for name in crosscoder.__all__:
        assert getattr(crosscoder, name) is not None
    with pytest.raises(AttributeError):
        crosscoder.nothing  # noqa: B018


@pytest.mark.parametrize("package", ["crosscoder", "crosscoder.evolution"])
def test_type_checkers_see_every_public_name_where_it_is(package: str) -> None:
    """Names are loaded on first use; a strict checker needs `from HOME import NAME as NAME` of each beside that."""
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    seen = {
        alias.asname: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname is not None
    }
    assert set(seen) == set(module.__all__) - {"__version__"}
    for name, (home, there) in seen.items():
        assert home is not None and name == there
        importlib.import_module(home)
        assert getattr(importlib.import_module(home), name) is getattr(module, name)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"example: crosscoder {verb}" in printed


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in cli.VERBS)])
def test_a_reader_who_has_seen_enough_is_no_error(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "crosscoder", *arguments]
        done = subprocess.run(command, check=False, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trian") == 2
    assert "did you mean train?" in error(capsys)


def test_unknown_option_exits_with_2() -> None:
    with pytest.raises(SystemExit) as stop:
        run("plan", "--snapshot", 3)
    assert stop.value.code == 2


@pytest.fixture
def activations(tmp_path: Path) -> Path:
    x = torch.randn(600, 3, 8, generator=torch.Generator().manual_seed(0))
    for split in ("train", "heldout"):
        ActivationStore.from_array(tmp_path / "run" / "activations" / split, x)
    return tmp_path / "run"


FAST = ["--n-features", 32, "--n-steps", 12, "--batch-size", 64, "--lr", 1e-3]


def test_train_and_eval(activations: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", activations, *FAST) == 0
    assert run("eval", activations) == 0
    summary = json.loads((activations / "summary.json").read_text())
    assert summary["n_features"] == 32 and 0 <= summary["dead_fraction"] <= 1
    assert set(summary["explained_variance"]["by_snapshot"]) == {"snapshot0", "snapshot1", "snapshot2"}
    assert "README.md" in {path.name for path in activations.iterdir()}
    assert "explained variance" in capsys.readouterr().out
    before = (activations / "crosscoder" / "model.safetensors").read_bytes()
    assert run("train", activations, *FAST) == 0, "done already"
    assert (activations / "crosscoder" / "model.safetensors").read_bytes() == before


def test_training_without_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Collected tokens alone, then live training; killed and resumed runs are the loader's tests."""
    command = collection(tmp_path)
    options = ["--model", tmp_path / "models", "--text", tmp_path / "text.txt", "--layer", 1, "--context", 64]
    assert command and run("collect", tmp_path / "run", *options, "--tokens-only") == 0
    assert not (tmp_path / "run" / "activations").exists()
    assert run("train", tmp_path / "run", "--live", *FAST) == 0
    record = json.loads((tmp_path / "run" / "crosscoder" / "training.json").read_text())
    assert record["store"]["source"]["live"] and record["store"]["snapshots"] == ["step0", "step1", "step8"]
    assert run("train", tmp_path / "nothing", "--live", *FAST) == 3
    assert "--tokens-only" in error(capsys)


def test_the_saved_configuration_makes_the_same_run(activations: Path, tmp_path: Path) -> None:
    assert run("train", activations, *FAST) == 0
    resolved = activations / "config" / "train.yaml"
    (activations / "crosscoder").rename(tmp_path / "first")
    assert run("train", "--config", resolved, "--no-resume") == 0
    for name in ("model.safetensors", "training.json"):
        assert (activations / "crosscoder" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_the_command_line_wins_over_the_file(activations: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"n_features": 16, "train": {"n_steps": 3, "batch_size": 64, "lr": "1e-3"}}))
    assert run("train", activations, "--config", file, "--n-features", 24) == 0
    record = json.loads((activations / "crosscoder" / "training.json").read_text())
    assert record["crosscoder"]["n_features"] == 24
    assert record["train"]["n_steps"] == 3 and record["train"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_featuers: 16", "unknown option 'n_featuers'; did you mean n_features?"),
        ("train: {learning_rate: 1}", "unknown option 'learning_rate'"),
        ("n_features: many", "n_features must be int, not 'many'"),
        ("n_features: true", "n_features must be int, not True"),
        ("train: {revival: sometimes}", "revival must be residual or none"),
        ("train: 5", "must be a mapping"),
        ("- 1", "must be a mapping"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_bad_configuration_files(
    activations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert run("train", activations, "--config", file) == 2
    assert message in error(capsys)


def test_a_missing_configuration_file_names_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "x", "--config", "nothing") == 2
    assert "presets: paper, paper-6.9b" in error(capsys)


def test_the_papers_preset(activations: Path) -> None:
    assert run("train", activations, "--config", "paper", *FAST) == 0
    record = json.loads((activations / "crosscoder" / "training.json").read_text())
    assert record["train"]["revival"] == "none" and record["train"]["threshold_lr_factor"] == 0.1


def test_errors_name_the_thing_and_the_remedy(
    activations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", tmp_path / "nothing", *FAST) == 3
    assert "collect first" in error(capsys)
    assert run("eval", activations) == 3
    assert "train it first" in error(capsys)
    assert run("train", activations, *FAST[:4], "--batch-size", 601) == 3
    assert "less than one batch of 601" in error(capsys)
    with pytest.raises(SystemExit) as stop:
        run("train", activations, *FAST, "--lr", -1)
    assert stop.value.code == 2 and "lr must be positive" in capsys.readouterr().err
    assert run("train", activations, *FAST) == 0
    capsys.readouterr()
    assert run("train", activations, *FAST, "--lr", 2e-3) == 2
    assert "was trained with other settings, says training.json (lr 0.001 there, 0.002 now)" in error(capsys)
    (activations / "activations" / "train" / "shard-00000" / "snapshot-001.seg").unlink()
    assert run("train", activations, *FAST, "--no-resume") == 3
    assert "segments of snapshot1 are missing" in error(capsys)


def test_a_report_names_the_verb_that_is_missing(activations: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", activations) == 3
    assert "run first: crosscoder train" in error(capsys)
    assert run("train", activations, *FAST) == 0
    assert run("report", activations) == 3
    assert "run first: crosscoder eval" in error(capsys)
    assert run("eval", activations) == 0
    (activations / "config" / "evolve.yaml").write_text("run: x\n")  # begun, and killed before there were results
    assert run("report", activations) == 3
    assert "run first: crosscoder evolve" in error(capsys)


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", tmp_path / "nothing", "--debug") == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_file_in_the_way_and_a_read_only_folder(
    activations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run("quickstart", "--out", tmp_path / "file" / "run") == 5
    assert "is a file, not a folder" in error(capsys)
    assert run("quickstart", "--out", "/proc/run") == 5
    assert "cannot write /proc/run" in error(capsys)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.1 GiB."), "2.00 GiB"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
            "64",
        ),
        (MemoryError("Unable to allocate 7.45 GiB for an array."), "7.45 GiB"),
    ],
)
def test_out_of_memory_says_how_much_and_what_to_lower(
    error: Exception, number: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", lambda verb, arguments: run(None))
    assert cli.main(["train", "run"]) == 8
    told = capsys.readouterr().err
    assert told.startswith("error: out of memory: ") and number in told and "lower --batch-size, --n-features" in told
    assert ("--device cpu" in told) == isinstance(error, torch.OutOfMemoryError)
    assert cli.main(["report", "run"]) == 8 and "To go on, free some" in capsys.readouterr().err


def test_options_that_need_less_memory_exist() -> None:
    options = (Path(__file__).parent / "options.txt").read_text()
    for verb, named in cli.LESS_MEMORY.items():
        for option in (word.strip(",;") for word in named.split() if word.startswith("--")):
            assert f"{verb} {option} " in options


def test_a_real_allocation_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", lambda verb, arguments: int(torch.empty(1 << 58)))
    assert cli.main(["eval", "run"]) == 8
    assert "lower --batch-size" in capsys.readouterr().err
