"""The sweep: its budgets, its three methods, going on after a kill, its tables, and its errors."""

from __future__ import annotations

import csv
import dataclasses
import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from support.command_line import error, run

from crosscoder import ActivationStore, Crosscoder, CrosscoderConfig, TrainConfig
from crosscoder.config import CrosscoderOptions
from crosscoder.errors import ConfigError, NonFiniteError
from crosscoder.files import write_json
from crosscoder.sweep import methods
from crosscoder.sweep import sweep as study
from crosscoder.sweep.budget import FIRST_FACTOR, budget_of, chain_steps
from crosscoder.sweep.measure import continuity
from crosscoder.sweep.methods import parts_of, train_config
from crosscoder.sweep.points import METHODS, Point, grid
from crosscoder.train.run import train, training_seconds

K, D, F, LR = 3, 8, 32, 3e-3
TRAIN = ["--n-features", F, "--n-steps", 30, "--batch-size", 64, "--lr", LR, "--warmup-steps", 3, "--log-every", 5]

POINTS = ["--sparsity", 0.01, 0.3, "--n-features", 24, F, "--baseline-lr", LR]


def make_run(folder: Path, n_tokens: int = 700) -> Path:
    """A run with activations of few directions, other ones in each split, and the settings of a training."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(12, K, D, generator=generator)
    for split, n in (("train", n_tokens), ("heldout", 300)):
        code = torch.rand(n, 12, generator=generator) * (torch.rand(n, 12, generator=generator) < 0.2)
        x = torch.einsum("nf,fkd->nkd", code, directions) + 0.02 * torch.randn(n, K, D, generator=generator)
        ActivationStore.from_array(folder / "activations" / split, x, rows_per_shard=500)
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a finished sweep of all methods, two values of lambda and two of F."""
    folder = make_run(tmp_path_factory.mktemp("swept") / "run")
    assert run("train", folder, *TRAIN) == 0
    assert run("sweep", folder, *POINTS) == 0
    return folder


# ----------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("n_snapshots", [1, 2, 3, 14, 32, 64])
@pytest.mark.parametrize("n_steps", [2, 7, 450, 390_625])
def test_the_chain_sees_exactly_the_crosscoders_activations(n_snapshots: int, n_steps: int) -> None:
    steps = chain_steps(n_steps, n_snapshots)
    assert len(steps) == n_snapshots and min(steps) >= 1
    budgets = {method: budget_of(method, n_steps, 16, n_snapshots) for method in METHODS}
    assert budgets["chain"].activations == budgets["crosscoder"].activations == n_steps * 16 * n_snapshots
    assert budgets["sae"].activations == budgets["sae"].tokens == budgets["crosscoder"].tokens == n_steps * 16
    assert budgets["sae"].steps == budgets["crosscoder"].steps == n_steps
    assert len(set(steps[1:])) <= 1
    if n_snapshots > 1 and n_steps > 10 * n_snapshots:
        assert steps[0] == pytest.approx(FIRST_FACTOR * steps[1], rel=0.2)


def test_what_is_trained_is_the_budget(swept: Path) -> None:
    """Steps and batch sizes as the trainings recorded them, not as they were asked for."""
    for point in (swept / "sweep" / "points").iterdir():
        activations, steps = 0, 0
        for file in point.rglob("crosscoder/training.json"):
            record = json.loads(file.read_text())
            done = record["trained"]["steps"]
            steps += done
            activations += done * record["train"]["batch_size"] * len(record["store"]["snapshots"])
        figures = json.loads((point / "result.json").read_text())["figures"]
        assert (steps, activations) == (figures["steps"], figures["activations"])
        assert activations == 30 * 64 * (1 if point.name.startswith("sae") else K)


def test_a_chain_without_steps_for_the_later_ones_is_refused() -> None:
    with pytest.raises(ConfigError, match="train longer"):
        chain_steps(1, 14)


def test_every_combination_comes_once() -> None:
    points = grid({"crosscoder": [1e-3], "sae": [1e-3, 4e-3, 1e-3]}, [8, 16, 8], [0.1, 0.2], [0, 1, 0])
    assert len(points) == len(set(points)) == len({point.name for point in points}) == 24
    first = [("crosscoder", 1e-3), ("sae", 1e-3), ("sae", 4e-3), ("crosscoder", 1e-3)]
    assert [(point.method, point.lr) for point in points[:4]] == first


