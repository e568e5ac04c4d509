"""A trainer on disk: the crosscoder in its own format, the optimiser's state beside it, all with checksums.

A checkpoint folder is complete or absent (written under a temporary name, synced, renamed).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from crosscoder import weights
from crosscoder.errors import ConfigError, DataError, StorageError
from crosscoder.files import new_folder, read_json, write_json

if TYPE_CHECKING:
    from crosscoder.train.trainer import Trainer

FORMAT_VERSION = 3
STATE_FILE = "trainer.safetensors"
RECORD_FILE = "trainer.json"
_FREE_OPTIONS = (
    "checkpoint_every",
    "log_every",
    "backend",
)  # may differ between the two ends of a resumed run


def _state_tensors(trainer: Trainer) -> dict[str, Tensor]:
    tensors = {"firing_average": trainer.firing.average_F, "silent_tokens": trainer.silent_tokens_F}
    tensors.update(trainer.engine.tensors())
    tensors.update(trainer.recent.tensors())
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def save(trainer: Trainer, folder: Path, extra: dict[str, Any]) -> None:
    """Write `trainer` to `folder`. Raises `StorageError`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = _state_tensors(trainer)
    with new_folder(folder) as temporary:
        weights.save(trainer.model.config, trainer.model.state_dict(), temporary)
        try:
            save_file(tensors, temporary / STATE_FILE)
        except SafetensorError as error:
            raise StorageError(
                f"cannot write {folder}: {error}; free some space and run the same command again"
            ) from error
        write_json(
            temporary / RECORD_FILE,
            {
                "format_version": FORMAT_VERSION,
                "step": trainer.step_number,
                "firing_steps": trainer.firing.n_steps,
                "revived": trainer.n_revived,
                "joined": trainer.n_joined,
                "train_config": trainer.config.to_dict(),
                "checksums": {name: weights.checksum(tensor) for name, tensor in tensors.items()},
                "extra": extra,
            },
        )


def load(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Put the state in `folder` into `trainer`, which is unchanged if this raises `DataError` or `ConfigError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    record = read_json(folder / RECORD_FILE)
    if record.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{folder}: checkpoint of format version {record.get('format_version')!r}")
    config, parameters = weights.load(folder)
    wanted = {**trainer.model.config.to_dict(), **trainer.config.to_dict()}
    found = {**config.to_dict(), **record["train_config"]}
    differences = [
        f"{name} {found.get(name)!r} there, {wanted.get(name)!r} now"
        for name in sorted(wanted.keys() | found.keys())
        if found.get(name) != wanted.get(name) and name not in _FREE_OPTIONS
    ]
    if differences:
        raise ConfigError(
            f"{folder} is of another configuration ({'; '.join(differences)}); use the same options, or another folder"
        )
    try:
        tensors = load_file(folder / STATE_FILE)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{folder / STATE_FILE} is missing or truncated ({error})") from error
    for name, checksum in record["checksums"].items():
        if name not in tensors or weights.checksum(tensors[name]) != checksum:
            raise DataError(f"{folder / STATE_FILE}: {name} is missing or damaged")
    trainer.engine.settle()
    trainer.model.load_state_dict(parameters)
    trainer.firing.average_F.copy_(tensors["firing_average"])
    trainer.firing.n_steps = record["firing_steps"]
    trainer.silent_tokens_F.copy_(tensors["silent_tokens"])
    trainer.step_number = record["step"]
    trainer.n_revived, trainer.n_joined = record["revived"], record["joined"]
    trainer.recent.load(tensors)
    for name, tensor in trainer.engine.tensors():
        tensor.copy_(tensors[name])
    extra: dict[str, Any] = record["extra"]
    return extra


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies under `root`."""
    return root / f"step-{step:08d}"


def existing(root: Path) -> list[Path]:
    """The checkpoints under `root`, newest first."""
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name)]
    return sorted(found, reverse=True)
