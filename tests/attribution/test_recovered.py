"""The loss recovered, against the whole model with a hook, prediction by prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution import small
from faults.test_kill import collection
from torch import Tensor

from crosscoder import ActivationStore, Crosscoder, cli
from crosscoder.activations.tokens import TokenSet
from crosscoder.attribution.recovered import RecoveredLoss, recovered_loss
from crosscoder.attribution.splice import CutModel
from crosscoder.errors import DataError, NonFiniteError

K, S, C = 3, 7, 12


def tokens() -> TokenSet:
    """Sequences that begin with the end-of-text token (0); some have it in the middle, one is filled up with it."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, small.VOCABULARY, (S, C)).astype(np.int32)
    ids[:, 0] = 0
    ids[2, 5] = ids[4, 3] = 0
    ids[6, 8:] = 0
    return TokenSet(ids, np.zeros((S, C), np.int32), ["text"], "none")


def stored(path: Path, snapshots: small.InMemory, text: TokenSet, seed: int = 0) -> ActivationStore:
    """The residual streams of all tokens but the end-of-text one, shuffled, in two shards."""
    sequence, position = np.nonzero(text.ids != 0)
    order = np.random.default_rng(seed).permutation(len(sequence))
    rows = [order[: len(order) // 2], order[len(order) // 2 :]]
    names = list(snapshots.revisions)
    store = ActivationStore.create(path, K, small.WIDTH, "fp32", shard_rows=[len(r) for r in rows], snapshots=names)
    ids = torch.from_numpy(text.ids).long()
    for k in range(K):
        x_SCD = CutModel(snapshots.load(k), snapshots.layer).residual(ids)
        for shard, row in enumerate(rows):
            store.write_segment(shard, k, x_SCD[sequence[row], position[row]])
            columns = (text.ids[sequence[row], position[row]], 0 * row, sequence[row], position[row])
            store.write_tokens(shard, np.stack(columns, axis=1).astype(np.int32))
    return store


@pytest.fixture
def made(tmp_path: Path) -> tuple[small.InMemory, TokenSet, ActivationStore, Crosscoder]:
    snapshots = small.InMemory(tuple(small.neox(seed) for seed in range(K)))
    text = tokens()
    return snapshots, text, stored(tmp_path / "store", snapshots, text), small.crosscoder(K)


def plain_loss(model: Any, layer: int, ids_SC: Tensor, instead_SCD: Tensor | None) -> float:
    """The whole model, one sequence at a time, with `instead_SCD` after the block at all but end-of-text tokens."""
    losses = []
    for s, ids in enumerate(ids_SC):

        def replace(module: Any, inputs: Any, output: Any, s: int = s, ids: Tensor = ids) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            if instead_SCD is not None:
                x = torch.where((ids != 0)[None, :, None], instead_SCD[s][None], x)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = model.gpt_neox.layers[layer].register_forward_hook(replace)
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].double().log_softmax(dim=-1)
        handle.remove()
        for c in range(len(ids) - 1):
            if ids[c] != 0 and ids[c + 1] != 0:
                losses.append(-float(log_p[c, ids[c + 1]]))
    return float(np.mean(losses))


@pytest.mark.parametrize(("n_tokens", "chosen"), [(10_000, range(S)), (3 * C, [0, 3, 6]), (1, [0])])
def test_the_three_losses_are_those_of_the_definition(
    made: tuple[small.InMemory, TokenSet, ActivationStore, Crosscoder], n_tokens: int, chosen: Any
) -> None:
    snapshots, text, store, crosscoder = made
    found = recovered_loss(crosscoder, snapshots, text, store, n_tokens)
    ids = torch.from_numpy(text.ids).long()
    x_SCKD = torch.stack([CutModel(snapshots.load(k), snapshots.layer).residual(ids) for k in range(K)], dim=2)
    y_SCKD = crosscoder.decode(crosscoder.encode(x_SCKD.flatten(0, 1))).view(x_SCKD.shape)
    mean_KD = x_SCKD[ids != 0].mean(dim=0)
    chosen = list(chosen)
    for k in range(K):
        model = snapshots.load(k)
        wanted = [
            plain_loss(model, snapshots.layer, ids[chosen], instead)
            for instead in (None, y_SCKD[chosen, :, k], mean_KD[k].expand(len(chosen), C, -1))
        ]
        assert abs(wanted[0] - wanted[1]) > 1e-3 and abs(wanted[1] - wanted[2]) > 1e-3, "worth comparing"
        measured = [found.clean_K[k], found.spliced_K[k], found.mean_ablated_K[k]]
        np.testing.assert_allclose(measured, wanted, atol=2e-5)
    assert found.n_predictions == int(((ids[chosen, :-1] != 0) & (ids[chosen, 1:] != 0)).sum())
    assert found.snapshots == ["step0", "step1", "step2"]


def test_snapshots_are_matched_by_name(made: tuple[small.InMemory, TokenSet, ActivationStore, Crosscoder]) -> None:
    """A store without one of the model's snapshots, as where collection skipped it."""
    snapshots, text, store, _ = made
    some = store.select(["step0", "step2"])
    found = recovered_loss(small.crosscoder(2), snapshots, text, some, 10_000)
    ids = torch.from_numpy(text.ids).long()
    clean = [plain_loss(snapshots.load(k), snapshots.layer, ids, None) for k in (0, 2)]
    np.testing.assert_allclose(found.clean_K, clean, atol=2e-5)


def test_the_share_recovered() -> None:
    found = RecoveredLoss(["a", "b", "c"], 10, [2.0, 3.0, 5.0], [2.5, 3.0, 5.1], [4.0, 3.005, 4.9])
    assert found.recovered_K == [0.75, None, None], "a cost of 0.005 nats, or none, says nothing"
    assert found.to_dict()["by_snapshot"]["a"] == {"clean": 2.0, "spliced": 2.5, "mean_ablated": 4.0, "recovered": 0.75}


def test_a_store_that_does_not_fit_is_refused(
    made: tuple[small.InMemory, TokenSet, ActivationStore, Crosscoder], tmp_path: Path
) -> None:
    snapshots, text, store, crosscoder = made
    ids = text.ids.copy()
    ids[0, 4] = 0
    with pytest.raises(DataError, match="not hold the activations of the run's held-out tokens"):
        recovered_loss(crosscoder, snapshots, TokenSet(ids, text.document, text.names, "none"), store, 10_000)
    ids[0, 4] = text.ids[0, 4] % 40 + 1
    with pytest.raises(DataError, match="not hold the activations of the run's held-out tokens"):
        recovered_loss(crosscoder, snapshots, TokenSet(ids, text.document, text.names, "none"), store, 10_000)
    with pytest.raises(DataError, match="snapshots that the model does not have: step2"):
        recovered_loss(crosscoder, small.InMemory(snapshots.models[:2]), text, store, 10_000)
    with torch.no_grad():
        snapshots.models[1].get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="step1"):
        recovered_loss(crosscoder, snapshots, text, store, 10_000)