# ----------------------------------------------------------------------------------------------- methods


def base(swept: Path) -> TrainConfig:
    record = json.loads((swept / "crosscoder" / "training.json").read_text())
    return TrainConfig(**record["train"])


def weights_of(folder: Path) -> bytes:
    return (folder / "crosscoder" / "model.safetensors").read_bytes()


def test_the_sae_is_a_crosscoder_of_the_last_snapshot_trained_directly(swept: Path, tmp_path: Path) -> None:
    store = ActivationStore.open(swept / "activations" / "train").select(["snapshot2"])
    config = dataclasses.replace(base(swept), sparsity_coefficient=0.3)
    train(store, CrosscoderConfig(1, D, F), config, tmp_path)
    point = swept / "sweep" / "points" / Point("sae", F, 0.3, LR, 0).name
    assert weights_of(tmp_path) == weights_of(point)


def test_the_crosscoder_is_the_runs_training_at_another_lambda(swept: Path, tmp_path: Path) -> None:
    store = ActivationStore.open(swept / "activations" / "train")
    config = dataclasses.replace(base(swept), sparsity_coefficient=0.01)
    train(store, CrosscoderConfig(K, D, F), config, tmp_path)
    assert weights_of(tmp_path) == weights_of(swept / "sweep" / "points" / Point("crosscoder", F, 0.01, LR, 0).name)


def test_a_start_is_taken_over_to_the_bit(tmp_path: Path) -> None:
    """With a learning rate that moves nothing, what comes out is what went in."""
    store = ActivationStore.open(make_run(tmp_path / "run") / "activations" / "train").select(["snapshot1"])
    start = Crosscoder(CrosscoderConfig(1, D, F), seed=5)
    with torch.no_grad():
        start.b_enc.normal_(generator=torch.Generator().manual_seed(1))
        start.log_threshold.add_(torch.linspace(-1, 1, F))
    still = TrainConfig(n_steps=3, batch_size=64, lr=1e-30, revival="none")
    model = train(store, start.config, still, tmp_path / "out", start=start)
    wanted = start.fold_scales(torch.from_numpy(store.scales()))
    for name in ("W_enc", "W_dec", "b_enc", "log_threshold"):
        assert torch.equal(getattr(model, name), getattr(wanted, name)), name
    with pytest.raises(ConfigError, match="other settings"):
        train(store, start.config, still, tmp_path / "out", start=Crosscoder(start.config, seed=6))


def test_each_sae_of_the_chain_starts_with_the_weights_of_the_one_before(swept: Path) -> None:
    """The record of each training holds the checksums of what it started from."""
    from crosscoder.weights import checksum

    folder = swept / "sweep" / "points" / Point("chain", F, 0.01, LR, 0).name
    records = [json.loads((folder / f"snapshot-{k:02d}/crosscoder/training.json").read_text()) for k in range(K)]
    assert [record["store"]["snapshots"] for record in records] == [[f"snapshot{k}"] for k in range(K)]
    assert records[0]["start"] is None
    for k in range(1, K):
        before: Crosscoder = Crosscoder.from_pretrained(folder / f"snapshot-{k - 1:02d}" / "crosscoder")
        tensors = before.unfold_scales().state_dict()
        assert records[k]["start"] == {name: checksum(tensor) for name, tensor in tensors.items()}
        assert records[k]["train"]["sparsity_warmup_fraction"] == 0
    assert records[0]["train"]["sparsity_warmup_fraction"] == 0.1


def test_parts_differ_from_the_runs_settings_in_nothing_else() -> None:
    point, settings = Point("chain", F, 0.7, 1e-3, 3), TrainConfig(n_steps=100)
    first, second = parts_of("chain", ["a", "b"], 100)[:2]
    changed = {"n_steps": first.n_steps, "sparsity_coefficient": 0.7, "lr": 1e-3, "seed": 3}
    assert train_config(point, first, settings) == dataclasses.replace(settings, **changed)
    changed = {**changed, "n_steps": second.n_steps, "sparsity_warmup_fraction": 0.0, "revival": "none"}
    assert train_config(point, second, settings) == dataclasses.replace(settings, **changed)


