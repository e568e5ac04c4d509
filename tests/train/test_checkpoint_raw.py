"""A checkpoint from the middle of training is a crosscoder for raw activations, the same as the export of that step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crosscoder import ActivationLoader, ActivationStore, Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.errors import ConfigError, DataError
from crosscoder.inputs import scale_of
from crosscoder.train import checkpoint
from crosscoder.train import run as run_module

K, D, F, N, B = 3, 12, 48, 2000, 100
NORMS = torch.tensor([0.05, 1.0, 30.0])


def raw(n: int = N, seed: int = 0) -> Tensor:
    """(n, K, D): activations of very different norms at the snapshots."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(40, K, D, generator=generator), dim=2)
    generator.manual_seed(seed)
    code = torch.rand(n, 40, generator=generator) * (torch.rand(n, 40, generator=generator) < 0.1)
    return torch.einsum("nf,fkd->nkd", code, directions) * NORMS[:, None]


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return ActivationStore.from_array(tmp_path / "store", raw(), "fp32")


def trainer_of(n_steps: int = 200, scale_K: Any = None, **options: Any) -> Trainer:
    gate = {"gate": options.pop("gate", "snapshot"), "top_k": options.pop("top_k", None)}
    config = TrainConfig(
        **{
            "n_steps": n_steps,
            "batch_size": B,
            "lr": 5e-3,
            "revival_every": 20,
            "sparsity_coefficient": 0.02,
            **options,
        }
    )
    return Trainer(Crosscoder(CrosscoderConfig(K, D, F, **gate), seed=1), config, scale_K=scale_K)


def batches(loader: ActivationLoader) -> Iterator[Tensor]:
    while True:
        yield from loader


