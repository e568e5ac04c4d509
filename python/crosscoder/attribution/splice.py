"""A snapshot's language model, cut at the crosscoder's layer, with the features in place there.

Letters: P prompts (B of them in a batch), T tokens of a prompt, D width, V vocabulary, F features, R coded tokens,
N pairs (token, feature) with an open gate at the snapshot.

What stands at the layer is `x = x^ + error`, with `x^ = sum_f f W_dec[f] + b_dec`. It is written as
`x + sum_f (f - f_clean) W_dec[f]`, the same in exact arithmetic: with nothing changed the sum is 0, and the logits are
the clean model's to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from crosscoder.activations.trunk import decoder_layers
from crosscoder.errors import DataError


class CutModel:
    """A causal language model in two halves: up to and with block `layer`, and from there on.

    Prompts are padded at the right: a causal model never looks there, so no mask is needed. The parameters' gradients
    are turned off.
    """

    def __init__(self, model: Any, layer: int) -> None:
        """`model` as `SnapshotSet.load` gives it. Raises `DataError` if it has no block `layer`."""
        self.model = model.eval().requires_grad_(False)
        self.blocks = decoder_layers(model)
        if not 0 <= layer < len(self.blocks):
            raise DataError(f"there is no block {layer}: the model has blocks 0 to {len(self.blocks) - 1}")
        self.layer = layer
        self._in_tuples = False
        self.residual(torch.zeros(1, 1, dtype=torch.long))

    @property
    def device(self) -> torch.device:
        device: torch.device = next(iter(self.model.parameters())).device
        return device

    @torch.no_grad()
    def residual(self, ids_BT: Tensor) -> Tensor:
        """The residual stream (B, T, D) after block `layer`, in the model's dtype."""
        caught: list[Any] = []

        def catch(module: Any, inputs: Any, output: Any) -> None:
            caught.append(output)

        handle = self.blocks[self.layer].register_forward_hook(catch)
        try:
            with self._replaced(dict.fromkeys(self.blocks[self.layer + 1 :], self._pass)):
                self.model(input_ids=ids_BT.to(self.device), use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        self._in_tuples = isinstance(caught[0], tuple)
        return cast(Tensor, caught[0][0] if self._in_tuples else caught[0])

    def logits(self, ids_BT: Tensor, x_BTD: Tensor, position_B: Tensor) -> Tensor:
        """Logits (B, V) in float32 at one position a prompt, if the residual stream after block `layer` is `x_BTD`.

        Differentiable in `x_BTD`, of any floating dtype; only the blocks after `layer` run.
        """
        rows_B, position_B = torch.arange(len(position_B), device=self.device), position_B.to(self.device)

        def only_last(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (inputs[0][rows_B, position_B][:, None],)

        handle = self.model.get_output_embeddings().register_forward_pre_hook(only_last)
        try:
            return self.every_logits(ids_BT, x_BTD)[:, 0]
        finally:
            handle.remove()

    def every_logits(self, ids_BT: Tensor, x_BTD: Tensor) -> Tensor:
        """Logits (B, T, V) in float32 at all positions, otherwise as `logits`."""

        def inject(hidden_states: Tensor, *rest: Any, **more: Any) -> Any:
            return self._pass(x_BTD.to(device=hidden_states.device, dtype=hidden_states.dtype))

        passed = dict.fromkeys(self.blocks[: self.layer], self._pass)
        with self._replaced({**passed, self.blocks[self.layer]: inject}):
            logits_BTV = self.model(input_ids=ids_BT.to(self.device), use_cache=False).logits
        return cast(Tensor, logits_BTV.float().to(x_BTD.device))

    def _pass(self, hidden_states: Tensor, *rest: Any, **more: Any) -> Any:
        """The forward of a block that is skipped, in the form of the model's own blocks."""
        return (hidden_states,) if self._in_tuples else hidden_states

    @staticmethod
    @contextlib.contextmanager
    def _replaced(forwards: dict[Any, Any]) -> Iterator[None]:
        """Blocks with another forward for a while: an attribute of the instance hides the class's method."""
        for block, forward in forwards.items():
            block.forward = forward
        try:
            yield
        finally:
            for block in forwards:
                del block.forward


@dataclass(frozen=True)
class Pairs:
    """The features of R coded tokens at one snapshot, token by token: N pairs."""

    offsets_R: Tensor
    """(R + 1,) int64: the pairs of token r are `offsets_R[r]` to `offsets_R[r + 1]`."""
    features_N: Tensor
    """(N,) int64."""
    values_N: Tensor
    """(N,) float32, never 0."""

    def rows(self) -> Tensor:
        """(N,) int64: the coded token of each pair."""
        counts = self.offsets_R.diff()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def take(self, rows: Tensor) -> Pairs:
        """The pairs of the tokens `rows`, in that order; a token may come more than once."""
        counts = self.offsets_R.diff()[rows]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        shift = torch.repeat_interleave(self.offsets_R[rows] - offsets[:-1], counts)
        index = torch.arange(len(shift), device=shift.device) + shift
        return Pairs(offsets, self.features_N[index], self.values_N[index])

    def only(self, kept_F: Tensor) -> Pairs:
        """The pairs of the features where `kept_F` (F,) is true."""
        kept_N = kept_F[self.features_N]
        before = torch.cat([self.offsets_R.new_zeros(1), kept_N.cumsum(0)])
        return Pairs(before[self.offsets_R], self.features_N[kept_N], self.values_N[kept_N])

    def decode(self, W_FD: Tensor, values_N: Tensor | None = None) -> Tensor:
        """(R, D): `sum_f f W[f]`, with `values_N` in the place of the pairs' own. Differentiable in `values_N`."""
        values_N = self.values_N if values_N is None else values_N
        if not len(values_N):
            return W_FD.new_zeros(len(self.offsets_R) - 1, W_FD.shape[1])
        return embedding_bag(
            self.features_N, W_FD, self.offsets_R, mode="sum", per_sample_weights=values_N, include_last_offset=True
        )

    def products(self, g_RD: Tensor, W_FD: Tensor) -> Tensor:
        """(N,): `<g_r, W[f]>` for each pair, the gradient of `decode` in its values."""
        values_N = torch.zeros_like(self.values_N, requires_grad=True)
        with torch.enable_grad():
            decoded_RD = self.decode(W_FD, values_N)
        return torch.autograd.grad(decoded_RD, values_N, g_RD)[0] if len(values_N) else values_N.detach()


@dataclass(frozen=True)
class SnapshotPrompts:
    """P prompts at one snapshot: tokens, the residual stream at the layer, and its features.

    Coded tokens are numbered prompt by prompt. The end-of-text token and padding are not coded: the crosscoder never
    saw such activations, and there all of x is error.
    """

    ids_PT: Tensor
    """(P, T) int64, padded at the right."""
    last_P: Tensor
    """(P,) int64: position of the last token, where the answer is predicted."""
    coded_PT: Tensor
    """(P, T) bool."""
    x_PTD: Tensor
    """(P, T, D) in the language model's dtype."""
    pairs: Pairs

    def __len__(self) -> int:
        return len(self.ids_PT)

    def take(self, index_B: Tensor) -> SnapshotPrompts:
        """The prompts `index_B`, which may repeat, without the columns that only longer prompts need."""
        T = int(self.last_P[index_B].max()) + 1 if len(index_B) else 0
        return SnapshotPrompts(
            self.ids_PT[index_B, :T],
            self.last_P[index_B],
            self.coded_PT[index_B, :T],
            self.x_PTD[index_B, :T],
            self.pairs.take(self.rows_of(index_B)),
        )

    def rows_of(self, index_B: Tensor) -> Tensor:
        """The coded tokens of the prompts `index_B`, in that order."""
        counts_P = self.coded_PT.sum(dim=1)
        starts_P = counts_P.cumsum(0) - counts_P
        counts_B = counts_P[index_B]
        ends_B = counts_B.cumsum(0)
        shift = torch.repeat_interleave(starts_P[index_B] - (ends_B - counts_B), counts_B)
        return torch.arange(len(shift), device=shift.device) + shift

    def prompt_of_rows(self) -> Tensor:
        """(R,) int64: the prompt of each coded token."""
        return self.coded_PT.nonzero()[:, 0]

    def coded(self, x_PTD: Tensor) -> Tensor:
        """(R, D): what `x_PTD` (P, T, D) has at the coded tokens, in float32."""
        return x_PTD[self.coded_PT].float()

    def shifted(self, delta_RD: Tensor) -> Tensor:
        """(P, T, D) float32: x, with `delta_RD` added at the coded tokens. Differentiable in `delta_RD`."""
        rows = self.coded_PT.reshape(-1).nonzero()[:, 0]
        flat = self.x_PTD.float().reshape(-1, self.x_PTD.shape[-1])
        return flat.index_add(0, rows, delta_RD.to(flat.dtype)).view(self.x_PTD.shape)


class Splice:
    """Snapshot k's language model with the crosscoder's features in place at its layer."""

    def __init__(self, model: CutModel, W_FD: Tensor, b_D: Tensor) -> None:
        """`W_FD`, `b_D`: the crosscoder's decoder and bias at the snapshot, for raw activations."""
        self.model = model
        self.W_FD = W_FD.detach().float().contiguous()
        self.b_D = b_D.detach().float()

    def error(self, prompts: SnapshotPrompts) -> Tensor:
        """(R, D): `x - x^` at the coded tokens, the part of x that the features do not hold."""
        return prompts.coded(prompts.x_PTD) - prompts.pairs.decode(self.W_FD) - self.b_D

    def logits(
        self, prompts: SnapshotPrompts, values_N: Tensor | None = None, error_RD: Tensor | None = None
    ) -> Tensor:
        """Logits (P, V) after the last token, with the features' values `values_N` and the error `error_RD`.

        What is None is kept as it is. Differentiable in both: the features are leaves of the graph.
        """
        x_PTD = prompts.x_PTD
        if values_N is not None or error_RD is not None:
            clean_RD = prompts.pairs.decode(self.W_FD)
            delta_RD = torch.zeros_like(clean_RD)
            if values_N is not None:
                delta_RD = delta_RD + (prompts.pairs.decode(self.W_FD, values_N) - clean_RD)
            if error_RD is not None:
                delta_RD = delta_RD + (error_RD - self.error(prompts))
            x_PTD = prompts.shifted(delta_RD)
        return self.model.logits(prompts.ids_PT, x_PTD, prompts.last_P)

    def shifted_logits(self, prompts: SnapshotPrompts, delta_RD: Tensor) -> Tensor:
        """Logits (P, V) after the last token, with `delta_RD` added to x at the coded tokens."""
        return self.model.logits(prompts.ids_PT, prompts.shifted(delta_RD), prompts.last_P)
