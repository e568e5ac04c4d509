"""Three tiny GPT-NeoX snapshots, and tokens for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from activations.tiny import REVISIONS_OF_TEST, C, S, V, tiny_model

from crosscoder.activations.tokens import TokenSet


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, revision in enumerate(REVISIONS_OF_TEST):
        tiny_model(seed).save_pretrained(tmp_path / "models" / revision)
    return tmp_path / "models"


@pytest.fixture
def tokens() -> TokenSet:
    generator = np.random.default_rng(0)
    ids = generator.integers(1, V, (S, C)).astype(np.int32)
    ids[:, 0] = 0
    ids[3, 7] = 0
    document = np.repeat(np.arange(S, dtype=np.int32), C).reshape(S, C)
    return TokenSet(ids, document, [f"document {i}" for i in range(S)], "none")
