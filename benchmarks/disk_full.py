"""Every command on a disk that is full at one moment after another: `python benchmarks/disk_full.py`.

A command on the demo model runs where no file may grow beyond a size, or, with --mount and as root, on a file system of
that size; once in an empty place and once over what it wrote before. It has to end with exit status 1 and one line that
says so, or with 0; what was there before is whole, no file is left that nobody goes on with, and the same command ends
well once there is room.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RUNS", "SIZES", "Ended", "Run", "contents", "filled", "limited", "place", "prepared", "run", "tried"]

_SMALL = "--samples 2 --windows 2 --sequence-length 16"
_IN_THE_WAY = "exists already; --force replaces"  # of a checkpoint
SIZES = (0, 1, 512, 4096, 2**14, 2**16, 2**18, 2**20)  # bytes


@dataclass(frozen=True)
class Run:
    """A command line.

    Attributes:
        words: of it.
        again: more words where what it wrote before is there.
        before: key of the run whose outputs it reads.
        grows: outputs that are added to, so that a part of them may be there.
    """

    words: str
    again: str = ""
    before: str | None = None
    grows: tuple[str, ...] = ()


RUNS: dict[str, Run] = {
    "discover": Run(
        f"discover --evaluations 16 --population 8 {_SMALL} --search-windows 2 --calibration-seeds 0 --workers 1 "
        "--operands W,X --target 0.5 --ledger led.sqlite --cache cache --json discover.json",
        "--resume",
        grows=("led.sqlite",),
    ),
    "analyse": Run("analyse led.sqlite --json analyse.json", before="discover"),
    "bench": Run(
        f"bench --metric wanda {_SMALL} --ledger bench.jsonl --json bench.json", "--resume", grows=("bench.jsonl",)
    ),
    "export": Run("export wanda --format python -o w.py --json export.json"),
    "allocate": Run(
        f"allocate {_SMALL} --search-windows 2 --evaluations 12 -o a.json --csv a.csv --plot a.png --archive a.jsonl "
        "--json allocate.json",
        "--resume",
        grows=("a.jsonl",),
    ),
    "prune": Run(f"prune {_SMALL} -o pruned --save-masks masks.safetensors --json prune.json", "--force"),
    "slim": Run(f"slim {_SMALL} --search-windows 2 --steps 1 -o slimmed --json slim.json", "--force"),
    "verify": Run("verify pruned --json verify.json", before="prune"),
    "evaluate": Run("evaluate --windows 2 --sequence-length 16 --json evaluate.json"),
    "pack": Run("pack pruned -o p.pack --json pack.json", before="prune"),
    "unpack": Run("unpack p.pack -o unpacked --json unpack.json", before="pack"),
    "layers": Run("layers --json layers.json"),
    "calibrate": Run(
        "calibrate --operands X --samples 2 --sequence-length 16 -o statistics.safetensors --json calibrate.json"
    ),
    "report": Run("report led.sqlite -o page.html --json report.json", before="discover"),
    "list": Run("list --json list.json"),
    "status": Run("status led.sqlite --json status.json", before="discover"),
    "ledger check": Run("ledger check led.sqlite --json check.json", before="discover"),
    "ledger export": Run("ledger export led.sqlite -o led.csv --json exported.json", before="discover"),
    "ledger free": Run("ledger free led.sqlite --json free.json", before="discover"),
    "catalogue": Run("catalogue --json catalogue.json"),
    "reproduce": Run("reproduce --list --json reproduce.json"),
    "plan": Run("plan prune -o planned --json plan.json"),
}


@dataclass(frozen=True)
class Ended:
    """How a command ended, and the last line of its standard error."""

    code: int
    told: str


def run(words: Sequence[str]) -> Ended:
    """A command in this process and folder."""
    from gpmetric import cli

    argv, told = sys.argv, io.StringIO()
    sys.argv = ["gpmetric", *words]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
            cli.main()
    except SystemExit as ended:
        return Ended(int(ended.code or 0), (told.getvalue().strip().splitlines() or [""])[-1])
    except Exception as error:  # which a user would see as a traceback
        return Ended(-1, f"{type(error).__name__}: {error}")
    finally:
        sys.argv = argv
    raise AssertionError("a command ends by SystemExit")


@contextlib.contextmanager
def limited(largest: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def filled(folder: Path, left: int) -> Iterator[None]:
    """A file takes all of a file system but so many bytes, in pages of 4096."""
    found, filler = os.statvfs(folder), folder / "filler"
    filler.write_bytes(b"\0" * max(0, found.f_bavail * found.f_frsize - left // 4096 * 4096))
    try:
        yield
    finally:
        filler.unlink()


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file in a folder and its folders."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def prepared(name: str) -> None:
    """Makes what a run reads, in the working directory."""
    before = RUNS[name].before
    if before is not None:
        prepared(before)
        assert (ended := run(shlex.split(RUNS[before].words))).code == 0, ended


def tried(name: str, folder: Path, full: contextlib.AbstractContextManager[None], *, over: bool) -> list[str]:
    """What was wrong with a run on a disk without room, and with the same run once there is room.

    Args:
        name: a key of RUNS.
        folder: where what it reads is, and what it wrote before; the working directory.
        full: leaves no room.
        over: whether what it wrote before is there.
    """
    row, problems = RUNS[name], []
    words = shlex.split(f"{row.words} {row.again if over else ''}")
    before = contents(folder)
    with full:
        ended = run(words)
        after = {one: digest for one, digest in contents(folder).items() if one != "filler"}
    if ended.code == 2 and _IN_THE_WAY in ended.told:
        return []
    if ended.code not in (0, 1) or (ended.code and not ended.told.startswith("gpmetric: error: ")):
        problems.append(f"exit status {ended.code}: {ended.told}")
    if ended.code == 1:
        changed = (one for one in before if after.get(one) != before[one] and not _may_change(one, row))
        problems += [f"{one} was lost or changed" for one in changed if not _is_whole(folder / one)]
        problems += [f"{one} was left" for one in after.keys() - before.keys() if not _may_stay(one, row)]
        again = run(shlex.split(f"{row.words} {row.again if over or row.again == '--resume' else ''}"))
        if again.code and _IN_THE_WAY not in again.told:  # it was finished before what failed
            problems.append(f"with room again: exit status {again.code}: {again.told}")
    return problems


def _may_change(name: str, row: Run) -> bool:
    """What goes on growing, what SQLite keeps beside it, and caches."""
    return name.removesuffix("-wal").removesuffix("-shm") in (*row.grows, "led.sqlite") or name.startswith(
        ("cache/", "xdg/")
    )


def _is_whole(path: Path) -> bool:
    """Whether a result was replaced by a whole one, before what failed."""
    with contextlib.suppress(OSError, ValueError):
        return path.suffix == ".json" and bool(json.loads(path.read_bytes()))
    return False


def _may_stay(name: str, row: Run) -> bool:
    """Whole outputs written before what failed, what is gone on with, and caches; never a temporary file."""
    kept = name.startswith(".pruned.") or ".search-" in name
    return kept or _may_change(name, row) or ("partial" not in name and not Path(name).name.startswith("."))


@contextlib.contextmanager
def place(*, mount: bool) -> Iterator[Path]:
    """A new working directory, on a file system of its own or not."""
    before, cache = Path.cwd(), os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        if mount:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], check=True)
        os.environ["XDG_CACHE_HOME"] = str(folder / "xdg")
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)
            os.environ.pop("XDG_CACHE_HOME")
            if cache is not None:
                os.environ["XDG_CACHE_HOME"] = cache
            if mount:
                subprocess.run(["umount", folder], check=True)


def _measured(name: str, size: int, over: bool, mount: bool) -> list[str]:
    with place(mount=mount) as folder:
        prepared(name)
        if over:
            assert (ended := run(shlex.split(RUNS[name].words))).code == 0, ended
        return tried(name, folder, filled(folder, size) if mount else limited(size), over=over)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", action="append", choices=RUNS, help="all by default; may be repeated")
    parser.add_argument(
        "--mount", action="store_true", help="fill a file system, as root, in place of limits of a file"
    )
    asked = parser.parse_args()
    wrong = 0
    for name in asked.run or RUNS:
        for over in (False, True):
            found = {size: _measured(name, size, over, asked.mount) for size in SIZES}
            told = [f"{size} bytes: {problem}" for size, problems in found.items() for problem in problems]
            wrong += len(told)
            where = "over what was there" if over else "in an empty place"
            print(f"{name:14}{where:22}{len(SIZES)} sizes, {len(told)} wrong", flush=True)
            for one in told:
                print(f"    {one:.300}", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
