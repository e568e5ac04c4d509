"""Numbers of a configuration: whole ones are whole; numpy's are as good as Python's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig
from crosscoder.errors import ConfigError, StorageError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_snapshots": True}, "n_snapshots must be a whole number, not True"),
        ({"d_model": "5"}, "d_model must be a whole number, not '5'"),
        ({"gate": "topk", "top_k": 2.0}, "top_k must be a whole number, not 2.0"),
        ({"tanh_scale": "4"}, "tanh_scale must be a number, not '4'"),
    ],
)
def test_other_types_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CrosscoderConfig(**{"n_snapshots": 2, "d_model": 5, "n_features": 16, **options})


def test_training_has_a_whole_number_of_steps() -> None:
    with pytest.raises(ConfigError, match=r"n_steps must be a whole number, not 2\.5"):
        TrainConfig(n_steps=2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lr must be a number, not '1'"):
        TrainConfig(lr="1")  # type: ignore[arg-type]
    assert TrainConfig(lr=1, clip_norm=None, joining_cosine=None).lr == 1


def test_numpy_numbers_are_saved_as_numbers(tmp_path: Path) -> None:
    config = CrosscoderConfig(np.int64(2), np.int32(5), np.int64(16), tanh_scale=np.float32(4))  # type: ignore[arg-type]
    assert json.loads(json.dumps(config.to_dict())) == CrosscoderConfig(2, 5, 16).to_dict()
    Crosscoder(config).save_pretrained(tmp_path / "m")
    assert Crosscoder.from_pretrained(tmp_path / "m").config == CrosscoderConfig(2, 5, 16)


def test_weights_do_not_depend_on_torchs_default_dtype() -> None:
    usual = Crosscoder(CrosscoderConfig(2, 5, 16))
    torch.set_default_dtype(torch.float64)
    try:
        other = Crosscoder(CrosscoderConfig(2, 5, 16))
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, a), b in zip(usual.state_dict().items(), other.state_dict().values(), strict=True):
        assert a.dtype == b.dtype == torch.float32, name
        assert torch.equal(a, b), name


def test_saving_where_it_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for path, message in ((tmp_path / "file", "a file of that name"), (tmp_path / ("x" * 300), "name too long")):
        with pytest.raises(StorageError, match=message):
            Crosscoder(CrosscoderConfig(2, 5, 16)).save_pretrained(path)
    assert (tmp_path / "file").read_text() == "precious"
