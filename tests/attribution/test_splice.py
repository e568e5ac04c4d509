"""The model with features in its middle is the model: at every position, with padding, in batches, in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution import small
from torch import Tensor

from crosscoder.attribution.coding import CodedTask, LeftOut, PromptActivations, code_task, length_batches
from crosscoder.attribution.splice import CutModel, Splice
from crosscoder.errors import DataError, NonFiniteError

K = 3


def coded(tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[small.InMemory, CodedTask, Any]:
    snapshots = small.InMemory(tuple(small.neox(seed) for seed in range(K)))
    crosscoder = small.crosscoder(K)
    return snapshots, code_task(PromptActivations(small.task(), snapshots, tmp_path, dtype), crosscoder), crosscoder


def clean_logits(model: Any, ids_PT: Tensor, last_P: Tensor) -> Tensor:
    """One prompt at a time, without padding, through the whole model."""
    with torch.no_grad():
        return torch.stack(
            [model(ids[None, : last + 1]).logits[0, -1].float() for ids, last in zip(ids_PT, last_P, strict=True)]
        )


@pytest.mark.parametrize("make", [small.neox, small.gpt2, small.llama])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_two_halves_are_the_whole(make: Callable[[int], Any], layer: int) -> None:
    model, ids = make(0), torch.randint(1, small.VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(0))
    cut = CutModel(model, layer)
    with torch.no_grad():
        whole = model(ids, output_hidden_states=True)
        x = cut.residual(ids)
        if layer < 2:  # after the last block, transformers reports the stream behind the final norm
            assert torch.equal(x, whole.hidden_states[layer + 1])
        last = torch.tensor([8, 3, 5, 8])
        assert torch.equal(cut.logits(ids, x, last), whole.logits[torch.arange(4), last].float())
        assert torch.equal(model(ids).logits, whole.logits), "the model is left as it was"


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(DataError, match="blocks 0 to 2"):
        CutModel(small.neox(0), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_ablated_is_the_clean_model(tmp_path: Path, dtype: torch.dtype) -> None:
    """Within the rounding of a product that torch may split otherwise; what is put back is what was there."""
    snapshots, task, crosscoder = coded(tmp_path, dtype)
    for k in range(K):
        model = snapshots.load(k, dtype)
        splice = Splice(CutModel(model, snapshots.layer), crosscoder.W_dec[:, k], crosscoder.b_dec[k])
        prompts = task.at(k, "clean")
        with torch.no_grad():
            whole = model(prompts.ids_PT).logits[torch.arange(len(prompts)), prompts.last_P].float()
            kept = splice.logits(prompts, prompts.pairs.values_N.clone(), splice.error(prompts).clone())
        spliced = splice.logits(prompts)
        assert torch.equal(kept, spliced)
        scale = float(whole.abs().max())
        assert float((spliced - whole).abs().max()) <= 8 * torch.finfo(dtype).eps * scale
        tolerance = 1e-5 if dtype == torch.float32 else 0.2  # padding and batching change the order of sums
        alone = clean_logits(model, prompts.ids_PT, prompts.last_P)
        torch.testing.assert_close(whole, alone, atol=tolerance, rtol=tolerance)


def test_reconstruction_and_error_are_x(tmp_path: Path) -> None:
    _, task, crosscoder = coded(tmp_path)
    clean = task.at(0, "clean")
    code = crosscoder.encode(torch.stack([clean.coded(task.at(k, "clean").x_PTD) for k in range(K)], dim=1))
    expected_RKD = crosscoder.decode(code)
    splices = [Splice.__new__(Splice) for _ in range(K)]
    for k, splice in enumerate(splices):
        splice.W_FD, splice.b_D = crosscoder.W_dec[:, k].detach().contiguous(), crosscoder.b_dec[k].detach()
        prompts = task.at(k, "clean")
        decoded_RD = prompts.pairs.decode(splice.W_FD) + splice.b_D
        torch.testing.assert_close(decoded_RD, expected_RKD[:, k], atol=1e-5, rtol=1e-5)
        x_RD = prompts.coded(prompts.x_PTD)
        torch.testing.assert_close(decoded_RD + splice.error(prompts), x_RD, atol=1e-6, rtol=1e-6)
        assert float((decoded_RD - splice.b_D).norm()) > 0.1 * float(x_RD.norm()), "features do something"


def test_features_are_leaves_with_gradients(tmp_path: Path) -> None:
    """The gradient in a feature is that of finite differences, at the feature's token and nowhere else."""
    snapshots, task, crosscoder = coded(tmp_path)
    k = 1
    model = snapshots.load(k).double()
    splice = Splice(CutModel(model, snapshots.layer), crosscoder.W_dec[:, k], crosscoder.b_dec[k])
    prompts = task.at(k, "clean")
    values = prompts.pairs.values_N.clone().requires_grad_()
    metric = task.task.measure(splice.logits(prompts, values), torch.arange(len(prompts)))
    (gradient,) = torch.autograd.grad(metric.sum(), values)
    prompt_N = prompts.prompt_of_rows()[prompts.pairs.rows()]
    for pair in torch.linspace(0, len(values) - 1, 12).long().tolist():
        up, down = values.detach().clone(), values.detach().clone()
        up[pair] += 0.02
        down[pair] -= 0.02
        with torch.no_grad():
            index = torch.arange(len(prompts))
            change_P = task.task.measure(splice.logits(prompts, up), index)
            change_P -= task.task.measure(splice.logits(prompts, down), index)
        assert change_P.nonzero()[:, 0].tolist() in ([], [int(prompt_N[pair])])
        assert float(change_P.sum()) / 0.04 == pytest.approx(float(gradient[pair]), rel=2e-2, abs=2e-4)


