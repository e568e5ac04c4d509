"""Which code reads which file of the runs that tools/whole_run.py makes, and whether it gives the same values."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosscoder import ActivationStore, Crosscoder, CrosscoderConfig, Trainer, configfile
from crosscoder.activations.tokens import TokenSet
from crosscoder.attribution.finished import finished_tasks
from crosscoder.common.arrays import load_arrays, load_mapped
from crosscoder.common.tables import read_table
from crosscoder.config import TrainConfig
from crosscoder.evolution.analyses import analysis
from crosscoder.evolution.study import Study
from crosscoder.explain.answers import Answers
from crosscoder.explain.explanation_study import ExplanationStudy
from crosscoder.files import read_json
from crosscoder.quickstart.language_model import LanguageModelConfig, train_language_model
from crosscoder.quickstart.tokenizer import load_tokenizer
from crosscoder.report import finished, language_model
from crosscoder.report.assemble import _settings
from crosscoder.runs import Run
from crosscoder.train.log import read_metrics
from crosscoder.train.run import train, training_seconds
from crosscoder.verbs.train import TrainVerbConfig

Reader = Callable[[Run, Path], Any]


def _crosscoder(run: Run, path: Path) -> Any:
    model = Crosscoder.from_pretrained(path.parent)
    return model.config, model.state_dict()


def _training_record(run: Run, path: Path) -> Any:
    folder = path.parent.parent
    record = read_json(path)
    if folder == run.path:  # the verb's own look at a finished training
        settings = configfile.read_config(run.path / "config" / "train.yaml", TrainVerbConfig)
        config = CrosscoderConfig(6, 128, settings.n_features)
        train(run.store("train"), config, settings.train, folder)
    return record


def _checkpoint(run: Run, path: Path) -> Any:
    trainer = Trainer(Crosscoder(_CHECKPOINT[0]), _CHECKPOINT[1])
    extra = trainer.resume(path.parent)
    return extra, trainer.state_dict()


_CHECKPOINT: list[Any] = []
"""Configurations of the crosscoder and of its training in `killed/`: a flipped file must not choose its own reader."""


def _metrics(run: Run, path: Path) -> Any:
    return training_seconds(path.parent.parent), read_metrics(path)


def _segment(run: Run, path: Path) -> Any:
    store = ActivationStore.open(path.parent.parent)
    if path.name == "tokens.seg":
        return [store.tokens(shard) for shard in range(len(store.shard_rows))]
    k = int(path.stem.rpartition("-")[2])
    return store.select([store.snapshot_names[k]]).read(int(path.parent.name[-5:]), slice(None))


def _analysis(run: Run, path: Path) -> Any:
    return Study.of(run).finished(analysis(path.stem))


def _task(run: Run, path: Path) -> Any:
    return finished_tasks(run, run.snapshots().revisions)


def _answers(run: Run, path: Path) -> Any:
    answers = Answers(path)
    return answers._records, answers.tokens_of("m")


def _snapshot(run: Run, path: Path) -> Any:
    snapshots = run.snapshots()
    k = snapshots.revisions.index(path.parent.name)
    model = snapshots.load_trunk(k)
    ids = torch.arange(40)[None]
    return snapshots.load_config(k).max_position_embeddings, model.state_dict(), model(ids)[0]


def _tokenizer(run: Run, path: Path) -> Any:
    last = run.snapshots().revisions[-1]
    if path.parent.name == last:
        return _uses(run.snapshots().load_tokenizer())
    return None  # the last snapshot's is the one that is used


def _own_tokenizer(run: Run, path: Path) -> Any:
    config = LanguageModelConfig(**read_json(run.path / "language_model" / "training.json")["config"])
    tokens = TokenSet.load(run.tokens("language_model"))
    train_language_model(config, tokens, path.parent, run.path / "language_model")  # quickstart's next call
    return _uses(load_tokenizer(path.parent))


def _uses(tokenizer: Any) -> Any:
    ids = list(range(len(tokenizer)))
    text = "The people of the United States, in 1789 -- and again."
    return [tokenizer.decode([token]) for token in ids], tokenizer.encode(text), tokenizer.eos_token_id


def prepare(folder: Path) -> None:
    """What the readers need to know before anything is damaged."""
    (saved,) = (folder / "killed" / "training" / "checkpoints").iterdir()
    config = Crosscoder.from_pretrained(saved).config
    _CHECKPOINT[:] = config, TrainConfig(**read_json(saved / "trainer.json")["train_config"])


READERS: dict[str, Reader] = {
    "run/crosscoder/training.json": _training_record,
    "run/crosscoder/*": _crosscoder,
    "run/sweep/points/*/crosscoder/training.json": _training_record,
    "run/sweep/points/*/crosscoder/*": _crosscoder,
    "run/sweep/points/*/training/metrics.jsonl": _metrics,
    "run/sweep/points/*/result.json": lambda run, path: read_json(path),
    "run/sweep/snapshots.parquet": lambda run, path: read_table(path),
    "run/sweep/*.json": lambda run, path: finished.finished(Study.of(run)),
    "run/sweep/*.parquet": lambda run, path: finished.finished(Study.of(run)),
    "killed/training/checkpoints/*": _checkpoint,
    "killed/training/metrics.jsonl": _metrics,
    "run/training/metrics.jsonl": _metrics,
    "run/config/*.yaml": lambda run, path: _settings(run),
    "run/evolution/settings.yaml": lambda run, path: Study.of(run).settings,
    "run/snapshots.json": lambda run, path: (run.snapshots(), run.snapshots_identity()),
    "run/summary.json": lambda run, path: run.summary(),
    "run/tokens/source.json": lambda run, path: read_json(path),
    "run/tokens/*": lambda run, path: TokenSet.load(path.parent),
    "run/activations/*.seg": _segment,
    "run/activations/*/manifest.json": lambda run, path: ActivationStore.open(path.parent).manifest,
    "run/evolution/explanations/answers.jsonl": _answers,
    "run/evolution/explanations/contexts.*": lambda run, path: ExplanationStudy(Study.of(run), 6, 0).contexts,
    "run/evolution/explanations.*": lambda run, path: finished.finished(Study.of(run)),
    "run/evolution/.*.npz": lambda run, path: load_arrays(path),
    "run/evolution/*.json": _analysis,
    "run/evolution/*.npz": _analysis,
    "run/comparison/*": lambda run, path: finished.finished(Study.of(run)),
    "run/attribution/*/work-*.npz": lambda run, path: load_arrays(path),
    "run/attribution/*/work-*.npy": lambda run, path: load_mapped(path),
    "run/attribution/*/results.json": _task,
    "run/attribution/*/circuit.npz": _task,
    "run/attribution/*/curves.parquet": _task,
    "run/attribution/*.parquet": lambda run, path: read_table(path),
    "run/language_model/training.json": lambda run, path: language_model.notes(run, ""),
    "run/language_model/*/tokenizer*": _tokenizer,
    "run/language_model/*": _snapshot,
    "run/tokenizer/*": _own_tokenizer,
}
"""Which code reads which files, the first pattern that fits; paths from the folder with `run/` and `killed/`."""


def reader_of(name: str) -> tuple[str, Reader] | None:
    """Pattern and reader of a file, None where nothing reads it back."""
    if name.endswith(".lock"):
        return None
    return next(((p, read) for p, read in READERS.items() if fnmatch.fnmatch(name, p)), None)


# ---------------------------------------------------------------------------------------------------- what was read


def fingerprint(value: Any) -> str:
    """A digest of nested values: equal where they are, to the bit."""
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode()
        yield from map(_text, value.ravel().tolist()) if value.dtype == object else [value.tobytes()]
    elif isinstance(value, (str, int, float, bool, bytes, type(None), Path, np.generic)):
        yield _text(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield _text(key)
            yield from _parts(item)
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _parts(item)
    elif dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            yield from _parts(getattr(value, part.name))
    elif hasattr(value, "__dict__"):
        yield from _parts(vars(value))
    else:
        raise TypeError(f"cannot compare {type(value)}")


def _text(value: object) -> bytes:
    return repr(value).encode()