# ----------------------------------------------------------------------------------------------- measures


def dense_figures(folder: Path, names: list[str], heldout: ActivationStore) -> tuple[Any, Any, Any]:
    """Squared error, squared deviation (both in scaled units) and L0 by snapshot, in float64 from the definition."""
    errors, deviations, l0 = [], [], []
    for part in sorted(folder.rglob("crosscoder/model.safetensors")):
        folded: Crosscoder = Crosscoder.from_pretrained(part.parent)
        chosen = heldout.select(names if folded.config.n_snapshots > 1 else [names[len(errors)]])
        model = folded.unfold_scales().double()
        x_NKD = torch.cat([chosen.read(shard) for shard in range(len(chosen.shard_rows))]).double()
        x_NKD = x_NKD * folded.snapshot_scale.double()[:, None]
        code = model.encode(x_NKD, backend="reference").to_dense()
        y_NKD = torch.einsum("nkf,fkd->nkd", code.double(), model.W_dec) + model.b_dec
        errors += (y_NKD - x_NKD).square().sum(dim=(0, 2)).tolist()
        deviations += (x_NKD - x_NKD.mean(dim=0)).square().sum(dim=(0, 2)).tolist()
        l0 += (code != 0).double().sum(dim=2).mean(dim=0).tolist()
    return np.array(errors), np.array(deviations), np.array(l0)


@pytest.mark.parametrize("method", METHODS)
def test_figures_are_those_of_the_definition(swept: Path, method: str) -> None:
    folder = swept / "sweep" / "points" / Point(method, F, 0.01, LR, 0).name  # type: ignore[arg-type]
    figures = json.loads((folder / "result.json").read_text())["figures"]
    names = ["snapshot2"] if method == "sae" else [f"snapshot{k}" for k in range(K)]
    error_K, deviation_K, l0_K = dense_figures(folder, names, ActivationStore.open(swept / "activations" / "heldout"))
    explained_K = 1 - error_K / deviation_K
    assert explained_K.min() > 0.3, "worth comparing"
    assert figures["by_snapshot"]["snapshot"] == names and figures["n_heldout_tokens"] == 300
    np.testing.assert_allclose(figures["by_snapshot"]["explained_variance"], explained_K, atol=2e-5)
    np.testing.assert_allclose(figures["explained_variance"], 1 - error_K.sum() / deviation_K.sum(), atol=2e-5)
    np.testing.assert_allclose(figures["explained_variance_last"], explained_K[-1], atol=2e-5)
    np.testing.assert_allclose(figures["by_snapshot"]["l0"], l0_K, atol=0.02)
    np.testing.assert_allclose(figures["l0"], l0_K.mean(), atol=0.02)
    assert figures["l0_last"] == figures["by_snapshot"]["l0"][-1]


def test_continuity_is_the_cosine_of_the_same_index() -> None:
    models = [Crosscoder(CrosscoderConfig(1, 4, 3)) for _ in range(3)]
    e = torch.eye(4)
    with torch.no_grad():
        models[0].W_dec[:, 0] = torch.stack([e[0], e[1], e[2]])
        models[1].W_dec[:, 0] = torch.stack([5 * e[0], e[3], e[2]])  # kept, turned by 90 degrees, dead in this one
        models[2].W_dec[:, 0] = torch.stack([-e[0], e[3], e[2]])
    fired = [torch.tensor([True] * 3), torch.tensor([True, True, False]), torch.tensor([True, False, True])]
    assert continuity(models, fired) == [None, pytest.approx(0.5), pytest.approx(-1.0)]
    nothing = [torch.zeros(3, dtype=torch.bool)] * 3
    assert continuity(models, nothing) == [None, None, None]