def test_eval_measures_it_where_it_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> int:
        return cli.main([str(argument) for argument in arguments])

    collection(tmp_path)
    folder = tmp_path / "run"
    options = ["--model", tmp_path / "models", "--text", tmp_path / "text.txt", "--layer", 1, "--context", 64]
    assert run("collect", folder, *options) == 0
    assert run("train", folder, "--n-features", 32, "--n-steps", 12, "--batch-size", 64, "--lr", 1e-3) == 0
    assert run("eval", folder, "--loss-tokens", 500) == 0
    found = json.loads((folder / "summary.json").read_text())["language_model_loss"]
    assert list(found["by_snapshot"]) == ["step0", "step1", "step8"] and 300 < found["n_predictions"] <= 512
    assert all(4 < row["clean"] < 7 for row in found["by_snapshot"].values()), "about ln 300 = 5.7"
    assert "language-model loss at step8: " in capsys.readouterr().out
    (folder / "snapshots.json").unlink()
    assert run("eval", folder) == 0
    printed = capsys.readouterr()
    assert "language-model loss not measured" in printed.err and "explained variance" in printed.out
    assert json.loads((folder / "summary.json").read_text())["language_model_loss"] is None, "not that of before"
    assert run("eval", folder, "--loss-tokens", 0) == 0
    assert "language-model loss" not in capsys.readouterr().err
