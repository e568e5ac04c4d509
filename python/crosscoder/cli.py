"""The command line: `crosscoder VERB ...`. Each verb is a module of `crosscoder.verbs` with `run(config) -> exit code`.

Nothing heavy is imported here, so that `crosscoder --help` is quick.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Any

from crosscoder import __version__
from crosscoder.errors import ConfigError, CrosscoderError, DataError, MissingDependencyError, printable

VERBS = {
    "quickstart": "train a small language model and a crosscoder over its snapshots, and make the page; offline",
    "plan": "what a run will take: FLOPs, disk, memory",
    "collect": "run text through every snapshot and store the activations",
    "store": "look at stored activations, verify every byte, merge stores",
    "train": "train a crosscoder on stored activations",
    "eval": "explained variance, L0 and dead features on held-out text",
    "sweep": "explained variance against L0, beside SAEs, over lambda and F",
    "evolve": "when features are born, turn and die; n-gram phase; examples",
    "explain": "features in words, how complex they are and whether the words hold, by a language model",
    "compare": "match the features with another run's, and their histories: is the dictionary stable?",
    "attribute": "which features carry a task: attribution and ablation at every snapshot",
    "report": "make the page and the figures of a run",
    "doctor": "what this machine has, and what to do about what is missing",
}
INTERRUPTED = 130
OUT_OF_MEMORY = 8
LESS_MEMORY = {
    "quickstart": "--batch-size, --n-features",
    "collect": "--batch-sequences",
    "train": "--batch-size, --n-features; --state low-memory takes a third of float32's memory",
    "eval": "--batch-size",
    "sweep": "--n-features",
    "attribute": "--n-prompts",
}
"""Options that a verb needs less memory with, if they are lowered."""


def usage() -> str:
    """The text of `crosscoder --help`."""
    verbs = "\n".join(f"  {name:<12}{text}" for name, text in VERBS.items())
    return f"""crosscoder {__version__}: watch the features of a language model evolve during its training

usage: crosscoder VERB [options]

{verbs}

Every verb has --help with an example, --config FILE.yaml to read its options from a file or a preset (the command
line wins), and --debug to show the traceback of an error. A killed command goes on where it stopped when it is run
again. Settings that are left out of a second eval, evolve, attribute, explain or compare of a run are as in the first.

exit codes: 0 done, 1 other error, 2 wrong options, 3 missing or damaged input, 4 NaN or infinity, 5 cannot write,
6 something is not installed, 7 another command works on the run, 8 out of memory, 130 interrupted

example: crosscoder quickstart
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    # With busy cores, threads that spin at every barrier cost a multiple of the work (docs/performance.md). This must
    # be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        try:
            return _command(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()  # a pipe that is closed shows here, not when the interpreter ends
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is still buffered goes
        return 0


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _run(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, CrosscoderError):
            print(f"error: {printable(str(error))}", file=sys.stderr)
            return error.exit_code
        if isinstance(error, ImportError):  # a wrong CROSSCODER_ISA also shows when the C++ core is imported
            print(f"error: {error}; crosscoder doctor says what is missing and what to do", file=sys.stderr)
            return MissingDependencyError.exit_code
        if _out_of_memory(error):
            print(f"error: {_what_to_lower(error, arguments[0])}", file=sys.stderr)
            return OUT_OF_MEMORY
        kind, text = type(error).__name__, (str(error).strip().splitlines() or [""])[0]
        print(f"error: unexpected {kind}: {printable(text)} (--debug shows where)", file=sys.stderr)
        return 1


def _out_of_memory(error: Exception) -> bool:
    """On a GPU, in torch's allocator of the host (a plain RuntimeError), or anywhere else in Python."""
    # torch's is known by its name: it is not imported here
    return type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or "DefaultCPU" in str(error)


def _what_to_lower(error: Exception, verb: str) -> str:
    """The allocator's own numbers, and the options that need less."""
    said = " ".join(str(error).split())
    numbers = printable(said[:400]) or "no more memory was to be had"
    lower = f"lower {LESS_MEMORY[verb]}" if verb in LESS_MEMORY else "free some"
    other = "; or use --device cpu" if type(error).__name__ == "OutOfMemoryError" else ""
    kept = "Nothing that was written is lost: the same command goes on from there"
    return f"out of memory: {numbers} To go on, {lower}{other} (crosscoder plan says what a run takes). {kept}"


def _run(verb: str, arguments: list[str]) -> int:
    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"there is no verb {verb!r}; {hint}crosscoder --help lists them")
    module = importlib.import_module(f"crosscoder.verbs.{verb}")
    config_class = typing.get_type_hints(module.run)["config"]
    if verb == "doctor" and importlib.util.find_spec("tyro") is None:
        return int(module.run(config_class()))  # where something is missing, the doctor must still come
    return int(module.run(parse(verb, module, config_class, arguments)))


def parse(verb: str, module: Any, config_class: type, arguments: list[str]) -> Any:
    """The verb's configuration from the command line, with `--config FILE` giving the defaults.

    Without such a file, options that the verb names (`AS_BEFORE`) and that are left out are as in its last call on the
    run. Raises `ConfigError` for a bad file; a wrong option ends the process with exit code 2 and a suggestion.
    """
    import tyro

    from crosscoder.configfile import locate_config, read_config

    arguments, files = _take_option(arguments, "--config")

    def parsed(defaults: Any) -> Any:
        return tyro.cli(
            config_class,
            args=arguments,
            prog=f"crosscoder {verb}",
            description=f"{(module.__doc__ or '').strip()}\n\nexample: {module.EXAMPLE}",
            default=defaults,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )

    if files:
        return parsed(read_config(locate_config(files[-1], verb), config_class))
    config = parsed(tyro.MISSING_NONPROP)
    names = getattr(module, "AS_BEFORE", ())
    return _as_before(verb, config, names, parsed) if names else config


def _as_before(verb: str, config: Any, names: Sequence[str], parsed: Callable[[Any], Any]) -> Any:
    """`config` where options `names` that were left out are as the run has them; a line tells which."""
    from crosscoder.configfile import as_before, differences
    from crosscoder.progress import warn

    record = config.run / "config" / f"{verb}.yaml"
    if not record.exists():
        return config
    try:
        defaults = as_before(config, record, names)
    except (ConfigError, DataError) as error:
        warn(f"options that are left out have their defaults, since {error}")
        return config
    again = parsed(defaults)
    kept = differences(again, config)
    if kept:
        shown = ", ".join(f"{name} {value}" for name, value in kept.items())
        print(f"left out, so as before ({record}): {shown}")
    return again


def _take_option(arguments: list[str], name: str) -> tuple[list[str], list[str]]:
    """`arguments` without every `name VALUE` and `name=VALUE`, and the values."""
    rest: list[str] = []
    values: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        if argument == name:
            value = next(pending, None)
            if value is None:
                raise ConfigError(f"{name} needs a file")
            values.append(value)
        elif argument.startswith(f"{name}="):
            values.append(argument.split("=", 1)[1])
        else:
            rest.append(argument)
    return rest, values
