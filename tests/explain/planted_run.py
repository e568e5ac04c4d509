"""A run whose features are words: feature f fires on the token of id f + 1 alone, and emerges at a known snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.language_models import neox_config

from crosscoder import ActivationStore, Crosscoder, CrosscoderConfig, weights
from crosscoder.activations.tokens import TokenSet
from crosscoder.config import StudySettings
from crosscoder.evolution.study import Study
from crosscoder.files import write_json
from crosscoder.runs import Run

REVISIONS = ("step0", "step10", "step1000")
K, WORDS, DENSE, DEAD = len(REVISIONS), 30, 30, 31
"""Features: one a word, one that fires at every token, one that never does."""
WIDTH, VOCABULARY = 32, 400
SEQUENCES, CONTEXT = 260, 64


def born(feature: int) -> int:
    """Index of the snapshot at which a word's feature emerges."""
    return feature % K


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|endoftext|>", *(f"Ġw{token}" for token in range(1, VOCABULARY))]
    core = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    new: Any = PreTrainedTokenizerFast
    return new(tokenizer_object=core, eos_token=words[0], unk_token=words[0])


def crosscoder(gate: str = "snapshot") -> Crosscoder:
    config = CrosscoderConfig(
        n_snapshots=K, d_model=WIDTH, n_features=WORDS + 2, gate=gate, top_k=4 if "topk" in gate else None
    )
    model = Crosscoder(config)
    with torch.no_grad():
        for parameter in (model.W_enc, model.W_dec):
            parameter.zero_()
        for feature in range(WORDS + 2):
            model.W_enc[feature, :, feature] = 1 / K
            model.W_dec[feature, :, feature] = 0.01
            model.W_dec[feature, born(feature) :, feature] = 1
        model.W_dec[DENSE, :, DENSE] = 1
        if model.weights().gate.learned:
            model.log_threshold.fill_(np.log(0.5))
        else:
            model.batch_threshold.fill_(0.5)
    return model.eval()


def tokens() -> TokenSet:
    """Words at random, those with a feature as often as the others; every second row is a document of its own."""
    rng = np.random.default_rng(5)
    ids = rng.integers(1, VOCABULARY, (SEQUENCES, CONTEXT)).astype(np.int32)
    ids[:, 0] = 0
    ids[1::2, 40] = 0  # a document ends within the row
    document = np.repeat(np.arange(SEQUENCES, dtype=np.int32) * 2, CONTEXT).reshape(SEQUENCES, CONTEXT)
    document[1::2, 40:] += 1
    return TokenSet(ids, document, [f"d{i}" for i in range(2 * SEQUENCES)], "tokenizer")


def activations(ids: np.ndarray) -> torch.Tensor:
    """(n, K, D) of tokens (n,): a word's own direction, between 1 and 2 long."""
    rng = np.random.default_rng(6)
    x_ND = np.zeros((len(ids), WIDTH), dtype=np.float32)
    words = np.flatnonzero((ids >= 1) & (ids <= WORDS))
    x_ND[words, ids[words] - 1] = rng.uniform(1, 2, len(words))
    x_ND[:, DENSE] = rng.uniform(1, 2, len(ids))
    return torch.from_numpy(x_ND)[:, None].repeat(1, K, 1)


def make_run(path: Path) -> Run:
    """Collected, trained and analysed as far as `crosscoder explain` needs it."""
    run = Run(path)
    train = tokens()
    train.save(run.tokens("train"))
    row, column = np.nonzero(train.ids)  # nothing is stored at the end of a text
    order = np.random.default_rng(7).permutation(len(row))
    in_second = row[order] >= train.n_sequences // 2
    order = order[np.argsort(in_second, kind="stable")]  # as collection has it: a sequence lies in one shard
    row, column = row[order], column[order]
    ids = train.ids[row, column]
    table = np.stack([ids, train.document[row, column], row, column], axis=1).astype(np.int32)
    x_NKD = activations(ids)
    half = int((~in_second).sum())
    store = ActivationStore.create(
        run.activations("train"), K, WIDTH, "fp32", shard_rows=[half, len(ids) - half], snapshots=REVISIONS
    )
    for shard, part in enumerate((slice(None, half), slice(half, None))):
        store.write_tokens(shard, table[part])
        for k in range(K):
            store.write_segment(shard, k, x_NKD[part, k])
    model = crosscoder()
    run.crosscoder.mkdir(parents=True)
    weights.save(model.config, model.state_dict(), run.crosscoder)
    for revision in REVISIONS:
        folder = run.path / "language_model" / revision
        neox_config(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    write_json(run.snapshots_file, {"model": "language_model", "revisions": list(REVISIONS), "layer": 0})
    Study(run, StudySettings()).save_settings()
    return run
