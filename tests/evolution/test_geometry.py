"""Products of decoders, in C++ for bf16 and in torch, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosscoder import _core
from crosscoder.errors import DataError, NonFiniteError
from crosscoder.evolution import decoder_cosines, decoder_norms, feature_dimensionality, geometry

native = pytest.mark.skipif(not _core.geometry_available(), reason="this CPU has no bf16 instructions")
# n above and below the rows packed at once, K no multiple of a tile, D odd, within a panel, and of several panels.
SHAPES = [(1, 1, 1), (5, 3, 7), (261, 2, 100), (513, 6, 33), (40, 9, 144)]


def decoders(n: int, K: int, D: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Directions with a common part, norms over three decades, some that are 0."""
    generator = torch.Generator().manual_seed(n + K + D)
    W = torch.randn(n, K, D, generator=generator) + 0.5 * torch.randn(1, K, D, generator=generator)
    W *= 10 ** (3 * torch.rand(n, K, 1, generator=generator) - 2)
    if n > 4:
        W[3] = 0
        W[4, 0] = 0
    return W.to(dtype)


def interference(W: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(n, K) sum_j (What_f . W_j)^2, term by term, and the sum of the sizes of its terms in the (D, D) form."""
    w = W.double().numpy()
    norm = np.linalg.norm(w, axis=2, keepdims=True)
    unit = np.divide(w, norm, out=np.zeros_like(w), where=norm > 0)
    gram = np.einsum("jkd,jke->kde", w, w)
    terms: np.ndarray = np.einsum("fkd,kde,fke->fk", abs(unit), abs(gram), abs(unit))
    return (np.einsum("fkd,jkd->kfj", unit, w) ** 2).sum(axis=2).T, terms


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "of_terms"),
    [(torch.float64, 1e-12, 1e-14), (torch.float32, 1e-6, 2**-20), (torch.bfloat16, 1e-6, 2**-16)],
)
def test_equals_float64(shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, of_terms: float) -> None:
    W = decoders(*shape, dtype)
    w = W.double()
    norm = torch.linalg.vector_norm(w, dim=2)
    np.testing.assert_allclose(decoder_norms(W), norm, rtol=tolerance)
    unit = torch.nn.functional.normalize(w, dim=2, eps=0.0).nan_to_num()
    cosines, norms = geometry.cosines(W)
    np.testing.assert_allclose(cosines, unit @ unit.mT, atol=2e-6)
    np.testing.assert_allclose(norms, norm, rtol=tolerance)

    grams = geometry.grams(W)
    for rows in geometry.blocks(W, 300 * W[0].numel() * W.element_size()):
        grams.add(W[rows])
    grams.close()
    found, squares = grams.interference(W)
    np.testing.assert_allclose(squares, norm.square(), rtol=tolerance)
    expected, terms = interference(W)
    assert (abs(found.numpy() - expected) <= of_terms * terms).all()


@native
def test_the_core_takes_bf16_and_torch_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    W = decoders(261, 3, 100)
    assert geometry.is_native(W) and geometry.is_native(W[5:9])
    assert not geometry.is_native(W.float()) and not geometry.is_native(W[:, 1:])
    by_core = feature_dimensionality(W).rate, decoder_cosines(W, np.ones((261, 3))).overall.mean
    monkeypatch.setattr(geometry, "is_native", lambda _: False)
    by_torch = feature_dimensionality(W).rate, decoder_cosines(W, np.ones((261, 3))).overall.mean
    for core, torch_ in zip(by_core, by_torch, strict=True):
        np.testing.assert_allclose(core, torch_, rtol=2e-5, atol=2e-6)
        assert (core != torch_).any()


@native
@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_threads_change_nothing(n_threads: int) -> None:
    W = decoders(300, 5, 50)
    bits = W.view(torch.uint16).numpy()
    padded = _core.padded_width(50)
    results = []
    for threads in (1, n_threads):
        products, gram = np.empty((300, 5, 5), np.float32), np.zeros((5, padded, padded), np.float32)
        forms, squares = np.empty((300, 5), np.float32), np.empty((300, 5), np.float32)
        _core.snapshot_products(bits, products, threads)
        _core.squared_norms(bits, squares, threads)
        _core.add_grams(bits, gram, threads)
        _core.quadratic_forms(bits, np.stack([_core.pack_form(g, 50) for g in gram]), forms, threads)
        results.append((products, squares, np.triu(gram), forms))
    for one, many in zip(*results, strict=True):
        assert (one == many).all()


@pytest.mark.parametrize("n_threads", [1, 3])
def test_statistics_of_cosines_equal_a_plain_count(n_threads: int) -> None:
    rng = np.random.default_rng(0)
    cosines = rng.uniform(-1, 1, (200, 4, 4)).astype(np.float32)
    cosines[rng.random(cosines.shape) < 0.2] = np.nan
    cosines[0] = 1
    cosines[1] = -1
    groups = rng.integers(-1, 3, 200).astype(np.int32)
    sums, counts = np.zeros((3, 10)), np.zeros((3, 10), np.int64)
    histogram, extremes = np.zeros((10, 8), np.int64), np.array([[9.0] * 10, [-9.0] * 10], np.float32)
    for rows in (slice(0, 120), slice(120, 200)):
        _core.add_cosines(
            np.ascontiguousarray(cosines[rows]), groups[rows], sums, counts, histogram, extremes, n_threads
        )
    first, second = np.triu_indices(4)
    pairs = cosines[:, first, second].astype(np.float64)
    for g in range(3):
        np.testing.assert_allclose(sums[g], np.nansum(pairs[groups == g], axis=0))
        assert (counts[g] == (~np.isnan(pairs[groups == g])).sum(axis=0)).all()
    inside = pairs[groups >= 0]
    for p in range(10):
        known = inside[~np.isnan(inside[:, p]), p]
        assert (histogram[p] == np.histogram(known, 8, (-1, 1))[0]).all()
        assert (extremes[0, p], extremes[1, p]) == (known.min(), known.max())


def test_bad_input() -> None:
    W = decoders(6, 3, 8)
    W[5, 1, 0] = torch.nan
    for broken in (W, W.float()):
        with pytest.raises(NonFiniteError, match="feature 5"):
            decoder_norms(broken)
        with pytest.raises(NonFiniteError, match="feature 105"):
            geometry.cosines(broken, 100)
        with pytest.raises(NonFiniteError, match="snapshot 1"):
            feature_dimensionality(broken)
    with pytest.raises(DataError, match="F, K, D"):
        decoder_norms(W[0])
    with pytest.raises(ValueError, match=r"groups\[1\] is 2, but there are 2"):
        _core.add_cosines(
            np.zeros((2, 1, 1), np.float32),
            np.array([1, 2], np.int32),
            np.zeros((2, 1)),
            np.zeros((2, 1), np.int64),
            np.zeros((1, 4), np.int64),
            np.zeros((2, 1), np.float32),
            1,
        )
    if _core.geometry_available():
        with pytest.raises(ValueError, match="squares must have shape"):
            _core.squared_norms(W.view(torch.uint16).numpy(), np.zeros((6, 2), np.float32), 1)
