"""The command line's options are a promise: every name and default is committed, and changes on purpose only."""

from __future__ import annotations

import re

import pytest
from cli.options import FILE, options, table

from crosscoder import cli, registry


def test_options_and_defaults_are_those_committed() -> None:
    committed, now = FILE.read_text().splitlines(), table().splitlines()
    assert [line for line in now if line not in committed] == [], "new: `python tests/cli/options.py` if meant"
    assert [line for line in committed if line not in now] == [], "gone: `python tests/cli/options.py` if meant"
    assert committed == now, "another order: `python tests/cli/options.py` if meant"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_list_is_what_the_help_shows(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    shown = re.findall(r"^[│|\s]*(--[a-z][\w-]*)", capsys.readouterr().out, flags=re.MULTILINE)
    assert sorted(shown) == sorted(name for name, _ in options(verb) if name.startswith("--"))


def test_the_help_names_every_backend_that_is_registered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    registry.register("mine", "my_package.backend:Mine", words="abacus")
    try:
        with pytest.raises(SystemExit):
            cli.main(["train", "--help"])
    finally:
        registry.unregister("mine")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in (*registry.backend_names(), "auto"):
        assert f'("{name}")' in shown
    assert 'Triton on a GPU ("triton"), abacus ("mine"), or the fastest that fits ("auto")' in shown
