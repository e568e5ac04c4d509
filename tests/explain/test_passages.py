"""The passages: against a slow search, and independent of how they are computed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from explain.planted_run import CONTEXT, DENSE, SEQUENCES, WORDS, make_run

from crosscoder import ActivationStore, Crosscoder, CrosscoderConfig
from crosscoder.activations.tokens import TokenSet
from crosscoder.config import StudySettings
from crosscoder.evolution.analyses.examples import EXAMPLES
from crosscoder.evolution.study import Study
from crosscoder.explain.passages import (
    ACTIVE,
    AT,
    LENGTH,
    TOP,
    ChosenEncoder,
    FeatureContexts,
    Places,
    collect_contexts,
    features_with_contexts,
    scanned_sequences,
    strongest_places,
)
from crosscoder.progress import Progress


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(make_run(tmp_path_factory.mktemp("run") / "run"), StudySettings())


def collected(study: Study, features: list[int], batch: int = 1024, seed: int = 0) -> FeatureContexts:
    chosen = np.array(features)
    places = strongest_places(study.result(EXAMPLES).contexts, study.train, chosen)
    scanned = scanned_sequences(SEQUENCES, CONTEXT, seed)
    encoder = ChosenEncoder(study.folded, chosen)
    with Progress("t", 1, "sequences") as progress:
        batches = study.store.whole_sequences(batch, sequences=np.union1d(scanned, places.sequence))
        return collect_contexts(batches, study.train, encoder, places, scanned, seed, progress)


def window(tokens: TokenSet, row: int, column: int) -> list[int]:
    """Slowly: the ids around a token, within its row and document."""
    ids = []
    for at in range(column - AT, column - AT + LENGTH):
        inside = 0 <= at < tokens.context and tokens.document[row, at] == tokens.document[row, column]
        ids.append(int(tokens.ids[row, at]) if inside else -1)
    return ids


def test_places_are_those_of_the_examples(study: Study) -> None:
    examples = study.result(EXAMPLES).contexts
    assert features_with_contexts(examples).tolist() == list(range(WORDS + 1))
    places = strongest_places(examples, study.train, np.array([3, 17, DENSE]))
    for feature, rows, columns in zip((3, 17), places.sequence, places.position, strict=False):
        assert (study.train.ids[rows, columns] == feature + 1).all() and len(set(rows.tolist())) == TOP
    own = examples.activations[examples.feature == 3][:TOP]
    found = collected(study, [3])
    np.testing.assert_array_equal(found.top_activations[0][:, AT], own[:, 16])


def test_windows_hold_what_they_say(study: Study) -> None:
    features = [0, 5, 11, DENSE]
    found = collected(study, features)
    train = study.train
    for n, feature in enumerate(features[:3]):
        known = {tuple(window(train, *place)) for place in np.argwhere(train.ids == feature + 1)}
        top = [tuple(ids) for ids in found.top_tokens[n].tolist()]
        active = [tuple(ids) for ids in found.active_tokens[n].tolist()]
        assert found.n_active[n] == ACTIVE and set(top) <= known and set(active) <= known
        assert len(set(top) | set(active)) == TOP + ACTIVE, "explained by some, scored on others"
        for ids, activations in (
            (found.top_tokens[n], found.top_activations[n]),
            (found.active_tokens[n], found.active_activations[n]),
        ):
            np.testing.assert_array_equal(activations > 0, ids == feature + 1)
        silent = ~(found.pool_tokens == feature + 1).any(axis=1)
        np.testing.assert_array_equal(found.pool_silent[n], silent)
        assert 0 < silent.sum() < len(silent)
    assert not found.pool_silent[3].any()
    np.testing.assert_array_equal(found.active_activations[3] > 0, found.active_tokens[3] > 0)


def test_neither_batches_nor_company_matter(study: Study) -> None:
    whole, small, alone = collected(study, [2, 9, 30]), collected(study, [2, 9, 30], batch=1), collected(study, [9])
    for name in FeatureContexts.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(whole, name), getattr(small, name))
    for name in ("top_tokens", "active_tokens", "active_activations", "pool_silent"):
        np.testing.assert_array_equal(getattr(whole, name)[1], getattr(alone, name)[0])
    other = collected(study, [9], seed=1)
    assert (other.active_tokens != alone.active_tokens).any() and (other.top_tokens == alone.top_tokens).all()


class Given(ChosenEncoder):
    """One feature, active where the activations are above 0."""

    def __init__(self) -> None:
        self.features, self.n_features = np.array([0]), 1

    def __call__(self, x_BKD: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        value = x_BKD[:, 0, 0].numpy()
        row = np.flatnonzero(value)
        return row, np.zeros(len(row), dtype=np.int64), value[row]


def test_active_tokens_are_a_uniform_sample() -> None:
    """A sequence is drawn as often as it has active tokens, each of these as often as the others."""
    S, C, repeats = 200, 20, 60
    rng = np.random.default_rng(0)
    ids = np.arange(S * C, dtype=np.int32).reshape(S, C)
    tokens = TokenSet(ids, np.repeat(np.arange(S, dtype=np.int32), C).reshape(S, C), [str(i) for i in range(S)], "")
    active = np.zeros((S, C), dtype=bool)
    for row in range(0, S, 2):
        active[row, rng.choice(np.arange(1, C), 1 if row % 4 else 9, replace=False)] = True
    drawn = np.zeros((S, C), dtype=int)
    none = Places(np.full((1, TOP), -1), np.full((1, TOP), -1))
    for seed in range(repeats):
        batch = torch.from_numpy(active.astype(np.float32)).reshape(-1, 1, 1)
        places = np.repeat(np.arange(S), C), np.tile(np.arange(C), S)
        with Progress("t", 1, "sequences") as progress:
            found = collect_contexts([(batch, *places)], tokens, Given(), none, np.arange(S), seed, progress)
        centre = found.active_tokens[0, :, AT]
        assert len(set((centre // C).tolist())) == ACTIVE, "one a sequence"
        drawn.ravel()[centre] += 1
    assert not drawn[~active].any()
    by_row = drawn.sum(axis=1)
    # Expected 10 % from the rows with one token, a little more as no row is drawn twice; 600 draws.
    assert 0.07 < by_row[2::4].sum() / by_row.sum() < 0.16
    first = sum(drawn[row, np.flatnonzero(active[row])[0]] for row in range(0, S, 4))
    assert 0.08 < first / by_row[::4].sum() < 0.15


def test_fewer_active_tokens_than_wanted(study: Study) -> None:
    ids = study.train.ids.copy()
    S, C = ids.shape
    few = np.zeros((S, C), dtype=np.float32)
    few[[4, 9], 5] = 1.0
    none = Places(np.full((1, TOP), -1), np.full((1, TOP), -1))
    batch = torch.from_numpy(few).reshape(-1, 1, 1), np.repeat(np.arange(S), C), np.tile(np.arange(C), S)
    with Progress("t", 1, "sequences") as progress:
        found = collect_contexts([batch], study.train, Given(), none, np.arange(S), 0, progress)
    assert found.n_active.tolist() == [2] and (found.active_tokens[0, 2:] == -1).all()
    assert found.active_tokens[0, :2, AT].tolist() == [ids[4, 5], ids[9, 5]]


@pytest.mark.parametrize("gate", ["snapshot", "shared", "topk", "batchtopk"])
def test_chosen_features_encode_as_in_company(gate: str) -> None:
    model = Crosscoder(CrosscoderConfig(3, 16, 40, gate=gate, top_k=6 if "topk" in gate else None), seed=1).eval()
    with torch.no_grad():
        model.b_dec.normal_(generator=torch.Generator().manual_seed(3))
        model.batch_threshold.fill_(0.3)
    x_BKD = 3 * torch.randn(50, 3, 16, generator=torch.Generator().manual_seed(2))
    chosen = np.array([1, 7, 8, 30, 39])
    row, column, value = ChosenEncoder(model, chosen)(x_BKD)
    dense = np.zeros((50, len(chosen)), dtype=np.float32)
    dense[row, column] = value
    expected = model.encode(x_BKD).to_dense().amax(dim=1)[:, chosen].numpy()
    assert 0 < (expected > 0).sum() < expected.size
    np.testing.assert_allclose(dense, expected, atol=1e-5)


def test_some_sequences_of_a_store(study: Study) -> None:
    store: ActivationStore = study.store

    def read(**options: object) -> Iterator[tuple[int, int, float]]:
        for x_BKD, sequence_B, position_B in store.whole_sequences(100, **options):  # type: ignore[arg-type]
            yield from zip(sequence_B.tolist(), position_B.tolist(), x_BKD.sum(dim=(1, 2)).tolist(), strict=True)

    some = [3, 4, 77, SEQUENCES - 1]
    assert list(read(sequences=np.array(some))) == [item for item in read() if item[0] in some]
    assert list(read(sequences=np.array([], dtype=np.int64))) == []
