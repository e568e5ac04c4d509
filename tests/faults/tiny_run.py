"""A whole run of a tiny language model, made by the commands themselves, in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from faults.forking import Forks
from support.language_models import neox, text_and_snapshots

SHAPE = {"vocab_size": 300, "num_hidden_layers": 2}
TRAIN = ["--n-features", 48, "--n-steps", 40, "--batch-size", 128, "--lr", 3e-3, "--checkpoint-every", 15]
EVOLVE = ["--induction-length", 16, "--n-probed", 12, "--complexity-features", 12, "--samples", 8, "--positions", 16]
ATTRIBUTE = ["--n-prompts", 16, "--n-exact", 4, "--steps", 2, "--n-random", 1]
SWEEP = ["--sparsity", 0.05, "--n-steps", 24, "--baseline-lr", 3e-3]


def make_inputs(folder: Path) -> None:
    """A text and three snapshots of a tiny GPT-NeoX under `folder`."""
    tokenizer = text_and_snapshots(folder, (80, 50), **SHAPE)
    (folder / "liked.jsonl").write_text("\n".join(map(json.dumps, liked(neox(8, **SHAPE), tokenizer))))


def liked(model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """A task that a model of random weights does: the right answer of a prompt is the word that it gives most to."""
    from crosscoder.attribution.tasks import word_tokens

    words = word_tokens(tokenizer)
    prompts = torch.tensor(words)[torch.randint(len(words), (2, 16, 6), generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        ids = torch.cat([torch.zeros(16, 1, dtype=torch.long), prompts[0]], dim=1)
        logits = model(ids).logits[:, -1, words]
    pairs = []
    for clean, corrupted, scores in zip(*prompts, logits, strict=True):
        answers = {"right": words[int(scores.argmax())], "wrong": words[int(scores.argmin())]}
        texts = {"clean": clean, "corrupted": corrupted, **answers}
        pairs.append({name: tokenizer.decode(ids) for name, ids in texts.items()})
    return pairs


def collect_options(folder: Path) -> list[object]:
    """Of `crosscoder collect RUN`."""
    options: list[object] = ["--model", folder / "models", "--layer", 1, "--text", folder / "text.txt"]
    return [*options, "--context", 64, "--rows-per-shard", 2048]


def make_run(folder: Path, forks: Forks) -> None:
    """`folder / "run"`, collected, trained, evaluated; `make_inputs` was there before."""
    forks.run(folder, "collect", "run", *collect_options(folder))
    forks.run(folder, "train", "run", *TRAIN)
    forks.run(folder, "eval", "run", "--loss-tokens", 512)
