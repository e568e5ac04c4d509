"""The options of every verb, as `options.txt` holds them: `python tests/cli/options.py` writes that file anew.

Whoever adds, renames or removes an option, or changes a default, does so here as well: users have it in their scripts.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from crosscoder import cli

FILE = Path(__file__).with_name("options.txt")
_POSITIONAL = typing.get_args(Positional[int])[1:]


def _fields(config: type, defaults: Any = None) -> Iterator[tuple[str, str]]:
    """(Name, default) of each option of a configuration class; those of the classes inside it stand beside them."""
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        hint, default = hints[field.name], field.default
        if defaults is not None:
            default = getattr(defaults, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(hint):
            yield from _fields(typing.cast(type, hint), None if default is dataclasses.MISSING else default)
            continue
        positional = any(mark in _POSITIONAL for mark in getattr(hint, "__metadata__", ()))
        name = field.name.upper() if positional else "--" + field.name.replace("_", "-")
        if default is dataclasses.MISSING:
            yield name, "required"
        else:
            text = os.fspath(default) if isinstance(default, os.PathLike) else default
            yield name, repr(text)


def options(verb: str) -> list[tuple[str, str]]:
    """(Name, default) of each option of a verb, as `crosscoder VERB --help` lists them."""
    module = importlib.import_module(f"crosscoder.verbs.{verb}")
    return list(_fields(typing.get_type_hints(module.run)["config"]))


def table() -> str:
    """One line an option: verb, name, default."""
    return "".join(f"{verb} {name} {default}\n" for verb in cli.VERBS for name, default in options(verb))


if __name__ == "__main__":
    FILE.write_text(table())
    print(f"wrote {FILE}")
