"""A whole training run over a store: resumed where it stopped, checkpointed, logged, exported.

In the run's `training/` folder: `checkpoints/step-*/`, `metrics.jsonl`. The finished crosscoder, for raw activations
(scales folded in), goes to `crosscoder/`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crosscoder import weights
from crosscoder.activations.live import LiveSource
from crosscoder.activations.loader import ActivationLoader
from crosscoder.activations.source import Source
from crosscoder.activations.store import ActivationStore
from crosscoder.config import CrosscoderConfig, TrainConfig
from crosscoder.devices import choose, describe
from crosscoder.errors import ConfigError, DataError
from crosscoder.files import (
    clear_left_overs,
    explained_write_errors,
    make_folder,
    new_folder,
    read_json,
    remove_folder,
    write_json,
)
from crosscoder.locks import working_on
from crosscoder.model import Crosscoder
from crosscoder.progress import Progress, warn
from crosscoder.seals import seal_json
from crosscoder.tensorfile import checksum
from crosscoder.train import checkpoint
from crosscoder.train.aside import OldTraining
from crosscoder.train.checkpoint_writer import CheckpointWriter
from crosscoder.train.initialization import initialize
from crosscoder.train.log import LOG_FILE, forget_after, logged_seconds
from crosscoder.train.trainer import Trainer

RECORD_FILE = "training.json"


def train(
    store: ActivationStore | LiveSource,
    config: CrosscoderConfig,
    train_config: TrainConfig,
    folder: Path,
    *,
    start: Crosscoder | None = None,
    device: str | torch.device = "auto",
    resume: bool = True,
    title: str = "training",
    begin: Callable[[], None] = lambda: None,
) -> Crosscoder:
    """Train on `store` (or live) and return the crosscoder for raw activations, on the CPU; `folder` is the run's.

    `device`: where the crosscoder is trained, as `crosscoder.devices.choose` takes it.

    If `folder` holds a finished crosscoder of the same configuration it is returned at once; an interrupted run goes
    on from its last checkpoint, to the same bits as an uninterrupted one (on as many threads).
    With `start`, a crosscoder for scaled activations, training begins from its weights (Adam's moments are fresh)
    instead of a random dictionary. Without `resume` it begins from nothing, also where `folder` holds a training: that
    one is kept until the new one has its first checkpoint. `title` stands before the progress bar.
    `begin` is called when all is checked that can be refused, before the first step.
    Raises `ConfigError` if `folder` holds a run of another configuration, `BusyError` if another command works on it,
    and what `Trainer.step` raises.
    """
    if (config.n_snapshots, config.d_model) != (store.n_snapshots, store.d_model):
        raise ConfigError(
            f"the crosscoder has {config.n_snapshots} snapshots of width {config.d_model}, "
            f"{store.path} has {store.n_snapshots} of width {store.d_model}"
        )
    record = {
        "crosscoder": config.to_dict(),
        "train": train_config.to_dict(),
        "store": _identity(store),
        "start": None if start is None else {name: checksum(t) for name, t in start.state_dict().items()},
    }
    with working_on(make_folder(folder), "train"):
        old, training = OldTraining(folder), folder / "training"
        old.settle()
        finished = _finished(folder, record) if resume else None
        if finished is not None:
            begin()
            _drop_checkpoints(training / "checkpoints")  # a kill just after the export leaves them
            return finished
        where = choose(device)
        loader = _source(store, train_config, where)
        model = Crosscoder(config, seed=train_config.seed, device=where, dtype=_weights_dtype(train_config))
        if start is not None:
            model.load_state_dict(start.state_dict())
        trainer = Trainer(model, train_config, scale_K=loader.scale_K)
        trainer.snapshot_names = store.snapshot_names
        if not (resume and _resume(trainer, loader, training / "checkpoints")) and start is None:
            initialize(trainer.model, _sample(store, loader), train_config)
        try:
            if not resume:
                old.put_aside()
            begin()
            _loop(trainer, loader, make_folder(training), title, old.remove)
            final = trainer.model.fold_scales(torch.from_numpy(loader.scale_K), device="cpu").eval()
            with new_folder(folder / "crosscoder") as temporary:
                weights.save(config, final.unmixed_state(), temporary)
                write_json(temporary / RECORD_FILE, {**record, "trained": _summary(trainer), "device": describe(where)})
        finally:
            old.settle()
        _drop_checkpoints(training / "checkpoints")
        return final


def _drop_checkpoints(folder: Path) -> None:
    for path in checkpoint.existing(folder):
        remove_folder(path)
    clear_left_overs(folder)  # of a kill while one was removed


def training_seconds(folder: Path) -> float:
    """Seconds of a training's steps so far, over all calls: `folder` is that given to `train`. Raises `DataError`.

    What a killed call did after its last checkpoint is done again, and counts once.
    """
    return logged_seconds(folder / "training" / LOG_FILE, finished=True)


def batch_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Of the batches: bf16 where the weights are and batches travel to a GPU, which takes half the bus; else fp32."""
    small = config.state == "low-memory" and device.type == "cuda"
    return torch.bfloat16 if small else torch.float32


def _weights_dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.state == "low-memory" else torch.float32


def _source(store: ActivationStore | LiveSource, config: TrainConfig, device: torch.device) -> Source:
    if isinstance(store, LiveSource):
        return store
    dtype: Literal["fp32", "bf16"] = "bf16" if batch_dtype(config, device) == torch.bfloat16 else "fp32"
    return ActivationLoader(store, config.batch_size, config.seed, device=device, dtype=dtype)


def _sample(store: ActivationStore | LiveSource, source: Source) -> Tensor:
    """Scaled activations (n, K, D) of at most 512 tokens: rows of a shard are in random order."""
    if isinstance(store, ActivationStore):
        return store.read(0, slice(0, 512)) * torch.from_numpy(source.scale_K).float()[:, None]
    begin = source.state_dict()
    x_BKD = next(iter(source))
    source.load_state_dict(begin)
    return x_BKD[:512]


def _identity(store: ActivationStore | LiveSource) -> dict[str, Any]:
    return {key: store.manifest[key] for key in ("snapshots", "d_model", "dtype", "shard_rows", "source")}


def _summary(trainer: Trainer) -> dict[str, Any]:
    dead_F = trainer.silent_tokens_F >= trainer.config.dead_after_tokens
    summary: dict[str, Any] = {
        "steps": trainer.step_number,
        "dead_features": int(dead_F.sum()),
        "revived_features": trainer.n_revived,
    }
    if trainer.recent_tokens is not None:
        x_nKD, model = trainer.recent_tokens.tokens(), trainer.model.eval()
        code = model.encode(x_nKD, backend=trainer.config.backend)
        summary["batch_threshold"] = {
            "value": float(model.batch_threshold),
            "tokens": len(x_nKD),
            "l0_union": code.n_pairs / max(1, len(x_nKD)),
        }
    return summary


def told_threshold(trained: dict[str, Any]) -> str:
    """A line about BatchTopK's threshold at inference, from `trained` of `RECORD_FILE`; empty for other gates."""
    found = trained.get("batch_threshold")
    if found is None:
        return ""
    return (
        f"BatchTopK at inference: a feature is on above {found['value']:.4g}, which lets {found['l0_union']:.2f} "
        f"features a token through on the last {found['tokens']} tokens of training"
    )


def _finished(folder: Path, record: dict[str, Any]) -> Crosscoder | None:
    path = folder / "crosscoder" / RECORD_FILE
    if not path.exists():
        return None
    different = _differences(read_json(path, crosscoder=dict, train=dict, store=dict), record)
    if different:
        raise ConfigError(
            f"{folder / 'crosscoder'} was trained with other settings, says {RECORD_FILE} ({'; '.join(different)}); "
            "use the same, train anew with --no-resume, or choose another run folder"
        )
    model: Crosscoder = Crosscoder.from_pretrained(folder / "crosscoder")
    return model.eval()


def _differences(found: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """What the record of a training says otherwise: option by option; of activations and weights, that they differ."""
    different = []
    for part in ("crosscoder", "train"):
        there, now = found.get(part, {}), record[part]
        different += [
            f"{name} {there.get(name)!r} there, {now.get(name)!r} now"
            for name in sorted(there.keys() | now.keys())
            if there.get(name) != now.get(name)
        ]
    others = [part for part in record if part not in ("crosscoder", "train")]
    return different + [part for part in others if found.get(part) != record[part]]


def _resume(trainer: Trainer, loader: Source, root: Path) -> bool:
    """Load the newest good checkpoint. A damaged one is skipped with a warning; one of other settings is refused."""
    skipped = 0
    for path in checkpoint.existing(root):
        try:
            loader.load_state_dict(trainer.resume(path)["loader"])
        except DataError as error:
            warn(f"skipping a damaged checkpoint: {error}")
            skipped += 1
            continue
        if skipped:
            warn(f"going on from step {trainer.step_number} instead")
        return True
    if skipped:
        warn("no checkpoint can be used: training begins anew")
    return False


def _loop(trainer: Trainer, loader: Source, folder: Path, title: str, saved: Callable[[], None]) -> None:
    """All steps that are left; `saved` is called after each checkpoint."""
    config = trainer.config
    log = folder / LOG_FILE
    forget_after(log, trainer.step_number)
    before = logged_seconds(log) if log.exists() else 0.0
    started, first = time.monotonic(), trainer.step_number
    waited, since = loader.wait_seconds, started
    with (
        explained_write_errors(log),
        log.open("ab") as lines,
        Progress(title, config.n_steps, "steps", done=trainer.step_number) as progress,
        CheckpointWriter(trainer, folder / "checkpoints", saved) as writer,
    ):
        while trainer.step_number < config.n_steps:
            for x_BKD in loader:
                step = trainer.step_number + 1
                last = step == config.n_steps
                logged = step % config.log_every == 0 or last
                metrics = trainer.step(x_BKD, measured=logged)
                if logged:
                    row = {"step": step, **{name: _plain(value) for name, value in metrics.items()}}
                    now = time.monotonic()
                    rate = (step - first) * config.batch_size / (now - started)
                    wait = (loader.wait_seconds - waited) / (now - since)
                    waited, since = loader.wait_seconds, now
                    speed = {
                        "seconds": round(before + now - started, 3),
                        "tokens_per_second": round(rate, 1),
                        "loader_wait_fraction": round(wait, 4),
                    }
                    lines.write(seal_json({**row, **speed}))
                    lines.flush()
                    progress.advance(0, _figures(row))
                progress.advance(1)
                if not last and writer.is_due():
                    writer.write({"loader": loader.state_dict()})
                if last:
                    writer.finish()
                    _tell_waits(loader, time.monotonic() - started)
                    return


def _tell_waits(loader: Source, seconds: float) -> None:
    if loader.wait_seconds > 0.05 * seconds:
        warn(
            f"training waited for activations during {loader.wait_seconds / seconds:.0%} of the time "
            f"({loader.waits} batches): {loader.wait_reason}"
        )


def _plain(value: Tensor | float) -> Any:
    """For JSON; what is not finite (the explained variance of a snapshot without variance) is null."""
    if isinstance(value, Tensor):
        plain = value.tolist()
        return [_plain(one) for one in plain] if isinstance(plain, list) else _plain(plain)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figures(row: dict[str, Any]) -> dict[str, str]:
    def mean(values: list[float | None]) -> float:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else math.nan

    return {"EV": f"{mean(row['explained_variance']):.3f}", "L0": f"{mean(row['l0']):.1f}"}
