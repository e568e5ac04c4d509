"""A sweep in a folder: what is to do, doing it, and its results. A finished point is never trained again.

In the folder: `settings.json` (what all points share), `points/NAME/` (weights, `training/metrics.jsonl`, and
`result.json` when the point is done), and of all finished points together `results.parquet` (a row a point),
`snapshots.parquet` (a row a point and snapshot), `common_l0.csv`, `frontier.svg` and its numbers `frontier.csv`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from crosscoder.activations.store import ActivationStore
from crosscoder.common.svg import draw_svg
from crosscoder.common.tables import csv_text, write_table
from crosscoder.config import CrosscoderConfig, CrosscoderOptions, TrainConfig
from crosscoder.configfile import plain
from crosscoder.errors import ConfigError, NonFiniteError
from crosscoder.files import make_folder, read_json, write_bytes, write_json, write_text
from crosscoder.locks import working_on
from crosscoder.progress import Progress, warn
from crosscoder.sweep import result_tables as tables
from crosscoder.sweep.budget import Budget, budget_of
from crosscoder.sweep.frontier_svg import draw_frontier
from crosscoder.sweep.measure import measure
from crosscoder.sweep.methods import parts_of, train_config, train_point
from crosscoder.sweep.points import Method, Point
from crosscoder.sweep.timing import seconds_per_step

SETTINGS_FILE = "settings.json"
RESULT_FILE = "result.json"
FORMAT_VERSION = 1


class Sweep:
    """The points asked for, over a run's activations."""

    def __init__(
        self,
        folder: Path,
        store: ActivationStore,
        heldout: ActivationStore,
        options: CrosscoderOptions,
        train: TrainConfig,
        points: Sequence[Point],
        device: torch.device | str = "cpu",
    ) -> None:
        """`heldout` has the snapshots of `store`. Of `train`, lambda, learning rate and seed are the points'.

        Raises `ConfigError` where a point cannot be trained, and where `folder` holds a sweep with other settings.
        """
        if not points:
            raise ConfigError("a sweep needs at least one lambda, F, learning rate and seed")
        if options.selects_by_rank:
            raise ConfigError(
                f'gate "{options.gate}" fixes L0 by itself, so lambda does not change it; sweep another gate'
            )
        self.folder = folder
        self.store = store
        self.heldout = heldout
        self.options = options
        self.train = train
        self.points = list(points)
        self.device = torch.device(device)
        for point in points:  # what cannot work is refused before any work is done
            for part in parts_of(point.method, store.snapshot_names, train.n_steps):
                CrosscoderConfig(len(part.snapshots), store.d_model, point.n_features, **plain(options))
                train_config(point, part, train)
        self._check_settings()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What all points of a folder share."""
        shared = plain(self.train)
        del shared["sparsity_coefficient"], shared["lr"], shared["seed"]
        return {
            "format_version": FORMAT_VERSION,
            "crosscoder": plain(self.options),
            "train": shared,
            "snapshots": self.store.snapshot_names,
            "store": self.store.identity,
            "heldout": self.heldout.identity,
        }

    def _check_settings(self) -> None:
        path = self.folder / SETTINGS_FILE
        if not path.exists():
            return
        found, wanted = _flat(read_json(path)), _flat(self.settings)
        different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if different:
            raise ConfigError(
                f"{self.folder} holds a sweep with other settings ({', '.join(different)}): its points do not compare "
                "with these; choose another folder with --out, or delete that one"
            )

    # ------------------------------------------------------------------------------------------- the plan

    def done(self, point: Point) -> bool:
        return (self._folder(point) / RESULT_FILE).exists()

    @property
    def pending(self) -> list[Point]:
        return [point for point in self.points if not self.done(point)]

    def budget(self, method: Method) -> Budget:
        return budget_of(method, self.train.n_steps, self.train.batch_size, self.store.n_snapshots)

    def estimate(self) -> dict[tuple[Method, int], float]:
        """Seconds of training of a pending point, by method and F: a few steps of each kind are timed."""
        seconds: dict[tuple[int, int], float] = {}
        estimates = {}
        for point in self.pending:
            parts = parts_of(point.method, self.store.snapshot_names, self.train.n_steps)
            kind = len(parts[0].snapshots), point.n_features
            if kind not in seconds:
                config = CrosscoderConfig(kind[0], self.store.d_model, point.n_features, **plain(self.options))
                last = self.store.select(self.store.snapshot_names[-kind[0] :])
                seconds[kind] = seconds_per_step(last, config, train_config(point, parts[0], self.train), self.device)
            estimates[point.method, point.n_features] = seconds[kind] * self.budget(point.method).steps
        return estimates

    def weight_bytes(self) -> int:
        """Disk for the weights of the pending points, in float32."""
        K, D = self.store.n_snapshots, self.store.d_model
        return sum(8 * D * point.n_features * (1 if point.method == "sae" else K) for point in self.pending)

    # ------------------------------------------------------------------------------------------- doing it

    def compute(self, begin: Callable[[], None] = lambda: None) -> None:
        """Train and evaluate what is pending, and write the results.

        `begin` is called when all is checked that can be refused. A point whose training meets a NaN is told and left
        out; the others go on. At the end that raises `NonFiniteError`. Raises what `train` and `evaluate` raise, and
        `BusyError` where another sweep works on the folder.
        """
        failed = []
        make_folder(self.folder)
        with working_on(self.folder, "sweep"):
            self._check_settings()
            begin()
            write_json(self.folder / SETTINGS_FILE, self.settings)
            done = len(self.points) - len(self.pending)
            with Progress("sweep", len(self.points), "points", done=done) as progress:
                for point in self.pending:
                    progress.advance(0, {"point": str(point)})
                    try:
                        self._compute(point)
                    except NonFiniteError as error:
                        warn(f"{point}: {error}")
                        failed.append(point)
                    progress.advance(1)
            self.write_results()
        if failed:
            raise NonFiniteError(
                f"{len(failed)} of {len(self.points)} points failed ({'; '.join(map(str, failed[:3]))}"
                f"{'; ...' if len(failed) > 3 else ''}); the others are in {self.folder}; lower their learning rate"
            )

    def _compute(self, point: Point) -> None:
        folder = self._folder(point)
        parts = parts_of(point.method, self.store.snapshot_names, self.train.n_steps)
        models, seconds = train_point(point, self.store, self.options, self.train, folder, self.device)
        figures = {
            **measure(models, parts, self.heldout, self.device),
            **plain(self.budget(point.method)),
            "seconds": seconds,
        }
        write_json(folder / RESULT_FILE, {"point": plain(point), "figures": figures})

    def _folder(self, point: Point) -> Path:
        return self.folder / "points" / point.name

    # ------------------------------------------------------------------------------------------- results

    def records(self) -> list[dict[str, Any]]:
        """`result.json` of every finished point of the folder, also those of earlier calls."""
        return [read_json(path) for path in sorted((self.folder / "points").glob(f"*/{RESULT_FILE}"))]

    def write_results(self) -> None:
        """Tables and figure of all finished points."""
        records = self.records()
        if not records:
            return
        table = tables.results(records)
        write_table(self.folder / "results.parquet", table)
        write_table(self.folder / "snapshots.parquet", tables.by_snapshot(records))
        write_text(self.folder / "common_l0.csv", csv_text(tables.at_common_l0(table)))
        write_bytes(self.folder / "frontier.svg", draw_svg("Explained variance against L0", draw_frontier, table))
        write_text(self.folder / "frontier.csv", csv_text(table))


def _flat(settings: Any) -> dict[str, Any]:
    """Nested settings by their innermost names, with the group before where it is not plain."""
    flat: dict[str, Any] = {}
    for name, value in (settings if isinstance(settings, dict) else {}).items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat
