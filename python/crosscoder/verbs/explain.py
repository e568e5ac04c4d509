"""What features are, in words: a language model explains, rates and checks them, over any endpoint.

Any OpenAI-compatible endpoint serves (OpenAI, vLLM, Ollama, llama.cpp, ...), and Anthropic's own. The key comes from
the environment alone: CROSSCODER_API_KEY, or OPENAI_API_KEY and ANTHROPIC_API_KEY for the vendors' own hosts; an
endpoint on this machine may need none. What it will cost is told and asked for first. Answers are kept: if it is
killed, the same command goes on and asks nothing twice. Results go to `evolution/explanations.parquet`, main figures
to `summary.json`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from crosscoder.errors import ConfigError
from crosscoder.runs import writes_run

if TYPE_CHECKING:
    from crosscoder.explain.asking import Spending
    from crosscoder.explain.explanation_study import Estimate

EXAMPLE = "crosscoder explain runs/quickstart --endpoint http://localhost:11434/v1 --model qwen3:8b"
AS_BEFORE = ("n_features", "seed")
"""Options that are as in the last call on the run where they are left out."""


@dataclass(frozen=True)
class ExplainConfig:
    """Options of `crosscoder explain`."""

    run: tyro.conf.Positional[Path]
    """The run's folder, analysed by `crosscoder evolve`."""
    endpoint: str
    """Address as vendors give it, such as https://api.openai.com/v1 or https://api.anthropic.com."""
    model: str
    """Name of the model there."""
    api: Literal["auto", "openai", "anthropic"] = "auto"
    """Form of the requests: Anthropic's for its own host and OpenAI's for all others ("auto"), or one of them."""
    n_features: int = 100
    """Features to explain, drawn evenly over the snapshots of emergence. Five requests each."""
    seed: int = 0
    """Seed of the drawing of features and passages."""
    max_in_flight: int = 4
    """Requests at a time."""
    max_output: int = 2_000
    """Most tokens of an answer; models that think aloud need more than the answer's own hundred."""
    timeout: float = 120.0
    """Seconds for one answer."""
    price_in: float | None = None
    """Price of a million tokens of prompts, to tell the cost beforehand."""
    price_out: float | None = None
    """Price of a million tokens of answers."""
    budget: float | None = None
    """Most to spend, in the prices' money, on this run and model in all; needs both prices."""
    yes: bool = False
    """Do not ask before the requests are sent."""
    device: str = "auto"
    """Where features are looked up in the text: auto (the GPU if there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        for name in ("n_features", "max_in_flight", "max_output"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ConfigError(f"timeout must be positive, not {self.timeout}")
        for name in ("price_in", "price_out", "budget"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be 0 or more, not {value}")
        if self.budget is not None and (self.price_in is None or self.price_out is None):
            raise ConfigError("budget needs both prices: --price-in and --price-out, per million tokens")


@writes_run
def run(config: ExplainConfig) -> int:
    """Tell the cost, ask, write the results, and the main figures to `summary.json`."""
    from crosscoder.devices import announced
    from crosscoder.evolution.study import Study
    from crosscoder.explain.answers import Answers
    from crosscoder.explain.asking import Asker, Spending
    from crosscoder.explain.endpoint import Endpoint, read_key
    from crosscoder.explain.explanation_study import ExplanationStudy
    from crosscoder.progress import warn
    from crosscoder.runs import Run

    run, device = Run(config.run), announced(config.device)
    key = read_key(config.endpoint)
    endpoint = Endpoint(
        config.endpoint,
        config.model,
        api=config.api,
        key=key,
        max_output=config.max_output,
        timeout=config.timeout,
    )
    study = ExplanationStudy(Study.of(run, device), config.n_features, config.seed)
    if endpoint.unsafe:
        warn(f"the key travels to {endpoint.host} without encryption; use https where you can")
    answers = Answers(study.folder / "answers.jsonl")
    spending = Spending(answers, endpoint, config.price_in, config.price_out, config.budget)
    asker = Asker(endpoint, answers, spending, max_in_flight=config.max_in_flight)
    estimate = study.estimate(asker)
    print(describe_cost(estimate, spending, config, len(study.features)))
    if estimate.n_to_ask and not config.yes:
        _confirm()
    run.begin("explain", dataclasses.replace(config, yes=False), device)  # consent is for once
    figures = study.compute(asker)
    run.update_summary({"explanations": figures})
    print(describe(figures))
    if figures["n_incomplete"]:
        print(f"{figures['n_incomplete']} features lack something: the column `missing` says what and why")
    print(f"results: {study.results}")
    return 0


def describe_cost(estimate: Estimate, spending: Spending, config: ExplainConfig, n_features: int) -> str:
    """What is about to be asked, and for how much."""
    lines = [
        f"{n_features:,} features, {estimate.n_requests:,} requests to {config.model}: {estimate.n_cached:,} are "
        f"answered already, {estimate.n_to_ask:,} to ask at {config.endpoint}"
    ]
    if not estimate.n_to_ask:
        return lines[0]
    lines.append(
        f"about {estimate.tokens_in:,} tokens in (counted by the studied model's tokenizer) and "
        f"{estimate.tokens_out:,} out; thinking aloud and retries come on top"
    )
    cost = spending.cost(estimate.tokens_in, estimate.tokens_out)
    if cost is None:
        lines.append("price unknown: --price-in and --price-out (per million tokens) tell it")
    else:
        lines.append(f"about {cost:,.2f} at {config.price_in:g} and {config.price_out:g} per million tokens")
    if config.budget is not None:
        spent = f"{spending.spent:,.2f} spent before" if spending.spent else "nothing spent yet"
        lines.append(f"budget {config.budget:,.2f}, {spent}")
        if cost is not None and spending.spent + cost > config.budget:
            lines.append("the budget will probably not reach: what is left then is not asked, and counts as missing")
    return "\n".join(lines)


def describe(figures: dict[str, Any]) -> str:
    """What was found, in lines for the terminal."""

    def shown(figure: dict[str, float | None]) -> str:
        return (
            "unknown" if figure["mean"] is None else f"{figure['mean']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"
        )

    lines = [
        f"\n{figures['n_explained']} of {figures['n_features']} features explained; complexity "
        f"{shown(figures['complexity'])}, consistency {shown(figures['consistency'])} (1 to 5, 95 % intervals)"
    ]
    relation = figures["complexity_and_emergence"]
    for name, symbol in (("pearson", "r"), ("spearman", "rho")):
        if relation[name] is not None:
            lines.append(
                f"complexity and emergence (log step), {name.capitalize()}: {symbol} = {relation[name]:.2f} "
                f"[{relation[f'{name}_low']:.2f}, {relation[f'{name}_high']:.2f}], permutation p = "
                f"{relation[f'{name}_p']:.3g}"
            )
    for kind in ("detection", "fuzzing"):
        score = figures[kind]
        if score["n"]:
            lines.append(
                f"{kind}: balanced accuracy {shown(score['score'])}, another feature's explanation "
                f"{shown(score['control'])}; {score['passed']:.0%} pass, control {score['control_passed']:.0%} "
                f"({score['n']} features)"
            )
    return "\n".join(lines)


def _confirm() -> None:
    """Raises `ConfigError` where nobody can answer or the answer is no."""
    import sys

    if not sys.stdin.isatty():
        raise ConfigError("nothing was sent: without a terminal nobody can agree to the cost; add --yes to agree")
    if input("send them? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was sent")
