"""The quickstart's language model: its batches, its loss, its snapshots, and going on after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crosscoder.activations.tokens import TokenSet, pack
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.quickstart import language_model
from crosscoder.quickstart.language_model import (
    LanguageModelConfig,
    next_token_loss,
    snapshot_steps,
    train_language_model,
)
from crosscoder.quickstart.text import Document
from crosscoder.quickstart.tokenizer import train_tokenizer

transformers = pytest.importorskip("transformers")

TINY = LanguageModelConfig(
    d_model=16, n_heads=2, d_mlp=32, steps=40, batch_size=4, warmup_steps=5, snapshots=9, checkpoint_every=8
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in `tokenizer/` and 16-token rows of its own text in `tokens/`."""
    folder = tmp_path_factory.mktemp("language_model")
    generator = np.random.default_rng(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "again"]
    documents = [Document(f"d{i}", " ".join(generator.choice(words, 400))) for i in range(10)]
    tokenizer = train_tokenizer(documents, folder / "tokenizer", vocabulary=300)
    pack(documents, tokenizer, context=16).save(folder / "tokens")
    return folder


@pytest.fixture(scope="module")
def tokens(folder: Path) -> TokenSet:
    return TokenSet.load(folder / "tokens")


@pytest.fixture(scope="module")
def whole(folder: Path, tokens: TokenSet) -> Path:
    """An uninterrupted training."""
    revisions = train_language_model(TINY, tokens, folder / "tokenizer", folder / "whole")
    assert revisions == TINY.revisions()
    return folder / "whole"


def same_bits(left: Path, right: Path) -> bool:
    names = sorted(path.relative_to(left) for path in left.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(right) for path in right.rglob("*") if path.is_file())
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


def test_snapshot_steps() -> None:
    assert snapshot_steps(1_000, 14) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 675, 837, 1_000]
    assert snapshot_steps(40, 9) == [0, 1, 2, 4, 8, 16, 32, 36, 40]
    assert snapshot_steps(2, 3) == [0, 1, 2]
    assert snapshot_steps(1, 2) == [0, 1]
    for steps, count in ((1_000, 11), (40, 7), (40, 16), (1, 3)):
        with pytest.raises(ConfigError, match="do not fit"):
            snapshot_steps(steps, count)


def test_transformers_reads_every_snapshot(whole: Path, folder: Path, tokens: TokenSet) -> None:
    assert sorted(path.name for path in whole.iterdir()) == sorted([*TINY.revisions(), "training.json"])
    rows = torch.from_numpy(tokens.ids[:32].astype(np.int64))
    losses = []
    for revision in TINY.revisions():
        model = transformers.AutoModelForCausalLM.from_pretrained(whole / revision, local_files_only=True)
        assert isinstance(model, transformers.GPTNeoXForCausalLM) and model.dtype == torch.float32
        with torch.no_grad():
            losses.append(model(rows, labels=rows).loss.item())
        tokenizer = transformers.AutoTokenizer.from_pretrained(whole / revision, local_files_only=True)
        text = "the quick — brown fox"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert losses[0] == pytest.approx(np.log(len(tokenizer)), abs=0.2)
    assert losses[-1] < losses[0] - 0.5 and len(set(losses)) == len(losses)


def test_a_complete_training_returns_at_once(
    whole: Path, folder: Path, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "_train", None)
    assert train_language_model(TINY, tokens, folder / "tokenizer", whole) == TINY.revisions()


