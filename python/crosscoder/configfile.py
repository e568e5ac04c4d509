"""Configurations as YAML: read with every unknown key refused, written beside each run."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

import tyro

from crosscoder.errors import ConfigError
from crosscoder.files import write_text

PRESETS = Path(__file__).parent / "presets"


def locate_config(name: str, verb: str) -> Path:
    """The file called `name`, or the verb's preset of that name. Raises `ConfigError` listing the presets."""
    for path in (Path(name), PRESETS / verb / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in (PRESETS / verb).glob("*.yaml"))) or "none"
    raise ConfigError(f"there is no configuration file {name}, and no preset of that name (presets: {known})")


def read_config(path: Path, config_class: type) -> Any:
    """An instance of the dataclass `config_class` from a YAML file; what the file leaves out keeps its default.

    Raises `ConfigError` naming the file and the key: unreadable, unknown (with a suggestion), wrong type.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {reason}") from error
    return _build(config_class, {} if values is None else values, str(path))


def write_config(path: Path, config: Any) -> None:
    """Write a dataclass as YAML, in a form that `read_config` takes. Raises `StorageError`."""
    import yaml

    write_text(path, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as what YAML and JSON have."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


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
    return config_class(**built)


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
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 5e-5, without a point, as text
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = " or ".join(map(str, arguments)) if origin is typing.Literal else getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where} must be {wanted}, not {value!r}")
