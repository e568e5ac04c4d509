"""Explained variance against L0: the crosscoder beside SAEs on the same activations, over lambda and F.

Baselines: "sae", an SAE on the last snapshot, with the same tokens and steps; "chain", an SAE for each snapshot,
warm-started from that of the snapshot before, that together see as many activations as the crosscoder. All else is the
run's own training (config/train.yaml). Results go to `sweep/`: results.parquet, snapshots.parquet, common_l0.csv,
frontier.svg and its numbers frontier.csv. More values may be added later: what is finished is not trained again, and
what was interrupted goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from crosscoder.runs import writes_run

if TYPE_CHECKING:
    import torch

    from crosscoder.config import CrosscoderOptions, TrainConfig
    from crosscoder.runs import Run
    from crosscoder.sweep.result_tables import Columns
    from crosscoder.sweep.sweep import Sweep

EXAMPLE = "crosscoder sweep runs/quickstart --sparsity 0.05 0.1 0.2 0.4 --n-features 1024 2048 --seeds 0 1"
FACTORS = (0.5, 1.0, 2.0, 4.0)
BASELINE_RATES = (1.0, 4.0)
"""An SAE's preactivation sums over one snapshot, the crosscoder's over K: with the same rate, one step of Adam moves it
less, and within the same steps it gets less far."""


@dataclass(frozen=True)
class SweepConfig:
    """Options of `crosscoder sweep`."""

    run: tyro.conf.Positional[Path]
    """The run's folder, with activations from `crosscoder collect`."""
    sparsity: tuple[float, ...] = ()
    """Values of lambda, the same for all methods; by default 0.5, 1, 2 and 4 times the run's."""
    n_features: tuple[int, ...] = ()
    """Values of F; by default the run's."""
    baselines: tuple[Literal["sae", "chain"], ...] = ("sae", "chain")
    """What is trained beside the crosscoder: sae, chain, both or (no value) neither."""
    lr: tuple[float, ...] = ()
    """Learning rates; by default the run's. A method's frontier is the best of all its learning rates."""
    baseline_lr: tuple[float, ...] = ()
    """Learning rates of the baselines; by default 1 and 4 times those of --lr: what suits K snapshots is too slow for
    one."""
    seeds: tuple[int, ...] = ()
    """Seeds, for the spread; by default the run's."""
    n_steps: int | None = None
    """Steps of training, if not the run's: fewer for a quick look."""
    settings: str | None = None
    """A configuration of crosscoder train (a file or a preset) in the place of the run's config/train.yaml."""
    out: Path | None = None
    """The sweep's folder, if not RUN/sweep."""
    device: str = "auto"
    """Where it computes: auto (the GPU if there is one), cpu, cuda or cuda:N."""
    plan: bool = False
    """Show the plan and stop."""


def run(config: SweepConfig) -> int:
    """Show the plan, train and evaluate what is not done yet, and print the table."""
    from crosscoder.devices import announced
    from crosscoder.runs import Run

    if not config.plan:
        return _compute(config)
    print(describe_plan(_sweep(config, Run(config.run), announced(config.device))))
    return 0


@writes_run
def _compute(config: SweepConfig) -> int:
    from crosscoder.devices import announced
    from crosscoder.runs import Run
    from crosscoder.sweep import result_tables as tables

    run, device = Run(config.run), announced(config.device)
    sweep = _sweep(config, run, device)
    print(describe_plan(sweep))
    sweep.compute(begin=lambda: run.begin("sweep", config, device))
    table = tables.results(sweep.records())
    if config.out is None:
        run.update_summary({"sweep": {"results": _rows(table), "at_common_l0": _rows(tables.at_common_l0(table))}})
    print(describe_results(table))
    print(describe_comparison(table))
    print(f"results: {sweep.folder}")
    return 0


def _sweep(config: SweepConfig, run: Run, device: torch.device) -> Sweep:
    import dataclasses

    from crosscoder.errors import ConfigError
    from crosscoder.sweep.points import METHODS, grid
    from crosscoder.sweep.sweep import Sweep

    store = run.store("train")
    heldout = run.store("heldout").select(store.snapshot_names)
    store.require_complete()
    heldout.require_complete()
    options, train, n_features = _training(config, run)
    if config.n_steps is not None:
        train = dataclasses.replace(train, n_steps=config.n_steps)
    sizes = config.n_features or n_features
    if not sizes:
        raise ConfigError("the settings do not say how many features (F) to train; give --n-features 2048")
    rates = config.lr or (train.lr,)
    baseline_rates = config.baseline_lr or tuple(factor * lr for factor in BASELINE_RATES for lr in rates)
    points = grid(
        {
            method: rates if method == "crosscoder" else baseline_rates
            for method in METHODS
            if method == "crosscoder" or method in config.baselines
        },
        sizes,
        config.sparsity or [factor * train.sparsity_coefficient for factor in FACTORS],
        config.seeds or [train.seed],
    )
    return Sweep(config.out or run.path / "sweep", store, heldout, options, train, points, device)


