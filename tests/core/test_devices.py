"""Which device a command computes on."""

from __future__ import annotations

import pytest
import torch

from crosscoder import devices
from crosscoder.errors import ConfigError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("name", "device"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_a_gpu_that_is_there(two_gpus: None, name: str, device: str) -> None:
    assert devices.choose(name) == torch.device(device)
    assert devices.choose(torch.device(device)) == torch.device(device)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_of_a_machine_has_its_own(two_gpus: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(devices.choose(name).index)
    assert found == [0, 1, 0, 1]


def test_without_a_gpu(no_gpu: None) -> None:
    assert devices.choose("auto") == devices.choose("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=f"device '{name}' was asked for, and .*; use cpu"):
            devices.choose(name)


def test_a_number_too_large(two_gpus: None) -> None:
    with pytest.raises(ConfigError, match="there is no device cuda:2; this machine has 2, from cuda:0 on"):
        devices.choose("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "mps", "", "cpu:0", "CUDA"])
def test_another_name_is_refused(no_gpu: None, name: str) -> None:
    with pytest.raises(ConfigError, match="name auto, cpu, cuda or cuda:N"):
        devices.choose(name)
