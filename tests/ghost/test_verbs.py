"""The verbs of the command line on a ghost of a GPU, over a tiny run: each gives what it gives on the CPU.

What computes with the crosscoder is dense torch here; that the kernels do the same is the other tests' matter.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.ghost import Machine, ghost_machine

from crosscoder import cli
from crosscoder.backends.triton import TritonBackend
from crosscoder.evolution.analyses import NAMES
from crosscoder.runs import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickstart, on the CPU."""
    folder = tmp_path_factory.mktemp("run")
    draw, words = random.Random(0), ["the", "people", "of", "this", "nation", "have", "many", "laws", "and", "rights"]
    (folder / "text").mkdir()
    for number in range(12):
        sentences = [" ".join(draw.choices(words, k=12)).capitalize() + "." for _ in range(120)]
        (folder / "text" / f"{number:02d}.txt").write_text("\n".join(sentences))
    options = ["--lm-steps", "40", "--lm-snapshots", "8", "--n-features", "64", "--train-steps", "40"]
    options += ["--batch-size", "128", "--max-characters", "90000", "--device", "cpu"]
    assert cli.main(["quickstart", "--out", str(folder / "run"), "--text", str(folder / "text"), *options]) == 0
    return folder


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr(TritonBackend, "fits", classmethod(lambda cls, weights: "is left out of this test"))
    with ghost_machine() as machine:
        yield machine


def copied(finished: Path, to: Path) -> Run:
    shutil.copytree(finished / "run", to)
    return Run(to)


def verb(*arguments: object) -> None:
    assert cli.main([*map(str, arguments), "--device", "cuda", "--debug"]) == 0


def test_analyses(machine: Machine, finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    shutil.rmtree(run.evolution)
    verb("evolve", run.path)
    assert run.summary()["devices"]["evolve"] == "cuda:0 (a ghost)"
    for name in NAMES:
        theirs, ours = (np.load(path / "evolution" / f"{name}.npz") for path in (finished / "run", run.path))
        assert theirs.files == ours.files
        for key in theirs.files:
            if theirs[key].dtype.kind == "f":
                np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-4, err_msg=f"{name}: {key}")
            else:
                np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f"{name}: {key}")
    assert set(machine.watch.unordered) <= {
        # sums of one batch's values, in float64, and of predictions: their last bits may differ from run to run
        "index_add_ @ evolution/latent_scaling.py:add", "index_add_ @ evolution/ngrams.py:add",
    }, machine.watch.unordered  # fmt: skip


def test_evaluation_attribution_comparison(machine: Machine, finished: Path, tmp_path: Path) -> None:
    run, other = copied(finished, tmp_path / "run"), copied(finished, tmp_path / "other")
    before = run.summary()
    verb("eval", run.path)
    now = run.summary()
    assert now["explained_variance"]["overall"] == pytest.approx(before["explained_variance"]["overall"], rel=1e-4)
    for name, losses in before["language_model_loss"]["by_snapshot"].items():
        found = now["language_model_loss"]["by_snapshot"][name]
        assert [found[key] for key in ("clean", "spliced", "mean_ablated")] == pytest.approx(
            [losses[key] for key in ("clean", "spliced", "mean_ablated")], rel=1e-4
        )
    verb("compare", run.path, other.path)
    assert run.summary()["stability"]["other"]["share_stable"] == 1.0
    verb("attribute", run.path, "--task", "induction", "--n-prompts", "12", "--n-exact", "3", "--n-random", "1")
    assert "induction" in run.summary()["attribution"]


def test_training_and_collecting(machine: Machine, finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    verb("train", run.path, "--no-resume", "--n-features", "32", "--n-steps", "6", "--batch-size", "64")
    model, text = finished / "run" / "language_model", finished / "text"
    verb("collect", tmp_path / "new", "--model", model, "--layer", "0", "--text", text, "--tokens", "6000")
    assert Run(tmp_path / "new").store("train").n_tokens > 0
