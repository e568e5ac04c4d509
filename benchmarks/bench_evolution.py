"""Rotation, norms and dimensionality at the paper's scale, from bf16 weights on disk: how near to the least work?

The least: reading the decoders once, and one product of F K D^2 multiply-adds in fp32 (the decoders of every snapshot
times one (D, D) matrix). Memory is what the process holds beyond the mapped file, at its peak.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crosscoder.evolution import decoder_cosines, decoder_norms, feature_dimensionality, kind_dimensionality
from harness.measure import Timing, seconds_of
from harness.memory import peak_anonymous
from harness.results import Recorder


@dataclass(frozen=True)
class Size:
    """Sizes of one case."""

    n_features: int
    n_snapshots: int = 32
    d_model: int = 768

    def __str__(self) -> str:
        return f"K{self.n_snapshots}-D{self.d_model}-F{self.n_features}"


QUICK = [Size(4_096)]
FULL = [Size(98_304)]
BLOCK = 512
PRODUCT_ROWS = 4_096
PRESENT = 0.3


def write_decoders(path: Path, shape: Size, seed: int = 0) -> None:
    """A safetensors file with W_dec (F, K, D), bf16: directions that drift and turn once, strengths that vary."""
    F, K, D = shape.n_features, shape.n_snapshots, shape.d_model
    entry = {"dtype": "BF16", "shape": [F, K, D], "data_offsets": [0, 2 * F * K * D]}
    header = json.dumps({"W_dec": entry}).encode()
    header += b" " * (-len(header) % 8)
    generator = torch.Generator().manual_seed(seed)
    noise_nKD = torch.randn(BLOCK, K, D, generator=generator)
    side_K = (torch.arange(K) >= K // 3).long()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, F, BLOCK):
            n = min(BLOCK, F - start)
            direction_nKD = torch.randn(n, 2, D, generator=generator)[:, side_K]
            strength_nK1 = torch.rand(n, K, 1, generator=generator)
            block_nKD = strength_nK1 * (direction_nKD + 0.5 * noise_nKD.roll(start // BLOCK, dims=2)[:n])
            file.write(block_nKD.bfloat16().view(torch.uint16).numpy().data)


def open_decoders(path: Path) -> Tensor:
    """W_dec, mapped, as a crosscoder's weights are loaded."""
    from safetensors.torch import load_file

    return load_file(path)["W_dec"]


@pytest.fixture
def decoders(case: Size, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "decoders.safetensors"
    write_decoders(path, case)
    yield path
    path.unlink()


def read_once(path: Path) -> None:
    buffer = bytearray(1 << 24)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def product(shape: Size) -> None:
    """F K rows of D numbers times a (D, D) matrix."""
    rows, matrix = torch.full((PRODUCT_ROWS, shape.d_model), 0.5), torch.full((shape.d_model, shape.d_model), 0.5)
    out = torch.empty(PRODUCT_ROWS, shape.d_model)
    for _ in range(shape.n_features * shape.n_snapshots // PRODUCT_ROWS):
        torch.mm(rows, matrix, out=out)


def worst_error(W_dec: Tensor, per_feature: np.ndarray, rows: slice) -> float:
    """Largest relative error of D_fk of a sample of features at the last snapshot, against float64."""
    w_FD = W_dec[:, -1]
    gram_DD = torch.zeros(w_FD.shape[1], w_FD.shape[1], dtype=torch.float64)
    for part in w_FD.split(4_096):
        gram_DD += part.double().T @ part.double()
    sample = w_FD[rows].double()
    norm2 = sample.square().sum(dim=1)
    exact = (norm2.square() / torch.linalg.vecdot(sample @ gram_DD, sample)).numpy()
    return float(np.abs(per_feature[rows, -1] / exact - 1).max())


def test_scale(case: Size, decoders: Path, recorder: Recorder, request: pytest.FixtureRequest) -> None:
    """Parts in turn, `--rounds` times (default: once)."""
    W_dec = open_decoders(decoders)
    found = {}

    def norms() -> None:
        found["norms"] = decoder_norms(W_dec).numpy()

    def rotation() -> None:
        norms_FK = found["norms"]
        present_FK = norms_FK > PRESENT * norms_FK.max(axis=1, keepdims=True)
        first = present_FK[:, 0]
        found["rotation"] = decoder_cosines(W_dec, present_FK, masks={"initialization": first, "emergent": ~first})

    def dimensionality() -> None:
        found["dimensionality"] = feature_dimensionality(W_dec)

    def by_kind() -> None:
        first = found["norms"][:, 0] > np.median(found["norms"][:, 0])
        kind_dimensionality(W_dec, {"initialization": first, "emergent": ~first})

    read_once(decoders)
    with peak_anonymous() as peak:
        norms()
        rotation()
        dimensionality()
    parts = {
        "read once": lambda: read_once(decoders),
        "one product, fp32": lambda: product(case),
        "norms": norms,
        "rotation": rotation,
        "dimensionality": dimensionality,
        "dimensionality within kinds": by_kind,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(request.config.getoption("--rounds") or 1):
        for name, work in parts.items():
            seconds[name].append(seconds_of(work))
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
    least = timings["read once"].median + timings["one product, fp32"].median
    analysis = sum(timings[name].median for name in ("norms", "rotation", "dimensionality"))
    recorder.add(
        str(case),
        timings,
        shape=asdict(case),
        bytes_of_decoders=W_dec.numel() * W_dec.element_size(),
        ratio=analysis / least,
        ratio_with_kinds=(analysis + timings["dimensionality within kinds"].median) / least,
        peak_bytes_beyond_the_map=peak.bytes,
        worst_relative_error=worst_error(W_dec, found["dimensionality"].per_feature, slice(0, 512)),
    )
    print(f"\n{case}: {analysis / least:.2f} x the least, {peak.bytes / 2**30:.2f} GiB beyond the map")
    for name, timing in timings.items():
        print(f"  {name}: {timing.median:.2f} s")
