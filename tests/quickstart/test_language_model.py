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

from crosscoder.activations.text import Document
from crosscoder.activations.tokens import TokenSet, pack
from crosscoder.errors import ConfigError, DataError, NonFiniteError
from crosscoder.quickstart import language_model
from crosscoder.quickstart.language_model import (
    LanguageModelConfig,
    next_token_loss,
    snapshot_steps,
    train_language_model,
    training_batch,
)
from crosscoder.quickstart.tokenizer import train_tokenizer

transformers = pytest.importorskip("transformers")

TINY = LanguageModelConfig(
    d_model=16,
    n_heads=2,
    d_mlp=32,
    steps=40,
    batch_size=4,
    warmup_steps=5,
    short_context=8,
    short_steps=20,
    shortest_repeat=0.25,
    snapshots=9,
    checkpoint_every=8,
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


def period(sequence: np.ndarray) -> int:
    """The smallest p such that the sequence is its first p tokens again and again."""
    return next(p for p in range(1, len(sequence) + 1) if (sequence[p:] == sequence[:-p]).all())


def distinct(rows: int, context: int) -> TokenSet:
    """No token occurs twice."""
    ids = np.arange(rows * context, dtype=np.int32).reshape(rows, context)
    return TokenSet(ids, ids * 0, ["a"], "none")


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    tokens = distinct(20, 64)
    config = LanguageModelConfig(batch_size=8, short_context=32, short_steps=10, seed=3)
    batches = {step: training_batch(tokens, config, step) for step in (9, 10, 0, 11)}
    for step, batch in batches.items():
        assert batch.dtype == torch.int64 and batch.shape == ((16, 32) if step < 10 else (8, 64))
        assert torch.equal(training_batch(tokens, config, step), batch)
        assert not torch.equal(training_batch(tokens, replace(config, seed=4), step), batch)
    assert not torch.equal(batches[10], batches[11])


def test_an_epoch_takes_every_row_once_and_each_in_its_own_order() -> None:
    tokens = distinct(12, 32)
    config = LanguageModelConfig(batch_size=8, short_steps=0, repeat_fraction=0, late_repeat_fraction=0)
    rows = torch.cat([training_batch(tokens, config, step) for step in range(3)])
    for epoch in rows.split(12):
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, tokens.ids.tolist()))
    assert not torch.equal(rows[:12], rows[12:])


def test_a_share_of_the_sequences_are_repeated_windows_of_many_lengths() -> None:
    tokens = distinct(50, 64)
    config = LanguageModelConfig(
        batch_size=10, short_context=32, short_steps=50, repeat_fraction=0.4, late_repeat_fraction=0.2
    )
    for steps, length, repeated in ((range(50), 32, 8), (range(50, 100), 64, 2)):
        periods = []
        for step in steps:
            batch = training_batch(tokens, config, step).numpy()
            periods += [period(sequence) for sequence in batch[:repeated]]
            assert all(period(sequence) == length for sequence in batch[repeated:])
            for sequence in batch:  # every one is text: tokens that follow each other
                window = sequence[: period(sequence)]
                assert (np.diff(window) == 1).all() and window[0] // 64 == window[-1] // 64
        assert min(periods) == length / 8 and length // 2 - 2 <= max(periods) <= length // 2
        assert np.bincount(periods).max() < len(periods) / 4


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


@pytest.mark.slow
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
        assert not left.is_dir() or not list(left.glob("*.safetensors")), "left over by the first, not the second"
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
    with pytest.raises(ConfigError, match="must divide the context of the tokens, 16"):
        train_language_model(replace(TINY, short_context=10), tokens, folder / "tokenizer", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 0}, "n_layers"),
        ({"d_model": 18, "n_heads": 4}, "n_heads"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"repeat_fraction": 1.5}, "repeat_fraction"),
        ({"shortest_repeat": 0.1}, "shortest_repeat"),
        ({"shortest_repeat": 0.6}, "shortest_repeat"),
        ({"warmup_steps": 40}, "warmup_steps"),
        ({"snapshots": 3}, "snapshots"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)  # type: ignore[arg-type]


def test_the_loss_and_its_gradients_are_those_of_the_logits(tokens: TokenSet, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_first_block_begins_by_attending_to_near_tokens() -> None:
    model = language_model._new_model(LanguageModelConfig(), 300, 32)
    first, second = (block.attention.query_key_value.bias.view(4, 3, 32) for block in model.base_model.layers)
    assert first[:, :2, :16].all() and not first[:, :2, 16:].any() and not first[:, 2].any() and not second.any()
    model.set_attn_implementation("eager")
    ids = torch.randint(300, (64, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        near, flat = (attention.mean(0)[:, -1] for attention in model(ids, output_attentions=True).attentions)
    assert (near[:, -4:].sum(1) > 0.4).all()
    assert (flat[:, -4:].sum(1) < 0.2).all()


def test_the_seed_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    language_model._new_model(TINY, 300, 16)
    assert torch.rand(1) == expected
