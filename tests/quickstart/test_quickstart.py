"""The whole quickstart in small, on a text that the test writes: every promised figure and file is there."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from crosscoder import Crosscoder, cli
from crosscoder.evolution.analyses import NAMES
from crosscoder.files import write_json
from crosscoder.runs import Run

OPTIONS = ["--lm-steps", "60", "--lm-snapshots", "8", "--n-features", "96", "--train-steps", "60"]
OPTIONS += ["--batch-size", "128", "--max-characters", "250000"]
STEPS = ["step0", "step1", "step2", "step4", "step8", "step16", "step32", "step60"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run; its text has markup in it, which the page must show as text."""
    folder = tmp_path_factory.mktemp("quickstart")
    draw = random.Random(0)
    words = ["the", "people", "of", "this", "nation", "have", "many", "laws", "and", "rights", "<script>", "</div>"]
    (folder / "text").mkdir()
    for number in range(30):
        sentences = [" ".join(draw.choices(words, k=12)).capitalize() + "." for _ in range(160)]
        (folder / "text" / f"{number:02d}.txt").write_text("\n".join(sentences))
    assert cli.main(["quickstart", "--out", str(folder / "run"), "--text", str(folder / "text"), *OPTIONS]) == 0
    return Run(folder / "run")


def test_the_summary_has_every_promised_figure(quickstart: Run) -> None:
    summary = quickstart.summary()
    assert (quickstart.path / summary["page"]).is_file()
    assert set(summary["seconds"]["by_stage"]) == {
        "tokens",
        "language_model",
        "collect",
        "train",
        "eval",
        "evolve",
        "report",
    }
    assert summary["seconds"]["total"] == pytest.approx(sum(summary["seconds"]["by_stage"].values()), abs=0.2)
    assert list(summary["explained_variance"]["by_snapshot"]) == STEPS
    assert list(summary["l0"]["by_snapshot"]) == STEPS
    for name in ("dead_fraction", "model_loss", "bigram_entropy", "induction_gap"):
        assert np.isfinite(summary[name]), name
    assert {"step", "step_low", "step_high", "p_shuffled"} <= set(summary["turning_point"])
    assert summary["n_initialization"] + summary["n_emergent"] <= summary["n_features"] == 96
    assert sum(summary["features_by_type"]["counts"].values()) == summary["n_features"]
    assert set(summary["complexity"]["correlation_with_emergence"]) == {"all", "emergent"}
    assert len(summary["findings"]) >= 9 and len(set(summary["findings"])) == len(summary["findings"])
    losses = list(summary["model_loss_by_snapshot"].values())
    assert losses[-1] < losses[0] - 1, "the language model learned"


def test_the_run_explains_itself(quickstart: Run) -> None:
    names = {path.name for path in quickstart.path.iterdir()}
    assert {"README.md", "config", "crosscoder", "evolution", "figures", "report.html", "summary.json"} <= names
    verbs = {path.stem for path in (quickstart.path / "config").iterdir()}
    assert verbs == {"quickstart", "collect", "train", "eval", "evolve", "report"}
    assert len(list(quickstart.figures.glob("*.svg"))) == len(list(quickstart.figures.glob("*.csv"))) >= 10
    model = Crosscoder.from_pretrained(quickstart.crosscoder)
    assert model.config.n_snapshots == 8
    definitions = [json.loads(path.read_text())["definition"] for path in quickstart.evolution.glob("*.json")]
    assert len(definitions) == len(NAMES) and all(definitions)


def test_the_parts_of_the_text_are_disjoint(quickstart: Run) -> None:
    from crosscoder import TokenSet

    names = [set(TokenSet.load(quickstart.tokens(part)).names) for part in ("language_model", "train", "heldout")]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])


def test_a_second_run_changes_nothing(quickstart: Run) -> None:
    files = [p for p in quickstart.path.rglob("*") if p.is_file() and p.name not in ("summary.json",)]
    before = {path: path.read_bytes() for path in files if path.suffix != ".svg"}
    text = quickstart.path.parent / "text"
    assert cli.main(["quickstart", "--out", str(quickstart.path), "--text", str(text), *OPTIONS]) == 0
    assert [path for path, content in before.items() if path.read_bytes() != content] == []