def test_seconds_go_on_over_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crosscoder.train.trainer import Trainer

    store = ActivationStore.open(make_run(tmp_path / "run") / "activations" / "train")
    config = TrainConfig(n_steps=40, batch_size=64, lr=1e-3, log_every=5, checkpoint_every=10)
    step = Trainer.step

    def interrupted(self: Trainer, x: torch.Tensor, **options: Any) -> Any:
        if self.step_number == 27:
            raise KeyboardInterrupt
        return step(self, x, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(store, CrosscoderConfig(K, D, F), config, tmp_path / "out")
    log = tmp_path / "out" / "training" / "metrics.jsonl"
    at_20 = next(row["seconds"] for row in map(json.loads, log.read_text().splitlines()) if row["step"] == 20)
    train(store, CrosscoderConfig(K, D, F), config, tmp_path / "out")
    seconds = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
    assert len(seconds) == 8 and seconds == sorted(seconds)
    assert training_seconds(tmp_path / "out") == seconds[-1] > at_20 > 0


# ----------------------------------------------------------------------------------------------- the verb


def test_results_are_there_and_agree(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = swept / "sweep"
    table = pyarrow.parquet.read_table(folder / "results.parquet").to_pydict()
    assert list(table) == [
        "method", "n_features", "sparsity", "lr", "seed", "explained_variance_last", "l0_last", "explained_variance",
        "l0", "dead", "steps", "tokens", "activations", "n_heldout_tokens", "seconds",
    ]  # fmt: skip
    assert len(table["method"]) == 12 and table["method"][::4] == list(METHODS)
    assert [value is None for value in table["l0"]] == [method == "sae" for method in table["method"]]
    assert min(table["seconds"]) > 0
    snapshots = pyarrow.parquet.read_table(folder / "snapshots.parquet").to_pydict()
    assert len(snapshots["method"]) == 4 * (K + 1 + K)
    assert {"snapshot", "explained_variance", "l0", "cosine_previous"} <= set(snapshots)
    with (folder / "frontier.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    summary = json.loads((swept / "summary.json").read_text())["sweep"]
    assert len(summary["results"]) == 12
    before = {path: path.stat().st_mtime_ns for path in (folder / "points").rglob("*.*")}
    assert run("sweep", swept, *POINTS) == 0
    printed = capsys.readouterr().out
    assert "12 done, 0 to do" in printed and "results: " in printed
    assert printed.count("\ncrosscoder ") == 4 and printed.count("\nsae ") == 4 and printed.count("\nchain ") == 4
    assert {path: path.stat().st_mtime_ns for path in (folder / "points").rglob("*.*")} == before


def test_the_figure_has_a_line_a_frontier_and_the_same_bytes_each_time(swept: Path) -> None:
    from matplotlib.figure import Figure

    from crosscoder.common.svg import draw_svg
    from crosscoder.sweep.frontier_svg import draw_frontier

    table = pyarrow.parquet.read_table(swept / "sweep" / "results.parquet").to_pydict()
    figure = Figure()
    draw_frontier(figure, table)
    last, every = figure.axes
    drawn = [[line for line in axes.lines if len(line.get_xdata())] for axes in (last, every)]
    assert [len(lines) for lines in drawn] == [6, 4]
    rows = [row for row in range(12) if (table["method"][row], table["n_features"][row]) == ("sae", F)]
    points = sorted((table["l0_last"][row], table["explained_variance_last"][row]) for row in rows)
    assert points in [list(zip(*line.get_data(), strict=True)) for line in drawn[0]]
    assert points in [sorted(map(tuple, some.get_offsets().tolist())) for some in last.collections]
    svg = (swept / "sweep" / "frontier.svg").read_bytes()
    assert svg == draw_svg("Explained variance against L0", draw_frontier, table)
    xml.etree.ElementTree.fromstring(svg)


def test_a_sweep_is_extended(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["sweep", swept, "--out", tmp_path / "other", "--baseline-lr", LR]
    assert run(*options, "--sparsity", 0.1, "--baselines", "sae") == 0
    assert run(*options, "--sparsity", 0.3, "--baselines", "chain", "--seeds", 4) == 0
    assert (
        "sweep: 2 points (2 methods and learning rates x 1 lambda x 1 F x 1 seeds), 0 done, 2 to do"
        in capsys.readouterr().out
    )
    table = pyarrow.parquet.read_table(tmp_path / "other" / "results.parquet").to_pydict()
    found = list(zip(table["method"], table["sparsity"], table["seed"], strict=True))
    assert found == [("crosscoder", 0.1, 0), ("crosscoder", 0.3, 4), ("sae", 0.1, 0), ("chain", 0.3, 4)]


def test_a_plan_alone_writes_nothing(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sweep", swept, "--out", tmp_path / "other", "--plan") == 0
    printed = capsys.readouterr().out
    assert "20 points (5 methods and learning rates x 4 lambda x 1 F x 1 seeds), 0 done, 20 to do" in printed
    assert "chain              90 steps,         5,760 activations a point" in printed
    assert "in all about" in printed and not (tmp_path / "other").exists()


def test_a_point_that_fails_does_not_stop_the_others(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(point: Point, *arguments: Any) -> Any:
        if point.method == "sae":
            raise NonFiniteError("step 3: the loss is not finite")
        return methods.train_point(point, *arguments)

    monkeypatch.setattr(study, "train_point", failing)
    assert run("sweep", swept, "--out", tmp_path / "other", "--sparsity", 0.1, "--baseline-lr", LR) == 4
    assert "1 of 3 points failed (sae, F 32, lambda 0.1, lr 0.003, seed 0)" in error(capsys)
    table = pyarrow.parquet.read_table(tmp_path / "other" / "results.parquet").to_pydict()
    assert table["method"] == ["crosscoder", "chain"]


# ----------------------------------------------------------------------------------------------- errors


def test_wrong_options_are_refused_in_one_line(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, code, message in (
        (["--lr", "0"], 2, "lr must be positive, not 0.0"),
        (["--sparsity", "-1"], 2, "sparsity_coefficient must be 0 or more, not -1.0"),
        (["--n-features", "0"], 2, "n_features must be 1 to"),
        (["--n-steps", "0"], 2, "n_steps must be at least 1, not 0"),
        (["--n-steps", "1"], 2, "n_steps = 1 leaves no steps for the chain's later SAEs"),
        (["--n-steps", "20"], 2, "holds a sweep with other settings (train.n_steps)"),
        (["--settings", "nothing"], 2, "there is no configuration file nothing"),
    ):
        assert run("sweep", swept, *options) == code
        assert message in error(capsys)


def test_what_is_missing_is_named_with_its_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sweep", tmp_path / "nothing") == 3
    assert "collect first: crosscoder collect" in error(capsys)
    folder = make_run(tmp_path / "run")
    assert run("sweep", folder) == 3
    assert "--settings FILE.yaml" in error(capsys)
    settings = tmp_path / "settings.yaml"
    settings.write_text("train: {n_steps: 30, batch_size: 64}\n")
    assert run("sweep", folder, "--settings", settings) == 2
    assert "--n-features" in error(capsys)
    settings.write_text("n_features: 16\ncrosscoder: {gate: topk, top_k: 4}\ntrain: {n_steps: 30, batch_size: 64}\n")
    assert run("sweep", folder, "--settings", settings) == 2
    assert 'gate "topk" fixes L0' in error(capsys)
    for path in (folder / "activations" / "heldout").rglob("*.seg"):
        path.unlink()
    settings.write_text("n_features: 16\ntrain: {n_steps: 30, batch_size: 64}\n")
    assert run("sweep", folder, "--settings", settings) == 3
    assert "incomplete" in error(capsys)


def test_settings_are_compared_by_name(tmp_path: Path) -> None:
    store = ActivationStore.open(make_run(tmp_path / "run") / "activations" / "train")
    points = grid({key: [LR] for key in METHODS}, [16], [0.1], [0])
    settings = TrainConfig(n_steps=10, batch_size=64)
    study.Sweep(tmp_path / "s", store, store, CrosscoderOptions(), settings, points)
    (tmp_path / "s").mkdir()
    sweep = study.Sweep(tmp_path / "s", store, store, CrosscoderOptions(), settings, points)
    write_json(tmp_path / "s" / "settings.json", sweep.settings)
    other = dataclasses.replace(settings, sparsity_coefficient=9.0, lr=9.0, seed=9)
    study.Sweep(tmp_path / "s", store, store, CrosscoderOptions(), other, points)  # these are the points'
    with pytest.raises(ConfigError, match=r"crosscoder.penalty, train.batch_size"):
        changed = dataclasses.replace(settings, batch_size=32)
        study.Sweep(tmp_path / "s", store, store, CrosscoderOptions(penalty="l1"), changed, points)
    with pytest.raises(ConfigError, match="at least one"):
        study.Sweep(tmp_path / "s", store, store, CrosscoderOptions(), settings, [])
