"""The activations of a task's prompts in all snapshots, computed once, and their features.

The crosscoder's encoder sums over the K snapshots' activations of a token, so features exist only when all snapshots
have read the prompts. Letters: P prompts, T tokens, K snapshots, D width, F features, R coded tokens, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from crosscoder.activations.tokens import END_OF_TEXT
from crosscoder.attribution.splice import CutModel, Pairs, SnapshotPrompts
from crosscoder.attribution.task import Task
from crosscoder.code import SparseCode
from crosscoder.common.arrays import load_mapped, save_mapped
from crosscoder.errors import DataError, NonFiniteError
from crosscoder.model import Crosscoder
from crosscoder.progress import Progress

_BATCH_TOKENS = 4096
_ENCODED_VALUES = 1 << 24
"""Preactivations (tokens x features) in memory at a time."""
SIDES = ("clean", "corrupted")


class Snapshots(Protocol):
    """What `SnapshotSet` has, and a test's stand-in."""

    @property
    def revisions(self) -> tuple[str, ...]: ...

    @property
    def layer(self) -> int: ...

    def load(self, k: int, dtype: torch.dtype | None = None) -> Any: ...


def length_batches(last_P: Tensor, index_B: Tensor, tokens: int = _BATCH_TOKENS) -> list[Tensor]:
    """`index_B` in groups of prompts of like length, so that little is spent on padding."""
    order_B = index_B[last_P[index_B].argsort(stable=True)]
    batches, start = [], 0
    for end in range(1, len(order_B) + 1):
        # sorted: the last prompt of a group is its longest
        full = end == len(order_B) or (end + 1 - start) * (int(last_P[order_B[end]]) + 1) > tokens
        if full:
            batches.append(order_B[start:end])
            start = end
    return batches


@dataclass(frozen=True)
class LeftOut:
    """Tokens that the crosscoder never saw, beside end-of-text. They have no features: the model's own stays there."""

    positions: int = 0
    """The first so many of a prompt."""
    ids: tuple[int, ...] = ()
    """Token ids, anywhere."""


class PromptActivations:
    """The residual streams of a task's prompts, one file a snapshot and side, kept until the task is done."""

    def __init__(
        self,
        task: Task,
        snapshots: Snapshots,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        left_out: LeftOut | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`device`: where the language models run."""
        self.device = device
        self.task, self.snapshots, self.folder, self.dtype = task, snapshots, folder, dtype
        self.coded_PT = coded_tokens(task, left_out or LeftOut())

    def _file(self, k: int, side: str) -> Path:
        return self.folder / f"{self.snapshots.revisions[k]}-{side}.npy"

    def compute(self, on_snapshot: Callable[[], object] = lambda: None) -> None:
        """Run the prompts through the lower half of every snapshot whose files are not there.

        Raises `NonFiniteError` naming the snapshot.
        """
        for k, revision in enumerate(self.snapshots.revisions):
            if not all(self._file(k, side).exists() for side in SIDES):
                model = CutModel(self.snapshots.load(k, self.dtype).to(self.device), self.snapshots.layer)
                for side in SIDES:
                    ids_PT, last_P = self.task.ids(side), self.task.last_P
                    x_PTD: Tensor | None = None
                    for index_B in length_batches(last_P, torch.arange(len(self.task))):
                        T = int(last_P[index_B].max()) + 1
                        x_BTD = model.residual(ids_PT[index_B, :T]).cpu()
                        if x_PTD is None:
                            x_PTD = x_BTD.new_zeros(*ids_PT.shape, x_BTD.shape[-1])
                        x_PTD[index_B, :T] = x_BTD
                    assert x_PTD is not None
                    if not bool(x_PTD.isfinite().all()):
                        raise NonFiniteError(f"an activation of snapshot {revision} is not finite ({side} prompts)")
                    _save(self._file(k, side), x_PTD)
            on_snapshot()

    def open(self, k: int, side: str) -> np.ndarray:
        """(P, T, D), on disk. Raises `DataError` naming a damaged file."""
        return load_mapped(self._file(k, side))

    def read(self, k: int, side: str) -> Tensor:
        """(P, T, D) in the language model's dtype."""
        return _tensor(np.array(self.open(k, side)))


def _save(path: Path, x: Tensor) -> None:
    """bfloat16 is unknown to numpy: kept as its bits."""
    save_mapped(path, (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).contiguous().numpy())


def _tensor(x: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(x)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


@dataclass(frozen=True)
class PromptCodes:
    """The features of the coded tokens of one side's prompts, over all snapshots: N pairs, values and K-bit gates."""

    offsets_R: Tensor
    features_N: Tensor
    values_N: Tensor
    gates_N: Tensor

    @classmethod
    def joined(cls, codes: Sequence[SparseCode]) -> PromptCodes:
        """One after the other, on the CPU; `codes` are at least one."""
        counts = torch.cat([code.row_offsets.diff() for code in codes])
        return cls(
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]).cpu(),
            torch.cat([code.features.long() for code in codes]).cpu(),
            torch.cat([code.values.float() for code in codes]).cpu(),
            torch.cat([code.gates for code in codes]).cpu(),
        )

    def at(self, k: int) -> Pairs:
        """The pairs that are open at snapshot k."""
        open_N = (self.gates_N >> k) & 1 != 0
        before = torch.cat([open_N.new_zeros(1, dtype=torch.int64), open_N.long().cumsum(0)])
        return Pairs(before[self.offsets_R], self.features_N[open_N], self.values_N[open_N])


