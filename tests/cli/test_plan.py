"""The arithmetic of a plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crosscoder import cli
from crosscoder.errors import ConfigError
from crosscoder.planning import PYTHIA, Plan, parse_count, shape_of
from crosscoder.step_time import GPUS, Step


def plan(**changes: object) -> Plan:
    settings = {
        "shape": PYTHIA["EleutherAI/pythia-160m"], "layer": 6, "n_snapshots": 32, "n_features": 98_304,
        "n_tokens": 800_000_000, "batch_size": 2_048, "context": 2_048, "bytes_per_value": 2.0, "l0": 40.0,
        "gpu": "h100", "gpus": 1, **changes,
    }  # fmt: skip
    return Plan(**settings)  # type: ignore[arg-type]


def values(made: Plan) -> dict[tuple[str, str], float]:
    return {(title, line.name): line.value for title, lines in made.sections() for line in lines}


def test_the_papers_160m() -> None:
    got = values(plan())
    assert got["collecting into a store", "activations on disk"] == pytest.approx(39_321.6)  # 40 TB
    assert got["the crosscoder", "parameters"] == pytest.approx(4_832.1, abs=0.1)
    assert got["the crosscoder", "steps"] == 390_625
    # 32 x 7 blocks x 2 x 12 D^2 over 2 K D F is 0.66; attention over 2,048 tokens adds a fifth.
    without = plan(context=1)
    assert values(without)["live, without a store", "forward / encode"] == pytest.approx(0.656, abs=0.005)
    many = values(plan(gpus=8))  # they collect; one trains
    assert many["collecting into a store", "time"] == pytest.approx(got["collecting into a store", "time"] / 8)
    training = "training, on one GPU"
    assert many[training, "time, fp32 state"] == got[training, "time, fp32 state"]
    assert got[training, "sparse step"] / got[training, "dense step"] == pytest.approx(0.2)


def test_a_step_is_as_slow_as_its_slowest_limit() -> None:
    """Pythia-160M, F = 98,304 on an H100, each limit worked out by hand."""
    gpu, (B, K, D, F) = GPUS["h100"], (2_048, 32, 768, 98_304)
    operations = {one.name: one for one in Step(B, K, D, F, touched=0.5).operations()}
    product = operations["encode: product"]
    assert product.bound_by(gpu) == "tensor cores"
    assert product.seconds(gpu) == pytest.approx(2 * B * K * D * F / 593.4e12) == pytest.approx(16.7e-3, rel=0.01)
    update = operations["update"]  # 60 GB: 50 bytes read and written of every other row's parameters, and the batch
    assert update.bound_by(gpu) == "memory"
    assert update.seconds(gpu) == pytest.approx((50 * F * K * D / 2 + 6 * B * K * D) / (0.8 * 3.35e12))
    decode = {one.name: one for one in Step(B, K, D, F, True).operations()}["decode, residual, dots"]
    assert decode.bound_by(gpu) == "instructions"
    clocks = 132 * 0.86 * 1.98e9
    assert decode.seconds(gpu) == pytest.approx(14 * B * 40 * K * D / (128 * clocks))


def test_the_papers_step_pays_for_its_threshold_and_for_every_row() -> None:
    gpu, size = GPUS["h100"], (2_048, 32, 4_096, 32_768, True)
    narrow, sampled, paper = (Step(*size, mode=mode).seconds(gpu) for mode in ("narrow", "sampled", "paper"))
    product = 2 * 2_048 * 32 * 4_096 * 32_768 / gpu.product_flops
    assert sampled - narrow > product / 8 and product < paper - narrow < 2 * product
    assert Step(*size).dense_seconds(gpu) > 5 * product
    faster = [Step(*size).seconds(GPUS[name]) for name in ("a100", "h100", "h200", "b200")]
    assert faster == sorted(faster, reverse=True)


def test_the_papers_largest_fits_one_gpu_only_with_the_small_state() -> None:
    large = plan(shape=PYTHIA["EleutherAI/pythia-6.9b"], layer=16, n_features=32_768)
    got = values(large)
    assert got["collecting into a store", "activations on disk"] == pytest.approx(209_715.2)
    assert got["the crosscoder", "parameters"] == pytest.approx(8_590, rel=1e-3)
    assert got["the crosscoder", "state, low memory"] == pytest.approx(34.7, abs=0.1)
    fits = [" fits into " in verdict for verdict in large.verdicts()]
    assert fits == [False, False, True, False]


def test_shapes_follow_the_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "step0"
    folder.mkdir(parents=True)
    llama = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 8,
        "num_key_value_heads": 2, "intermediate_size": 100, "vocab_size": 1000,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(llama))
    shape = shape_of(str(tmp_path / "models"))
    assert (shape.d_model, shape.n_layers, shape.vocabulary) == (64, 5, 1000)
    assert shape.block_parameters == 2.5 * 64**2 + 3 * 64 * 100
    # As counted in the real thing.
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    matrices = sum(p.numel() for p in model.layers[0].parameters() if p.ndim == 2)
    assert shape.block_parameters == matrices
    neox = PYTHIA["EleutherAI/pythia-70m"]
    assert neox.block_parameters == 12 * 512**2


@pytest.mark.parametrize(
    ("text", "count"), [("800M", 800_000_000), ("2.5b", 2_500_000_000), ("7", 7), ("1_000k", 1_000_000), ("1T", 10**12)]
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "many", "-3M", "0", "nan", "1e999"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a number of tokens"):
        parse_count(text)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["plan", "--features", "32768", "--tokens", "800M", "--gpu", "h100", "--gpus", "1"]
    assert cli.main([*options, "--model", "EleutherAI/pythia-6.9b"]) == 0
    printed = capsys.readouterr().out
    assert "layer 16 of 0 to 31" in printed and "209,715.2 GB" in printed and "does not fit into 73.6 GB" in printed
    assert cli.main([*options, "--model", "pythia-160m-paper", "--dtype", "int8"]) == 0
    assert "19,814.4 GB" in capsys.readouterr().out  # 8e8 x 32 x 768 x (1 + 2/256) bytes
    assert cli.main([*options, "--model", "pythia-160m-paper", "--dtype", "int4"]) == 0
    assert "11,059.2 GB" in capsys.readouterr().out  # 8e8 x 32 x 768 x (1/2 + 2/32) bytes
    for wrong, message in (
        (["--layer", "12"], "layer 12 does not exist: the model has layers 0 to 11"),
        (["--gpu", "h1000"], "gpu must be one of"),
        (["--gpus", "0"], "gpus must be at least 1"),
        (["--model", str(tmp_path)], "cannot read the configuration"),
    ):
        assert cli.main([*options, *wrong]) in (2, 3)
        assert message in capsys.readouterr().err
