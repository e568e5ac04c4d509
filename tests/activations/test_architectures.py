"""What is collected from any architecture is the whole model's own, or the collection is refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from activations.random_models import ARCHITECTURES, CONTEXT, VOCABULARY, random_configuration, random_model
from torch import Tensor
from transformers import BertLMHeadModel, GraniteForCausalLM

from crosscoder.activations.collect import collect
from crosscoder.activations.proof import prove, proven
from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.tokens import TokenSet
from crosscoder.activations.trunk import activations, block_ends, decoder_layers
from crosscoder.errors import ConfigError

SOME = (
    *("gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt", "llama", "mixtral", "qwen3", "gemma2", "phi"),
    *("olmo2", "granite", "cohere", "glm4", "gpt_neox_japanese", "mamba", "recurrent_gemma", "bert"),
)


def tokens() -> Tensor:
    return torch.randint(1, VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(0))


def collected(model: Any, folder: Path, layer: int) -> dict[str, Tensor | str]:
    """By site, what a collection would take, or why it is refused."""
    model.save_pretrained(folder / "step1")
    found: dict[str, Tensor | str] = {}
    for site in ("residual", "mlp", "attention"):
        try:
            taken = prove(SnapshotSet.open(str(folder), layer, site=site), 0, tokens())
            found[site] = activations(taken.load_trunk(0), layer, tokens(), site, taken.module)
        except ConfigError as error:
            found[site] = str(error)
    return found


def assert_the_models_own(model: Any, layer: int, found: dict[str, Tensor | str]) -> list[str]:
    """Against `hidden_states` of the whole model; returns the sites that were collected."""
    sites = [site for site, x in found.items() if isinstance(x, Tensor)]
    for site, reason in found.items():
        assert isinstance(reason, Tensor) or "cannot be collected" in reason, f"{site}: {reason}"
    if not sites:
        return sites
    with torch.no_grad():
        states = model(input_ids=tokens(), output_hidden_states=True, use_cache=False).hidden_states
    residual = found["residual"]
    assert isinstance(residual, Tensor)
    if layer + 2 < len(states):
        torch.testing.assert_close(residual, states[layer + 1], rtol=1e-5, atol=1e-5)
    attention, mlp = found["attention"], found["mlp"]
    assert isinstance(attention, Tensor) == isinstance(mlp, Tensor)
    if isinstance(attention, Tensor) and isinstance(mlp, Tensor):
        scale = float(states[layer].abs().max() + residual.abs().max())
        torch.testing.assert_close(states[layer] + attention + mlp, residual, rtol=1e-5, atol=1e-5 * scale)
        # Each is what that part adds, and not only their sum: without an MLP the block adds the attention's part alone.
        handles = [
            child.register_forward_hook(lambda module, inputs, output: without(output))
            for name, child in decoder_layers(model)[layer].named_children()
            if not re.search("attn|attention|norm|ln_|dropout", name)
        ]
        pre, post = block_ends(model, layer, tokens())
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(post - pre, attention, rtol=1e-5, atol=1e-5 * scale)
    return sites


def without(output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


@pytest.mark.parametrize("name", SOME)
def test_what_is_collected_is_the_whole_models_own_or_refused(name: str, tmp_path: Path) -> None:
    model = random_model(name, seed=4 if name == "falcon" else 3)
    layer = len(decoder_layers(model)) - 2
    sites = assert_the_models_own(model, layer, collected(model, tmp_path, layer))
    if name in ("mamba", "bert"):  # hidden_states that are something else; attention that looks ahead
        assert sites == [] or name == "bert"
    else:
        assert "residual" in sites


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_hundred_random_configurations(tmp_path: Path) -> None:
    """Four of each of some fifty architectures. Fifteen in a hundred may be ones that transformers does not run."""
    made, whole = 0, set()
    for name in ARCHITECTURES:
        for seed in range(4):
            try:
                model = random_model(name, seed)
                with torch.no_grad():
                    model(input_ids=tokens(), use_cache=False)
            except Exception:  # a combination that transformers does not take
                continue
            made += 1
            layer = seed % len(decoder_layers(model))
            if len(assert_the_models_own(model, layer, collected(model, tmp_path / name / str(seed), layer))) == 3:
                whole.add(name)
    assert made >= 200 and len(whole) >= 35


@pytest.mark.parametrize("site", ["mlp", "attention"])
def test_a_block_that_scales_what_it_adds_is_refused_with_the_reason(site: str, tmp_path: Path) -> None:
    """Granite multiplies both branches: the modules' outputs are not what is added."""
    config = random_configuration("granite", 0)
    config.residual_multiplier = 0.22
    torch.manual_seed(0)
    GraniteForCausalLM(config).save_pretrained(tmp_path / "step1")
    with pytest.raises(ConfigError) as refused:
        prove(SnapshotSet.open(str(tmp_path), 1, site=site), 0, tokens())
    message = str(refused.value)
    assert (
        f"--site {site} of {tmp_path} step1 cannot be collected: the outputs of attention (self_attn) and MLP (mlp)"
        in message
    )
    assert "in GraniteDecoderLayer do not add up to what the block adds" in message
    assert message.endswith("; use --site residual")
    assert prove(SnapshotSet.open(str(tmp_path), 1), 0, tokens()).proven


