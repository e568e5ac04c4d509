"""The snapshots (checkpoints) of one language model, and where in it the activations are taken."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crosscoder.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class SnapshotSet:
    """K snapshots of `model`, a hub name (`EleutherAI/pythia-160m`) or a folder with one sub-folder a snapshot."""

    model: str
    revisions: tuple[str, ...]
    """Names of the snapshots, in the order of training: `step0`, `step1`, ... """
    layer: int
    """0-based block; activations are the residual stream after it ("layer 6" of the paper is the seventh block)."""

    def __post_init__(self) -> None:
        if not self.revisions:
            raise ConfigError(f"no snapshots of {self.model} were named; give at least one with --revisions")
        if len(set(self.revisions)) != len(self.revisions):
            raise ConfigError(f"a snapshot of {self.model} is named twice in {', '.join(self.revisions)}")
        if self.layer < 0:
            raise ConfigError(f"layer must be 0 or more (0 is the first block), not {self.layer}")

    @classmethod
    def open(cls, model: str, layer: int, revisions: tuple[str, ...] = ()) -> SnapshotSet:
        """The named revisions, or every `step<N>` sub-folder of a local `model` folder in the order of N.

        Raises `DataError` where a local snapshot is missing, `ConfigError` where revisions must be named.
        """
        folder = Path(model)
        if folder.is_dir():
            found = sorted(
                (path.name for path in folder.iterdir() if re.fullmatch(r"step\d+", path.name)), key=_step_of
            )
            if not found:
                raise DataError(f"{folder} has no snapshots: sub-folders named step0, step1, step2, ...")
            missing = [name for name in revisions if not (folder / name / "config.json").is_file()]
            if missing:
                raise DataError(f"{folder} lacks the snapshots {', '.join(missing)}; it has {', '.join(found)}")
            return cls(model, revisions or tuple(found), layer)
        if not revisions:
            raise ConfigError(f"{model} is not a local folder; name its revisions with --revisions step0 step1 ...")
        return cls(model, revisions, layer)

    @property
    def n_snapshots(self) -> int:
        """K."""
        return len(self.revisions)

    @property
    def steps(self) -> np.ndarray:
        """(K,) int64: training step of each snapshot. Raises `ConfigError` if a name does not end in a number."""
        return np.array([_step_of(name) for name in self.revisions], dtype=np.int64)

    def _location(self, k: int) -> tuple[str, dict[str, Any]]:
        if Path(self.model).is_dir():
            return str(Path(self.model) / self.revisions[k]), {"local_files_only": True}
        return self.model, {"revision": self.revisions[k]}

    def load(self, k: int, dtype: torch.dtype | None = None) -> Any:
        """Snapshot k as a `transformers` causal language model in eval mode, float32 unless `dtype` says otherwise.

        Raises `DataError` naming the snapshot if it is missing, damaged or has too few layers.
        """
        import torch
        from transformers import AutoModelForCausalLM

        quiet_transformers()
        name, options = self._location(k)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or torch.float32, **options)
        except Exception as error:  # transformers raises many kinds for one cause: the files are not usable
            raise DataError(
                f"cannot load snapshot {self.revisions[k]} of {self.model}: {_first_line(error)}"
            ) from error
        layers = decoder_layers(model)
        if self.layer >= len(layers):
            raise ConfigError(
                f"layer {self.layer} does not exist: {self.model} {self.revisions[k]} has layers 0 to {len(layers) - 1}"
            )
        return model.eval()

    def load_config(self, k: int) -> Any:
        """Snapshot k's configuration, without its weights. Raises `DataError` naming the snapshot."""
        from transformers import AutoConfig

        name, options = self._location(k)
        try:
            return AutoConfig.from_pretrained(name, **options)
        except Exception as error:
            raise DataError(
                f"cannot load snapshot {self.revisions[k]} of {self.model}: {_first_line(error)}"
            ) from error

    def load_tokenizer(self) -> Any:
        """The last snapshot's tokenizer."""
        from transformers import AutoTokenizer

        name, options = self._location(self.n_snapshots - 1)
        try:
            return AutoTokenizer.from_pretrained(name, **options)
        except Exception as error:
            raise DataError(f"cannot load the tokenizer of {self.model}: {_first_line(error)}") from error


def quiet_transformers() -> None:
    """Turn off the bars that transformers shows for each file it reads or writes: they would drown ours."""
    from transformers.utils import logging

    library: Any = logging
    library.disable_progress_bar()


def decoder_layers(model: Any) -> nn.ModuleList:
    """The blocks of a causal language model. Raises `DataError` for an unknown architecture."""
    base = getattr(model, model.base_model_prefix, model)
    for name in ("layers", "h"):
        layers = getattr(base, name, None)
        if layers is not None:
            found: nn.ModuleList = layers
            return found
    raise DataError(
        f"do not know where {type(model).__name__} keeps its blocks; use a GPT-NeoX, Llama or GPT-2 like model"
    )


def truncate(model: Any, layer: int) -> Any:
    """The base model without the blocks after `layer` and without the unembedding; in place."""
    layers = decoder_layers(model)
    del layers[layer + 1 :]
    return getattr(model, model.base_model_prefix, model)


def _step_of(name: str) -> int:
    match = re.search(r"(\d+)$", name)
    if match is None:
        raise ConfigError(f"the snapshot name {name!r} does not end in its training step (as in step1000)")
    return int(match.group(1))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
