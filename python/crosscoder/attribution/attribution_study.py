"""The attribution study of a run: one folder a task, resumable snapshot by snapshot, results as parquet.

`attribution/TASK/` of the run holds `results.json` (what was computed, from what, with which settings, and the main
figures) and the tables of `task_tables.py`. While a study is under way, `work-*` inside it holds the prompts'
activations and the snapshots that are done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosscoder import weights
from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.tokens import END_OF_TEXT, TokenSet
from crosscoder.activations.trunk import SITES
from crosscoder.attribution.circuits import Circuit, circuit
from crosscoder.attribution.coding import CodedTask, LeftOut, PromptActivations, code_task
from crosscoder.attribution.main_figures import main_figures
from crosscoder.attribution.snapshot import SnapshotResult, measure_snapshot
from crosscoder.attribution.task import Task
from crosscoder.attribution.task_tables import task_tables
from crosscoder.attribution.tasks import make_task
from crosscoder.common.arrays import flatten, load_result, save_arrays
from crosscoder.common.tables import write_table
from crosscoder.config import AttributionSettings
from crosscoder.errors import DataError
from crosscoder.evolution.strength import life_cycles
from crosscoder.files import clear_left_overs, make_folder, read_json, remove_folder, write_json
from crosscoder.model import Crosscoder
from crosscoder.progress import Progress, warn
from crosscoder.runs import Run

RESULTS = "results.json"
CIRCUIT = "circuit.npz"
FORMAT_VERSION = 1
"""Of the results: those of another version are computed again."""
WORK_VERSION = 3
"""Of what a killed study goes on from."""
DEFINITION = (
    "attribution (the paper's) by gradient x activation, attribution patching and integrated gradients between clean "
    "and corrupted prompts, error as a node; ablation of the top k and of all others (the paper's); matched random "
    "sets, the bar for chance, shares and dominance (ours); faithfulness and completeness (Marks et al. 2024); RelIE "
    "(Bayazit et al. 2025)"
)
TAU = 0.3
"""Presence threshold of emergence where the run was not analysed by `crosscoder evolve`."""


class AttributionStudy:
    """The tasks of one run. `compute(name)` does what is not done yet."""

    def __init__(self, run: Run, settings: AttributionSettings, device: torch.device | str = "cpu") -> None:
        """`device`: where crosscoder and language model compute.

        Raises `DataError` with the remedy if the run lacks a crosscoder or its snapshots, they do not fit, or it reads
        another site than the residual stream.
        """
        self.run, self.settings, self.device = run, settings, torch.device(device)
        run.require(run.crosscoder, f"train it first: crosscoder train {run.path} --help")
        run.require(run.snapshots_file, f"collect first: crosscoder collect {run.path} --help")
        self._check_origin()
        if self.snapshots.site != "residual":
            raise DataError(
                f"the crosscoder of {run.path} reads {SITES[self.snapshots.site]}; attribution puts its reconstruction "
                "in the place of the residual stream, so it needs a run that was collected with --site residual"
            )
        self._check_end_of_text()
        self.left_out = self._left_out()

    @cached_property
    def snapshots(self) -> SnapshotSet:
        return self.run.snapshots()

    @cached_property
    def crosscoder(self) -> Crosscoder:
        """The crosscoder for raw activations."""
        model: Crosscoder = Crosscoder.from_pretrained(self.run.crosscoder, map_location=self.device)
        return model.eval()

    @cached_property
    def tokenizer(self) -> Any:
        return self.snapshots.load_tokenizer()

    def _check_origin(self) -> None:
        """Refuse a crosscoder of other snapshots, another model or another layer than the run's."""
        config, _ = weights.read_config(self.run.crosscoder)
        snapshots = self.snapshots
        width = int(snapshots.load_config(0).hidden_size)
        remedy = f"give the run that it was trained in, or train one here: crosscoder train {self.run.path} --help"
        if (config.n_snapshots, config.d_model) != (snapshots.n_snapshots, width):
            raise DataError(
                f"{self.run.crosscoder} is of another model: it reads {config.n_snapshots} snapshots of width "
                f"{config.d_model}, {self.run.snapshots_file} names {snapshots.n_snapshots} of width {width}; {remedy}"
            )
        trained = self.run.crosscoder / "training.json"
        if not trained.exists():
            return
        store = read_json(trained).get("store", {})
        source = store.get("source", {})
        name = Path(snapshots.model).name if Path(snapshots.model).is_dir() else snapshots.model
        for what, theirs, ours in (
            ("layer", source.get("layer"), snapshots.layer),
            ("model", source.get("model"), name),
            ("snapshots", tuple(store.get("snapshots") or ()) or None, tuple(snapshots.revisions)),
        ):
            if theirs is not None and theirs != ours:
                raise DataError(
                    f"{self.run.crosscoder} was trained on another {what} ({_short(theirs)}) than "
                    f"{self.run.snapshots_file} names ({_short(ours)}); {remedy}"
                )

    def _check_end_of_text(self) -> None:
        """Refuse a model whose documents do not begin as the tasks' prompts do."""
        header = self.run.tokens("heldout") / "tokens.json"
        end = read_json(header).get("end_of_text", END_OF_TEXT) if header.exists() else END_OF_TEXT
        if end != END_OF_TEXT:
            raise DataError(
                f"{header}: the end-of-text token of this model is {end}; the prompts of tasks begin with token "
                f"{END_OF_TEXT} (Pythia's), so attribution works only with models whose end-of-text token it is"
            )

    def _left_out(self) -> LeftOut:
        """What `collect` was told to leave out of the crosscoder's tokens."""
        header = self.run.tokens("train") / "tokens.json"
        asked = (read_json(header).get("source", {}).get("left_out") or {}) if header.exists() else {}
        if asked.get("norm"):
            warn(
                f"the crosscoder was trained without the tokens of {asked['norm']:g} times the median norm or more; "
                "prompts keep such tokens, and what the features do not explain of them counts as error"
            )
        return LeftOut(int(asked.get("positions", 0)), tuple(asked.get("ids", ())))

    def task(self, name: str) -> Task:
        """The task called `name`, for this run's tokenizer. Raises `ConfigError`, `DataError` (see `make_task`)."""
        config = self.snapshots.load_config(0)
        context = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
        heldout = self.run.tokens("heldout")
        text = TokenSet.load(heldout).ids if name == "induction-text" and heldout.exists() else None
        task = make_task(name, self.tokenizer, self.settings, context=context, text=text)
        task.require_fit(context, int(config.vocab_size))
        return task

    def folder(self, task_name: str) -> Path:
        return self.run.path / "attribution" / task_name

    def compute(self, name: str, *, resume: bool = True) -> dict[str, Any]:
        """The record of a task's results, computed where it is not there for these settings and this crosscoder.

        Without `resume` it is computed from nothing all the same; results that are there stay until then.
        """
        task = self.task(name)
        folder = self.folder(task.name)
        record = self._record(task)
        done = folder / RESULTS
        work = folder / f"work-{WORK_VERSION}-{record['of'][:12]}"
        finished = read_json(done) if resume and done.exists() else {}
        current = finished.get("of") == record["of"]
        clear_left_overs(folder)
        for other in folder.glob("work-*"):
            if other != work or current or not resume:
                remove_folder(other)
        if current:
            return finished
        make_folder(work)
        activations = PromptActivations(task, self.snapshots, work, left_out=self.left_out, device=self.device)
        parts = self._measure(activations, work)
        done.unlink(missing_ok=True)  # a kill between the writes must not leave new tables under an old record
        return self._finish(task, parts, record, folder, work)

    def _measure(self, activations: PromptActivations, work: Path) -> list[SnapshotResult]:
        """Every snapshot; what is on disk is not computed again."""
        coded: CodedTask | None = None
        parts = []
        task = activations.task
        files = [work / f"{revision}.npz" for revision in self.snapshots.revisions]
        n_done = sum(path.exists() for path in files)
        if n_done < len(files):
            coded = code_task(activations, self.crosscoder)
        with Progress(f"attribution ({task.name})", len(files), "snapshots", done=n_done) as progress:
            for k, path in enumerate(files):
                if not path.exists():
                    assert coded is not None

                    def show(stage: str, revision: str = self.snapshots.revisions[k]) -> None:
                        progress.advance(0, {"snapshot": revision, "stage": stage})

                    model = self.snapshots.load(k).to(self.device)
                    found = measure_snapshot(
                        model, k, self.snapshots.layer, coded, self.crosscoder, self.settings, show
                    )
                    save_arrays(path, flatten(found))
                    progress.advance(1)
                parts.append(load_result(SnapshotResult, path))
        return parts

    def _finish(
        self, task: Task, parts: list[SnapshotResult], record: Mapping[str, Any], folder: Path, work: Path
    ) -> dict[str, Any]:
        revisions = self.snapshots.revisions
        found = self._circuit(task, parts)
        save_arrays(folder / CIRCUIT, flatten(found))
        for name, table in task_tables(task, self.tokenizer, revisions, parts, self.settings).items():
            write_table(folder / f"{name}.parquet", table)
        figures = main_figures(task, revisions, parts, found, self.settings)
        poor = [name for name, part in zip(revisions, parts, strict=True) if part.explained_variance < 0.2]
        if poor:
            warn(
                f"task {task.name}: the crosscoder explains under 20 % of the variance of the prompts' activations at "
                f"{_short(poor)}; is it of this model and layer?"
            )
        finished = {**record, "figures": figures}
        write_json(folder / RESULTS, finished)
        remove_folder(work)
        return finished

    def _circuit(self, task: Task, parts: list[SnapshotResult]) -> Circuit:
        F = self.crosscoder.config.n_features
        attribution_FK = np.zeros((F, len(parts)))
        for k, part in enumerate(parts):
            if (found := part.attributed) is not None:
                sums_F = np.bincount(found.feature, found.values["integrated_gradients"], minlength=F)
                attribution_FK[:, k] = sums_F / task.n_train
        norms_FK = self.crosscoder.decoder_norms().detach().double().cpu().numpy()
        steps = self.snapshots.steps
        tau = float(self.run.summary().get("presence_threshold", TAU))
        return circuit(attribution_FK, norms_FK, life_cycles(norms_FK, steps, threshold=tau), self.settings.n_circuit)

    def _record(self, task: Task) -> dict[str, Any]:
        _, config = weights.read_config(self.run.crosscoder)
        rests_on = {
            "crosscoder": config["checksums"],
            "snapshots": self.run.snapshots_identity(),
            "task": task.fingerprint,
            "left_out": dataclasses.asdict(self.left_out),
            "format_version": FORMAT_VERSION,
            "settings": dataclasses.asdict(self.settings),
        }
        return {
            "task": task.name,
            "note": task.note,
            "n_prompts": len(task),
            "n_train": task.n_train,
            "definition": DEFINITION,
            "settings": dataclasses.asdict(self.settings),
            "of": hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest(),
        }


def _short(value: Any) -> str:
    """A list by its ends, anything else as it is."""
    if not isinstance(value, (tuple, list)):
        return str(value)
    return ", ".join(value) if len(value) <= 4 else f"{value[0]}, ..., {value[-1]}: {len(value)}"
