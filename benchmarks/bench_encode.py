"""How long does `model.encode` take for inference, in units of the one product?"""

from __future__ import annotations

from typing import Any

from harness.measure import compare, gemms
from harness.results import Recorder
from harness.situation import Shape, make

QUICK = [Shape(n_features=4_096, batch=256)]
FULL = [Shape(), Shape(n_features=32_768, batch=2_048)]


def test_encode(benchmark: Any, case: Shape, device: str, rounds: int, recorder: Recorder) -> None:
    situation = make(case, device=device)
    situation.model.eval()
    feed = situation.feed()
    model = situation.model
    contenders = {**gemms(case, device), "encode": lambda: model.encode(next(feed))}
    if not device.startswith("cuda"):
        contenders["encode int8"] = lambda: model.encode(next(feed), candidates="int8")
    timings = compare(benchmark, "encode", contenders, rounds, device=device)
    entry = recorder.add(str(case), timings, shape=case.to_dict(), **situation.facts())
    benchmark.extra_info["gemms"] = round(entry["contenders"]["encode"]["gemms"], 2)
