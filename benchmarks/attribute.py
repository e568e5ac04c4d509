"""How exact integrated gradients are by number of steps, and what a study of one task costs.

    python benchmarks/attribute.py runs/quickstart --task induction

Prints JSON lines: the completeness error at every snapshot above chance for 5, 10, 20 and 50 steps, then the seconds of
wall clock and of processor time of the whole study, computed anew.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from crosscoder.attribution.attribution_study import AttributionStudy
from crosscoder.attribution.coding import PromptActivations, code_task
from crosscoder.attribution.gradients import attribute
from crosscoder.attribution.splice import CutModel, Splice
from crosscoder.config import AttributionSettings
from crosscoder.files import remove_folder
from crosscoder.hardware import cpu_name
from crosscoder.runs import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--task", default="induction")
    parser.add_argument("--n-prompts", type=int, default=200)
    options = parser.parse_args()
    study = AttributionStudy(Run(options.run), AttributionSettings(n_prompts=options.n_prompts))
    task = study.task(options.task)
    if study.folder(task.name).exists():
        remove_folder(study.folder(task.name))
    wall, processor = time.monotonic(), time.process_time()
    figures = study.compute(options.task)["figures"]
    cost = {"seconds": time.monotonic() - wall, "processor_seconds": time.process_time() - processor}
    with tempfile.TemporaryDirectory() as folder:
        coded = code_task(PromptActivations(task, study.snapshots, Path(folder)), study.crosscoder)
        for k, revision in enumerate(study.snapshots.revisions):
            if revision not in figures["above_chance"]:
                continue
            cut = CutModel(study.snapshots.load(k), study.snapshots.layer)
            splice = Splice(cut, study.crosscoder.W_dec[:, k], study.crosscoder.b_dec[k])
            errors = {
                steps: attribute(
                    splice, coded.at(k, "clean"), coded.at(k, "corrupted"), task, task.train, steps=steps
                ).completeness_error()
                for steps in (5, 10, 20, 50)
            }
            print(json.dumps({"snapshot": revision, "completeness_error_by_steps": errors}))
    device = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"task": task.name, "snapshots": len(figures["clean_accuracy"]), **cost, **device}))


if __name__ == "__main__":
    main()
