"""Pythia-160M's true shape on two cores: the whole command, with random weights, in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GIB = 1 << 30
MOST = 12 * GIB
REVISIONS = ("step0", "step1", "step1000", "step143000")

SCRIPT = """
import json, resource, sys
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from crosscoder import Crosscoder, CrosscoderConfig, cli, weights
from crosscoder.activations.snapshots import SnapshotSet, quiet_transformers
from crosscoder.files import write_json
from crosscoder.runs import Run

path, revisions = Path(sys.argv[1]), sys.argv[2].split(",")
run = Run(path)
quiet_transformers()
shape = dict(
    vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    max_position_embeddings=2048, rotary_pct=0.25, bos_token_id=0, eos_token_id=0,
)

# Weights are drawn when a snapshot is asked for: two gigabytes of random numbers need not go to the disk and back.
def load(self, k, dtype=None):
    torch.manual_seed(k)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape)).eval()

SnapshotSet.load = load
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[3])
for revision in revisions:
    GPTNeoXConfig(**shape).save_pretrained(path / "language_model" / revision)
tokenizer.save_pretrained(path / "language_model" / revisions[-1])
write_json(run.snapshots_file, {"model": "language_model", "revisions": revisions, "layer": 6})
torch.manual_seed(0)
crosscoder = Crosscoder(CrosscoderConfig(n_snapshots=len(revisions), d_model=768, n_features=24576)).eval()
with torch.no_grad():
    crosscoder.log_threshold.fill_(THRESHOLD)
run.crosscoder.mkdir()
weights.save(crosscoder.config, crosscoder.state_dict(), run.crosscoder)
del crosscoder

# A random model is at chance; the measurement is to run where one is not.
import crosscoder.attribution.snapshot as snapshot
snapshot.above_chance = lambda metric: True
code = cli.main(["attribute", str(path), "--task", "induction", "--n-prompts", "8", "--n-exact", "5", "--n-random", "1", "--steps", "4", "--ablations", "mean"])
print(json.dumps({"code": code, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


@pytest.mark.slow
def test_pythia_160m_with_24576_features(tokenizer: object, tmp_path: Path) -> None:
    """K = 4, F = 24,576, D = 768, 12 blocks: prompts, attribution, exact effects, curves, tables, circuit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    script = SCRIPT.replace("THRESHOLD", "-2.3")
    folder = tokenizer.name_or_path  # type: ignore[attr-defined]
    command = [sys.executable, "-c", script, str(tmp_path / "run"), ",".join(REVISIONS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["code"] == 0, done.stderr[-3000:]
    print(f"peak {result['peak'] / GIB:.2f} GiB", done.stderr[-1500:])
    assert result["peak"] < MOST, f"{result['peak'] / GIB:.1f} GiB"
    figures = json.loads((tmp_path / "run" / "summary.json").read_text())["attribution"]["induction"]
    assert figures["above_chance"] == list(REVISIONS) and figures["ig_completeness_error"] < 0.05
    assert figures["n_prompts"] == 8 and figures["disrupt_top50"] is not None
    assert figures["active_a_token"]["top50"] > 0