def granite(multiplier: float, folder: Path) -> None:
    config = random_configuration("granite", 0)
    config.residual_multiplier = multiplier
    torch.manual_seed(0)
    GraniteForCausalLM(config).save_pretrained(folder)


def token_set() -> TokenSet:
    ids = tokens().numpy().astype(np.int32)
    return TokenSet(ids, np.zeros_like(ids), ["a document"], "none")


def test_the_first_snapshot_must_hold_what_the_last_one_has_shown(tmp_path: Path) -> None:
    granite(1.0, tmp_path / "step2")
    granite(1.0, tmp_path / "step1")
    assert proven(SnapshotSet.open(str(tmp_path), 1, site="mlp"), token_set()).proven
    granite(0.22, tmp_path / "step1")
    with pytest.raises(ConfigError, match="--site mlp of .* step1 cannot be collected: the outputs of"):
        proven(SnapshotSet.open(str(tmp_path), 1, site="mlp"), token_set())
    assert proven(SnapshotSet.open(str(tmp_path), 1), token_set()).proven


def test_a_branch_that_adds_nothing_yet_is_taken_from_the_last_snapshot(tmp_path: Path) -> None:
    """Of a snapshot before training, whose blocks are initialised to add nothing."""
    for step in (0, 9):
        model = random_model("llama", 0)
        if step == 0:
            with torch.no_grad():
                for parameter in decoder_layers(model)[1].mlp.down_proj.parameters():
                    parameter.zero_()
        model.save_pretrained(tmp_path / f"step{step}")
    assert proven(SnapshotSet.open(str(tmp_path), 1, site="mlp"), token_set()).module == "mlp"
    with pytest.raises(ConfigError, match="adds next to nothing"):
        proven(SnapshotSet.open(str(tmp_path), 1, ("step0",), site="mlp"), token_set())


def slightly_wrong(monkeypatch: pytest.MonkeyPatch, relative: float) -> None:
    """Truncated models whose first block is off: what an architecture that depends on its depth would be."""
    load = SnapshotSet.load_trunk

    def wrong(self: SnapshotSet, k: int, dtype: torch.dtype | None = None) -> Any:
        model = load(self, k, dtype)
        with torch.no_grad():
            decoder_layers(model)[0].mlp.down_proj.weight.mul_(1 + relative)
        return model

    monkeypatch.setattr(SnapshotSet, "load_trunk", wrong)


@pytest.mark.parametrize("model_dtype", ["fp32", "bf16", "fp16"])
def test_a_difference_far_below_bfloat16_is_found_whatever_the_collection_runs_in(
    model_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model("llama", 0).save_pretrained(tmp_path / "step1")
    snapshots = SnapshotSet.open(str(tmp_path), 0)
    slightly_wrong(monkeypatch, 1e-3)
    with pytest.raises(ConfigError, match="does not give the whole model's residual stream"):
        collect(snapshots, token_set(), tmp_path / "store", model_dtype=model_dtype)
    assert not (tmp_path / "store").exists()


def test_a_model_that_does_not_fit_in_float32_is_proven_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random_model("llama", 0).save_pretrained(tmp_path / "step1")
    load = SnapshotSet.load

    def full(self: SnapshotSet, k: int, dtype: torch.dtype | None = None) -> Any:
        model = load(self, k, dtype)

        def to(device: str) -> Any:
            if device != "cpu":
                raise torch.OutOfMemoryError(f"{device} is full")
            return model

        monkeypatch.setattr(model, "to", to)
        return model

    monkeypatch.setattr(SnapshotSet, "load", full)
    assert proven(SnapshotSet.open(str(tmp_path), 0), token_set(), "meta").proven
    assert "in float32 does not fit on meta; its first tokens are run on the CPU" in capsys.readouterr().err


def test_a_model_that_counts_its_blocks_is_loaded_whole(tmp_path: Path) -> None:
    """The last block of this one is built differently: with fewer blocks in the configuration another one would be."""
    random_model("gpt_neox_japanese", 0).save_pretrained(tmp_path / "step1")
    found = prove(SnapshotSet.open(str(tmp_path), 0), 0, tokens())
    assert found.whole
    assert torch.equal(
        activations(found.load_trunk(0), 0, tokens()), activations(random_model("gpt_neox_japanese", 0), 0, tokens())
    )


def test_an_attention_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    config = random_configuration("bert", 0)
    config.is_decoder = False
    BertLMHeadModel(config).save_pretrained(tmp_path / "step1")
    with pytest.raises(ConfigError, match="a token changes the activations before it"):
        prove(SnapshotSet.open(str(tmp_path), 0), 0, tokens())