def explained(model: Crosscoder, x: Tensor) -> float:
    error = (model.decode(model.encode(x)) - x).square().sum(dim=(0, 2))
    return float((1 - error / (x - x.mean(dim=0)).square().sum(dim=(0, 2))).mean())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"whitening": "none"},
    {"state": "low-memory"},
    {"gate": "batchtopk", "top_k": 4},
    {"backend": "reference", "gate": "shared"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_loaded_checkpoint_is_the_export_of_its_step(
    store: ActivationStore, tmp_path: Path, options: dict[str, Any]
) -> None:
    loader = ActivationLoader(store, B)
    trainer = trainer_of(**options)
    for _, x in zip(range(150), batches(loader), strict=False):
        trainer.step(x)
    assert trainer.model.is_mixed == (options.get("whitening") != "none")
    trainer.save(tmp_path / "checkpoint")
    loaded = Crosscoder.from_pretrained(tmp_path / "checkpoint")
    trainer.model.batch_threshold.copy_(trainer.state_dict()["model"]["batch_threshold"])
    trainer.model.fold_scales(torch.from_numpy(loader.scale_K)).save_pretrained(tmp_path / "export")
    export = Crosscoder.from_pretrained(tmp_path / "export")
    assert not loaded.is_mixed
    for name, tensor in export.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x = raw(500, seed=1)
    by_hand = x * torch.from_numpy(loader.scale_K).float()[:, None]  # what training read, with its own crosscoder
    in_training = trainer.model.eval()
    code, expected = loaded.encode(x), in_training.encode(by_hand)
    assert abs(code.n_pairs - expected.n_pairs) <= 0.005 * expected.n_pairs and expected.n_pairs > 500
    assert explained(loaded, x) == pytest.approx(explained(in_training, by_hand), abs=2e-3)
    assert explained(loaded, x) > 0.3


@pytest.mark.parametrize("stop", [1, 33])
def test_resuming_takes_the_scale_along_and_repeats_the_bits(store: ActivationStore, tmp_path: Path, stop: int) -> None:
    def run(trainer: Trainer, loader: ActivationLoader, until: int) -> Trainer:
        while trainer.step_number < until:
            for x in loader:
                trainer.step(x)
                if trainer.step_number == until:
                    break
        return trainer

    whole = run(trainer_of(), ActivationLoader(store, B), 50)
    loader = ActivationLoader(store, B)
    run(trainer_of(), loader, stop).save(tmp_path / "checkpoint", {"loader": loader.state_dict()})
    second, other = trainer_of(), ActivationLoader(store, B)
    other.load_state_dict(second.resume(tmp_path / "checkpoint")["loader"])
    assert second.scale_K is not None and np.array_equal(second.scale_K.numpy(), loader.scale_K)
    run(second, other, 50)
    second.save(tmp_path / "second")
    whole.save(tmp_path / "whole")
    for file in ("model.safetensors", "trainer.safetensors"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_run_interrupted_leaves_checkpoints_for_raw_activations(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, options = (
        CrosscoderConfig(K, D, F),
        TrainConfig(n_steps=160, batch_size=B, lr=5e-3, checkpoint_every=150, sparsity_coefficient=0.02),
    )
    monkeypatch.setattr(run_module, "_summary", lambda trainer: 1 / 0)  # killed before the end
    with pytest.raises(ZeroDivisionError):
        run_module.train(store, config, options, tmp_path / "run", device="cpu")
    (found,) = checkpoint.existing(tmp_path / "run" / "training" / "checkpoints")
    assert explained(Crosscoder.from_pretrained(found), raw(500, seed=1)) > 0.3


def test_without_a_known_scale_a_checkpoint_reads_what_step_got_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, x = trainer_of(), raw() / NORMS[:, None]
    for step in range(30):
        trainer.step(x[step * 50 : step * 50 + B])
    for name in ("first", "second"):
        trainer.save(tmp_path / name)
    assert capsys.readouterr().err.count("the scale of the activations is not known") == 1
    loaded = Crosscoder.from_pretrained(tmp_path / "first")
    assert torch.equal(loaded.snapshot_scale, torch.ones(K)) and not loaded.is_mixed
    torch.testing.assert_close(loaded(x), trainer.model.eval()(x), rtol=1e-3, atol=1e-3)


def test_the_scale_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale_K = 3 / NORMS
    trainer, x = trainer_of(scale_K=scale_K), raw()
    for step in range(30):
        trainer.step((x * scale_K[:, None])[step * 50 : step * 50 + B])
    trainer.save(tmp_path / "checkpoint")
    assert "not known" not in capsys.readouterr().err
    loaded = Crosscoder.from_pretrained(tmp_path / "checkpoint")
    torch.testing.assert_close(loaded.snapshot_scale, scale_K)
    assert explained(loaded, x) == pytest.approx(explained(trainer.model.eval(), x * scale_K[:, None]), abs=2e-3)
    with pytest.raises(ConfigError, match="unfold_scales"):
        Trainer(loaded, TrainConfig(n_steps=1))


def test_batches_of_two_scales_are_refused(store: ActivationStore) -> None:
    trainer = trainer_of()
    trainer.step(next(iter(ActivationLoader(store, B))))
    other = next(iter(ActivationLoader(store, B, scale=np.array([1.0, 2.0, 3.0]))))
    assert np.array_equal(scale_of(other), [1.0, 2.0, 3.0])  # type: ignore[arg-type]
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(DataError, match=r"this batch was multiplied by \[1\.0, 2\.0, 3\.0\], those before by"):
        trainer.step(other)
    assert trainer.step_number == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    for bad in ([1.0, 2.0], [1.0, 2.0, 0.0], [1.0, float("nan"), 1.0]):
        with pytest.raises(DataError, match="scale_K must be 3 positive numbers"):
            trainer_of(scale_K=np.array(bad))


def test_a_crosscoder_saved_for_scaled_activations_says_so(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, loader = trainer_of(), ActivationLoader(store, B)
    trainer.step(next(iter(loader)))
    trainer.model.fold_scales(torch.from_numpy(loader.scale_K)).save_pretrained(tmp_path / "raw")
    trainer_of(scale_K=torch.ones(K)).model.save_pretrained(tmp_path / "unscaled")
    assert "scaled activations" not in capsys.readouterr().err
    trainer.model.save_pretrained(tmp_path / "scaled")
    assert "trained on scaled activations and is saved as one that reads such" in capsys.readouterr().err
