"""Configurations as YAML: read with every unknown key refused, written sealed beside each run."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from crosscoder.errors import ConfigError, DataError
from crosscoder.files import read_bytes, write_bytes
from crosscoder.seals import BrokenSealError, is_sealed_yaml, open_yaml, seal_yaml

C = TypeVar("C")
PRESETS = Path(__file__).parent / "presets"
MOST_CONFIG_BYTES = 1 << 20
"""The largest file of options that is read: YAML takes some seconds for it."""


def locate_config(name: str, verb: str) -> Path:
    """The file called `name`, or the verb's preset of that name. Raises `ConfigError` listing the presets."""
    for path in (Path(name), PRESETS / verb / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in (PRESETS / verb).glob("*.yaml"))) or "none"
    raise ConfigError(f"there is no configuration file {name}, and no preset of that name (presets: {known})")


def read_config(path: Path, config_class: type, *, record: bool = False) -> Any:
    """An instance of the dataclass `config_class` from a YAML file; what the file leaves out keeps its default.

    Raises `ConfigError` naming the file and the key: unreadable, unknown (with a suggestion), wrong type; and where it
    is not as `write_config` left it. A file without a checksum is a user's own, and is taken as it is unless it must be
    a `record` of what was done: damage to that is a `DataError`.
    """
    return _build(config_class, read_options(path, record=record), str(path))


def read_options(path: Path, *, record: bool = False) -> dict[str, Any]:
    """The options in a YAML file, by name, as YAML has them. Raises `ConfigError`, of a record `DataError`."""
    import yaml

    kind = DataError if record else ConfigError
    try:
        data = read_bytes(path, MOST_CONFIG_BYTES)
        if record or is_sealed_yaml(data):
            data = open_yaml(data)
        values = yaml.safe_load(data.decode())  # before the next line: it ends at deep nesting
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(data.decode(), yaml.SafeLoader)):
            raise ValueError("aliases (*name) are not taken: a few lines of them can stand for any number of entries")
    except DataError as error:
        raise kind(str(error)) from error
    except BrokenSealError as error:
        raise kind(
            f"{path} {error}; restore it, or run the command that wrote it again (to use its values all the same, give "
            "--config a copy without the line of the checksum)"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise kind(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, (dict, type(None))):
        raise kind(f"{path} must be a mapping of options, not {type(values).__name__}")
    return values or {}


def write_config(path: Path, config: Any) -> None:
    """Write a dataclass as YAML, sealed, in a form that `read_config` takes. Raises `StorageError`."""
    import yaml

    write_bytes(path, seal_yaml(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)))


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as what YAML and JSON have."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def as_before(config: C, path: Path, names: Sequence[str]) -> C:
    """The defaults of a second call: options `names` as the record of the first at `path` has them, the others at
    their own defaults (as in `config` where they have none). Raises what `read_config` raises.
    """
    before = read_config(path, type(config))
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if field.name in names:
            values[field.name] = getattr(before, field.name)
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def differences(config: Any, other: Any) -> dict[str, Any]:
    """The options of `config`, also those of its groups, that `other` has otherwise; by their innermost names."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        mine, its = getattr(config, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(mine) and type(mine) is type(its):
            found |= differences(mine, its)
        elif mine != its:
            found[field.name] = mine
    return found


def _build(config_class: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of options, not {type(values).__name__}")
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown option {key!r}{hint}")
    built = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            built.setdefault(name, tyro.MISSING)  # then the command line must give it
    try:
        return config_class(**built)
    except ConfigError as error:  # what the class itself finds wrong
        raise ConfigError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert(arguments[0], value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(option for option in arguments if option is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, where) for item in value)
    if origin is typing.Literal and value in arguments:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 5e-5, without a point, as text
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = " or ".join(map(str, arguments)) if origin is typing.Literal else getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where} must be {wanted}, not {reprlib.repr(value)}")
