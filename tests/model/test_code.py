"""SparseCode and the encoder: the pairs are those of the dense definition, and pack and unpack without loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscoder import Crosscoder, CrosscoderConfig, SparseCode
from crosscoder.code import pack_gates
from crosscoder.errors import DataError
from crosscoder.gate import Gate
from crosscoder.kernels.encode import reference
from crosscoder.kernels.transpose.reference import transpose


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 20), st.integers(1, 64), st.integers(1, 40), st.sampled_from([-3.0, 0.0, 3.0]), st.integers(0, 99)
)
def test_pairs_are_those_of_the_dense_gates(B: int, K: int, F: int, shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(B, F, generator=generator) + shift
    norms = torch.rand(F, K, generator=generator) * 2
    norms[torch.rand(F, K, generator=generator) < 0.1] = 0
    theta = torch.rand(F, generator=generator)
    for gate in (Gate("norm"), Gate("one"), Gate("largest norm")):
        gates, _ = reference.gates(h, norms, theta, gate)
        code = reference.encode(h, norms, theta, gate)
        dense = torch.where(gates, h[:, None, :], 0.0)
        assert torch.equal(code.to_dense(), dense)
        for k in (0, K - 1):
            assert torch.equal(code.column(k), dense[:, k])
        assert code.n_tokens == B and int(code.row_offsets[-1]) == code.n_pairs
        assert (code.gates != 0).all() and (code.values > 0).all()
        ordered = code.rows() * F + code.features
        assert (ordered.diff() > 0).all(), "token by token, features ascending"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.integers(1, 64), st.integers(0, 99))
def test_gates_pack_and_unpack(N: int, K: int, seed: int) -> None:
    gates = torch.rand(N, K, generator=torch.Generator().manual_seed(seed)) < 0.5
    offsets = torch.tensor([0, N])
    code = SparseCode(offsets, torch.zeros(N, dtype=torch.int32), torch.ones(N), pack_gates(gates), K, 1)
    assert torch.equal(code.open_gates(), gates)


def test_more_than_64_snapshots_are_refused() -> None:
    with pytest.raises(DataError, match="at most 64"):
        pack_gates(torch.ones(2, 65, dtype=torch.bool))


@pytest.mark.parametrize("gate", ["topk", "batchtopk"])
def test_gates_by_rank_keep_the_largest(gate: str) -> None:
    model = Crosscoder(CrosscoderConfig(3, 5, 40, gate=gate, top_k=4)).train()
    x = torch.randn(30, 3, 5, generator=torch.Generator().manual_seed(0))
    h, norms = model.preactivations(x).detach(), model.decoder_norms().detach()
    scores = h.relu() * norms.amax(dim=1)
    code = model.encode(x)
    kept = code.column(0) > 0
    assert kept.sum() == 30 * 4
    if gate == "topk":
        assert (kept.sum(dim=1) == 4).all()
        assert (scores.masked_fill(~kept, torch.inf).amin(1) >= scores.masked_fill(kept, 0).amax(1)).all()
    else:
        assert scores[kept].min() >= scores[~kept].max()
        assert kept.sum(dim=1).min() < 4, "over the whole batch, not token by token"


def test_batchtopk_at_inference_uses_the_running_threshold() -> None:
    model = Crosscoder(CrosscoderConfig(3, 5, 40, gate="batchtopk", top_k=4))
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        model.train().loss(torch.randn(64, 3, 5, generator=generator))
    x = torch.randn(512, 3, 5, generator=generator)
    assert model.batch_threshold > 0
    mean = model.eval().encode(x).n_pairs / 512
    assert 3.5 < mean < 4.5
    alone = model.encode(x[:1])
    together = model.encode(x)
    assert alone.n_pairs == int(together.row_offsets[1]), "a token's code does not depend on its batch"


def test_transpose_is_a_stable_sort() -> None:
    model = Crosscoder(CrosscoderConfig(3, 5, 40, threshold_init=0.01))
    code = model.encode(torch.randn(30, 3, 5, generator=torch.Generator().manual_seed(0)))
    order = transpose(code)
    dense = code.column(0) + code.column(1) + code.column(2)
    for f in range(40):
        lo, hi = int(order.feature_offsets[f]), int(order.feature_offsets[f + 1])
        assert torch.equal(order.tokens[lo:hi].long(), dense[:, f].nonzero().squeeze(1))
        assert (code.features[order.order[lo:hi]] == f).all()
