"""Everything that gpmetric reads, given a million damaged and hostile inputs: `python benchmarks/fuzz.py --minutes 30`.

Inputs begin as valid ones that the product made, and are changed at random (`mutations.py`); those that reach code that
none reached before are changed further, where atheris is installed (`pip install atheris`). Each reader of `readers.py`
has a process of its own. A reading is to end, within two seconds of the processor, with a value or with an error of
`gpmetric.errors` that a terminal can show in one line. It is a crash where it ends otherwise, runs text, starts a
process, reaches for the network, or writes outside its folder; the input is then in --out beside what went wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

__all__ = ["Fuzzer", "Hang", "Watch", "fuzz"]

SECONDS = 2.0  # of the processor
ASLEEP = 20.0  # of the clock
ROOM = 4 * 2**30  # bytes of address space beyond what is taken when the first input is read
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_MOVES = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
}
_NEVER = {
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "pickle.find_class",
    "socket.connect",
    "code.__new__",
}
_MAKERS = ("/typing.py", "/dataclasses.py")  # of source that is in modules


class Hang(BaseException):
    """A reading takes too long."""


class Refused(BaseException):
    """A reading does what none may do."""


class Watch:
    """Sees, by Python's audit events, what is run and what is written outside a folder while a block is entered."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found, self._on = os.path.realpath(folder), list[str](), False
        sys.addaudithook(self._audit)

    def __enter__(self) -> None:
        self.found.clear()
        self._on = True

    def __exit__(self, *_: object) -> None:
        self._on = False

    def _audit(self, event: str, arguments: Sequence[Any]) -> None:
        if not self._on:
            return
        wrong = event in _NEVER or (event in ("exec", "compile") and not _importing())
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & _WRITES
            wrong = bool(writes) and isinstance(path, str | bytes) and not self._inside(path)
        elif event in _MOVES:
            wrong = not all(self._inside(one, arguments[-1]) for one in arguments if isinstance(one, str | bytes))
        if wrong:
            self.found.append(f"{event} {arguments!r:.300}")
            raise Refused(self.found[-1])

    def _inside(self, path: str | bytes, folder: Any = -1) -> bool:
        """Whether a path is in the folder; a relative one may be within a folder that is open under a number."""
        above = f"/proc/self/fd/{folder}" if isinstance(folder, int) and folder > 2 else ""
        place = os.path.realpath(os.path.join(above, os.fsdecode(path)))
        return place == os.devnull or place.startswith(self.folder)


def _importing() -> bool:
    """Whether what runs now is the code of a module on its way in, or what these make of its annotations."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith(_MAKERS) or "importlib" in frame.f_code.co_filename:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Ends a block, by Hang, that takes more of the processor, or sleeps."""

    def stop(*_: object) -> None:
        raise Hang

    for number, timer, limit in (
        (signal.SIGPROF, signal.ITIMER_PROF, seconds),
        (signal.SIGALRM, signal.ITIMER_REAL, ASLEEP),
    ):
        signal.signal(number, stop)
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)


