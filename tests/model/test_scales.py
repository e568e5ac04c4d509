"""Folding the snapshot scales into the weights changes nothing: same features, same reconstructions, raw inputs."""

from __future__ import annotations

import pytest
import torch

from crosscoder import Crosscoder, CrosscoderConfig
from crosscoder.errors import ConfigError, DataError

NORMS = torch.tensor([1.0, 5.0, 20.0, 80.0], dtype=torch.float64)
GATES = [("snapshot", None), ("shared", None), ("topk", 5), ("batchtopk", 5)]


@pytest.mark.parametrize(("gate", "top_k"), GATES)
def test_folded_model_on_raw_activations(gate: str, top_k: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    model = Crosscoder(CrosscoderConfig(4, 16, 60, gate=gate, top_k=top_k)).double().eval()
    with torch.no_grad():
        for parameter in (model.W_dec, model.W_enc, model.b_enc, model.b_dec):
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    model.batch_threshold.fill_(0.5)
    raw = torch.randn(50, 4, 16, generator=generator, dtype=torch.float64) * (NORMS / 4)[:, None]
    scale = 16**0.5 / torch.linalg.vector_norm(raw, dim=2).mean(dim=0)
    scaled = raw * scale[:, None]
    folded = model.fold_scales(scale)
    ours, theirs = model.encode(scaled), folded.encode(raw)
    assert 0 < ours.n_pairs < 50 * 60
    assert torch.equal(ours.features, theirs.features) and torch.equal(ours.gates, theirs.gates)
    torch.testing.assert_close(theirs.values, ours.values, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(folded.decode(theirs) * scale[:, None], model.decode(ours), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(folded(raw) * scale[:, None], model(scaled), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(folded.decoder_norms(), model.decoder_norms(), rtol=1e-12, atol=1e-12)
    back = folded.unfold_scales()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, rtol=1e-12, atol=1e-14)


def test_a_folded_crosscoder_is_not_trained() -> None:
    folded = Crosscoder(CrosscoderConfig(4, 16, 60)).fold_scales(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(ConfigError, match="unfold_scales"):
        folded.loss(torch.randn(3, 4, 16))


def test_bad_scales() -> None:
    model = Crosscoder(CrosscoderConfig(4, 16, 60))
    for scale in ([1.0, 2.0], [1.0, 2.0, 0.0, 1.0], [1.0, float("nan"), 1.0, 1.0]):
        with pytest.raises(DataError, match="4 positive numbers"):
            model.fold_scales(torch.tensor(scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_exact_in_a_crosscoder_of_16_bits(dtype: torch.dtype) -> None:
    """Rounded to bf16, a scale would shift all of its snapshot by up to 0.4 %."""
    scale = torch.tensor([1.003, 0.3339, 7.77, 0.0123])
    model = Crosscoder(CrosscoderConfig(4, 16, 60)).to(dtype)
    folded = model.fold_scales(scale)
    assert torch.equal(folded.snapshot_scale, scale)
    exact = model.float().fold_scales(scale)
    ratio = (folded.W_enc.double() / exact.W_enc.double()).mean(dim=(0, 2))
    torch.testing.assert_close(ratio, torch.ones(4, dtype=torch.float64), atol=2e-4, rtol=0)
    converted = exact.to(dtype)
    assert torch.equal(converted.snapshot_scale, scale) and converted.snapshot_mix.dtype == torch.float32


def test_thresholds_never_drop_under_float32() -> None:
    model = Crosscoder(CrosscoderConfig(2, 8, 20))
    with torch.no_grad():
        model.log_threshold += torch.linspace(0, 1, 20) / 3
    exact = model.log_threshold.detach().clone()
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype)
        assert model.W_dec.dtype == dtype
        assert model.log_threshold.dtype == torch.float32 and torch.equal(model.log_threshold, exact)
    assert model.double().log_threshold.dtype == torch.float64
