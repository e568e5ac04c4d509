"""Joining: one concept in two features, found by their activations, becomes one feature again.

The penalty counts each snapshot for itself, so a feature that turns can as well be two: one for the snapshots before
the turn, one for those after (its quadratic part even prefers two rare features to a common one). Either half then
looks born, or dead, at the turn ("latent decoupling", Minder et al. 2025). Two features whose activations are
proportional over all tokens are one: f_i W_i + f_j W_j = f_i (W_i + a W_j) with f_j = a f_i.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from crosscoder.code import SparseCode
from crosscoder.model import Crosscoder

N_BATCHES = 8
"""Batches whose activations are compared."""
LAST_JOINING = 0.95
"""Share of the steps after which features are joined for the last time: nothing is revived after it, and the learning
rate that is left settles the joined ones without taking them apart."""
MIN_TOGETHER = 6
"""Tokens on which both must be active: fewer say little about being proportional."""
EXCLUSIVE = 0.2
"""Two features whose norms over snapshots have at most this cosine are there at different snapshots."""
LEAST_FACTOR = 0.8
"""No pair is joined whose activations have less than this share of the cosine asked for, but ..."""
SAME_DIRECTION = 0.85
"""... two features at different snapshots, with mean decoders of this cosine: there it is enough if ..."""
SAME_DIRECTION_ACTIVATIONS = 0.5
"""... their activations have this one, since each reads what the other does from other snapshots."""
ROUNDS = 3
"""Rounds of pairs at a time: parts of up to eight features find each other."""
_PAIRS_AT_ONCE = 512
"""Pairs whose decoders are compared at a time."""
_MAX_PAIRS = 40_000_000
"""Pairs of features active on one token, summed over tokens, that are looked at; later tokens are left out."""


class JoiningSample:
    """Activations of the batches before a joining, as triples (token, feature, value); part of a checkpoint."""

    def __init__(self, device: torch.device) -> None:
        self._forget(device)

    def _forget(self, device: torch.device) -> None:
        self._tokens = torch.zeros(0, dtype=torch.int64, device=device)
        self._features = torch.zeros(0, dtype=torch.int64, device=device)
        self._values = torch.zeros(0, device=device, dtype=torch.float32)

    def add(self, code: SparseCode) -> None:
        """The activations of one more batch."""
        first = self._tokens[-1] + 1 if len(self._tokens) else 0
        counts_B = code.row_offsets.diff()
        kept_N = ((counts_B**2).cumsum(0) <= _MAX_PAIRS // N_BATCHES)[code.rows()]
        self._tokens = torch.cat([self._tokens, code.rows()[kept_N] + first])
        self._features = torch.cat([self._features, code.features[kept_N].long()])
        self._values = torch.cat([self._values, code.values[kept_N].float()])

    def take(self, n_features: int) -> Tensor:
        """The activations as a sparse (tokens, F) matrix; forgets them."""
        n_tokens = int(self._tokens[-1]) + 1 if len(self._tokens) else 1
        places = torch.stack([self._tokens, self._features])
        matrix = _sparse(places, self._values, torch.Size((n_tokens, n_features)))
        self._forget(self._values.device)
        return matrix

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds, under the names of its format."""
        yield "recent_tokens", self._tokens
        yield "recent_features", self._features
        yield "recent_values", self._values

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        device = self._values.device
        self._tokens, self._features = tensors["recent_tokens"].to(device), tensors["recent_features"].to(device)
        self._values = tensors["recent_values"].to(device)


@torch.no_grad()
def join_features(model: Crosscoder, f_TF: Tensor, cosine: float) -> Tensor:
    """Join pairs of features whose activations `f_TF` (sparse, tokens by features) have at least this cosine.

    Pairs with similar decoders need less, and so do those of which one is there only where the other is not. The one
    that explains more takes the other's decoder (times the ratio of their activations) and the mean of both encoders
    and thresholds; the other's decoder becomes 0. A feature takes part in one pair at a time, the closest first, in
    `ROUNDS` rounds, so that more than two parts find each other. Returns the features that were given up, (n,).
    """
    given_up = []
    for _ in range(ROUNDS):
        kept, dropped, ratio_n = _pairs(model, f_TF, cosine)
        if not len(kept):
            break
        _join(model, kept, dropped, ratio_n)
        given_up.append(dropped)
        f_TF = _joined_activations(f_TF, kept, dropped, ratio_n)
    return torch.cat(given_up) if given_up else torch.zeros(0, dtype=torch.int64, device=f_TF.device)


def _join(model: Crosscoder, kept: Tensor, dropped: Tensor, ratio_n: Tensor) -> None:
    dtype = torch.promote_types(model.W_dec.dtype, torch.float32)
    a = ratio_n.to(dtype)
    joined = model.W_dec[kept].to(dtype) + a[:, None, None] * model.W_dec[dropped].to(dtype)
    encoder = (model.W_enc[kept].to(dtype) + model.W_enc[dropped].to(dtype) / a[:, None, None]) / 2
    model.b_enc[kept] = ((model.b_enc[kept].to(dtype) + model.b_enc[dropped].to(dtype) / a) / 2).to(model.b_enc)
    model.log_threshold[kept] = (model.log_threshold[kept] + model.log_threshold[dropped]) / 2
    model.W_dec[kept], model.W_enc[kept] = joined.to(model.W_dec), encoder.to(model.W_enc)
    model.W_dec[dropped] = 0


