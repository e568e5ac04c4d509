"""Named lists of snapshots of Pythia (arXiv 2304.01373), and the settings of the paper (arXiv 2509.17196)."""

from __future__ import annotations

from dataclasses import dataclass

PYTHIA_STEPS = (0, *(2**i for i in range(10)), *range(1_000, 144_000, 1_000))
"""All 154: 0, 1, 2, 4, ... 512, then every thousand to 143,000."""

_EARLY = (0, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_THOUSANDS = tuple(range(1_000, 10_000, 1_000))

REVISIONS: dict[str, tuple[int, ...]] = {
    # The 32 of the paper's own script: without step 1.
    "paper": (
        *(*_EARLY, *_THOUSANDS, 10_000, 14_000, 20_000, 27_000, 34_000, 47_000, 60_000),
        *(74_000, 87_000, 100_000, 114_000, 127_000, 143_000),
    ),
    # The paper's text as a later work reads it: with step 1, without 10,000.
    "paper-text": (
        *(*sorted((1, *_EARLY)), *_THOUSANDS, 14_000, 21_000, 27_000, 34_000, 47_000, 61_000, 75_000),
        *(89_000, 102_000, 116_000, 130_000, 143_000),
    ),
    "log": (0, *(2**i for i in range(10)), *(1_000 * 2**i for i in range(8)), 143_000),
    "all": PYTHIA_STEPS,
}
"""Lists of Pythia's steps that `--revisions` takes by name; in "log" each step is twice the one before."""


@dataclass(frozen=True)
class Preset:
    """A model, a list of its snapshots and a layer."""

    model: str
    layer: int
    revisions: str


PRESETS = {
    "pythia-160m-paper": Preset("EleutherAI/pythia-160m", 6, "paper"),
    "pythia-6.9b-paper": Preset("EleutherAI/pythia-6.9b", 16, "paper"),
    "pythia-160m-paper-text": Preset("EleutherAI/pythia-160m", 6, "paper-text"),
    "pythia-6.9b-paper-text": Preset("EleutherAI/pythia-6.9b", 16, "paper-text"),
}
"""What `--model` takes by name: hook points `blocks.6.hook_resid_post` and `blocks.16.hook_resid_post` of the paper."""


def revision_names(revisions: tuple[str, ...]) -> tuple[str, ...]:
    """A single name of a list becomes its `step<N>`; anything else stays."""
    if len(revisions) == 1 and revisions[0] in REVISIONS:
        return tuple(f"step{step}" for step in REVISIONS[revisions[0]])
    return revisions
