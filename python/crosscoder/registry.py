"""The backends by name. Cheap to import: a backend's module is loaded when it is first used.

A package of your own adds one before it makes a `TrainConfig` or calls a model:

```
from crosscoder.registry import register
register("mine", "my_package.crosscoder_backend:MyBackend")
```

after which `model.encode(x, backend="mine")`, `model.loss(x, backend="mine")` and `TrainConfig(backend="mine")` use it.
What such a class must offer is in `crosscoder.backends.base.Backend`.
"""

from __future__ import annotations

import importlib
from typing import Any

from crosscoder.errors import ConfigError

AUTO = "auto"
_entries: dict[str, str] = {
    "reference": "crosscoder.backends.reference:ReferenceBackend",
    "native": "crosscoder.backends.native:NativeBackend",
    "triton": "crosscoder.backends.triton:TritonBackend",
}
_words = {"reference": "dense torch", "native": "C++ on a CPU", "triton": "Triton on a GPU"}
"""What each is, in a few words."""
_automatic = ["native", "triton"]
"""Whom "auto" asks, in this order, before the reference."""


def register(name: str, target: str, *, automatic: bool = False, words: str = "") -> None:
    """Add the backend `target` ("module:Class") under `name`; `automatic`: "auto" asks it first of all.

    `words` say in the help what it is.

    Raises `ConfigError` for a name that is taken by another class, or a target of another form.
    """
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        raise ConfigError(f'a backend is registered as "module:Class", not {target!r}')
    if name == AUTO or _entries.get(name, target) != target:
        raise ConfigError(f"there is a backend {name!r} already; choose another name")
    _entries[name] = target
    if words:
        _words[name] = words
    if automatic and name not in _automatic:
        _automatic.insert(0, name)


def unregister(name: str) -> None:
    """Take a backend out again. Raises `ConfigError` if there is none of that name."""
    check_name(name)
    _entries.pop(name, None)
    _words.pop(name, None)
    if name in _automatic:
        _automatic.remove(name)


def backend_names() -> tuple[str, ...]:
    """Every backend there is."""
    return tuple(_entries)


def described() -> str:
    """The backends in words, for the help of an option."""
    return (
        ", ".join(f'{_words.get(name, target)} ("{name}")' for name, target in _entries.items())
        + f', or the fastest that fits ("{AUTO}")'
    )


def automatic_names() -> tuple[str, ...]:
    """Those that "auto" asks, in order."""
    return tuple(_automatic)


def check_name(name: str) -> None:
    """Raises `ConfigError` unless `name` is a backend or "auto"."""
    if name != AUTO and name not in _entries:
        raise ConfigError(f"backend must be one of {', '.join((AUTO, *_entries))}, not {name!r}")


def load(name: str) -> Any:
    """The backend's class. Raises `ConfigError` for an unknown one, or one whose module cannot be imported."""
    if name not in _entries:
        check_name(name)
        raise ConfigError(f'"{name}" chooses a backend, and is none itself; name one of {", ".join(_entries)}')
    module, _, attribute = _entries[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f'backend "{name}" cannot be loaded ({error}); install what it needs, or use "auto"'
        ) from error