def _training(config: SweepConfig, run: Run) -> tuple[CrosscoderOptions, TrainConfig, tuple[int, ...]]:
    """The settings of training that all points share, and the run's F where it is known."""
    from crosscoder.configfile import locate_config, read_config
    from crosscoder.verbs.train import TrainVerbConfig

    if config.settings is not None:
        path = locate_config(config.settings, "train")
    else:
        path = run.require(
            run.path / "config" / "train.yaml",
            f"train the run first (crosscoder train {config.run} --help), or name its settings: --settings FILE.yaml",
        )
    found: TrainVerbConfig = read_config(path, TrainVerbConfig, record=config.settings is None)
    return found.crosscoder, found.train, (found.n_features,) if isinstance(found.n_features, int) else ()


def describe_plan(sweep: Sweep) -> str:
    """What will be done and how long it may take, in lines for the terminal."""
    from crosscoder.devices import describe

    points, pending, K = sweep.points, sweep.pending, sweep.store.n_snapshots
    counts: dict[str, set[Any]] = {
        "methods and learning rates": {(point.method, point.lr) for point in points},
        "lambda": {point.sparsity for point in points},
        "F": {point.n_features for point in points},
        "seeds": {point.seed for point in points},
    }
    product = " x ".join(f"{len(values)} {name}" for name, values in counts.items())
    lines = [f"sweep: {len(points)} points ({product}), {len(points) - len(pending)} done, {len(pending)} to do"]
    epochs = sweep.train.n_steps * sweep.train.batch_size / sweep.store.n_tokens
    lines.append(
        f"  of {sweep.store.n_tokens:,} training tokens in {K} snapshots; {sweep.train.n_steps:,} steps of "
        f"{sweep.train.batch_size:,} tokens are {epochs:.2f} passes; evaluated on {sweep.heldout.n_tokens:,} tokens"
    )
    for method in dict.fromkeys(point.method for point in points):
        budget = sweep.budget(method)
        lines.append(f"  {method:<11} {budget.steps:>9,} steps, {budget.activations:>13,} activations a point")
    if not pending:
        return "\n".join(lines)
    estimates = sweep.estimate()
    for (method, F), seconds in estimates.items():
        lines.append(f"  {method:<11} F {F:>7,}: about {_duration(seconds)} of training a point")
    total = sum(estimates[point.method, point.n_features] for point in pending)
    lines.append(
        f"  in all about {_duration(total)} of training on {describe(sweep.device)} as busy as it is, "
        f"and {sweep.weight_bytes() / 1e9:.2f} GB of weights in {sweep.folder}"
    )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def describe_results(table: Columns) -> str:
    """A row a point."""
    lines = [
        "",
        "                                                    last snapshot       all snapshots",
        "method              F    lambda        lr  seed       EV      L0         EV      L0     dead   seconds",
    ]
    for row in _rows(table):
        over_all = f"{'-':>8}{'-':>8}" if row["l0"] is None else f"{row['explained_variance']:>8.4f}{row['l0']:>8.1f}"
        lines.append(
            f"{row['method']:<11}{row['n_features']:>10,}{row['sparsity']:>10g}{row['lr']:>10g}{row['seed']:>6}"
            f"{row['explained_variance_last']:>9.4f}{row['l0_last']:>8.1f}   {over_all}"
            f"{row['dead']:>9.2%}{row['seconds']:>10.1f}"
        )
    return "\n".join(lines)


def describe_comparison(table: Columns) -> str:
    """Explained variance at common L0 (`table` is that of all points), with the range where the frontiers overlap."""
    from crosscoder.sweep import result_tables as tables

    rows = _rows(tables.at_common_l0(table))
    lines: list[str] = []
    for (scope, F), comparison in tables.comparisons(table).items():
        where = f"{'the last snapshot' if scope == 'last' else 'all snapshots'}, F {F:,}"
        if not len(comparison.l0_G):
            lines.append(f"\n{where}: the frontiers do not overlap in L0; add values of lambda")
            continue
        some = [row for row in rows if (row["scope"], row["n_features"]) == (scope, F)]
        low, high = comparison.l0_G[[0, -1]]
        lines.append(f"\n{where}: the frontiers overlap for L0 {low:.1f} to {high:.1f}; seeds: {some[0]['seeds']}")
        for l0 in comparison.l0_G.tolist():
            cells = [f"{row['method']} {row['explained_variance']:.4f}{_lead(row)}" for row in some if row["l0"] == l0]
            lines.append(f"  L0 {l0:>6.1f}: " + ", ".join(cells))
    return "\n".join(lines)


def _lead(row: dict[str, Any]) -> str:
    if row["method"] == "crosscoder":
        return ""
    between = f", {row['lowest_lead']:+.4f} to {row['highest_lead']:+.4f}" if row["seeds"] > 1 else ""
    return f" (crosscoder {row['crosscoder_lead']:+.4f}{between})"


def _rows(table: Columns) -> list[dict[str, Any]]:
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
