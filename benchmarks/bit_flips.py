"""What one flipped bit does to each kind of file that results are stored in: `python benchmarks/bit_flips.py`.

A flip is `detected` where reading the file ends in an error, or in the figures being measured again; `harmless` where
what is read is what was written, or where a journal goes on behind its last line as after a kill, and measures that one
again; else it is `wrong`. The files are small and made here, the manifest by `prune` of the demo model.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch

import gpmetric
from gpmetric import digests
from gpmetric.allocation.candidate_objective import CandidateObjective
from gpmetric.allocation.evaluation_log import EvaluationLog
from gpmetric.allocation.levels import LevelTable
from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.cache import Sample, cached_statistics, load_statistics
from gpmetric.digests import remembered_digest
from gpmetric.errors import GpmetricError
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.records import Candidate, Evaluation, HeldOutMeasurement, Measurement
from gpmetric.structured.search_log import SearchLog, State
from gpmetric.tuning.trial_log import TrialLog

__all__ = ["KINDS", "MANIFEST", "Detected", "Store", "flip", "measure"]

_RECORDS = 40  # of a journal or ledger
_DENSE = "5" * 64


class Detected(Exception):
    """What is stored is not used: it is measured again."""


@dataclass(frozen=True)
class Store:
    """A file that was written, what reading it gives, and what else may be read without harm."""

    path: Path
    read: Callable[[], Any]
    also: Sequence[Any] = ()


def flip(store: Store, flips: int, seed: int) -> Counter[str]:
    """How many flips, drawn with a seed, were `detected`, `harmless` and `wrong`; the file is then as it was."""
    content, truth, draw = store.path.read_bytes(), store.read(), random.Random(seed)
    found: Counter[str] = Counter(detected=0, harmless=0, wrong=0)
    for place in (draw.randrange(8 * len(content)) for _ in range(flips)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        store.path.write_bytes(flipped)
        for name in ("-wal", "-shm"):  # of another flip
            store.path.with_name(store.path.name + name).unlink(missing_ok=True)
        try:
            read = store.read()
        except (GpmetricError, Detected):
            found["detected"] += 1
        else:
            found["harmless" if read == truth or read in store.also else "wrong"] += 1
    store.path.write_bytes(content)
    return found


def _ledger(folder: Path) -> Store:
    path = folder / "ledger.sqlite"
    settings = {"model": "sha256:aa", "targets": ["0.5", "2:4"], "seed": 2, "generations": 3}
    with Ledger.open(path, settings, resume=False) as ledger:
        for number in range(_RECORDS):
            formula = f"abs(W)*X + {number}"
            row = Evaluation(
                formula, formula, 0, "done", f"{number:02x}", figures={"loss": {"0.5": 0.1 / (1 + number)}}
            )
            ledger.measure([Measurement(0, number, "8 windows", {"loss": {"0.5": number / 7}}, None, 0.5)])
            ledger.record(Candidate(0, number, formula, formula, "evaluated", ranked=formula), row)
        ledger.commit_generation(0, ["W", "X"], random.Random(1).getstate())
        ledger.hold_out(HeldOutMeasurement("W", "0.5", "test", "", 0.25, 3.5))
        ledger.save_result({"winner": {"formula": "W"}})

    def read() -> Any:
        with Ledger.open(path, settings, resume=True) as ledger:
            rows = [*ledger.candidates(), *ledger.evaluations(), *ledger.measurements(), *ledger.generations()]
            looked = [ledger.find_canonical(f"abs(W)*X + {number}") for number in range(_RECORDS)]
            held = ledger.held_out("test", "")
            told = [asdict(row) for row in (*rows, *held, *looked) if row is not None]
            return told, ledger.result(), ledger.settings, ledger.counts(), ledger.comparable_tables()

    return Store(path, read)


def _journal(path: Path, opened: Callable[[], Any], fill: Callable[[Any], None]) -> Store:
    """A journal of a class that notes what it takes; a lost last line is as if a kill had cut it short."""
    with opened() as log:
        fill(log)

    def read() -> list[dict[str, Any]]:
        with opened() as log:
            return cast(list[dict[str, Any]], log.taken)

    return Store(path, read, [read()[:-1]])


class _Archive(EvaluationLog):
    def take(self, record: dict[str, Any]) -> bool:
        vars(self).setdefault("taken", []).append(deepcopy(record))
        return super().take(record)


class _SlimLedger(SearchLog):
    def take(self, record: dict[str, Any]) -> bool:
        vars(self).setdefault("taken", []).append(deepcopy(record))
        return super().take(record)


class _TuneLedger(TrialLog[Any]):
    def take(self, record: dict[str, Any]) -> bool:
        vars(self).setdefault("taken", []).append(deepcopy(record))
        return super().take(record)


def _archive(folder: Path) -> Store:
    path, unused = folder / "archive.jsonl", (cast(LevelTable, None), cast(CandidateObjective, None))

    def fill(log: _Archive) -> None:
        for number in range(_RECORDS):
            log.write({"levels": [number, 3, 1], "first": 0, "values": [1 / (3 + number), 0.5]})
            log.write({"seconds": number / 3})

    return _journal(path, lambda: _Archive(*unused, path, {"seed": 1}, focus=0.5, resume=True), fill)


def _slim_ledger(folder: Path) -> Store:
    path = folder / "slim.jsonl"

    def fill(log: _SlimLedger) -> None:
        for number in range(_RECORDS):
            state = State(number, torch.rand(4, dtype=torch.float64), 0.25, number / 3, 7 * number)
            log.add({"step": number, "loss": 1 / (3 + number)}, state)

    return _journal(path, lambda: _SlimLedger(path, {"seed": 1}, resume=True), fill)


def _tune_ledger(folder: Path) -> Store:
    path, unused = folder / "tune.jsonl", cast(Any, None)

    def fill(log: _TuneLedger) -> None:
        log.keep("wanda", {"sparsity": {"a": 0.25}})
        for number in range(_RECORDS):
            told = {"recipe": f"r{number}", "share": 0.25, "losses": [1 / (3 + number)], "document": {"metric": "W"}}
            log.write(told | {"seconds": 0.5, "error": None})

    return _journal(path, lambda: _TuneLedger(unused, unused, unused, path, {"seed": 1}, resume=True), fill)


def _statistics(folder: Path) -> Store:
    sample = Sample({"a.up": (6, 4), "a.down": (4, 6)}, frozenset("XG"), 8, 16)
    blocks = [{name: LayerStatistics(X=torch.rand(i), G=torch.rand(o, i)) for name, (o, i) in sample.shapes.items()}]
    path = cached_statistics(folder, "key", sample, lambda: blocks)

    def again() -> Iterable[Mapping[str, LayerStatistics]]:
        raise Detected

    def read() -> Any:
        found = load_statistics(cached_statistics(folder, "key", sample, again))
        numbers = {name: {key: one.tolist() for key, one in of.values.items()} for name, of in found.layers.items()}
        return numbers, found.sequences, found.length

    return Store(path, read)


def _digest(folder: Path) -> Store:
    model = folder / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    remembered_digest(model, "fp32", lambda: _DENSE)
    (path,) = (folder / "gpmetric" / "digests").iterdir()

    def again() -> str:
        raise Detected

    return Store(path, lambda: remembered_digest(model, "fp32", again))


def _manifest(folder: Path) -> Store:
    """Of a checkpoint that `verify` says is as it should be; everything that the manifest says counts."""
    output = folder / "pruned"
    gpmetric.prune(metric="wanda", target="0.5", samples=2, windows=2, sequence_length=16, output=output)
    path = output / "gpmetric_manifest.json"

    def read() -> Any:
        if not gpmetric.verify(output)["ok"]:
            raise Detected
        return path.read_bytes()

    return Store(path, read)


MANIFEST = "manifest"
KINDS: dict[str, Callable[[Path], Store]] = {
    "ledger": _ledger,
    "archive": _archive,
    "slim ledger": _slim_ledger,
    "tune ledger": _tune_ledger,
    "statistics cache": _statistics,
    "remembered digest": _digest,
    MANIFEST: _manifest,
}


def measure(kinds: Sequence[str], flips: int, seed: int) -> dict[str, Counter[str]]:
    """What `flip` says of fresh files of some kinds, made with a seed in a folder of their own."""
    found = {}
    for kind in kinds:
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as name:
            settled = patch.object(digests, "_SETTLED", -1.0)  # as for files that have not changed for a while
            with settled, patch.dict("os.environ", XDG_CACHE_HOME=name):
                found[kind] = flip(KINDS[kind](Path(name)), flips, seed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flips", type=int, default=334, help="of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append", help="all by default")
    asked = parser.parse_args()
    print(f"{'file':18}{'flips':>8}{'detected':>10}{'harmless':>10}{'wrong':>8}")
    total: Counter[str] = Counter()
    for kind in asked.kind or KINDS:
        found = measure([kind], asked.flips, asked.seed)[kind]
        total += found
        _show(kind, found)
    _show("all", total)


def _show(kind: str, found: Mapping[str, int]) -> None:
    counts = found["detected"], found["harmless"], found["wrong"]
    print(f"{kind:18}{sum(counts):8}{counts[0]:10}{counts[1]:10}{counts[2]:8}", flush=True)


if __name__ == "__main__":
    main()