def test_every_position_is_spliced_and_end_of_text_is_not(tmp_path: Path) -> None:
    """Ablating all features moves x to the decoder's bias plus error at real tokens, and at no others."""
    snapshots, task, crosscoder = coded(tmp_path)
    prompts = task.at(0, "clean")
    splice = Splice(CutModel(snapshots.load(0), snapshots.layer), crosscoder.W_dec[:, 0], crosscoder.b_dec[0])
    x_PTD = prompts.shifted(-prompts.pairs.decode(splice.W_FD))
    for p, last in enumerate(prompts.last_P.tolist()):
        assert not prompts.coded_PT[p, 0] and bool(prompts.coded_PT[p, 1 : last + 1].all())
        assert not bool(prompts.coded_PT[p, last + 1 :].any())
    expected_RD = splice.error(prompts) + splice.b_D
    torch.testing.assert_close(x_PTD[prompts.coded_PT], expected_RD, atol=1e-5, rtol=1e-5)
    assert torch.equal(x_PTD[~prompts.coded_PT], prompts.x_PTD[~prompts.coded_PT])


def test_tokens_that_the_crosscoder_never_saw_have_no_features_and_stay(tmp_path: Path) -> None:
    """By position and by id, on either side; everything else is as without."""
    _, whole, crosscoder = coded(tmp_path)
    clean_PT, corrupted_PT = (whole.task.ids(side) for side in ("clean", "corrupted"))
    unseen = int(clean_PT[0, 3])
    activations = whole.activations
    left_out = LeftOut(positions=2, ids=(unseen,))
    fewer = code_task(PromptActivations(whole.task, activations.snapshots, tmp_path, left_out=left_out), crosscoder)
    seen_PT = (clean_PT != unseen) & (corrupted_PT != unseen)
    seen_PT[:, :2] = False
    prompts, before = fewer.at(1, "clean"), whole.at(1, "clean")
    assert torch.equal(prompts.coded_PT, before.coded_PT & seen_PT) and not bool(prompts.coded_PT[0, 3])
    kept_R = seen_PT[before.coded_PT]
    assert 0 < int(kept_R.sum()) < len(kept_R)
    x_RF = before.pairs.decode(torch.eye(crosscoder.config.n_features))[kept_R]
    assert torch.equal(prompts.pairs.decode(torch.eye(crosscoder.config.n_features)), x_RF)


def test_batches_give_what_the_whole_gives(tmp_path: Path) -> None:
    snapshots, task, crosscoder = coded(tmp_path)
    prompts = task.at(2, "clean")
    splice = Splice(CutModel(snapshots.load(2), snapshots.layer), crosscoder.W_dec[:, 2], crosscoder.b_dec[2])
    ablated_RD = -prompts.pairs.decode(splice.W_FD)
    whole = splice.shifted_logits(prompts, ablated_RD)
    batches = length_batches(prompts.last_P, torch.arange(len(prompts)), tokens=40)
    assert len(batches) > 3 and sorted(torch.cat(batches).tolist()) == list(range(len(prompts)))
    for index_B in batches:
        batch = prompts.take(index_B)
        assert batch.ids_PT.numel() <= 40
        part = splice.shifted_logits(batch, -batch.pairs.decode(splice.W_FD))
        torch.testing.assert_close(part, whole[index_B], atol=1e-5, rtol=1e-5)
    twice = prompts.take(torch.tensor([4, 4, 1]))
    torch.testing.assert_close(
        splice.shifted_logits(twice, -twice.pairs.decode(splice.W_FD)), whole[[4, 4, 1]], atol=1e-5, rtol=1e-5
    )


def test_activations_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, task, crosscoder = coded(tmp_path)
    monkeypatch.setattr(small.InMemory, "load", lambda *_: pytest.fail("loaded again"))
    again = code_task(task.activations, crosscoder)
    assert torch.equal(again.codes["clean"].values_N, task.codes["clean"].values_N)


def test_bad_activations_and_another_crosscoder(tmp_path: Path) -> None:
    model = small.neox(0)
    snapshots = small.InMemory((model, model))
    activations = PromptActivations(small.task(), snapshots, tmp_path / "a")
    with pytest.raises(DataError, match="crosscoder is of 3 snapshots, the model has 2"):
        code_task(activations, small.crosscoder(3))
    with pytest.raises(DataError, match="another model"):
        code_task(activations, small.crosscoder(2, D=8))
    (tmp_path / "a" / "step0-clean.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match="step0-clean.npy is damaged"):
        code_task(activations, small.crosscoder(2))
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match="snapshot step0 is not finite"):
        code_task(PromptActivations(small.task(40), snapshots, tmp_path / "b"), small.crosscoder(2))
