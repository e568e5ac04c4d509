"""Is every flipped bit of a run's files noticed? Each is read back by the code that reads it in the verbs.

    python tools/bit_flips.py --flips 20000 --out benchmarks/results/bit-flips.json
    python tools/bit_flips.py --folder /tmp/whole --only 'config/*'      # runs that tools/whole_run.py made before

One bit is flipped at a time, equally often in every file. What comes of it is one of five:

- refused: one of the package's own errors, whose message has the file's name;
- same: the values are those of the whole file (the bit lay in a comment, padding, or what nothing reads);
- told: it goes on without what the file (or the line) held, and a warning has the file's name;
- silent: other values, and not a word;
- bare: another exception, or an error that does not name the file.

The last two are faults, and make the exit status 1. Files that nothing reads back (figures, the page, README.md) are
listed as such. The runs are copied before anything is flipped.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crosscoder.errors import CrosscoderError
from crosscoder.runs import Run
from run_readers import Reader, fingerprint, prepare, reader_of
from whole_run import build_quietly

FAULTS = ("silent", "bare")
OUTCOMES = ("refused", "same", "told", *FAULTS)


@dataclass
class Tally:
    """What came of the flips in the files of one pattern."""

    files: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, outcome: str, what: str) -> None:
        self.outcomes[outcome] += 1
        if outcome in FAULTS and len(self.examples.setdefault(outcome, [])) < 5:
            self.examples[outcome].append(what)


def outcome_of(read: Reader, run: Run, path: Path, whole: str) -> tuple[str, str]:
    """Read a file that was damaged: one of `OUTCOMES`, and the message. `whole`: the fingerprint without damage."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            found = fingerprint(read(run, path))
    except CrosscoderError as error:
        return ("refused" if path.name in str(error) else "bare"), f"{type(error).__name__}: {error}"
    except Exception as error:
        return "bare", f"{type(error).__name__}: {error}"
    told = path.name in said.getvalue()
    return ("told" if told else "same" if found == whole else "silent"), said.getvalue()


def files_of(folder: Path, only: str = "*") -> tuple[list[Path], list[str]]:
    """The files that something reads back, and the names of the others."""
    found = sorted(path for part in ("run", "killed") for path in (folder / part).rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in found}
    read = [path for path in found if reader_of(names[path]) and fnmatch.fnmatch(names[path], f"*{only}")]
    return read, [name for name in names.values() if reader_of(name) is None]


def flip(folder: Path, files: Sequence[Path], n: int, seed: int, tell: Callable[[str], None]) -> dict[str, Tally]:
    """Flip `n` bits in the files, as many in each; what came of it, by pattern. The files are as before in the end."""
    prepare(folder)
    run = Run(folder / "run")
    tallies: dict[str, Tally] = {}
    for number, path in enumerate(files):
        pattern, read = reader_of(path.relative_to(folder).as_posix()) or ("", lambda run, path: None)
        tally = tallies.setdefault(pattern, Tally())
        tally.files += 1
        data = path.read_bytes()
        whole = fingerprint(read(run, path))
        dice = random.Random(f"{seed} {path.relative_to(folder)}")
        share = n * (number + 1) // len(files) - n * number // len(files)
        for position in dice.sample(range(8 * len(data)), min(share, 8 * len(data))):
            at, bit = divmod(position, 8)
            _put(path, at, bytes([data[at] ^ 1 << bit]))
            outcome, message = outcome_of(read, run, path, whole)
            message = message.replace(f"{folder}/", "")[-300:]
            tally.add(outcome, f"{path.relative_to(folder)}, byte {at} bit {bit}: {message}")
            if path.stat().st_size == len(data):
                _put(path, at, data[at : at + 1])
            else:  # a reader has cut a line that seemed torn
                path.write_bytes(data)
        tell(f"{number + 1}/{len(files)} {path.relative_to(folder)}")
    return tallies


def _put(path: Path, at: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, data, at)
    os.close(descriptor)


@contextlib.contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """A copy of `run/` and `killed/` in memory where there is room."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
        for part in ("run", "killed"):
            shutil.copytree(folder / part, Path(temporary) / part)
        yield Path(temporary)


@contextlib.contextmanager
def whole_copy(folder: Path | None) -> Iterator[Path]:
    """A copy of the runs that tools/whole_run.py made in `folder`; None: they are made first."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            build_quietly(folder)
        yield stack.enter_context(copied(folder))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which runs, which of their files, and where the figures go."""
    parser.add_argument("--folder", type=Path, help="where tools/whole_run.py made the runs (default: made anew)")
    parser.add_argument("--only", default="*", help="files whose path ends like this pattern")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")


def print_examples(tallies: Mapping[str, Tally]) -> None:
    """What went wrong, a line each."""
    for tally in tallies.values():
        for outcome, examples in tally.examples.items():
            for example in examples:
                print(f"{outcome}: {example}")


def table(tallies: Mapping[str, Tally]) -> str:
    """A row a pattern."""
    lines = [f"{'files':>5} {'flips':>6} {''.join(f'{name:>9}' for name in OUTCOMES)}  which"]
    total: Counter[str] = Counter()
    for pattern, tally in sorted(tallies.items()):
        total += tally.outcomes
        cells = "".join(f"{tally.outcomes[name]:>9}" for name in OUTCOMES)
        lines.append(f"{tally.files:>5} {tally.outcomes.total():>6} {cells}  {pattern}")
    cells = "".join(f"{total[name]:>9}" for name in OUTCOMES)
    return "\n".join([*lines, f"{sum(t.files for t in tallies.values()):>5} {total.total():>6} {cells}  all"])


def _show(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=20_000, help="bits to flip, in all")
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    options = parser.parse_args()
    with whole_copy(options.folder) as copy:
        files, unread = files_of(copy, options.only)
        start = time.monotonic()
        tallies = flip(copy, files, options.flips, options.seed, _show)
        seconds = time.monotonic() - start
    print(table(tallies))
    kinds = sorted({Path(name).suffix or Path(name).name for name in unread})
    print(f"{seconds:.0f} s; {len(unread)} files that nothing reads back: {', '.join(kinds)}")
    print_examples(tallies)
    faults = sum(tally.outcomes[name] for tally in tallies.values() for name in FAULTS)
    if options.out:
        record = {
            "flips": options.flips,
            "seed": options.seed,
            "faults": faults,
            "by_files": {
                name: {"files": tally.files, **dict(tally.outcomes), "examples": tally.examples}
                for name, tally in sorted(tallies.items())
            },
            "not_read_back": unread,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
