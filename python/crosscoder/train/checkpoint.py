"""A trainer's state on disk: the crosscoder in its own format, all else beside it, with checksums.

The crosscoder is the one in training, for batches that are scaled and whitened; the scale and the mix lie beside its
weights. So resuming repeats its bits, and `Crosscoder.from_pretrained` makes the one for raw activations.

A checkpoint folder is complete or absent (written under a temporary name, synced, renamed).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from crosscoder import weights
from crosscoder.config import CrosscoderConfig, TrainConfig
from crosscoder.errors import ConfigError, DataError, StorageError
from crosscoder.files import new_folder, read_json, write_json
from crosscoder.tensorfile import checksum, write_tensors

FORMAT_VERSION = 4
STATE_FILE = "trainer.safetensors"
RECORD_FILE = "trainer.json"
NUMBERS = ("step", "firing_steps", "revived", "joined")
"""`TrainerState.numbers`."""
_FREE_OPTIONS = (
    "checkpoint_every",
    "checkpoint_minutes",
    "log_every",
    "backend",
)  # may differ between the two ends of a resumed run


class TrainerState(TypedDict):
    """Everything that a trainer's next step depends on (`Trainer.state_dict`)."""

    model: Mapping[str, Tensor]
    """The crosscoder's `state_dict`."""
    scale_K: Tensor | None
    """(K,) float64: what raw activations were multiplied by to give the batches; None where that is not known."""
    tensors: Mapping[str, Tensor]
    """The optimiser's moments and what the trainer counts for each feature, by unique names."""
    numbers: Mapping[str, int]
    """Steps done, features revived and joined."""


def save(
    folder: Path, config: CrosscoderConfig, train_config: TrainConfig, state: TrainerState, extra: dict[str, Any]
) -> None:
    """Write a trainer's state and `extra` (JSON) to `folder`, one tensor after the other.

    Raises `StorageError`, also where something else than a checkpoint lies there.
    """
    folder = _replaceable(folder)
    with new_folder(folder) as temporary:
        scale = {} if state["scale_K"] is None else {weights.ACTIVATION_SCALE: state["scale_K"]}
        weights.save(config, {**state["model"], **scale}, temporary)
        checksums = write_tensors(temporary / STATE_FILE, state["tensors"])
        write_json(
            temporary / RECORD_FILE,
            {
                "format_version": FORMAT_VERSION,
                **state["numbers"],
                "train_config": train_config.to_dict(),
                "checksums": checksums,
                "extra": extra,
            },
        )


def _replaceable(folder: Path) -> Path:
    """`folder`, or what it links to. Raises `StorageError` where replacing it would lose what is no checkpoint."""
    folder = folder.resolve() if folder.is_symlink() else folder
    if folder.exists() and not folder.is_dir():
        raise StorageError(
            f"cannot write {folder}: a file lies there, and a checkpoint is a folder; choose another name"
        )
    ours = {weights.CONFIG_FILE, weights.WEIGHTS_FILE, STATE_FILE, RECORD_FILE}
    others = sorted({path.name for path in folder.iterdir()} - ours) if folder.is_dir() else []
    if others:
        raise StorageError(
            f"cannot write {folder}: a checkpoint replaces its folder, and {', '.join(others[:4])}"
            f"{', ...' if len(others) > 4 else ''} would be lost; choose a folder for it alone"
        )
    return folder


def load(folder: Path, config: CrosscoderConfig, train_config: TrainConfig) -> tuple[TrainerState, dict[str, Any]]:
    """The state and `extra` in `folder`, every checksum verified.

    Raises `DataError` for a missing or damaged checkpoint, `ConfigError` for one of other configurations than these.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    kinds: dict[str, type] = {**dict.fromkeys(NUMBERS, int), "train_config": dict, "checksums": dict, "extra": dict}
    record = read_json(folder / RECORD_FILE, **kinds)
    if record.get("format_version") != FORMAT_VERSION:
        version = record.get("format_version")
        raise DataError(
            f"{folder}: the checkpoint has format version {version!r}, this release reads {FORMAT_VERSION}; "
            "go on with the release that wrote it, or train anew"
        )
    saved_config, parameters = weights.load(folder)
    wanted = {**config.to_dict(), **train_config.to_dict()}
    found = {**saved_config.to_dict(), **record["train_config"]}
    differences = [
        f"{name} {found.get(name)!r} there, {wanted.get(name)!r} now"
        for name in sorted(wanted.keys() | found.keys())
        if found.get(name) != wanted.get(name) and name not in _FREE_OPTIONS
    ]
    if differences:
        raise ConfigError(
            f"{folder} was written with other options ({'; '.join(differences)}); use the same options, or another "
            "folder"
        )
    try:
        tensors = load_file(folder / STATE_FILE)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{folder / STATE_FILE} is missing or truncated ({error})") from error
    for name, expected in record["checksums"].items():
        if name not in tensors or checksum(tensors[name]) != expected:
            raise DataError(f"{folder / STATE_FILE}: {name} is missing or damaged")
    numbers = {name: record[name] for name in NUMBERS}
    extra: dict[str, Any] = record["extra"]
    scale_K = parameters.pop(weights.ACTIVATION_SCALE, None)
    return TrainerState(model=parameters, scale_K=scale_K, tensors=tensors, numbers=numbers), extra


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies under `root`."""
    return root / f"step-{step:08d}"


def existing(root: Path) -> list[Path]:
    """The checkpoints under `root`, newest first."""
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name)]
    return sorted(found, reverse=True)