def _joined_activations(f_TF: Tensor, kept: Tensor, dropped: Tensor, ratio_n: Tensor) -> Tensor:
    """What the joined encoders give, roughly: the mean of both."""
    tokens, features = f_TF.indices()
    target_F = torch.arange(f_TF.shape[1], device=f_TF.device)
    weight_F = torch.ones(f_TF.shape[1], device=f_TF.device, dtype=torch.float32)
    target_F[dropped] = kept
    weight_F[kept], weight_F[dropped] = 0.5, 0.5 / ratio_n
    return _sparse(torch.stack([tokens, target_F[features]]), f_TF.values() * weight_F[features], f_TF.shape)


def _pairs(model: Crosscoder, f_TF: Tensor, cosine: float) -> tuple[Tensor, Tensor, Tensor]:
    """Features to keep, features to drop, and f_drop / f_keep, (n,) each."""
    none = torch.zeros(0, dtype=torch.int64, device=f_TF.device)
    if not f_TF._nnz():
        return none, none, torch.zeros(0, device=f_TF.device, dtype=torch.float32)
    products = _gram(f_TF)
    together = _gram(_sparse(f_TF.indices(), torch.ones_like(f_TF.values()), f_TF.shape))
    first, second = products.indices()
    product_n = products.values()
    squares_F = torch.zeros(f_TF.shape[1], device=f_TF.device, dtype=torch.float32)
    same = first == second
    squares_F[first[same]] = product_n[same]
    cosine_n = product_n / (squares_F[first] * squares_F[second]).sqrt()
    least = min(LEAST_FACTOR * cosine, SAME_DIRECTION_ACTIVATIONS)
    close = (first < second) & (cosine_n >= least) & (together.values() >= MIN_TOGETHER)
    first, second, product_n, cosine_n = first[close], second[close], product_n[close], cosine_n[close]
    close = _are_one(model, first, second, cosine_n, cosine)
    order = close.nonzero().squeeze(1)
    order = order[cosine_n[order].argsort(descending=True, stable=True)]
    first, second, product_n = first[order], second[order], product_n[order]
    taken: set[int] = set()
    chosen = []
    for n, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        if i not in taken and j not in taken:
            taken |= {i, j}
            chosen.append(n)
    first, second, product_n = first[chosen], second[chosen], product_n[chosen]
    norms_F = torch.linalg.vector_norm(model.decoder_norms(), dim=1)
    swap = squares_F[second] * norms_F[second] ** 2 > squares_F[first] * norms_F[first] ** 2
    kept, dropped = torch.where(swap, second, first), torch.where(swap, first, second)
    return kept, dropped, product_n / squares_F[kept]


def _are_one(model: Crosscoder, first: Tensor, second: Tensor, cosine_n: Tensor, cosine: float) -> Tensor:
    """Which pairs are one feature, (n,) bool, from the cosine of their activations and from their decoders.

    Two features of one size are a matrix f_i W_i + f_j W_j of rank 2 over tokens and (K, D); a single one keeps the
    share (1 + a)(1 + w) / ((1 + a)(1 + w) + (1 - a)(1 - w)) of its squares, a and w the cosines of activations and of
    decoders. Asked for is what orthogonal decoders keep with a = `cosine`.
    """
    one_n = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    for part in torch.split(torch.arange(len(first), device=first.device), _PAIRS_AT_ONCE):
        a_n = cosine_n[part]
        W_iKD, W_jKD = model.W_dec[first[part]].float(), model.W_dec[second[part]].float()
        w_n = torch.cosine_similarity(W_iKD.flatten(1), W_jKD.flatten(1)).clamp_min(0)
        both_n, neither_n = (1 + a_n) * (1 + w_n), (1 - a_n) * (1 - w_n)
        close_n = a_n >= LEAST_FACTOR * cosine
        norms_i, norms_j = torch.linalg.vector_norm(W_iKD, dim=2), torch.linalg.vector_norm(W_jKD, dim=2)
        exclusive_n = torch.cosine_similarity(norms_i, norms_j) <= EXCLUSIVE
        aligned_n = torch.cosine_similarity(W_iKD.mean(dim=1), W_jKD.mean(dim=1)) >= SAME_DIRECTION
        proportional_n = both_n / (both_n + neither_n) >= (1 + cosine) / 2
        one_n[part] = (close_n & (proportional_n | exclusive_n)) | (exclusive_n & aligned_n)
    return one_n


def _sparse(places: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    matrix: Tensor = torch.sparse_coo_tensor(places, values, shape, check_invariants=False).coalesce()
    return matrix


def _gram(f_TF: Tensor) -> Tensor:
    """f^T f, sparse."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        products: Tensor = torch.sparse.mm(f_TF.t(), f_TF).coalesce()
    return products
