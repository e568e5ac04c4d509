"""A run: a folder that explains itself. Every verb works on one and leaves its settings and main figures in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from crosscoder.configfile import plain, read_config, write_config
from crosscoder.devices import describe
from crosscoder.errors import ConfigError, DataError
from crosscoder.files import make_folder, read_json, reading, write_json, write_text
from crosscoder.locks import working_on

if TYPE_CHECKING:
    import torch

    from crosscoder.activations.snapshots import SnapshotSet
    from crosscoder.activations.store import ActivationStore

README = """# A crosscoder run

One sparse dictionary over the activations of the same tokens in several snapshots of a language model.
Open `report.html` in a browser: it needs no network.

| file | what it is |
|---|---|
| `report.html` | the page: figures, and every feature with its history and its contexts |
| `summary.json` | the main figures, for scripts |
| `config/VERB.yaml` | the settings of each step, resolved; `crosscoder VERB --config` takes them back |
| `snapshots.json` | which model, which snapshots, which layer |
| `tokens/` | the tokens: `train` (the crosscoder's), `heldout` (evaluation only) |
| `activations/` | activation stores of the same two |
| `training/metrics.jsonl` | one line every few steps: loss, explained variance, L0 by snapshot |
| `training/checkpoints/` | while training: from here a killed run goes on |
| `crosscoder/` | the crosscoder, for raw activations: `crosscoder.Crosscoder.from_pretrained(...)` |
| `evolution/` | the results of the analyses as arrays (`.npz`); `README.md` there says what each is |
| `comparison/RUN.npz` | features matched with those of another run; `RUN.json` says which |
| `evolution/explanations.parquet` | features in words, with scores; `explanations/answers.jsonl`: all that was asked |
| `attribution/TASK/` | which features carry a task (`.parquet`): prompts, metric, attributions, ablation curves |
| `sweep/` | explained variance against L0 beside SAEs: `results.parquet`, `frontier.svg`, every trained point |
| `figures/` | every figure as SVG, its data as CSV |

Files appear complete or not at all. Any command that was killed goes on when it is run again. Records carry a checksum:
a changed one is refused. (To use a changed `config/VERB.yaml`, give a copy of it without its last line to `--config`.)
`activations/` is the large part; it can be deleted when no further training is wanted.
"""


_F = TypeVar("_F", bound=Callable[..., int])


def writes_run(run: _F) -> _F:
    """For a verb's `run(config)`: hold the run of `config.run` while it works."""
    return _holding(run)


def shares_run(run: _F) -> _F:
    """The same for a verb whose processes share its work, beside each other."""
    return _holding(run, together=True)


def makes_run(run: _F) -> _F:
    """The same for a verb that begins the run of `config.out`."""
    return _holding(run, make=True)


def _holding(run: _F, *, make: bool = False, together: bool = False) -> _F:
    @functools.wraps(run)
    def held(config: Any) -> int:
        folder = Path(config.run if hasattr(config, "run") else config.out)
        if make:
            make_folder(folder)
        with working_on(folder, run.__module__.rpartition(".")[2], together=together):
            return run(config)

    return held  # type: ignore[return-value]


class Run:
    """The paths of a run folder, and its summary."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def snapshots_file(self) -> Path:
        return self.path / "snapshots.json"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    def tokens(self, split: str) -> Path:
        """`split` is "train" or "heldout"."""
        return self.path / "tokens" / split

    def activations(self, split: str) -> Path:
        """`split` is "train" or "heldout"."""
        return self.path / "activations" / split

    @property
    def crosscoder(self) -> Path:
        return self.path / "crosscoder"

    @property
    def evolution(self) -> Path:
        return self.path / "evolution"

    @property
    def comparison(self) -> Path:
        return self.path / "comparison"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    def begin(self, verb: str, config: Any, device: torch.device | None = None) -> None:
        """Make the folder, its README and the record of the verb's settings, and of the device in `summary.json`.

        Raises `StorageError`.
        """
        make_folder(self.path)
        if not (self.path / "README.md").exists():
            write_text(self.path / "README.md", README)
        write_config(self.path / "config" / f"{verb}.yaml", config)
        if device is not None:
            self.update_summary({"devices": {**self.summary().get("devices", {}), verb: describe(device)}})

    def require_same(self, verb: str, config: Any, ignored: Sequence[str] = ()) -> None:
        """Raises `ConfigError` saying what differs if the run has a record of `verb` with other settings."""
        path = self.path / "config" / f"{verb}.yaml"
        if not path.exists():
            return
        before, now = plain(read_config(path, type(config), record=True)), plain(config)
        different = [
            f"{name}: {before[name]} there, {value} now"
            for name, value in now.items()
            if name not in ignored and before[name] != value
        ]
        if different:
            raise ConfigError(
                f"{self.path} was begun with other settings ({'; '.join(different)}); delete it or choose another --out"
            )

    def relative(self, model: str) -> str:
        """What a record calls a model: its folder relative to the run where it lies inside (so that the run can be
        moved), any other folder absolute, a name on the hub as it is."""
        folder = Path(model).resolve()
        if folder.is_relative_to(self.path.resolve()):
            return str(folder.relative_to(self.path.resolve()))
        return str(folder) if folder.is_dir() else model

    def absolute(self, model: str) -> str:
        """The inverse of `relative`."""
        return str(self.path / model) if (self.path / model).is_dir() else model

    def snapshots(self) -> SnapshotSet:
        """The snapshots that the run's activations come from, as `collect` recorded them.

        Raises `DataError` where there is no record, or it is malformed.
        """
        from crosscoder.activations.snapshots import SnapshotSet

        record = read_json(self.require(self.snapshots_file, f"collect first: crosscoder collect {self.path} --help"))
        with reading(self.snapshots_file):
            return SnapshotSet(
                self.absolute(record["model"]),
                tuple(record["revisions"]),
                record["layer"],
                record.get("site", "residual"),
                tuple(record.get("steps", ())),
                record.get("module", ""),
                record.get("whole", False),
                content=tuple(record.get("content", ())),
                tokenizer=record.get("tokenizer", ""),
            )

    def snapshots_identity(self) -> dict[str, Any]:
        """What results rest on of `snapshots.json`: the place of the model's folder does not matter where its content
        is recorded, nor the tokenizer's files, nor what was noticed of the snapshots."""
        record: dict[str, Any] = read_json(self.snapshots_file)
        beside = {"model", "alike", "tokenizer"} if record.get("content") else {"tokenizer"}
        return {key: value for key, value in record.items() if key not in beside}

    def write_snapshots(self, snapshots: SnapshotSet, alike: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write `snapshots.json`, which `snapshots` reads; `alike`: which of them are nearly equal."""
        record = {
            "model": self.relative(snapshots.model),
            "revisions": list(snapshots.revisions),
            "steps": [int(step) for step in snapshots.steps],
            "layer": snapshots.layer,
            "site": snapshots.site,
            "module": snapshots.module,
            "whole": snapshots.whole,
            "content": list(snapshots.content),
            "tokenizer": snapshots.tokenizer,
            "alike": [dict(group) for group in alike],
        }
        write_json(self.snapshots_file, record)

    def store(self, split: str) -> ActivationStore:
        """The activations of `split`, without skipped snapshots, in the order of `snapshots.json` (that of training):
        a store has snapshots that were added later at its end. Raises `DataError`."""
        from crosscoder.activations.store import ActivationStore

        remedy = f"collect first: crosscoder collect {self.path} --help"
        store = ActivationStore.open(self.require(self.activations(split), remedy)).without_skipped()
        if not self.snapshots_file.exists():
            return store
        names = list(self.snapshots().revisions)
        return store.select(names) if set(names) == set(store.snapshot_names) else store

    def require(self, path: Path, remedy: str) -> Path:
        """`path`, which another verb makes. Raises `DataError` with the `remedy` if it is not there."""
        if not path.exists():
            raise DataError(f"{path} does not exist; {remedy}")
        return path

    def summary(self) -> dict[str, Any]:
        """`summary.json`, empty if there is none yet."""
        if not self.summary_file.exists():
            return {}
        summary: dict[str, Any] = read_json(self.summary_file)
        return summary

    def update_summary(self, figures: dict[str, Any]) -> None:
        """Add or replace figures in `summary.json`."""
        write_json(self.summary_file, {**self.summary(), **figures})