@pytest.mark.parametrize("last_step", [0, 3, 8, 20, 39])
def test_the_same_bits_after_an_interruption(
    last_step: int,
    whole: Path,
    folder: Path,
    tokens: TokenSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = language_model.training_batch

    def interrupted(tokens: TokenSet, config: LanguageModelConfig, step: int) -> torch.Tensor:
        if step == last_step:
            raise KeyboardInterrupt
        return batch(tokens, config, step)

    monkeypatch.setattr(language_model, "training_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_language_model(TINY, tokens, folder / "tokenizer", tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint.bin").exists() == (last_step >= TINY.checkpoint_every)
    steps = []
    monkeypatch.setattr(
        language_model,
        "training_batch",
        lambda tokens, config, step: steps.append(step) or batch(tokens, config, step),
    )
    train_language_model(TINY, tokens, folder / "tokenizer", tmp_path / "out")
    assert steps[0] == last_step // TINY.checkpoint_every * TINY.checkpoint_every
    assert same_bits(tmp_path / "out", whole)


def test_the_same_bits_after_kill_9(whole: Path, folder: Path, tmp_path: Path) -> None:
    code = f"""
import sys, torch
from pathlib import Path
from crosscoder.activations.tokens import TokenSet
from crosscoder.quickstart.language_model import LanguageModelConfig, train_language_model
torch.set_num_threads({torch.get_num_threads()})
folder = Path(sys.argv[1])
train_language_model({TINY!r}, TokenSet.load(folder / "tokens"), folder / "tokenizer", Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "out")]
    generator = np.random.default_rng()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "step1").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(float(generator.uniform(0, 0.3)))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=120, check=False).returncode == 0
    for left in (tmp_path / "out").glob(".tmp-*"):
        assert not left.is_dir() or not list(left.glob("*.safetensors")), (
            "left over by the first, not the second"
        )
        left.rmdir() if left.is_dir() else left.unlink()
    assert same_bits(tmp_path / "out", whole)


def test_a_damaged_checkpoint_is_refused(
    folder: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "next_token_loss", _fails_at(12))
    with pytest.raises(KeyboardInterrupt):
        train_language_model(TINY, tokens, folder / "tokenizer", tmp_path)
    path = tmp_path / "checkpoint.bin"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:], b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"checkpoint\.bin is damaged .*delete it"):
            train_language_model(TINY, tokens, folder / "tokenizer", tmp_path)


def _fails_at(step: int, value: float | None = None):  # type: ignore[no-untyped-def]
    original, calls = next_token_loss, iter(range(10_000))

    def loss(model, ids):  # type: ignore[no-untyped-def]
        if next(calls) != step:
            return original(model, ids)
        if value is None:
            raise KeyboardInterrupt
        return original(model, ids) * value

    return loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops(
    value: float, folder: Path, tokens: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "next_token_loss", _fails_at(18, value))
    with pytest.raises(NonFiniteError, match=r"at step 18 .*checkpoint is of step 16"):
        train_language_model(TINY, tokens, folder / "tokenizer", tmp_path)


def test_what_another_configuration_began_is_refused(
    whole: Path, folder: Path, tokens: TokenSet, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"other settings \(learning_rate, seed\); delete .* or choose"):
        train_language_model(replace(TINY, seed=1, learning_rate=1e-3), tokens, folder / "tokenizer", whole)
    fewer = TokenSet(tokens.ids[:-1], tokens.document[:-1], tokens.names, tokens.tokenizer)
    with pytest.raises(ConfigError, match=r"other settings \(tokens\)"):
        train_language_model(TINY, fewer, folder / "tokenizer", whole)
    high = TokenSet(tokens.ids + 300, tokens.document, tokens.names, tokens.tokenizer)
    with pytest.raises(ConfigError, match="make the tokens with this tokenizer"):
        train_language_model(TINY, high, folder / "tokenizer", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 0}, "n_layers"),
        ({"d_model": 18, "n_heads": 4}, "n_heads"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"repeat_fraction": 1.5}, "repeat_fraction"),
        ({"warmup_steps": 40}, "warmup_steps"),
        ({"snapshots": 3}, "snapshots"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)  # type: ignore[arg-type]


def test_the_loss_and_its_gradients_are_those_of_the_logits(
    tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "_LOSS_ROWS", 7)  # does not divide 4 * 15
    model = language_model._new_model(TINY, 300, 16).double()
    rows = torch.from_numpy(tokens.ids[:4].astype(np.int64))
    loss = next_token_loss(model, rows)
    (2 * loss).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(rows).logits  # transformers' own loss would round them to float32
    reference = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    (2 * reference).backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_the_seed_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    language_model._new_model(TINY, 300, 16)
    assert torch.rand(1) == expected
