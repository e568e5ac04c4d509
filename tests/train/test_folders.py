"""A checkpoint replaces an older one, and nothing else of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.errors import ConfigError, DataError, StorageError

X = torch.randn(8, 2, 5, generator=torch.Generator().manual_seed(0))


def trainer() -> Trainer:
    return Trainer(Crosscoder(CrosscoderConfig(2, 5, 16)), TrainConfig(n_steps=9, batch_size=8), scale_K=torch.ones(2))


def test_a_checkpoint_does_not_replace_what_is_not_one(tmp_path: Path) -> None:
    file, notes = tmp_path / "file", tmp_path / "folder" / "notes.txt"
    notes.parent.mkdir()
    for path in (file, notes):
        path.write_text("precious")
    for path, message in ((file, "a file lies there"), (notes.parent, "notes.txt would be lost")):
        with pytest.raises(StorageError, match=message):
            trainer().save(path)
    assert file.read_text() == notes.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "notes.txt"]


def test_a_checkpoint_replaces_an_older_one_also_through_a_link(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk)
    first = trainer()
    first.step(X)
    first.save(link)
    first.step(X)
    first.save(link)
    assert link.is_symlink() and link.resolve() == disk
    again = trainer()
    again.resume(disk)
    assert again.step_number == 2
    assert torch.equal(again.model.W_dec, first.model.W_dec)


def test_a_parameter_that_is_to_stay_is_not_trained(tmp_path: Path) -> None:
    model = Crosscoder(CrosscoderConfig(2, 5, 16))
    model.b_dec.requires_grad_(False)
    with pytest.raises(ConfigError, match="b_dec asks for no gradient"):
        Trainer(model, TrainConfig(n_steps=3, batch_size=8))
    model = Crosscoder(CrosscoderConfig(2, 5, 16, gate="topk", top_k=3))  # its threshold is not learned
    Trainer(model, TrainConfig(n_steps=3, batch_size=8)).step(X)


def test_a_batch_without_tokens_is_no_step() -> None:
    made = trainer()
    with pytest.raises(DataError, match="without tokens"):
        made.step(X[:0])
    assert made.step_number == 0
