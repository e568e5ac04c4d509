"""A crosscoder on disk: `config.json` (format, version, configuration, checksums) and `model.safetensors`.

safetensors does not notice a flipped bit in the data, so every tensor's XXH3 is kept in `config.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscoder.config import CrosscoderConfig
from crosscoder.errors import ConfigError, DataError
from crosscoder.files import read_json, require_file, write_json
from crosscoder.tensorfile import checksum, write_tensors

FORMAT = "crosscoder"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ACTIVATION_SCALE = "activation_scale"
"""(K,): in a checkpoint of training, what raw activations are multiplied by before this crosscoder reads them."""
_CHECKED_AT_ONCE = 1 << 20


def save(config: CrosscoderConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a crosscoder into `folder`, one tensor after the other. Raises `StorageError` if that fails."""
    checksums = write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_json(
        folder / CONFIG_FILE,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": config.to_dict(),
            "checksums": checksums,
        },
    )


HUB_OPTIONS = ("revision", "cache_dir", "force_download", "token", "local_files_only")
"""What `locate` passes on to `huggingface_hub.snapshot_download`."""


def locate(model_id: str, subfolder: str | None = None, **hub_options: Any) -> Path:
    """The folder of a crosscoder: in a local folder, or in a repository on the hub.

    Raises `DataError` where there is none, `ConfigError` for an option that is not in `HUB_OPTIONS`, a revision of a
    local folder, or a sub-folder that is not inside.
    """
    unknown = sorted(set(hub_options) - set(HUB_OPTIONS))
    if unknown:
        raise ConfigError(
            f"from_pretrained has no option {', '.join(unknown)}; "
            f"it has subfolder, map_location, {', '.join(HUB_OPTIONS)}"
        )
    inside = Path(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise ConfigError(f"subfolder must be a path inside of {model_id}, not {subfolder!r}")
    folder = Path(model_id)
    if folder.is_dir():
        if hub_options.get("revision") is not None:
            raise ConfigError(
                f"{model_id} is a local folder and has no revisions; leave out revision, or give its folder"
            )
        if not (folder / inside).is_dir():
            raise DataError(f"{folder / inside} does not exist")
        return folder / inside
    if folder.exists() or model_id.count("/") != 1:
        raise DataError(f"{model_id} is not a folder with a crosscoder ({CONFIG_FILE} and {WEIGHTS_FILE})")
    from huggingface_hub import snapshot_download

    wanted = [(inside / name).as_posix() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    try:
        return Path(snapshot_download(model_id, allow_patterns=wanted, **hub_options)) / inside
    except Exception as error:
        raise DataError(f"no crosscoder at {model_id}: neither a local folder nor on the hub ({error})") from error


def read_config(folder: Path) -> tuple[CrosscoderConfig, dict[str, Any]]:
    """The configuration in `folder`, and the whole of its `config.json`."""
    path = folder / CONFIG_FILE
    record = read_json(path)
    if record.get("format") != FORMAT:
        raise DataError(f"{path} is not the configuration of a crosscoder")
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}; "
            + ("upgrade crosscoder" if isinstance(version, int) and version > FORMAT_VERSION else "save it anew")
        )
    fields = {field.name for field in dataclasses.fields(CrosscoderConfig)}
    options = record.get("config")
    if not isinstance(options, dict) or not set(options) <= fields:
        unknown = sorted(set(options) - fields) if isinstance(options, dict) else "everything"
        raise DataError(f"{path}: unknown options {unknown}")
    try:
        return CrosscoderConfig(**options), record
    except (ConfigError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: {error}") from error


def load(folder: Path) -> tuple[CrosscoderConfig, dict[str, Tensor]]:
    """Configuration and tensors in `folder`; every shape and checksum is verified.

    Raises `DataError` naming the file for anything missing, truncated, damaged, foreign or newer.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, _ = read_config(folder)
    path = require_file(folder / WEIGHTS_FILE)
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is truncated or not a safetensors file ({error})") from error
    K, D, F = config.n_snapshots, config.d_model, config.n_features
    shapes = {
        "W_enc": (F, K, D),
        "W_dec": (F, K, D),
        "b_enc": (F,),
        "b_dec": (K, D),
        "log_threshold": (F,),
        "snapshot_scale": (K,),
        "batch_threshold": (),
    }
    in_training = {"snapshot_mix": (K, K), ACTIVATION_SCALE: (K,)}
    shapes |= {name: shape for name, shape in in_training.items() if name in tensors}
    if set(tensors) != set(shapes):
        raise DataError(f"{path}: tensors {sorted(set(tensors) ^ set(shapes))} are missing or unexpected")
    checksums = read_json(folder / CONFIG_FILE, checksums=dict)["checksums"]
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise DataError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, {CONFIG_FILE} asks for {shape}")
        if not tensors[name].is_floating_point():
            raise DataError(f"{path}: {name} is of {tensors[name].dtype}, not of floating-point numbers")
        if checksum(tensors[name]) != checksums.get(name):
            raise DataError(f"{path}: {name} is damaged (its checksum differs from {CONFIG_FILE}'s)")
        infinite = name == "log_threshold"  # of a gate that is never open
        if not all(
            bool(_fine(part, infinite).all()) for part in torch.split(tensors[name].reshape(-1), _CHECKED_AT_ONCE)
        ):
            what = "NaN" if infinite else "NaN or infinity"
            raise DataError(f"{path}: {name} holds {what}; the training went wrong, or another program wrote it")
    return config, tensors


def _fine(values: Tensor, infinite: bool) -> Tensor:
    return ~torch.isnan(values) if infinite else torch.isfinite(values)
