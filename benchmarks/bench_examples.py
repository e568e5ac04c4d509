"""What does keeping every feature's examples cost, in units of the encoding of the same tokens?

One pass over fresh tokens; each batch is encoded, then collected from, and the two are timed apart, so that whatever
else the machine does hits both. Also: does the memory grow with the tokens?
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np

from crosscoder.evolution import ExampleCollector
from harness.measure import Timing, seconds_of
from harness.results import Recorder
from harness.situation import Shape, make, planted_batches, planted_dictionary

CONTEXT = 128
"""Tokens of a sequence."""
N_EXAMPLES = 8
QUICK_TOKENS, FULL_TOKENS = 1 << 15, 1 << 20
QUICK = [Shape(n_snapshots=4, d_model=64, n_features=1_024, batch=256)]
FULL = [Shape()]


def _memory() -> int:
    """Bytes of this process that are in memory."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


def test_examples(benchmark: Any, case: Shape, full: bool, device: str, recorder: Recorder) -> None:
    situation = make(case, device=device)
    model = situation.model.eval()
    truth = planted_dictionary(case)
    collector = ExampleCollector(case.n_features, case.n_snapshots, n_examples=N_EXAMPLES)
    sequence_B, position_B = np.divmod(np.arange(case.batch), CONTEXT)
    seconds: dict[str, list[float]] = {"encode": [], "collect": []}
    memory: list[int] = []

    def run() -> None:
        model.encode(situation.batches[0])  # what is made at first use is not counted
        for number in range((FULL_TOKENS if full else QUICK_TOKENS) // case.batch):
            (x_BKD,) = planted_batches(truth, case.batch, 1, seed=number)
            x_BKD = x_BKD.to(device)
            codes: list[Any] = []
            seconds["encode"].append(seconds_of(lambda x=x_BKD, to=codes: to.append(model.encode(x)), device))
            sequence = sequence_B + number * (case.batch // CONTEXT)
            work = lambda code=codes[0], sequence=sequence: collector.add(code, sequence, position_B)  # noqa: E731
            seconds["collect"].append(seconds_of(work, device))
            memory.append(_memory())

    benchmark.pedantic(run, rounds=1, iterations=1)
    encode, collect = (sum(seconds[name]) for name in ("encode", "collect"))
    recorder.add(
        str(case),
        {name: Timing(tuple(times)) for name, times in seconds.items()},
        shape=case.to_dict(),
        n_tokens=collector.n_tokens,
        seconds={"encode": encode, "collect": collect},
        with_examples_over_encode=(encode + collect) / encode,
        state_bytes=sum(array.nbytes for array in collector.state().values()),
        memory_growth_after_first_quarter=memory[-1] - memory[len(memory) // 4],
        **situation.facts(),
    )
    benchmark.extra_info["with_examples_over_encode"] = round((encode + collect) / encode, 4)
