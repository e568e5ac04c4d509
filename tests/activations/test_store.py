"""The activation store: what is written is read, and whatever is wrong is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from crosscoder import ActivationStore, _core, cli
from crosscoder.activations.claim import claim
from crosscoder.errors import ConfigError, DataError, NonFiniteError

N, K, D = 100, 3, 5


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(N, K, D, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 80.0])[:, None]


def make(path: Path, x: torch.Tensor, dtype: str = "fp32") -> ActivationStore:
    return ActivationStore.from_array(path, x, dtype, rows_per_shard=37)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_round_trip(tmp_path: Path, x: torch.Tensor, dtype: str) -> None:
    make(tmp_path / "s", x, dtype)
    store = ActivationStore.open(tmp_path / "s")
    assert (store.n_tokens, store.n_snapshots, store.d_model, store.dtype) == (N, K, D, dtype)
    assert store.shard_rows == [37, 37, 26]
    read = torch.cat([store.read(shard) for shard in range(3)])
    exact = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert torch.equal(read, x.to(exact).float())
    torch.testing.assert_close(store.read(1, slice(3, 9)), read[40:46], rtol=0, atol=0)
    store.verify()


def test_scales_and_means_are_of_the_whole_collection(tmp_path: Path, x: torch.Tensor) -> None:
    store = make(tmp_path / "s", x)
    expected = np.sqrt(D) / torch.linalg.vector_norm(x.double(), dim=2).mean(dim=0).numpy()
    np.testing.assert_allclose(store.scales(), expected, rtol=1e-12)
    np.testing.assert_allclose(store.means(), x.double().mean(dim=0).numpy(), rtol=1e-12)


def test_incomplete_store_names_what_is_missing(tmp_path: Path, x: torch.Tensor) -> None:
    store = ActivationStore.create(tmp_path / "s", K, D, "fp32", shard_rows=[N], snapshots=["step0", "step1", "step2"])
    store.write_segment(0, 0, x[:, 0])
    assert store.missing() == [(0, 1), (0, 2)]
    with pytest.raises(DataError, match="step1, step2 are missing"):
        store.require_complete()


def test_not_finite_names_the_snapshot(tmp_path: Path, x: torch.Tensor) -> None:
    store = ActivationStore.create(tmp_path / "s", K, D, "fp16", shard_rows=[N], snapshots=["step0", "step1", "step2"])
    x[3, 1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="snapshot step1"):
        store.write_segment(0, 1, x[:, 1])
    with pytest.raises(NonFiniteError, match="fp16"):  # finite, but not in the store's dtype
        store.write_segment(0, 0, x[:, 0] * 1e6)
    assert store.missing() == [(0, 0), (0, 1), (0, 2)]


def test_wrong_shapes(tmp_path: Path, x: torch.Tensor) -> None:
    store = ActivationStore.create(tmp_path / "s", K, D, "fp32", shard_rows=[N])
    with pytest.raises(DataError, match=r"needs rows of shape \(100, 5\), got \(100, 4\)"):
        store.write_segment(0, 0, x[:, 0, :4])
    with pytest.raises(DataError, match=r"\(tokens, snapshots, width\)"):
        ActivationStore.from_array(tmp_path / "t", x[0])
    with pytest.raises(ConfigError, match="dtype must be one of"):
        ActivationStore.from_array(tmp_path / "t", x, "int2")


def test_another_store_is_not_overwritten(tmp_path: Path, x: torch.Tensor) -> None:
    make(tmp_path / "s", x)
    with pytest.raises(ConfigError, match="already holds other activations"):
        make(tmp_path / "s", x[:50])


def test_all_zero_snapshot_has_no_scale(tmp_path: Path, x: torch.Tensor) -> None:
    x[:, 2] = 0
    with pytest.raises(DataError, match="snapshot2"):
        make(tmp_path / "s", x).scales()


def files_of(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if path.is_file() and path.suffix in (".seg", ".json"))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_every_flipped_byte_of_a_store_is_found(tmp_path: Path, x: torch.Tensor, dtype: str) -> None:
    """All bytes of all files: headers, data, padding, checksums, manifest."""
    ActivationStore.from_array(tmp_path / "s", x[:, :1], dtype)
    ActivationStore.open(tmp_path / "s").verify()
    for path in files_of(tmp_path / "s"):
        good, missed = path.read_bytes(), []
        with path.open("r+b", buffering=0) as file:
            for position, byte in enumerate(good):
                file.seek(position)
                file.write(bytes([byte ^ 1 << position % 8]))
                try:
                    ActivationStore.open(tmp_path / "s").verify()
                    missed.append(position)
                except DataError as error:
                    if path.name not in str(error):
                        missed.append(position)
                file.seek(position)
                file.write(bytes([byte]))
        assert missed == [], f"{path.name}: {len(missed)} of {len(good)} bytes"
    ActivationStore.open(tmp_path / "s").verify()


@pytest.fixture
def large(tmp_path: Path) -> ActivationStore:
    """Two shards whose segments have three blocks, the last one short."""
    x = torch.randn(1_100, 2, 300, generator=torch.Generator().manual_seed(1))
    return ActivationStore.from_array(tmp_path / "large", x, "fp32", rows_per_shard=550)


def test_verify_names_every_damaged_block(large: ActivationStore) -> None:
    blocks = large.segment(0, 1).head["n_blocks"]
    assert blocks == 3
    damaged = {(0, 1, 0), (0, 1, 2), (1, 0, 1)}
    for shard, k, block in damaged:
        data = bytearray(large.segment_path(shard, k).read_bytes())
        data[4096 + block * (1 << 18) + 17] ^= 1
        large.segment_path(shard, k).write_bytes(data)
    lines = list(large.damage())
    assert len(lines) == 3
    for shard, k, block in damaged:
        assert any(f"{large.segment_path(shard, k)}: block {block} of 3 is damaged" in line for line in lines)
    with pytest.raises(DataError, match=r"block 0 of 3 is damaged; collect it again \(and 2 more"):
        ActivationStore.open(large.path).verify()
    # Reading finds the same, and leaves the whole blocks readable.
    with pytest.raises(DataError, match=r"snapshot-001.seg was changed while it was read"):
        large.read(0, np.arange(220, 300))
    large = ActivationStore.open(large.path)
    large.read(0, np.arange(220, 300))
    with pytest.raises(DataError, match=r"snapshot-001\.seg: block 2 of 3"):
        large.read(0, np.arange(500, 550))


@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_truncation_at_every_block_is_found(large: ActivationStore, tmp_path: Path, dtype: str) -> None:
    if dtype != "fp32":
        x = torch.randn(4_000, 2, 301, generator=torch.Generator().manual_seed(1))
        large = ActivationStore.from_array(tmp_path / "s", x, dtype, rows_per_shard=2_000)
    assert large.segment(1, 1).head["n_blocks"] > 1
    file = large.segment_path(1, 1)
    good = file.read_bytes()
    begin = int.from_bytes(good[16:20], "little")
    for length in [0, 1, 100, 4095, *range(begin, len(good), 1 << 18), len(good) - 4096, len(good) - 1]:
        file.write_bytes(good[:length])
        with pytest.raises(DataError, match=r"snapshot-001\.seg.* truncated"):
            ActivationStore.open(large.path).verify()
    file.write_bytes(good + b"x")
    with pytest.raises(DataError, match="appended"):
        ActivationStore.open(large.path).verify()


def test_swaps_are_found(large: ActivationStore) -> None:
    """Of snapshots, of shards, of stores, and of blocks within a file."""
    file, others = large.segment_path(0, 1), [large.segment_path(0, 0), large.segment_path(1, 1)]
    good = file.read_bytes()
    foreign = ActivationStore.create(large.path.parent / "other", 2, 300, "fp32", shard_rows=[550, 551])
    foreign.write_segment(0, 1, torch.randn(550, 300))
    for other in [*others, foreign.segment_path(0, 1), large.token_path(0)]:
        shutil.copy(other, file)
        with pytest.raises(DataError, match=r"snapshot-001\.seg does not belong there"):
            ActivationStore.open(large.path).verify()
    first, second = slice(4096, 4096 + (1 << 18)), slice(4096 + (1 << 18), 4096 + (2 << 18))
    bad = bytearray(good)
    bad[first], bad[second] = good[second], good[first]
    file.write_bytes(bad)
    assert [line.split(": ")[1] for line in ActivationStore.open(large.path).damage()] == [
        "block 0 of 3 is damaged; collect it again",
        "block 1 of 3 is damaged; collect it again",
    ]
    bad = bytearray(good)
    bad[first] = others[1].read_bytes()[first]
    file.write_bytes(bad)
    assert len(list(ActivationStore.open(large.path).damage())) == 1
    file.write_bytes(good)
    shutil.copy(large.token_path(1), large.token_path(0))
    with pytest.raises(DataError, match="tokens.seg"):
        ActivationStore.open(large.path).tokens(0)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (8, (1).to_bytes(4, "little"), "has format version 1, this release reads 2; collect it again"),
        (8, (3).to_bytes(4, "little"), "has format version 3, this release reads 2"),
        (12, (0x01020304).to_bytes(4, "big"), "the other byte order"),
        (0, b"XCSEGMNU", "is not a segment of an activation store"),
    ],
)
def test_other_versions_and_byte_orders(large: ActivationStore, position: int, value: bytes, message: str) -> None:
    file = large.segment_path(0, 0)
    data = bytearray(file.read_bytes())
    data[position : position + len(value)] = value
    file.write_bytes(data)
    with pytest.raises(DataError, match=rf"snapshot-000\.seg.*{message}"):
        ActivationStore.open(large.path).verify()


def resigned(data: bytearray, position: int, value: bytes) -> bytes:
    """A header that makes no sense, with a checksum that is right."""
    data[position : position + len(value)] = value
    length = int.from_bytes(data[16:20], "little")
    data[length - 8 : length] = _core.xxh3_64(bytes(data[: length - 8])).to_bytes(8, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (20, 7), (24, 9), (24, 4), (24, 3), (24, 5), (36, 0), (36, 1 << 30), (40, 0), (44, 1 << 30), (48, 0),
        (48, 1 << 31), (52, 3), (72, 949), (72, (1 << 32) - 1), (64 + 4, 0x7FF00000),
    ],
)  # fmt: skip
def test_headers_that_make_no_sense(large: ActivationStore, position: int, value: int) -> None:
    file = large.segment_path(0, 0)
    file.write_bytes(resigned(bytearray(file.read_bytes()), position, value.to_bytes(4, "little")))
    with pytest.raises(DataError, match=r"snapshot-000\.seg"):
        ActivationStore.open(large.path).verify()


@pytest.mark.parametrize(("dtype", "most"), [("int8", 3e-4), ("int4", 1.3e-2)])
def test_coarse_dtypes_are_close_also_beside_outlier_channels(tmp_path: Path, dtype: str, most: float) -> None:
    """A channel that is a hundred times larger costs the others nothing."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2_000, 1, 96, generator=generator)
    x[:, :, 7] = x[:, :, 7] * 100 + 500
    x[:, :, 8] = 3.5
    store = ActivationStore.from_array(tmp_path / "s", x, dtype, rows_per_shard=700)
    error = torch.cat([store.read(shard) for shard in range(3)]) - x
    lost = error.square().mean(dim=(0, 1)) / x.var(dim=(0, 1))
    usual = torch.arange(96) != 8
    assert lost[usual].max() < most
    assert error[:, :, 8].abs().max() < 1e-5
    exact = torch.cat([store.read(shard) for shard in range(3)]).double()
    np.testing.assert_allclose(store.means()[0], exact.mean(dim=(0, 1)), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(store.scales(), 96**0.5 / exact.norm(dim=2).mean(), rtol=1e-6)


@pytest.mark.parametrize("width", [1, 5, 31, 32, 33, 97, 300])
@pytest.mark.parametrize(("dtype", "steps"), [("int8", 127), ("int4", 7)])
def test_coarse_dtypes_are_off_by_half_a_step(tmp_path: Path, dtype: str, steps: int, width: int) -> None:
    """No value by more than half of its group's scale, whatever the width; the file is as docs/store-format.md says."""
    x = torch.randn(50, 1, width, generator=torch.Generator().manual_seed(width)) * 3 + 2
    store = ActivationStore.from_array(tmp_path / "s", x, dtype)
    group, head = store.manifest["scale_group"], store.segment(0, 0).head
    data, at = store.segment_path(0, 0).read_bytes(), 1024 + 8 * width
    offset, gain = np.frombuffer(data, np.float32, 2 * width, at).reshape(2, width)
    groups, items_bytes = -(-width // group), width if dtype == "int8" else (width + 1) // 2
    assert store.row_bytes == items_bytes + 2 * groups and head["rows_per_block"] >= 50
    begin = int.from_bytes(data[16:20], "little")
    items = np.frombuffer(data, np.uint8, 50 * items_bytes, begin).reshape(50, items_bytes)
    halves = np.frombuffer(data, np.uint16, 50 * groups, begin + items.size).reshape(50, groups)
    scale = (halves.astype(np.uint32) << 16).view(np.float32).repeat(group, axis=1)[:, :width]
    if dtype == "int4":
        both = np.stack([items & 15, items >> 4], axis=2).reshape(50, -1)
        assert not both[:, width:].any(), "the half of a byte that no channel takes is 0"
        q = (both[:, :width] ^ 8).astype(np.int32) - 8
    else:
        q = items.view(np.int8).astype(np.int32)
    assert np.abs(q).max() <= steps and (np.abs(q).max(axis=0) >= steps - 1).any()
    expected = (q * scale).astype(np.float64) * gain + offset
    read = store.read(0)[:, 0].numpy()
    np.testing.assert_allclose(read, expected, rtol=1e-6, atol=1e-6)
    off = np.abs(read - x[:, 0].numpy()) / gain
    assert (off <= scale * 0.5001 + 1e-6).all()
    assert ((scale * steps).max() <= np.abs((x[:, 0].numpy() - offset) / gain).max() * (1 + 2**-6)).all()


def test_snapshots_are_added_later_and_subsets_read(tmp_path: Path, x: torch.Tensor) -> None:
    def collected(names: list[str], columns: list[int]) -> ActivationStore:
        store = ActivationStore.create(tmp_path / "s", len(names), D, "fp32", shard_rows=[60, 40], snapshots=names)
        for shard, k in store.missing():
            store.write_segment(shard, k, x.split([60, 40])[shard][:, columns[k]])
        return store

    collected(["step0", "step9"], [0, 2])
    later = collected(["step0", "step5", "step9"], [0, 1, 2])
    assert later.snapshot_names == ["step0", "step5", "step9"]
    assert torch.equal(later.read(1), x[60:])
    assert ActivationStore.open(tmp_path / "s").snapshot_names == ["step0", "step9", "step5"]
    assert torch.equal(later.select(["step9", "step5"]).read(0), x[:60, [2, 1]])
    np.testing.assert_allclose(later.select(["step9"]).scales(), later.scales()[2:])
    with pytest.raises(DataError, match="has no snapshot step7; it has step0, step9, step5"):
        ActivationStore.open(tmp_path / "s").select(["step7"])


def test_skipped_snapshots_are_left_out_on_purpose_only(tmp_path: Path, x: torch.Tensor) -> None:
    store = ActivationStore.create(tmp_path / "s", 3, D, "fp32", shard_rows=[N], snapshots=["a", "b", "c"])
    for k in (0, 2):
        store.write_segment(0, k, x[:, k])
    store.skip(1, "its file is damaged")
    assert store.missing() == []
    with pytest.raises(DataError, match=r"collection skipped b \(b: its file is damaged\)"):
        store.require_complete()
    left = ActivationStore.open(tmp_path / "s").without_skipped()
    assert left.snapshot_names == ["a", "c"] and torch.equal(left.read(0), x[:, [0, 2]])


def test_merge_and_the_store_verb(tmp_path: Path, x: torch.Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"one": (["a", "b"], [0, 1]), "two": (["c", "b"], [2, 1])}
    for folder, (names, columns) in parts.items():
        store = ActivationStore.create(tmp_path / folder, 2, D, "fp32", shard_rows=[60, 40], snapshots=names)
        store.write_tokens(0, np.zeros((60, 4), np.int32))
        store.write_tokens(1, np.zeros((40, 4), np.int32))
        for shard, k in store.missing():
            if (folder, k) != ("one", 1):
                store.write_segment(shard, k, x.split([60, 40])[shard][:, columns[k]])
    assert cli.main(["store", "merge", str(tmp_path / "m"), str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert "complete" in capsys.readouterr().out
    merged = ActivationStore.open(tmp_path / "m")
    assert merged.snapshot_names == ["a", "b", "c"] and torch.equal(merged.read(1), x[60:])
    assert cli.main(["store", "verify", str(tmp_path / "m")]) == 0
    assert cli.main(["store", "info", str(tmp_path / "one")]) == 0
    assert "missing    2 segments, of b" in capsys.readouterr().out
    file = tmp_path / "two" / "shard-00001" / "snapshot-000.seg"
    file.unlink()  # a file of its own, not a link into the merged store
    file.write_bytes(b"nonsense")
    assert cli.main(["store", "verify", str(tmp_path / "two")]) == 3
    printed = capsys.readouterr()
    assert f"{file} is not a segment" in printed.out and "1 blocks or files are damaged" in printed.err
    assert cli.main(["store", "merge", str(tmp_path / "m")]) == 2
    other = ActivationStore.from_array(tmp_path / "other", x[:50], "fp32")
    assert cli.main(["store", "merge", str(tmp_path / "m"), str(other.path)]) == 3
    assert "differ in shard_rows" in capsys.readouterr().err


def test_a_claim_is_one_processs_alone_and_dies_with_it(tmp_path: Path, x: torch.Tensor) -> None:
    store = ActivationStore.create(tmp_path / "s", K, D, "fp32", shard_rows=[N])
    path = store.segment_path(0, 0)
    code = (
        "import sys, time; from pathlib import Path; from crosscoder.activations.claim import claim\n"
        f"with claim(Path({str(path)!r})) as mine:\n    print(mine, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        with claim(path) as mine:
            assert not mine
        holder.kill()
    with claim(path) as mine:
        assert mine
        store.write_segment(0, 0, x[:, 0])
    with claim(path) as mine:
        assert not mine, "it is there"
    with claim(store.segment_path(0, 1)) as mine:
        assert mine
    assert not list(store.path.rglob(".tmp-*"))


def manifest_text(path: Path, change: dict[str, object]) -> str:
    return json.dumps({**json.loads((path / "manifest.json").read_text()), **change})


MALFORMED = [
    "", "[]", "{", '"text"', "{}", "null", "7", "\x00\x01", "\ufeff{}", "[" * 100_000, '{"a":' * 100_000,
    "9" * 5000, "NaN", '{"format": "other"}', '{"format": "crosscoder-activations"}',
    {"format": None}, {"format": ["crosscoder-activations"]},
    {"format_version": 1}, {"format_version": 3}, {"format_version": None}, {"format_version": "2"},
    {"format_version": 2.5}, {"format_version": True}, {"format_version": [2]},
    {"d_model": -5}, {"d_model": None}, {"d_model": 0}, {"d_model": 5.0}, {"d_model": 10**30}, {"d_model": True},
    {"dtype": "int4"}, {"dtype": None}, {"dtype": ["fp32"]}, {"dtype": "int8"},
    {"dtype": "int4", "scale_group": 3}, {"dtype": "int4", "scale_group": False}, {"dtype": "int2"},
    {"scale_group": 4}, {"scale_group": None}, {"scale_group": False},
    {"byte_order": "big"}, {"byte_order": None},
    {"shard_rows": []}, {"shard_rows": [37, 37, -26]}, {"shard_rows": "100"}, {"shard_rows": [37.5]},
    {"shard_rows": [2**63]}, {"shard_rows": {"0": 37}}, {"shard_rows": [[37]]}, {"shard_rows": None},
    {"snapshots": []}, {"snapshots": ["a", "a", "b"]}, {"snapshots": [1, 2, 3]}, {"snapshots": "abc"},
    {"snapshots": [""]}, {"snapshots": ["x" * 949]}, {"snapshots": ["\ud800"]}, {"snapshots": ["a"] * 1000},
    {"source": None}, {"source": []}, {"checksum": None}, {"checksum": "0" * 15}, {"checksum": "0" * 16},
    {"checksum": "é" * 16}, {"n_snapshots": 3}, {"unknown": 1},
    {"snapshots": ["snapshot0", "snapshot1"]}, {"d_model": 6}, {"source": {"edited": "by hand"}},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_malformed_manifests(tmp_path: Path, x: torch.Tensor, number: int) -> None:
    make(tmp_path / "s", x)
    change = MALFORMED[number]
    text = change if isinstance(change, str) else manifest_text(tmp_path / "s", change)
    (tmp_path / "s" / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json") as refused:
        ActivationStore.open(tmp_path / "s")
    assert "\n" not in str(refused.value)


def test_a_manifest_that_is_not_text(tmp_path: Path, x: torch.Tensor) -> None:
    make(tmp_path / "s", x)
    (tmp_path / "s" / "manifest.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match=r"manifest\.json"):
        ActivationStore.open(tmp_path / "s")


def test_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not an activation store"):
        ActivationStore.open(tmp_path)
