"""README.md and docs/: their Python runs, their commands exist, their figures are those that were measured."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

from crosscoder import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SUBSTITUTED = {"x = ...": "x = activations"}
"""What a reader fills in, and what stands there when the test runs the block."""


def blocks(document: Path, *languages: str) -> list[str]:
    """The text of the document's code blocks in these languages."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


PYTHON = [(document, text) for document in DOCUMENTS for text in blocks(document, "python")]


@pytest.mark.parametrize(("document", "text"), PYTHON, ids=[f"{d.name}-{i}" for i, (d, _) in enumerate(PYTHON)])
def test_a_python_block_runs_as_it_stands(
    document: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for placeholder, value in SUBSTITUTED.items():
        text = text.replace(placeholder, value)
    assert "..." not in re.sub(r"#.*", "", text), "something is left for the reader to fill in"
    names: dict[str, Any] = {"activations": torch.randn(1200, 14, 128, generator=torch.Generator().manual_seed(0))}
    exec(compile(text, str(document), "exec"), names)
    if document.name == "README.md":
        assert names["code"].n_pairs > 0 and names["metrics"]["loss"] > 0
        assert names["norms"].shape == (2048, 14) and len(names["cycles"].kind) == 2048


def test_the_readme_has_a_python_block() -> None:
    assert any(document.name == "README.md" for document, _ in PYTHON)


def commands(document: Path) -> list[str]:
    """The `crosscoder VERB ...` commands of the document's shell blocks, without comments."""
    found: list[str] = []
    for text in blocks(document, "sh", "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = " ".join(shlex.quote(word) for word in shlex.split(line, comments=True))
            found += re.findall(r"(?:^|\s)(?:\S*/)?crosscoder (\w[^&|;]*?)(?= '?&&|$)", words)
    return found


COMMANDS = [(document.name, command) for document in DOCUMENTS for command in commands(document)]


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[f"{name}: {text}" for name, text in COMMANDS])
def test_a_command_of_the_documents_has_options_that_exist(document: str, command: str) -> None:
    verb, *arguments = shlex.split(command)
    module = importlib.import_module(f"crosscoder.verbs.{verb}")
    config_class = typing.get_type_hints(module.run)["config"]
    assert isinstance(cli.parse(verb, module, config_class, arguments), config_class)


def test_the_documents_have_commands_of_every_stage() -> None:
    verbs = {command.split()[0] for _, command in COMMANDS}
    assert {"quickstart", "collect", "train", "eval", "evolve", "report", "attribute", "explain", "sweep"} <= verbs


spec = importlib.util.spec_from_file_location("figures", ROOT / "tools" / "figures.py")
assert spec is not None and spec.loader is not None
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)


@pytest.mark.parametrize("name", figures.CHECKED)
def test_a_figure_is_that_of_the_committed_results(name: str) -> None:
    document, phrase, there = figures.holds(name)
    assert there, f"{document} should say: {phrase}"


def test_a_figure_that_drifted_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document, phrase, _ = figures.holds("bigrams")
    text = (ROOT / document).read_text(encoding="utf-8")
    drifted = phrase.replace("24", "25")
    (tmp_path / document).write_text(text.replace(phrase, drifted), encoding="utf-8")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    assert drifted != phrase and not figures.holds("bigrams")[2]


def test_every_link_between_documents_leads_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