class Fuzzer:
    """Reads inputs of one reader, counts how they end, and keeps what went wrong.

    Args:
        name: a key of READERS.
        folder: empty, for whatever is written.
        out: where inputs that crash go; None keeps none.
    """

    def __init__(self, name: str, folder: Path, out: Path | None = None) -> None:
        from readers import READERS

        from gpmetric.errors import GpmetricError
        from gpmetric.plain import LONGEST

        self.name, self.reader, self.out = name, READERS[name], out
        self.counts: Counter[str] = Counter(inputs=0, values=0, errors=0, crashes=0, hangs=0)
        self.problems: dict[str, bytes] = {}  # the first input of each kind
        self._error, self._longest, self._base = GpmetricError, LONGEST, folder
        os.environ["XDG_CACHE_HOME"] = str(folder / "work")
        tempfile.tempdir = str(folder / "work")
        (folder / "work").mkdir()
        self.opened = self.reader.open(folder / "work")
        self.words = [word.encode("utf-8", "surrogatepass") for word in self.reader.words]
        self._watch = Watch(folder / "work")
        for seed in self.opened.seeds:
            self._ended(seed)  # imports what it needs
            if wrong := self._ended(seed):
                raise AssertionError(f"{name}: a valid input: {wrong}")
        self.counts.clear()

    def read(self, content: bytes) -> None:
        """Reads an input, and again where it took too long: a machine may have been busy."""
        self.counts["inputs"] += 1
        wrong = self._ended(content)
        if wrong and wrong.startswith("Hang"):
            wrong = self._ended(content)
        if wrong:
            self.counts["hangs" if wrong.startswith("Hang") else "crashes"] += 1
            kind = _place(wrong)
            if kind not in self.problems:
                self.problems[kind] = content
                self._keep(content, wrong)

    def _ended(self, content: bytes) -> str | None:
        """What was wrong with how a reading ended."""
        ended: BaseException | None = None
        try:
            with _limited(SECONDS), self._watch:
                self.opened.read(content)
        except BaseException as error:
            ended = error
        if self._watch.found:
            return f"Refused: {self._watch.found[0]}\n{_traceback(ended)}"
        if others := [one for one in os.listdir(self._base) if one != "work"]:
            return f"Refused: wrote {others[0]!r}"
        if ended is None:
            self.counts["values"] += 1
            return None
        self.counts["errors"] += 1
        if isinstance(ended, self._error):
            told = str(ended)
            return None if told.isprintable() and 0 < len(told) <= self._longest else f"Told: {told!r:.3000}"
        return (
            None
            if isinstance(ended, self.opened.allowed)
            else f"{type(ended).__name__}: {ended!s:.300}\n{_traceback(ended)}"
        )

    def _keep(self, content: bytes, wrong: str) -> None:
        print(f"{self.name}: {wrong.splitlines()[0]:.200}", flush=True)
        if self.out is not None:
            stem = self.out / f"{self.name.replace(' ', '-')}-{hashlib.sha256(content).hexdigest()[:12]}"
            stem.with_suffix(".input").write_bytes(content)
            stem.with_suffix(".txt").write_text(wrong, encoding="utf-8", errors="backslashreplace")


def _traceback(error: BaseException | None) -> str:
    return "" if error is None else "".join(traceback.format_exception(error)[-12:])


def _place(wrong: str) -> str:
    """What faults of one kind have in common: the error's name and the last line of ours."""
    ours = [line for line in wrong.splitlines() if line.lstrip().startswith("File ") and "/gpmetric/" in line]
    return wrong.partition(":")[0] + (ours[-1] if ours else wrong[:60])


def fuzz(fuzzer: Fuzzer, inputs: float, seed: int, ends: float = float("inf")) -> None:
    """Reads inputs drawn with a seed, so many or until a time of time.monotonic()."""
    from mutations import mutated

    draw, seeds = random.Random(f"{seed} {fuzzer.name}"), list(fuzzer.opened.seeds)
    while fuzzer.counts["inputs"] < inputs and time.monotonic() < ends:
        fuzzer.read(mutated(draw.choice(seeds), fuzzer.reader.shape, fuzzer.words, draw))


def _guided(fuzzer: Fuzzer, atheris: Any, inputs: float, seed: int, ends: float, done: Callable[[], None]) -> None:
    """As `fuzz`, and what reaches new code is changed further; never returns."""
    from mutations import mutated

    def one(content: bytes) -> None:
        if fuzzer.counts["inputs"] >= inputs or time.monotonic() >= ends:
            done()
        fuzzer.read(content)

    def change(content: bytes, longest: int, number: int) -> bytes:
        draw = random.Random(f"{seed} {number}")
        begin = draw.choice(fuzzer.opened.seeds) if draw.random() < 0.3 else content
        return mutated(begin, fuzzer.reader.shape, fuzzer.words, draw)[:longest]

    corpus = Path(tempfile.mkdtemp(dir=os.environ["XDG_CACHE_HOME"]))
    for number, content in enumerate(fuzzer.opened.seeds):
        (corpus / str(number)).write_bytes(content)
    longest = max(2**16, *(2 * len(content) for content in fuzzer.opened.seeds))
    flags = [f"-seed={seed + 1}", "-rss_limit_mb=0", f"-max_len={longest}", "-print_final_stats=0", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *flags, "-handle_segv=0", str(corpus)], one, custom_mutator=change)
    atheris.Fuzz()


