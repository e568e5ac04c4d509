"""A circuit built by hand: what each feature does for the answer is known in closed form.

D = 32, two blocks. Tokens put directions of an orthonormal basis into the residual stream, on top of a constant that is
so large that layer norms only divide by it (C = 1000: the rest moves a norm by 1e-5). Block 0 adds nothing. In block 1
one head attends to all tokens alike and copies two directions, feature 3 and (a third as much) feature 5, into one that
the right answer's logit reads. At snapshot k the tokens write their directions `STRENGTH[k]` times as strongly, at
snapshot 0 not at all. So on a prompt of T tokens, with feature f of value a on one of them,

    m = READ GAIN a STRENGTH[k] WEIGHT[f] D / (T C^2)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from support.language_models import neox

from crosscoder import Crosscoder, CrosscoderConfig
from crosscoder.attribution.task import Example, Task

D, C, GAIN, READ = 32, 1000.0, 100.0, 1000.0
STRENGTH = (0.0, 1.0, 2.0)
WEIGHT = {3: 1.0, 5: 1 / 3}
VALUE = 1.5
N_FEATURES = 20
NOUNS, OTHER_NOUNS, FILLERS = range(1, 9), range(9, 17), range(17, 35)
RIGHT, WRONG, VOCABULARY = 36, 37, 40
WRITTEN = 30
"""The basis vector that the answer is read from."""


def basis() -> torch.Tensor:
    """(D, D) orthonormal rows of signs, the first of them constant: what layer norms take away.

    Their products are exactly 0 in floating point as well, or C would leak into the small directions.
    """
    signs = np.ones((1, 1))
    while len(signs) < D:
        signs = np.kron(signs, [[1, 1], [1, -1]])
    return torch.from_numpy(signs / np.sqrt(D)).float()


def feature_values() -> torch.Tensor:
    """(V, F): a noun has features 3 and 5, every token but end-of-text two others that do nothing, and larger."""
    rng = np.random.default_rng(0)
    values = torch.zeros(VOCABULARY, N_FEATURES)
    idle = [f for f in range(N_FEATURES) if f not in WEIGHT]
    for token in range(1, VOCABULARY):
        for feature in rng.choice(idle, 2, replace=False):
            values[token, feature] = 2 + rng.random()
    values[list(NOUNS), 3] = VALUE
    values[list(NOUNS), 5] = VALUE
    return values


def model(k: int) -> Any:
    built = neox(
        0, vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=2, num_attention_heads=1, intermediate_size=D,
        layer_norm_eps=1e-12,
    )  # fmt: skip
    q = basis()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "layernorm" not in name and "layer_norm" not in name:
                parameter.zero_()
        # directions: q[0] constant, q[1] the large constant, q[2 + f] feature f
        embedded = feature_values() @ q[2 : 2 + N_FEATURES]
        built.gpt_neox.embed_in.weight.copy_(C * q[1] + STRENGTH[k] * embedded)
        attention = built.gpt_neox.layers[1].attention
        for feature, weight in WEIGHT.items():
            attention.query_key_value.weight[2 * D] += weight * q[2 + feature]  # the first of the D value dimensions
        attention.dense.weight[:, 0] = GAIN * q[WRITTEN]
        built.get_output_embeddings().weight[RIGHT] = READ * q[WRITTEN]
    return built


def crosscoder() -> Crosscoder:
    """It reads off the features' values exactly, with no error."""
    built = Crosscoder(CrosscoderConfig(n_snapshots=3, d_model=D, n_features=N_FEATURES))
    q = basis()[2 : 2 + N_FEATURES]
    with torch.no_grad():
        for k, strength in enumerate(STRENGTH):
            built.W_dec[:, k] = strength * q
            built.W_enc[:, k] = q / (2 * strength) if strength else 0  # two snapshots have a part in the value
            built.b_dec[k] = C * basis()[1]
        built.log_threshold.fill_(-3.0)
    return built.eval()


def task(n: int = 24) -> Task:
    """A noun somewhere among fillers; the corrupted prompt has one of the other nouns instead."""
    rng = np.random.default_rng(1)
    examples = []
    for _ in range(n):
        clean = rng.choice(list(FILLERS), rng.integers(3, 9)).tolist()
        place = int(rng.integers(len(clean)))
        corrupted = list(clean)
        clean[place], corrupted[place] = int(rng.choice(list(NOUNS))), int(rng.choice(list(OTHER_NOUNS)))
        examples.append(Example((0, *clean), (0, *corrupted), RIGHT, WRONG))
    return Task.of("planted", examples)


def metric(k: int, tokens: np.ndarray, feature: int, value: float = VALUE) -> np.ndarray:
    """What the feature, of `value` on one token, adds to the metric of prompts of so many tokens."""
    return READ * GAIN * value * STRENGTH[k] * WEIGHT[feature] * D / (tokens * C**2)