def test_another_seed_is_refused(quickstart: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = quickstart.path.parent / "text"
    command = ["quickstart", "--out", str(quickstart.path), "--text", str(text), *OPTIONS, "--seed", "1"]
    assert cli.main(command) == 2
    assert "begun with other settings (seed: 0 there, 1 now)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [("", "empty"), ("Too short.\n\nReally.", "characters"), (None, "no such")]
)
def test_bad_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_text(content)
    assert cli.main(["quickstart", "--out", str(tmp_path / "run"), "--text", str(tmp_path / "text.txt")]) == 3
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]


def test_two_seeds_are_compared(quickstart: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "seed1"
    shutil.copytree(quickstart.path, other, ignore=shutil.ignore_patterns("crosscoder", "training", "evolution"))
    shared = ["--n-features", "80", "--n-steps", "40", "--batch-size", "128", "--lr", "2e-3", "--warmup-steps", "4"]
    assert cli.main(["train", str(other), *shared, "--seed", "1"]) == 0
    compare = ["compare", str(quickstart.path), str(other)]
    assert cli.main(compare) == 3 and "run first: crosscoder evolve" in capsys.readouterr().err
    assert cli.main(["evolve", str(other), "--only", "life", "--tau", "0.2"]) == 0
    assert cli.main(compare) == 2 and "--only life --tau 0.3" in capsys.readouterr().err
    assert cli.main(["evolve", str(other), "--only", "life", "--tau", "0.3"]) == 0
    assert cli.main(compare) == 0
    assert "of cosine 0.7 or more" in capsys.readouterr().out
    figures = quickstart.summary()["stability"]["seed1"]
    assert 0 <= figures["share_stable"] <= 1 and figures["n_second"] <= 80 and "stability" not in Run(other).summary()
    with np.load(quickstart.comparison / "seed1.npz") as arrays:
        assert (arrays["matching.cosine"] >= 0.7).sum() == round(figures["share_stable"] * figures["n_second"])
        matched = arrays["matching.match"][arrays["matching.match"] >= 0]
        assert len(np.unique(matched)) == len(matched) and matched.max(initial=0) < 80
    assert cli.main(["report", str(quickstart.path)]) == 0
    assert any("in seed1 (random directions: " in sentence for sentence in quickstart.summary()["findings"])
    assert (quickstart.figures / "matched_share.svg").exists() and (quickstart.figures / "matched_share.csv").exists()
    assert json.loads((quickstart.comparison / "seed1.json").read_text())["other"] == str(other.resolve())
    write_json(quickstart.comparison / "seed1.json", {})
    assert cli.main(["report", str(quickstart.path)]) == 0
    assert not any("in seed1" in sentence for sentence in quickstart.summary()["findings"])
    assert "The comparison with seed1 is of an earlier crosscoder" in quickstart.page.read_text()
    assert cli.main(["compare", str(other), str(other)]) == 2 and "with itself" in capsys.readouterr().err
    record = json.loads((other / "snapshots.json").read_text())
    write_json(other / "snapshots.json", {**record, "layer": 1})
    assert cli.main(compare) == 3 and "different snapshots, layers or sites" in capsys.readouterr().err


def test_the_norm_is_tested(quickstart: Run) -> None:
    summary = quickstart.summary()
    honesty, scaling = summary["norm_honesty"], summary["latent_scaling"]
    assert 0 < honesty["n_probed"] <= 96 and abs(honesty["mean_auc_shuffled"] - 0.5) < 0.05
    assert sum(honesty["pairs_by_relative_norm"].values()) <= honesty["n_probed"] * len(STEPS)
    assert honesty["median_auc_at_peak"] > 0.8
    assert 0 <= scaling["pairs"]["shrunk"] <= scaling["pairs"]["low"]
