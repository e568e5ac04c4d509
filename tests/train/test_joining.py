"""One concept in two features is joined, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from crosscoder import Crosscoder, CrosscoderConfig, TrainConfig, Trainer
from crosscoder.errors import ConfigError
from crosscoder.train.joining import MIN_TOGETHER, JoiningSample, join_features

K, D, F = 4, 8, 6


def halves() -> tuple[Crosscoder, torch.Tensor]:
    """Feature 0 is a concept at snapshots 0 and 1, feature 1 the same concept at 2 and 3, twice as active; the others
    are different."""
    model = Crosscoder(CrosscoderConfig(K, D, F, gate="snapshot"))
    with torch.no_grad():
        model.W_dec[0, 2:] = 0
        model.W_dec[1, :2] = 0
        model.W_dec[1, 2:] = torch.randn(2, D, generator=torch.Generator().manual_seed(0))
        model.W_enc[1] = 2 * model.W_enc[0]
        model.b_enc[:2] = torch.tensor([0.1, 0.2])
    g = torch.Generator().manual_seed(1)
    f = torch.rand(40, F, generator=g) * (torch.rand(40, F, generator=g) < 0.5)
    f[:, 1] = 2 * f[:, 0]
    return model, f


def reconstruction(model: Crosscoder, f: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bf,fkd->bkd", f, model.W_dec.detach())


def test_two_halves_become_one_feature_that_reconstructs_the_same() -> None:
    model, f = halves()
    expected, encoder = reconstruction(model, f), model.W_enc[0].detach().clone()
    others = model.W_dec[2:].detach().clone()
    dropped = join_features(model, f.to_sparse(), 0.95)
    kept = 1 - int(dropped)
    assert dropped.tolist() in ([0], [1])
    assert (model.decoder_norms()[kept] > 0).all() and (model.decoder_norms()[dropped] == 0).all()
    f[:, dropped] = 0
    assert torch.allclose(reconstruction(model, f), expected, atol=1e-5)
    assert torch.allclose(model.W_enc[kept], encoder * (1 + kept), atol=1e-6)  # both encoders said the same
    assert torch.allclose(model.b_enc[kept], torch.tensor(0.1 * (1 + kept)))
    assert torch.equal(model.W_dec[2:], others)


def test_different_features_stay_two() -> None:
    model, f = halves()
    f[:, 1] = f[:, 0] * (1 + 2 * torch.rand(40, generator=torch.Generator().manual_seed(2)))
    f[:20, 1] = 0
    assert not len(join_features(model, f.to_sparse(), 0.95))


def test_a_few_tokens_prove_nothing() -> None:
    model, f = halves()
    rare = f.clone()
    rare[f[:, 0].nonzero().squeeze(1)[MIN_TOGETHER - 1 :], :2] = 0
    assert not len(join_features(model, rare.to_sparse(), 0.95))
    assert not len(join_features(model, torch.zeros(4, F).to_sparse(), 0.95))


def test_more_than_two_parts_find_each_other() -> None:
    model, f = halves()
    f[:, 2], f[:, 3] = 3 * f[:, 0], 0.5 * f[:, 0]
    expected = reconstruction(model, f)
    dropped = join_features(model, f.to_sparse(), 0.95)
    kept = ({0, 1, 2, 3} - set(dropped.tolist())).pop()
    assert len(dropped) == 3
    f[:, dropped] = 0
    assert torch.allclose(reconstruction(model, f), expected, atol=1e-4) and f[:, kept].any()


@pytest.mark.parametrize(("apart", "n_dropped"), [(True, 1), (False, 0)])
def test_parts_at_different_snapshots_may_differ_more(apart: bool, n_dropped: int) -> None:
    model, f = halves()
    g = torch.Generator().manual_seed(4)
    f[:, 1] = f[:, 0] * (0.3 + 1.4 * torch.rand(40, generator=g))
    cosine = float(torch.cosine_similarity(f[:, 0], f[:, 1], dim=0))
    assert 0.8 < cosine < 0.94
    if not apart:
        with torch.no_grad():
            model.W_dec[1, :2] = 1.0
    assert len(join_features(model, f.to_sparse(), 0.95)) == n_dropped


@pytest.mark.parametrize(("similar", "n_dropped"), [(True, 1), (False, 0)])
def test_parts_with_similar_decoders_may_differ_more(similar: bool, n_dropped: int) -> None:
    """Both are there at all snapshots, so that only the decoders' directions say whether they are one."""
    model, f = halves()
    g = torch.Generator().manual_seed(4)
    f[:, 1] = f[:, 0] * (0.3 + 1.4 * torch.rand(40, generator=g))
    assert 0.8 < float(torch.cosine_similarity(f[:, 0], f[:, 1], dim=0)) < 0.94
    with torch.no_grad():
        model.W_dec[0] = torch.randn(K, D, generator=g)
        model.W_dec[1] = model.W_dec[0] + 0.3 * torch.randn(K, D, generator=g) if similar else model.W_dec[0].flip(1)
        if not similar:
            model.W_dec[1] -= model.W_dec[0] * (model.W_dec[0] * model.W_dec[1]).sum() / model.W_dec[0].square().sum()
    assert len(join_features(model, f.to_sparse(), 0.95)) == n_dropped


