"""The snapshots (checkpoints) of one language model, and where in it the activations are taken."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crosscoder.activations.content import files_digest, snapshot_digest, tokenizer_files, weight_files
from crosscoder.activations.presets import PRESETS, REVISIONS, revision_names
from crosscoder.activations.steps import REMEDY, step_of, steps_of
from crosscoder.activations.trunk import SITES, decoder_layers, truncate
from crosscoder.errors import ConfigError, DataError
from crosscoder.progress import Progress, warn

if TYPE_CHECKING:
    import torch

TOLD_ABOVE = 4 << 30
"""Bytes of weights from which a bar shows that they are read."""


@dataclass(frozen=True)
class SnapshotSet:
    """K snapshots of `model`, a hub name (`EleutherAI/pythia-160m`) or a folder with one sub-folder a snapshot."""

    model: str
    revisions: tuple[str, ...]
    """Names of the snapshots, in the order of training: `step0`, `step1`, ... """
    layer: int
    """0-based block; activations are taken after it or in it ("layer 6" of the paper is the seventh block)."""
    site: str = "residual"
    """"residual": the residual stream after the block; "mlp", "attention": what that part adds to it."""
    given_steps: tuple[int, ...] = ()
    """Training step of each snapshot, where the names do not carry them."""
    module: str = ""
    """The module of the block that gives the site's activations, as `proof.prove` found it."""
    whole: bool = False
    """Load the blocks after the layer too (they are never run): the architecture computes something else without."""
    proven: bool = False
    """`proof.prove` has shown, in this process, that what is taken from the snapshots is the whole model's own."""
    content: tuple[str, ...] = ()
    """What identifies each snapshot's content (`identified`): one that has changed since is not loaded."""
    tokenizer: str = ""
    """What `tokenizer_content` gave when the snapshots were collected."""

    def __post_init__(self) -> None:
        if not self.revisions:
            raise ConfigError(f"no snapshots of {self.model} were named; give at least one with --revisions")
        if len(set(self.revisions)) != len(self.revisions):
            raise ConfigError(f"a snapshot of {self.model} is named twice in {', '.join(self.revisions)}")
        if self.site not in SITES:
            raise ConfigError(f"site must be one of {', '.join(SITES)}, not {self.site!r}")
        if self.layer < 0:
            raise ConfigError(f"layer must be 0 or more (0 is the first block), not {self.layer}")

    @classmethod
    def open(
        cls,
        model: str,
        layer: int | None = None,
        revisions: tuple[str, ...] = (),
        site: str = "residual",
        steps: tuple[int, ...] = (),
    ) -> SnapshotSet:
        """The named revisions, or every sub-folder of a local `model` folder whose name carries a step, by steps.

        `model` may be one of `presets.PRESETS`, which bring layer and revisions; `revisions` the name of one of
        `presets.REVISIONS`. Raises `DataError` where a local snapshot is missing, `ConfigError` where layer or
        revisions must be named.
        """
        if model in PRESETS and not Path(model).is_dir():
            preset = PRESETS[model]
            model, layer = preset.model, preset.layer if layer is None else layer
            revisions = revisions or (preset.revisions,)
        if layer is None:
            raise ConfigError(f"name the layer of {model} with --layer (0 is the first block)")
        revisions = revision_names(revisions)
        folder = Path(model)
        if folder.is_dir():
            checkpoints = sorted(path.name for path in folder.iterdir() if (path / "config.json").is_file())
            found = sorted(
                (name for name in checkpoints if step_of(name) is not None), key=lambda name: step_of(name) or 0
            )
            if not revisions and not found:
                has = f"it has {', '.join(checkpoints)}: name them with --revisions and --steps" if checkpoints else ""
                raise DataError(
                    f"{folder} has no snapshots: sub-folders named step0, step1, step2, ...{'; ' * bool(has)}{has}"
                )
            missing = [name for name in revisions if not (folder / name / "config.json").is_file()]
            if missing:
                raise DataError(
                    f"{folder} lacks the snapshots {', '.join(missing)}; it has {', '.join(found or checkpoints)}"
                )
            stepless = [name for name in checkpoints if name not in found]
            if stepless and not revisions:
                warn(f"left out: {', '.join(stepless)} of {folder} (no training step in the name; {REMEDY})")
            return cls(model, revisions or tuple(found), layer, site, steps)
        if not revisions:
            raise ConfigError(
                f"{model} is not a local folder; name its revisions with --revisions step0 step1 ... "
                f"(or one of {', '.join(REVISIONS)})"
            )
        return cls(model, revisions, layer, site, steps)

    @property
    def n_snapshots(self) -> int:
        """K."""
        return len(self.revisions)

    @property
    def steps(self) -> np.ndarray:
        """(K,) int64: training step of each snapshot. Raises `ConfigError` if they are unknown or do not increase."""
        return np.array(steps_of(self.revisions, self.given_steps), dtype=np.int64)

    def only(self, names: Sequence[str]) -> SnapshotSet:
        """The same with some of its snapshots."""
        kept = [self.revisions.index(name) for name in names]

        def of(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[k] for k in kept) if values else ()

        return dataclasses.replace(
            self,
            revisions=tuple(names),
            given_steps=of(self.given_steps),
            content=of(self.content),
            tokenizer=self.tokenizer if names[-1] == self.revisions[-1] else "",
        )

    def identified(self) -> SnapshotSet:
        """The same with what identifies each snapshot's `content`, where that is not known yet: a digest of a local
        one's configuration and weights, the commit of a revision on the hub; "" for one that cannot be had.

        Reads all weights of a local model; where that takes a while, a bar shows how far it is.
        """
        if self.content:
            return self
        folders = [Path(self.model) / name for name in self.revisions]
        n_bytes = sum(file.stat().st_size for folder in folders for file in weight_files(folder))
        with Progress("reading the weights", n_bytes, "B") if n_bytes > TOLD_ABOVE else nullcontext() as progress:
            advance = progress.advance if progress is not None else None
            content = tuple(self._content(k, advance) for k in range(self.n_snapshots))
        return dataclasses.replace(self, content=content)

    def _content(self, k: int, advance: Callable[[int], object] | None = None) -> str:
        folder = Path(self.model) / self.revisions[k]
        try:
            if folder.is_dir():
                return snapshot_digest(folder, advance or (lambda n_bytes: None))
            return f"commit {getattr(self.load_config(k), '_commit_hash', None)}"
        except DataError:
            return ""

    def tokenizer_content(self) -> str:
        """A digest of the files of the last snapshot's tokenizer, where it is a local folder; else empty."""
        folder = Path(self.model) / self.revisions[-1]
        return files_digest(tokenizer_files(folder), folder) if folder.is_dir() else ""

    def _require_unchanged(self, k: int) -> None:
        """Raises `DataError` if snapshot k is not the one that was collected."""
        if not (self.content and self.content[k]):
            return
        folder = Path(self.model) / self.revisions[k]
        if folder.is_dir():
            changed = f"config.json or the weights in {', '.join(path.name for path in weight_files(folder))}"
            same = snapshot_digest(folder) == self.content[k]
        else:
            changed, same = "the commit", self._content(k) in ("", self.content[k])
        if not same:
            raise DataError(
                f"snapshot {self.revisions[k]} of {self.model} is not the one that was collected: {changed} "
                "changed since; restore it, or collect into another run"
            )

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

        model = self._read(AutoModelForCausalLM, k, dtype or torch.float32)
        layers = decoder_layers(model)
        if self.layer >= len(layers):
            raise ConfigError(
                f"layer {self.layer} does not exist: {self.model} {self.revisions[k]} has layers 0 to {len(layers) - 1}"
            )
        return model.eval()

    def load_trunk(self, k: int, dtype: torch.dtype | None = None) -> Any:
        """Snapshot k up to the block `layer`: what comes after it is neither run nor, with safetensors, read.

        Raises as `load` does, and `DataError` if a weight of these blocks is not in the snapshot's files.
        """
        import torch
        from transformers import AutoModel

        if self.whole:
            return truncate(self.load(k, dtype), self.layer)
        config = self.load_config(k)
        if self.layer >= config.num_hidden_layers:
            raise ConfigError(
                f"layer {self.layer} does not exist: {self.model} {self.revisions[k]} has layers 0 to "
                f"{config.num_hidden_layers - 1}"
            )
        config.num_hidden_layers = self.layer + 1
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[: self.layer + 1]
        return truncate(self._read(AutoModel, k, dtype or torch.float32, config=config), self.layer)

    def _read(self, kind: Any, k: int, dtype: torch.dtype, **options: Any) -> Any:
        """Snapshot k, every weight of it from its files, in eval mode."""
        quiet_transformers()
        self._require_unchanged(k)
        name, where = self._location(k)
        try:
            with _without_load_report():
                model, report = kind.from_pretrained(name, dtype=dtype, output_loading_info=True, **options, **where)
        except Exception as error:  # transformers raises many kinds for one cause: the files are not usable
            raise DataError(
                f"cannot load snapshot {self.revisions[k]} of {self.model}: {_first_line(error)}"
            ) from error
        absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
        if absent:
            raise DataError(f"snapshot {self.revisions[k]} of {self.model} lacks weights: {', '.join(absent[:3])}")
        return model.eval()

    def tokenizer_fingerprint(self, k: int) -> str | None:
        """SHA-256 (hex) of what makes snapshot k's token ids; None if the snapshot comes without a tokenizer."""
        from transformers.utils.hub import cached_file

        name, options = self._location(k)
        try:
            path = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **options)
            if path is None:
                return None
            rules = json.loads(Path(path).read_text(encoding="utf-8"))
            parts = {key: rules.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(
                f"cannot read the tokenizer of snapshot {self.revisions[k]} of {self.model}: {_first_line(error)}"
            ) from error
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def load_config(self, k: int) -> Any:
        """Snapshot k's configuration, without its weights. Raises `DataError` naming the snapshot."""
        from transformers import AutoConfig

        name, options = self._location(k)
        try:
            return AutoConfig.from_pretrained(name, **options)
        except Exception as error:
            raise DataError(
                f"cannot load snapshot {self.revisions[k]} of {self.model}, its config.json: {_first_line(error)}"
            ) from error

    def first_config(self) -> Any:
        """The configuration of the first snapshot that can be had. Raises `DataError` of the last where none can."""
        for k in range(self.n_snapshots):
            try:
                return self.load_config(k)
            except DataError as error:
                last = error
        raise last

    def load_tokenizer(self) -> Any:
        """The last snapshot's tokenizer. Raises `DataError` if it is missing, damaged, or changed since collection."""
        from transformers import AutoTokenizer

        if self.tokenizer and self.tokenizer_content() not in ("", self.tokenizer):
            folder = Path(self.model) / self.revisions[-1]
            names = ", ".join(path.name for path in tokenizer_files(folder)) or "there are no files of it"
            raise DataError(
                f"the tokenizer in {folder} is not the one that made the collected tokens ({names}); restore it"
            )
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


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers lists the weights that were not read; here they are left out on purpose.

    At this level it lists the layers that it does not split over devices instead, so that logger is quietened too.
    """
    names = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
