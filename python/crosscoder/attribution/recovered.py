"""How much of the language model's loss a crosscoder keeps, when its reconstruction stands in the model's place.

At each snapshot three losses (cross-entropy of the next token, nats, on held-out tokens): of the model as it is, with
`x^_k` in the place of the residual stream after the layer, and with the mean activation there. Recovered is
`(mean-ablated - spliced) / (mean-ablated - clean)`: 1 if the reconstruction is as good as the activation, 0 if it is no
better than the mean. Source: docs/method.md, section 5.

Letters: S sequences, C context, K snapshots, D width, F features, R coded tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from crosscoder.activations.store import ActivationStore
from crosscoder.activations.tokens import TokenSet
from crosscoder.attribution.coding import PromptCodes, Snapshots
from crosscoder.attribution.splice import CutModel
from crosscoder.errors import DataError, NonFiniteError
from crosscoder.model import Crosscoder
from crosscoder.progress import Progress

LEAST_COST = 0.01
"""Nats that mean ablation must cost for the share recovered to say anything: a random model has nothing to lose."""
_ENCODED_TOKENS = 2048
_LOGITS = 1 << 25
"""Logits (tokens x vocabulary) in memory at a time."""


@dataclass(frozen=True)
class RecoveredLoss:
    """Losses in nats a token, by snapshot."""

    snapshots: list[str]
    n_predictions: int
    """Predictions that count: made at a token whose activation was replaced, and not of the end-of-text token."""
    clean_K: list[float]
    spliced_K: list[float]
    mean_ablated_K: list[float]

    @property
    def recovered_K(self) -> list[float | None]:
        """The share of the loss recovered; None where mean ablation costs less than `LEAST_COST`."""
        triples = zip(self.clean_K, self.spliced_K, self.mean_ablated_K, strict=True)
        return [(m - s) / (m - c) if m - c >= LEAST_COST else None for c, s, m in triples]

    def to_dict(self) -> dict[str, Any]:
        """For `summary.json`."""
        columns = zip(self.clean_K, self.spliced_K, self.mean_ablated_K, self.recovered_K, strict=True)
        names = ("clean", "spliced", "mean_ablated", "recovered")
        rows = [dict(zip(names, row, strict=True)) for row in columns]
        return {"n_predictions": self.n_predictions, "by_snapshot": dict(zip(self.snapshots, rows, strict=True))}


def recovered_loss(
    crosscoder: Crosscoder, snapshots: Snapshots, tokens: TokenSet, store: ActivationStore, n_tokens: int
) -> RecoveredLoss:
    """Measure on about `n_tokens` tokens, whole sequences spread evenly over `tokens`.

    `crosscoder` is the one for raw activations, `store` holds those of `tokens` in its snapshots, in the residual
    stream. The end-of-text token and those left out are never replaced: the crosscoder never saw them. Raises
    `DataError` if the store is of other tokens or snapshots, `NonFiniteError` naming a snapshot whose loss is not
    finite.
    """
    S, C = tokens.ids.shape
    chosen_S = np.unique(np.linspace(0, S - 1, min(S, max(1, -(-n_tokens // C)))).round().astype(np.int64))
    names = store.snapshot_names
    missing = [name for name in names if name not in snapshots.revisions]
    if missing:
        raise DataError(f"{store.path} has snapshots that the model does not have: {', '.join(missing)}")
    _check_tokens(tokens, store)
    parts = np.array_split(chosen_S, -(-len(chosen_S) * C // _ENCODED_TOKENS))
    codes = PromptCodes.joined([crosscoder.encode(_in_text_order(store, part)) for part in parts])
    ids_SC = torch.from_numpy(tokens.ids[chosen_S]).long()
    coded_SC = torch.from_numpy(tokens.stored_SC[chosen_S])
    counted_SC = coded_SC[:, :-1] & (ids_SC[:, 1:] != tokens.end_of_text)
    means_KD = torch.from_numpy(store.means()).float()
    losses: list[list[float]] = []
    with Progress("language-model loss", len(names), "snapshots") as progress:
        for k, name in enumerate(names):
            whole = snapshots.load(snapshots.revisions.index(name), torch.float32)
            model = CutModel(whole.to(crosscoder.W_dec.device), snapshots.layer)
            W_FD = crosscoder.W_dec[:, k].detach().float().cpu().contiguous()
            b_D = crosscoder.b_dec[k].detach().float().cpu()
            # in exact arithmetic the pairs' sum is what crosscoder.decode gives at k, without the other snapshots
            spliced_RD = codes.at(k).decode(W_FD) + b_D
            found = _losses(model, ids_SC, coded_SC, counted_SC, spliced_RD, means_KD[k])
            if not np.isfinite(found).all():
                raise NonFiniteError(f"the language model's loss at snapshot {name} is not finite")
            losses.append(found)
            progress.advance()
    clean_K, spliced_K, mean_K = (list(column) for column in zip(*losses, strict=True))
    return RecoveredLoss(names, int(counted_SC.sum()), clean_K, spliced_K, mean_K)


def _in_text_order(store: ActivationStore, sequences: np.ndarray) -> Tensor:
    """Activations (B, K, D) of the tokens of `sequences`, by sequence and position."""
    found = list(store.whole_sequences(_ENCODED_TOKENS, sequences=sequences))
    sequence_B, position_B = (np.concatenate([part[i] for part in found]) for i in (1, 2))
    return torch.cat([part[0] for part in found])[torch.from_numpy(np.lexsort((position_B, sequence_B)))]


def _check_tokens(tokens: TokenSet, store: ActivationStore) -> None:
    """Raises `DataError` unless the store has exactly the tokens that are to be stored."""
    rows_N4 = np.concatenate([store.tokens(shard) for shard in range(len(store.shard_rows))])
    token_N, sequence_N, position_N = rows_N4[:, 0], rows_N4[:, 2], rows_N4[:, 3]
    found_SC = np.full(tokens.ids.shape, tokens.end_of_text)
    inside_N = (sequence_N >= 0) & (sequence_N < tokens.n_sequences) & (position_N >= 0) & (position_N < tokens.context)
    found_SC[sequence_N[inside_N], position_N[inside_N]] = token_N[inside_N]
    if not (inside_N.all() and np.array_equal(found_SC, np.where(tokens.stored_SC, tokens.ids, tokens.end_of_text))):
        raise DataError(f"{store.path} does not hold the activations of the run's held-out tokens; collect them again")


@torch.no_grad()
def _losses(
    model: CutModel, ids_SC: Tensor, coded_SC: Tensor, counted_SC: Tensor, spliced_RD: Tensor, mean_D: Tensor
) -> list[float]:
    """Mean loss of the model as it is, with `spliced_RD` at the coded tokens, and with `mean_D` there."""
    S, C = ids_SC.shape
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    rows = max(1, _LOGITS // (C * vocabulary))
    starts_S = torch.cat([torch.zeros(1, dtype=torch.int64), coded_SC.sum(dim=1).cumsum(0)])
    mean_D = mean_D.to(model.device)
    sums = [0.0, 0.0, 0.0]
    for first in range(0, S, rows):
        ids_BC, coded_BC = ids_SC[first : first + rows], coded_SC[first : first + rows]
        ids_BC, coded_BC = ids_BC.to(model.device), coded_BC.to(model.device)
        counted_N = counted_SC[first : first + rows].flatten().to(model.device)
        x_BCD = model.residual(ids_BC)
        here_RD = spliced_RD[starts_S[first] : starts_S[min(S, first + rows)]].to(model.device)
        for number, x in enumerate((x_BCD, _replaced(x_BCD, coded_BC, here_RD), _replaced(x_BCD, coded_BC, mean_D))):
            logits_BCV = model.every_logits(ids_BC, x)
            loss = cross_entropy(logits_BCV[:, :-1].flatten(0, 1), ids_BC[:, 1:].flatten(), reduction="none")
            sums[number] += float(loss[counted_N].double().sum())
    n = max(1, int(counted_SC.sum()))
    return [value / n for value in sums]


def _replaced(x_BCD: Tensor, coded_BC: Tensor, values: Tensor) -> Tensor:
    x_BCD = x_BCD.clone()
    x_BCD[coded_BC] = values.to(x_BCD.dtype)
    return x_BCD


def describe(found: RecoveredLoss, shown: Sequence[int]) -> list[str]:
    """Lines for the terminal, of the snapshots `shown`."""
    lines = []
    for k in shown:
        share = found.recovered_K[k]
        kept = "mean ablation costs too little to say" if share is None else f"{share:.1%} recovered"
        lines.append(
            f"language-model loss at {found.snapshots[k]}: {found.clean_K[k]:.4f} clean, {found.spliced_K[k]:.4f} with "
            f"the reconstruction, {found.mean_ablated_K[k]:.4f} with the mean ({kept})"
        )
    return lines
