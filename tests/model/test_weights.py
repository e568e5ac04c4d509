"""Crosscoders on disk: they come back equal, also from the hub's cache, and whatever is wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from crosscoder import Crosscoder, CrosscoderConfig
from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution import decoder_norms
from crosscoder.files import read_json, write_json


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = Crosscoder(CrosscoderConfig(3, 8, 20, gate="shared", penalty="l1"), seed=4)
    model.fold_scales(torch.tensor([1.0, 2.0, 3.0])).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_round_trip(saved: Path) -> None:
    model = Crosscoder(CrosscoderConfig(3, 8, 20, gate="shared", penalty="l1"), seed=4)
    expected = model.fold_scales(torch.tensor([1.0, 2.0, 3.0]))
    loaded = Crosscoder.from_pretrained(saved)
    assert loaded.config == expected.config
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert isinstance(loaded.W_enc, torch.nn.Parameter) and loaded.W_enc.requires_grad


def test_from_the_hubs_cache(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository in the form that the hub's client leaves on disk, with a revision."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "cache" / "models--someone--crosscoder"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.parent.mkdir(parents=True)
    saved.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(snapshot.name)
    loaded = Crosscoder.from_pretrained(
        "someone/crosscoder", revision="v1", cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert loaded.config.n_features == 20


def test_a_subfolder_is_read_and_nothing_else(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root holds another crosscoder, which must not be taken for it: in a folder, and in the hub's cache."""
    inner = Crosscoder(CrosscoderConfig(2, 4, 5), seed=7)
    inner.save_pretrained(saved / "layers" / "layer-3")
    for given in ("layers/layer-3", "layers/layer-3/", "./layers//layer-3"):
        loaded = Crosscoder.from_pretrained(saved, subfolder=given)
        assert loaded.config == inner.config and torch.equal(loaded.W_enc, inner.W_enc)
    for root in (None, "", "."):
        assert Crosscoder.from_pretrained(saved, subfolder=root).config.n_features == 20
    with pytest.raises(DataError, match="layer-4 does not exist"):
        Crosscoder.from_pretrained(saved, subfolder="layers/layer-4")
    with pytest.raises(DataError, match=r"layers/config\.json does not exist"):
        Crosscoder.from_pretrained(saved, subfolder="layers")
    for outside in ("..", "layers/../..", str(saved)):
        with pytest.raises(ConfigError, match="must be a path inside"):
            Crosscoder.from_pretrained(saved, subfolder=outside)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = tmp_path / "cache" / "models--someone--crosscoder" / "snapshots" / ("0123456789" * 4)
    snapshot.parent.mkdir(parents=True)
    saved.rename(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    where = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    loaded = Crosscoder.from_pretrained("someone/crosscoder", subfolder="layers/layer-3", **where)
    assert torch.equal(loaded.W_enc, inner.W_enc)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sub_folder": "x"}, "no option sub_folder; it has subfolder, map_location, revision"),
        ({"torch_dtype": torch.float16, "device": "cpu"}, "no option device, torch_dtype"),
        ({"resume_download": None}, "no option resume_download"),
        ({"revision": "v1"}, "is a local folder and has no revisions"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(saved: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Crosscoder.from_pretrained(saved, **options)
    assert Crosscoder.from_pretrained(saved, revision=None, token=None, cache_dir=None).config.n_features == 20


def test_a_loaded_crosscoder_is_for_inference(tmp_path: Path) -> None:
    """BatchTopK then has its threshold, so that a token's code does not depend on the tokens beside it."""
    model = Crosscoder(CrosscoderConfig(2, 4, 40, gate="batchtopk", top_k=3))
    x = torch.randn(30, 2, 4, generator=torch.Generator().manual_seed(0))
    model.batch_threshold.copy_(model.calibrated_batch_threshold(x))
    model.save_pretrained(tmp_path)
    loaded = Crosscoder.from_pretrained(tmp_path)
    assert not loaded.training
    alone = torch.cat([loaded.encode(token[None]).to_dense() for token in x])
    assert torch.equal(alone, loaded.encode(x).to_dense()) and bool((alone > 0).any())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_weights_stay_in_the_file(tmp_path: Path) -> None:
    """Loading holds the file's pages and little else, at its peak too; writing to the weights leaves the file."""

    def memory(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    model = Crosscoder(CrosscoderConfig(8, 256, 8_192)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    stored = (tmp_path / "model" / "model.safetensors").read_bytes()
    del model
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    loaded = Crosscoder.from_pretrained(tmp_path / "model")
    decoder_norms(loaded.W_dec.detach())
    assert memory("VmHWM") - before < 1.4 * len(stored)
    with torch.no_grad():
        loaded.W_dec.zero_()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == stored


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    write_json(file, {**read_json(file), **changes})  # with a checksum that holds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "sae"}, "not the configuration of a crosscoder"),
        ({"format_version": 2}, "upgrade crosscoder"),
        ({"format_version": "1"}, "format version '1'"),
        ({"config": None}, "unknown options"),
        ({"config": {"n_snapshots": 3, "d_model": 8, "n_features": 20, "colour": 1}}, "colour"),
        ({"config": {"n_snapshots": 3, "d_model": 8}}, "n_features"),
        ({"config": {"n_snapshots": 99, "d_model": 8, "n_features": 20}}, "n_snapshots must be 1 to 64"),
        ({"config": {"n_snapshots": 3, "d_model": 9, "n_features": 20}}, "asks for"),
        ({"checksums": {}}, "damaged"),
    ],
)
def test_wrong_configurations(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit(saved, **changes)
    with pytest.raises(DataError, match=message):
        Crosscoder.from_pretrained(saved)


def test_damaged_weights(saved: Path) -> None:
    file = saved / "model.safetensors"
    good = file.read_bytes()
    for length in (0, 5, 100, len(good) - 1):
        file.write_bytes(good[:length])
        with pytest.raises(DataError, match=r"model\.safetensors"):
            Crosscoder.from_pretrained(saved)
    for position in range(len(good) - 400, len(good), 13):
        bad = bytearray(good)
        bad[position] ^= 1
        file.write_bytes(bad)
        with pytest.raises(DataError, match="damaged"):
            Crosscoder.from_pretrained(saved)
    file.unlink()
    with pytest.raises(DataError, match="does not exist"):
        Crosscoder.from_pretrained(saved)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder with a crosscoder"):
        Crosscoder.from_pretrained(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"config\.json does not exist"):
        Crosscoder.from_pretrained(tmp_path / "empty")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_snapshots": 0}, "n_snapshots must be 1 to 64"),
        ({"n_snapshots": 65}, "n_snapshots must be 1 to 64"),
        ({"d_model": 0}, "d_model"),
        ({"n_features": 0}, "n_features"),
        ({"gate": "soft"}, "gate must be one of snapshot, shared, topk, batchtopk, not 'soft'"),
        ({"penalty": "l0"}, "penalty must be one of"),
        ({"threshold_mode": "none"}, "threshold_mode must be one of"),
        ({"threshold_mode": "narrow", "threshold_window": 0.2}, "at most 0.1"),
        ({"threshold_window": 0}, "threshold_window must be positive"),
        ({"threshold_init": -1.0}, "threshold_init must be 0 or more"),
        ({"threshold_sample": 0.0}, "threshold_sample"),
        ({"gate": "topk"}, "needs top_k"),
        ({"gate": "topk", "top_k": 50}, "needs top_k"),
        ({"top_k": 5}, "no effect"),
    ],
)
def test_impossible_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CrosscoderConfig(**{"n_snapshots": 3, "d_model": 8, "n_features": 20, **options})


def test_wrong_inputs_are_named() -> None:
    model = Crosscoder(CrosscoderConfig(3, 8, 20))
    for shape in ((5, 2, 8), (5, 3, 9), (5, 24), (3, 8)):
        with pytest.raises(DataError, match="expected activations of shape"):
            model(torch.randn(shape))
    with pytest.raises(DataError, match="floating point"):
        model(torch.ones(5, 3, 8, dtype=torch.int64))
    other = Crosscoder(CrosscoderConfig(2, 8, 20))
    with pytest.raises(DataError, match="does not fit"):
        model.decode(other.encode(torch.randn(5, 2, 8)))