def _measured(name: str, out: Path, atheris: Any, inputs: float, seconds: float, seed: int) -> Counter[str]:
    """Counts of one reader, in a process of its own; where that ends otherwise, its folder is kept with the input."""
    counts = out / "counts.json"
    counts.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as place:
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            log = os.open(out / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                _run(name, Path(place), out, atheris, inputs, seconds, seed)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)
        _, status = os.waitpid(child, 0)
        if counts.exists():
            return Counter(json.loads(counts.read_text()))
        shutil.copytree(place, out / f"{name.replace(' ', '-')}-ended-{status}", dirs_exist_ok=True)
        return Counter(inputs=1, crashes=1)


def _run(name: str, folder: Path, out: Path, atheris: Any, inputs: float, seconds: float, seed: int) -> None:
    """Reads what one reader is given, tells how it ended, and ends the process."""
    fuzzer = Fuzzer(name, folder, out)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 60, resource.RLIM_INFINITY))  # where Hang cannot be raised

    def done() -> None:
        (out / "counts.json").write_text(json.dumps(fuzzer.counts))
        sys.stdout.flush()
        os._exit(0)

    ends = time.monotonic() + seconds
    if atheris is not None:
        _guided(fuzzer, atheris, inputs, seed, ends, done)
    fuzz(fuzzer, inputs, seed, ends)
    done()


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.dont_write_bytecode = True
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reader", action="append", help="all by default; may be repeated")
    parser.add_argument("--minutes", type=float, default=60.0, help="of all readers together, at most")
    parser.add_argument("--inputs", type=int, default=50_000, help="of each reader; of one that is slow, its share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-found"))
    parser.add_argument("--record", action="store_true", help="add rows to results.csv")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        import atheris
    except ImportError:
        atheris = None
    with atheris.instrument_imports(include=["gpmetric"]) if atheris else nullcontext():
        from readers import READERS

    names, total, found = asked.reader or list(READERS), Counter[str](), dict[str, Counter[str]]()
    begun = time.monotonic()
    print(f"{'reader':24}{'inputs':>10}{'values':>10}{'errors':>10}{'crashes':>9}{'hangs':>7}{'seconds':>9}")
    for name in names:
        started = time.monotonic()
        limits = int(asked.inputs / READERS[name].every), 60 * asked.minutes / len(names)
        found[name] = _measured(name, asked.out.absolute(), atheris, *limits, asked.seed)
        total += found[name]
        _show(name, found[name], time.monotonic() - started)
    _show("all", total, time.monotonic() - begun)
    if asked.record:
        _record(found)
    sys.exit(1 if total["crashes"] or total["hangs"] else 0)


def _record(found: dict[str, Counter[str]]) -> None:
    import numpy as np
    from results import append, row

    for name, counts in found.items():
        for unit, figure in (("inputs", counts["inputs"]), ("crashes", counts["crashes"] + counts["hangs"])):
            append([row("fuzz", name, np.array([figure]), unit=unit)])


def _show(name: str, counts: Counter[str], seconds: float) -> None:
    widths = {"inputs": 10, "values": 10, "errors": 10, "crashes": 9, "hangs": 7}
    print(f"{name:24}{''.join(f'{counts[key]:{width}}' for key, width in widths.items())}{seconds:9.0f}", flush=True)


if __name__ == "__main__":
    main()
