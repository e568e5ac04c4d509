"""The audit of int8 candidates: it counts what is missed, and gives int8 up when that is too much."""

from __future__ import annotations

import pytest
import torch
from support.crosscoders import GATES, RANKED, make

from crosscoder import TrainConfig, Trainer
from crosscoder.backends import recall
from crosscoder.code import SparseCode
from crosscoder.kernels.encode import products


def code_without(code: SparseCode, every: int) -> SparseCode:
    """The same code with each `every`-th pair left out."""
    kept = torch.arange(code.n_pairs) % every != 0
    rows = code.rows()[kept]
    offsets = torch.searchsorted(rows, torch.arange(code.n_tokens + 1))
    return SparseCode(
        offsets, code.features[kept], code.values[kept], code.gates[kept], code.n_snapshots, code.n_features
    )


def test_recall_is_what_was_left_out() -> None:
    model, x = make((60, 3, 16, 200))
    whole, head = model.encode(x), model.encode(x[:32])
    audit = recall.RecallAudit()
    assert float(audit.recall()) == 1 and not audit.add(whole, head)
    assert float(audit.recall()) == 1
    audit = recall.RecallAudit()
    assert audit.add(code_without(whole, 10), head), "a tenth is missing"
    assert float(audit.recall()) == pytest.approx(0.9, abs=0.01)
    assert audit.given_up and not audit.due(recall.EVERY)


def test_one_missed_pair_is_no_reason_to_give_up() -> None:
    model, x = make((60, 3, 16, 200))
    whole, head = model.encode(x), model.encode(x[:32])
    audit = recall.RecallAudit()
    assert not audit.add(code_without(whole, whole.n_pairs), head)
    assert float(audit.recall()) == 1 - 1 / head.n_pairs


def test_training_falls_back_aloud(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = make((64, 3, 16, 400), shift=-0.6)
    monkeypatch.setattr(products, "INT8_DEVIATIONS", -40.0)
    trainer = Trainer(model, TrainConfig(n_steps=200, batch_size=64, candidates="int8", lr=1e-4))
    first = trainer.step(x)
    assert float(torch.as_tensor(first["candidate_recall"])) < 0.99
    assert "int8 candidates find only" in capsys.readouterr().err
    second = trainer.step(x)
    assert float(torch.as_tensor(second["l0_union"])) > float(torch.as_tensor(first["l0_union"]))
    exact_pairs = trainer.model.encode(x).n_pairs / 64
    assert float(torch.as_tensor(trainer.step(x)["l0_union"])) == pytest.approx(exact_pairs, rel=1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_an_audit_of_a_few_tokens_takes_them_as_the_whole_batch_did(
    gate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """BatchTopK keeps the largest of the batch: here none of the audited tokens, which come first, is among them."""
    model, x = make((256, 3, 16, 400), gate=gate, shift=-0.2 if gate in RANKED else -1.0)
    x[: recall.TOKENS] *= 0.05
    x[recall.TOKENS : 2 * recall.TOKENS] *= 3
    trainer = Trainer(model, TrainConfig(n_steps=200, batch_size=256, candidates="int8", lr=1e-4))
    for _ in range(2 * recall.EVERY + 1):
        found = trainer.step(x)
    assert float(torch.as_tensor(found["candidate_recall"])) >= recall.REQUIRED_RECALL
    assert "int8 candidates find only" not in capsys.readouterr().err


@pytest.mark.parametrize("gate", ["batchtopk", "topk"])
def test_misses_of_a_gate_by_rank_are_noticed(
    gate: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, x = make((64, 3, 16, 400), gate=gate)
    monkeypatch.setattr(products, "INT8_DEVIATIONS", -40.0)
    found = Trainer(model, TrainConfig(n_steps=200, batch_size=64, candidates="int8", lr=1e-4)).step(x)
    assert float(torch.as_tensor(found["candidate_recall"])) < 0.99
    assert "int8 candidates find only" in capsys.readouterr().err