def coded_tokens(task: Task, left_out: LeftOut) -> Tensor:
    """(P, T) bool: the tokens that have features, on both sides: neither padding nor end-of-text nor left out."""
    position_T = torch.arange(task.ids("clean").shape[1])
    inside_PT = (position_T >= left_out.positions) & (position_T <= task.last_P[:, None])
    unseen = torch.tensor([END_OF_TEXT, *left_out.ids])
    return inside_PT & ~torch.isin(task.ids("clean"), unseen) & ~torch.isin(task.ids("corrupted"), unseen)


@torch.no_grad()
def encode(activations: PromptActivations, crosscoder: Crosscoder, side: str) -> PromptCodes:
    """The code of the prompts' tokens. Raises `DataError` if the crosscoder is of other snapshots or another width."""
    K, F = crosscoder.config.n_snapshots, crosscoder.config.n_features
    if len(activations.snapshots.revisions) != K:
        raise DataError(
            f"the crosscoder is of {K} snapshots, the model has {len(activations.snapshots.revisions)}; "
            "name those that it was trained on"
        )
    prompt_R, position_R = activations.coded_PT.nonzero(as_tuple=True)
    codes = []
    rows = max(1, _ENCODED_VALUES // F)
    x_KPTD = [activations.open(k, side) for k in range(K)]
    for start in range(0, len(prompt_R), rows):
        at = prompt_R[start : start + rows].numpy(), position_R[start : start + rows].numpy()
        x_KRD = [_tensor(x_PTD[at]).float() for x_PTD in x_KPTD]
        codes.append(crosscoder.encode(torch.stack(x_KRD, dim=1)))
    return PromptCodes.joined(codes)


@dataclass(frozen=True)
class CodedTask:
    """A task's prompts with their features in all snapshots."""

    task: Task
    activations: PromptActivations
    codes: dict[str, PromptCodes]

    def at(self, k: int, side: str) -> SnapshotPrompts:
        """One side's prompts at snapshot k."""
        return SnapshotPrompts(
            self.task.ids(side),
            self.task.last_P,
            self.activations.coded_PT,
            self.activations.read(k, side),
            self.codes[side].at(k),
        )


def code_task(activations: PromptActivations, crosscoder: Crosscoder) -> CodedTask:
    """Activations in all snapshots, then features: once for the task."""
    K = len(activations.snapshots.revisions)
    with Progress("activations of the prompts", K, "snapshots") as progress:
        activations.compute(progress.advance)
    codes = {side: encode(activations, crosscoder, side) for side in SIDES}
    return CodedTask(activations.task, activations, codes)
