"""Tensors written one after the other, against the safetensors package's own writer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from crosscoder import Crosscoder, CrosscoderConfig, tensorfile
from crosscoder import model as model_module
from crosscoder.tensorfile import checksum, write_tensors

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_the_safetensors_package(
    tmp_path: Path, metadata: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorfile, "_WRITTEN_AT_ONCE", 13)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, dtype in enumerate(DTYPES):
        for shape in ((), (0,), (3, 5), (7,)):
            values = torch.randint(0, 2, shape, generator=generator)
            tensors[f"{'zyx'[number % 3]}.{number}.{len(shape)}.{sum(shape)}"] = values.to(dtype)
    tensors["é"] = torch.rand(4, 6, generator=generator).T  # not contiguous
    checksums = write_tensors(tmp_path / "t.safetensors", tensors, metadata)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "t.safetensors").read_bytes() == serialize(contiguous, metadata)
    assert checksums == {name: checksum(tensor) for name, tensor in tensors.items()} and list(checksums) == list(
        tensors
    )
    back = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed", [True, False])
def test_folding_a_few_rows_at_a_time_gives_the_same_bits(
    dtype: torch.dtype, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CrosscoderConfig(4, 16, 60)
    generator = torch.Generator().manual_seed(0)
    found = []
    for at_once in (1 << 28, 7 * 4 * 4 * 16):
        monkeypatch.setattr(model_module, "_ROWS_BYTES", at_once)
        model = Crosscoder(config, seed=1, dtype=dtype)
        if mixed:
            mix = torch.rand(4, 4, generator=torch.Generator().manual_seed(2))
            model.set_snapshot_mix(mix @ mix.T + 0.1 * torch.eye(4))
        folded = model.fold_scales(torch.rand(4, generator=generator.manual_seed(3)) + 0.5)
        found.append({**folded.state_dict(), **{f"unmixed {k}": v for k, v in model.unmixed_state().items()}})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