@pytest.mark.parametrize(("same_direction", "n_dropped"), [(True, 1), (False, 0)])
def test_one_direction_at_different_snapshots_is_one_feature(same_direction: bool, n_dropped: int) -> None:
    model, f = halves()
    g = torch.Generator().manual_seed(5)
    f[:, 1] = f[:, 0] * (torch.rand(40, generator=g) < 0.5)
    assert 0.5 < float(torch.cosine_similarity(f[:, 0], f[:, 1], dim=0)) < 0.76
    if same_direction:
        with torch.no_grad():
            direction = torch.randn(D, generator=g)
            model.W_dec[0, :2], model.W_dec[1, 2:] = direction, 2 * direction
    assert len(join_features(model, f.to_sparse(), 0.95)) == n_dropped


def test_the_sample_is_the_activations_of_the_batches() -> None:
    model, _ = halves()
    x = torch.randn(30, K, D, generator=torch.Generator().manual_seed(3))
    codes = [model.encode(part, backend="reference") for part in x.split(10)]
    sample, other = JoiningSample(torch.device("cpu")), JoiningSample(torch.device("cpu"))
    for code in codes[:2]:
        sample.add(code)
    other.load(dict(sample.tensors()))  # as a resumed run has it
    for one in (sample, other):
        one.add(codes[2])
        matrix = one.take(F).to_dense()
        dense = torch.cat([code.to_dense().amax(dim=1) for code in codes])
        assert torch.equal(matrix, dense[: len(matrix)]) and not dense[len(matrix) :].any()
        assert not one.take(F)._nnz()


DIRECTIONS = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(7)))[0].view(8, 2, 16)


def two_sided(n_tokens: int, seed: int) -> torch.Tensor:
    """Eight concepts, each in one direction before the turn and in another after it."""
    g = torch.Generator().manual_seed(seed)
    f = torch.rand(n_tokens, 8, generator=g) * (torch.rand(n_tokens, 8, generator=g) < 0.2)
    before, after = torch.einsum("bf,fsd->sbd", 6 * f, DIRECTIONS)
    return torch.stack([before, before, after, after], dim=1)


def in_halves() -> Crosscoder:
    """All concepts of `two_sided` in halves."""
    model = Crosscoder(CrosscoderConfig(K, 16, 16, gate="snapshot"))
    with torch.no_grad():
        model.W_dec[:8, :2], model.W_dec[:8, 2:] = DIRECTIONS[:, :1], 0
        model.W_dec[8:, 2:], model.W_dec[8:, :2] = DIRECTIONS[:, 1:], 0
        model.W_enc.copy_(model.W_dec)
    return model


def trained(cosine: float | None) -> tuple[int, int]:
    """Of a crosscoder that starts with all concepts in halves: how many it joined, how many it has whole in the end."""
    config = TrainConfig(
        n_steps=200, batch_size=256, lr=1e-3, warmup_steps=1, sparsity_coefficient=0.05, revival_every=50,
        joining_cosine=cosine,
    )  # fmt: skip
    trainer = Trainer(in_halves(), config)
    for step in range(140):
        trainer.step(two_sided(256, step))
    norms = trainer.model.decoder_norms()
    return trainer.n_joined, int(((norms[:, 0] > 0.3) & (norms[:, 3] > 0.3)).sum())


def test_training_joins_what_turns() -> None:
    assert trained(None) == (0, 0)
    joined, whole = trained(0.95)
    assert joined == 8 and whole >= 8


@pytest.mark.parametrize("optimizer_mode", ["lazy", "exact"])
def test_what_comes_apart_after_the_last_revival_is_joined_near_the_end(optimizer_mode: str) -> None:
    config = TrainConfig(
        n_steps=100, batch_size=256, lr=1e-4, warmup_steps=1, revival_every=1000, optimizer_mode=optimizer_mode
    )
    trainer = Trainer(in_halves(), config)
    for step in range(94):
        trainer.step(two_sided(256, step))
    assert trainer.n_joined == 0
    trainer.step(two_sided(256, 94))
    assert trainer.n_joined == 8
    given_up = (trainer.model.decoder_norms() == 0).all(dim=1)
    assert given_up.sum() == 8
    for step in range(95, 100):
        metrics = trainer.step(two_sided(256, step))
    assert (trainer.model.decoder_norms()[given_up] == 0).all()
    assert int(metrics["dead"]) == 8


def test_the_cosine_is_checked() -> None:
    with pytest.raises(ConfigError, match="joining_cosine"):
        TrainConfig(joining_cosine=1.5)


def test_a_run_resumed_between_two_joinings_joins_the_same(tmp_path) -> None:
    config = TrainConfig(n_steps=60, batch_size=256, lr=1e-3, warmup_steps=1, revival_every=20, joining_cosine=0.5)

    def fresh() -> Trainer:
        return Trainer(Crosscoder(CrosscoderConfig(K, 16, 16, gate="snapshot"), seed=3), config)

    whole, first = fresh(), fresh()
    for step in range(36):  # 4 of the 8 batches before step 40 are seen
        whole.step(two_sided(256, step))
        first.step(two_sided(256, step))
    first.save(tmp_path / "checkpoint")
    second = fresh()
    second.resume(tmp_path / "checkpoint")
    for step in range(36, 60):
        whole.step(two_sided(256, step))
        second.step(two_sided(256, step))
    assert whole.n_joined == second.n_joined > 0
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
