"""What is measured and read off this machine."""

from __future__ import annotations

import os

import pytest
import torch

from crosscoder import hardware
from crosscoder.errors import ConfigError


@pytest.fixture(autouse=True)
def fresh_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware.gemm_gflops.cache_clear()
    monkeypatch.delenv(hardware.GEMM_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp32", torch.float32),
        ("float32", torch.float32),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
    ],
)
def test_environment_decides_without_timing(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hardware.GEMM_VARIABLE, name)
    assert hardware.faster_gemm_dtype() == dtype
    assert hardware.gemm_gflops.cache_info().misses == 0


def test_unknown_dtype_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hardware.GEMM_VARIABLE, "int8")
    with pytest.raises(ConfigError, match="CROSSCODER_GEMM_DTYPE=int8 is not one of float32, fp32, bfloat16, bf16"):
        hardware.faster_gemm_dtype()


@pytest.mark.parametrize(("slow", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_faster_one_is_chosen_and_timed_once(
    slow: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def seconds(a: torch.Tensor, b: torch.Tensor) -> float:
        calls.append(a.dtype)
        return 0.02 if a.dtype == slow else 0.01

    monkeypatch.setattr(hardware, "_seconds_of_product", seconds)
    assert hardware.faster_gemm_dtype() == dtype
    assert hardware.faster_gemm_dtype() == dtype
    assert len(calls) == 2 * (hardware.GEMM_REPEATS + 1)
    m, k, n = hardware.GEMM_SHAPE
    rate = hardware.gemm_gflops()[str(dtype).removeprefix("torch.")]
    assert rate == pytest.approx(2 * m * k * n / 0.01 / 1e9)


def test_rates_are_measured_for_both() -> None:
    rates = hardware.gemm_gflops()
    assert set(rates) == {"float32", "bfloat16"}
    assert all(rate > 0 for rate in rates.values())


def test_machine() -> None:
    assert hardware.cpu_name()
    assert 1 <= hardware.cpu_count() <= (os.cpu_count() or 1)
    total, available = hardware.memory_bytes()
    assert 0 <= available <= total
    cpu, *gpus = hardware.devices()
    assert (cpu.name, cpu.description, cpu.memory_bytes) == ("cpu", hardware.cpu_name(), total)
    assert len(gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
