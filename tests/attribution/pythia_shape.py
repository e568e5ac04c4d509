"""`crosscoder attribute` in Pythia-160M's true shape, with random weights: `pythia_shape.py RUN TOKENIZER [N]`.

The last N snapshots (default 4, all) are attributed; a random model is at chance, so that is decided here.
Prints the exit code and the largest memory of the process, in bytes, as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from crosscoder import Crosscoder, CrosscoderConfig, cli, weights
from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.attribution import snapshot
from crosscoder.files import write_json
from crosscoder.runs import Run

REVISIONS = ("step0", "step1", "step1000", "step143000")
FEATURES, LAYER = 24_576, 6


def shape() -> Any:
    return GPTNeoXConfig(
        vocab_size=50_304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3_072,
        max_position_embeddings=2_048, rotary_pct=0.25, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def load(_: SnapshotSet, k: int, dtype: torch.dtype | None = None) -> Any:
    """Weights are drawn when a snapshot is asked for: gigabytes of random numbers need not go to the disk and back."""
    torch.manual_seed(k)
    return GPTNeoXForCausalLM(shape()).eval()


def make_run(path: Path, tokenizer_folder: str) -> None:
    """A run with everything but the models' weights; a few per cent of the features fire on a token."""
    run = Run(path)
    for revision in REVISIONS:
        shape().save_pretrained(path / "language_model" / revision)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(path / "language_model" / REVISIONS[-1])
    write_json(run.snapshots_file, {"model": "language_model", "revisions": list(REVISIONS), "layer": LAYER})
    model = Crosscoder(CrosscoderConfig(n_snapshots=len(REVISIONS), d_model=768, n_features=FEATURES))
    with torch.no_grad():
        x_BKD = torch.stack([0.02 * torch.randn(64, 768) for _ in REVISIONS], dim=1)
        h_BF = model.preactivations(x_BKD) * model.decoder_norms().amax(dim=1)
        model.log_threshold.fill_(float(h_BF.flatten().kthvalue(int(0.97 * h_BF.numel())).values.log()))
    run.crosscoder.mkdir()
    weights.save(model.config, model.state_dict(), run.crosscoder)


def main() -> None:
    path, tokenizer_folder = Path(sys.argv[1]), sys.argv[2]
    make_run(path, tokenizer_folder)
    SnapshotSet.load = load  # type: ignore[method-assign]
    attributed = int(sys.argv[3]) if len(sys.argv) > 3 else len(REVISIONS)
    decisions = iter([False] * (len(REVISIONS) - attributed) + [True] * attributed)
    snapshot.above_chance = lambda metric_P: next(decisions)
    options = ["--n-prompts", "8", "--n-exact", "5", "--n-random", "1", "--steps", "4", "--ablations", "mean"]
    code = cli.main(["attribute", str(path), "--task", "induction", *options])
    print(json.dumps({"code": code, "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


if __name__ == "__main__":
    main()
