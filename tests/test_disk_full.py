"""A disk without room costs no result, and files are what the umask says: every command, by the benchmark's table."""

from __future__ import annotations

import importlib
import os
import shlex
import stat
from pathlib import Path
from types import ModuleType
from unittest.mock import ANY

import pytest

from gpmetric.commands import COMMANDS
from gpmetric.errors import GpmetricError
from gpmetric.journal import Journal

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def loaded() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("disk_full")


@pytest.fixture
def disk_full(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark; commands in this process leave its log and signals alone, and read a written model here."""
    monkeypatch.setattr("gpmetric.cli.log_plainly", lambda: None)
    monkeypatch.setattr("gpmetric.cli.watch_signals", lambda: None)
    return loaded()


def test_every_command_is_tried(disk_full: ModuleType) -> None:
    commands = {"plan", *COMMANDS}
    tried = {name for name in commands for row in disk_full.RUNS.values() if f"{row.words} ".startswith(f"{name} ")}
    # tune is prune and allocate, for half a minute at least; the others write new files only, and over none
    assert tried == commands - {"tune", "ledger repair", "ledger merge"}


@pytest.mark.every(3)
@pytest.mark.slow
@pytest.mark.parametrize("name", loaded().RUNS)
def test_a_disk_without_room(name: str, disk_full: ModuleType) -> None:
    with disk_full.place(mount=False) as folder:
        disk_full.prepared(name)
        assert disk_full.run(shlex.split(disk_full.RUNS[name].words)) == disk_full.Ended(0, ANY)
        assert disk_full.tried(name, folder, disk_full.limited(2**14), over=True) == []


@pytest.mark.slow
def test_files_are_as_the_umask_has_them(disk_full: ModuleType) -> None:
    """Also those of SQLite, which are 0644 by themselves, and of safetensors, which are 0600."""
    before = os.umask(0o007)
    try:
        with disk_full.place(mount=False) as folder:
            for name, row in disk_full.RUNS.items():
                assert disk_full.run(shlex.split(row.words)) == disk_full.Ended(0, ANY), name
            modes = {path: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
            wrong = {
                str(path.relative_to(folder)): oct(mode)
                for path, mode in modes.items()
                if mode != (0o770 if path.is_dir() else 0o660)
            }
            assert wrong == {}
            assert len(modes) > 40
    finally:
        os.umask(before)


def test_a_journal_keeps_what_it_had(disk_full: ModuleType, tmp_path: Path) -> None:
    """A record that finds no room leaves nothing of itself, and closing the file fails no more than the record did."""
    path = tmp_path / "a.jsonl"

    class Log(Journal):
        def take(self, record: dict[str, int]) -> bool:
            return True

    with Log(path, "bench", {"format": 1}) as log:
        log.write({"row": 1})
        whole = path.read_bytes()
        with (
            disk_full.limited(len(whole) + 20),
            pytest.raises(GpmetricError, match="cannot be written: File too large"),
        ):
            log.write({"row": 2})
        assert path.read_bytes() == whole
        log.write({"row": 3})
    with Log(path, "bench", {"format": 1}, resume=True):
        assert path.read_bytes().startswith(whole)
