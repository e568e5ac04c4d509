"""The metrics, against their definitions written out."""

from __future__ import annotations

import torch

from crosscoder import Crosscoder, CrosscoderConfig
from crosscoder.metrics import Evaluator, batch_explained_variance


def test_streaming_equals_the_definition_on_all_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    model = Crosscoder(CrosscoderConfig(3, 8, 30, threshold_init=0.3)).eval().double()
    x = torch.randn(100, 3, 8, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5])[:, None] + 0.3
    evaluator = Evaluator(x.mean(dim=0), 30)
    for part in x.split(33):
        code = model.encode(part)
        evaluator.add(part, model.decode(code), code)
    result = evaluator.result()
    with torch.no_grad():
        residual, dense = model(x) - x, model.encode(x).to_dense()
    error_BK, total_BK = residual.square().sum(2), (x - x.mean(0)).double().square().sum(2)
    expected_K = 1 - error_BK.sum(0) / total_BK.sum(0)
    torch.testing.assert_close(torch.tensor(result.explained_variance_K, dtype=torch.float64), expected_K)
    ratios_K = (1 - error_BK / total_BK).mean(0)
    torch.testing.assert_close(torch.tensor(result.explained_variance_mean_of_ratios_K, dtype=torch.float64), ratios_K)
    assert abs(result.explained_variance - float(1 - error_BK.sum() / total_BK.sum())) < 1e-9
    on = dense > 0
    torch.testing.assert_close(torch.tensor(result.l0_K), on.float().sum(2).mean(0))
    assert abs(result.l0 - float(on.float().sum(2).mean())) < 1e-6
    assert abs(result.l0_union - float(on.any(1).float().sum(1).mean())) < 1e-6
    torch.testing.assert_close(result.firing_rate_F.float(), on.any(1).float().mean(0))
    assert result.never_fired_fraction == float((~on.any(1).any(0)).double().mean())
    assert result.n_tokens == 100
    pooled_K, mean_K = batch_explained_variance(x.float(), residual.float())
    torch.testing.assert_close(pooled_K.double(), expected_K, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean_K.double(), ratios_K, rtol=1e-4, atol=1e-5)


def test_a_perfect_reconstruction_explains_everything() -> None:
    x = torch.randn(10, 2, 4)
    for explained in batch_explained_variance(x, torch.zeros_like(x)):
        torch.testing.assert_close(explained, torch.ones(2))
