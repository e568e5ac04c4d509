"""How long does a whole run take from each start, and do they end alike?

`TrainConfig.start`: the paper's, a search for the decoder norm, from which half of all features fire at first; and one
calibrated to the target L0. The run is that of `crosscoder train`, on planted activations; explained variance and L0
are on held-out tokens.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from crosscoder import ActivationStore, CrosscoderConfig, TrainConfig
from crosscoder.metrics import Evaluator
from crosscoder.train.run import train
from harness.results import Recorder
from harness.situation import Shape, planted_batches, planted_dictionary
from harness.variants import choices

QUICK = [Shape(n_snapshots=4, d_model=32, n_features=512, batch=256)]
FULL = [Shape(n_features=8_192, batch=1_024)]
STARTS = choices(TrainConfig, "start") or ("search",)
STEPS = {False: 200, True: 3_000}
TOKENS = {False: 10_240, True: 131_072}


@pytest.mark.parametrize("start", STARTS)
def test_start(
    benchmark: Any, case: Shape, start: str, full: bool, device: str, recorder: Recorder, tmp_path: Path
) -> None:
    if device != "cpu":
        pytest.skip("`crosscoder train` runs on the CPU")
    truth = planted_dictionary(case)
    x_NKD = torch.cat(planted_batches(truth, 2_048, TOKENS[full] // 2_048, seed=0))
    store = ActivationStore.from_array(tmp_path / "store", x_NKD)
    held_out = planted_batches(truth, 2_048, 4, seed=1)
    config = TrainConfig(
        n_steps=STEPS[full],
        batch_size=case.batch,
        lr=2e-3 if case.n_features < 4_096 else 5e-4,
        warmup_steps=100,
        **({"start": start} if choices(TrainConfig, "start") else {}),
    )
    shape = CrosscoderConfig(case.n_snapshots, case.d_model, case.n_features)
    begun = time.perf_counter()
    model = benchmark.pedantic(train, args=(store, shape, config, tmp_path / "run"), rounds=1, iterations=1)
    seconds = time.perf_counter() - begun
    evaluator = Evaluator(torch.cat(held_out).mean(dim=0), case.n_features)
    for x in held_out:
        code = model.encode(x)
        evaluator.add(x, model.decode(code), code)
    found = evaluator.result()
    figures = {
        "seconds": seconds,
        "explained_variance": found.explained_variance,
        "l0": found.l0,
        "l0_union": found.l0_union,
        "never_fired": found.never_fired_fraction,
    }
    recorder.add(f"{case} start {start}", shape=case.to_dict(), steps=STEPS[full], **figures)
    benchmark.extra_info.update({name: round(value, 4) for name, value in figures.items()})
